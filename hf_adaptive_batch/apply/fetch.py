"""What a loader, and its workers, fetch from in place of the user's dataset."""

import contextlib
import random
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data._utils import worker


class Fetched(Dataset[Any]):
    """The user's dataset, of which a function fetches whole micro-batches.

    Its attributes are that dataset's, so that a `worker_init_fn` may open a file and keep it in
    `get_worker_info().dataset`.

    Args:
        dataset: The user's, map-style or iterable.
        fetch: Gives the samples for what the sampler yields.
    """

    def __init__(self, dataset: Any, fetch: Callable[[Any], Any]) -> None:
        self.__dict__.update(_users=dataset, _fetch=fetch)

    def __getitem__(self, index: Any) -> Any:
        """One sample."""
        return self._users[index]

    def __len__(self) -> int:
        """Samples of the user's."""
        return len(self._users)

    def __getitems__(self, request: Any) -> Any:
        """Fetch; the name is what torch's DataLoader calls for a whole batch."""
        return self._fetch(request)

    def __getattr__(self, name: str) -> Any:
        """The user's; not asked for its own, which a copy does not have at first."""
        if name in ("_users", "_fetch"):
            raise AttributeError(name)
        return getattr(self._users, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set on the user's."""
        setattr(self._users, name, value)


class SeededFetch:
    """Fetches a micro-batch as torch does, with random draws that depend on its place alone.

    A collator that masks tokens at random draws from its worker's generators, which move on from
    one micro-batch to the next: after a restart, or with more workers, it would draw otherwise.

    Args:
        dataset: The user's, map-style.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __call__(self, request: tuple[tuple[int, ...], list[int]]) -> list[Any]:
        """Fetch in a worker, whose generators the collator will then find as they were left.

        Args:
            request: The place, and the indices.

        Returns:
            The samples.
        """
        place, indices = request
        set_generators(*place)
        fetch = getattr(self._dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self._dataset[index] for index in indices]


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Let a dataset read as it does outside of loader workers.

    In a worker some take a part of their shards, or move on the generators of their buffers, by
    `torch.utils.data.get_worker_info()`. A stream has one reader, so all of it is to be read, in
    the order of a single process. torch offers no public way to say so.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If this version of torch keeps the worker's information elsewhere.
    """
    info, worker._worker_info = worker._worker_info, None
    try:
        if get_worker_info() is not None:
            raise RuntimeError(
                f"torch ({torch.__version__}) keeps worker information where it cannot be hidden "
                "from a stream; set dataloader_num_workers to 0."
            )
        yield
    finally:
        worker._worker_info = info


def set_generators(*place: int) -> None:
    """Set the generators of torch, numpy and Python in this process.

    Args:
        *place: What their draws are to depend on.
    """
    seed = int.from_bytes(blake2b(repr(place).encode(), digest_size=8).digest(), "big")
    torch.random.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def same_random_numbers() -> Iterator[None]:
    """What is read again may draw; training must find the generators as they were.

    Yields:
        Nothing.
    """
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
