"""Checkpoints of a model that transformers sharded as it was loaded (`DistributedConfig`).

transformers 5.23 refuses to resume such a model, because its Trainer saves no optimizer state for
it. Everything that it takes is there: the same version saves and loads sharded optimizers outside
of the Trainer. Can go when the Trainer does it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.trainer import (
    OPTIMIZER_NAME,
    OPTIMIZER_NAME_BIN,
    SAFE_WEIGHTS_NAME,
    SCHEDULER_NAME,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .arguments import AdaptiveBatchOptions
from .hf_parallel import ranks_of


# For the type checker a Trainer; at run time a mixin that stands in front of any.
if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

# Which layouts there are, and by what their checkpoints are told apart.
_WHOLE = "a single process or DDP"
_FULL = "FSDP with FULL_STATE_DICT"
_SHARDED = "FSDP with SHARDED_STATE_DICT"
_AT_LOAD_TIME = "a model that was loaded in shards (DistributedConfig)"
_LAYOUTS = {
    _WHOLE: OPTIMIZER_NAME,
    _FULL: OPTIMIZER_NAME_BIN,
    _SHARDED: "optimizer_0",
    _AT_LOAD_TIME: "optimizer_shards",
}


@contextlib.contextmanager
def resumable(values: Iterable[Any]) -> Iterator[None]:
    """Construct a Trainer whose checkpoints of a sharded model are to hold the optimizer, too.

    It refuses any that are not `save_only_model`, and looks only while it is constructed.

    Args:
        values: What the Trainer is given.

    Yields:
        Nothing.

    Raises:
        ValueError: If accelerate is to shard it again.
    """
    given = list(values)
    if not any(is_loaded_in_shards(value) for value in given):
        yield
        return
    every = [value for value in given if isinstance(value, AdaptiveBatchOptions)]
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "distributed_type (FSDP) of the launcher must be MULTI_GPU, because the model was "
            "loaded in shards (DistributedConfig) and is not to be sharded again; launch with "
            "--multi_gpu, or load the model whole."
        )
    refused = [args for args in every if not args.save_only_model]
    for args in refused:
        args.save_only_model = True
    try:
        yield
    finally:
        for args in refused:
            args.save_only_model = False


def is_loaded_in_shards(model: Any) -> bool:
    """Whether transformers sharded a model as it was loaded, and cares for its gradients.

    Args:
        model: Anything.

    Returns:
        True for a whole model of transformers; adapters upon one are left to the Trainer.
    """
    return isinstance(model, PreTrainedModel) and bool(
        getattr(model, "is_distributed_loading_by_transformers", False)
    )


def check_layout(trainer: _Trainer, folder: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint whose optimizer is kept otherwise than this run keeps its own.

    Args:
        trainer: Any Trainer, constructed.
        folder: The checkpoint's folder, complete.

    Raises:
        ValueError: With the layout to resume it in.
    """
    there = (layout for layout, name in _LAYOUTS.items() if (Path(folder) / name).exists())
    saved = next(there, None)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    here: str | None = _WHOLE
    if is_loaded_in_shards(trainer.model):
        here = _AT_LOAD_TIME
    elif plugin is not None:
        kinds = {"FULL_STATE_DICT": _FULL, "SHARDED_STATE_DICT": _SHARDED}
        here = kinds.get(plugin.state_dict_type.name, saved)
    if saved not in (None, here):  # none: saved by save_only_model
        raise ValueError(
            f"resume_from_checkpoint ({folder}) must be one of {here}, because the optimizer's "
            f"state is kept otherwise in one of {saved}; resume it in that layout (its "
            "configuration of accelerate launch, and its flags), or start a new run from its "
            "weights."
        )


class ShardedCheckpointMixin(_Trainer):
    """Saves and loads what the Trainer would not, for a model that was loaded in shards."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_loaded_in_shards(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from transformers.distributed.checkpoint import save_optimizer_distributed

        folder = str(Path(output_dir) / _LAYOUTS[_AT_LOAD_TIME])
        save_optimizer_distributed(self.model, self._torch_optimizer, folder)
        if self.args.should_save:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch asks to save the optimizer as well
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_loaded_in_shards(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        from transformers.distributed.checkpoint import load_optimizer_distributed

        folder = Path(checkpoint) / _LAYOUTS[_AT_LOAD_TIME]
        if not ranks_of(self).alike(folder.is_dir()):
            raise ValueError(
                f"resume_from_checkpoint ({checkpoint}) must be in a folder that every process "
                "sees, because each reads its part of the optimizer there; copy it to all nodes."
            )
        if not folder.is_dir():  # saved with save_only_model: begun anew, as the Trainer does
            return
        load_optimizer_distributed(self.model, self._torch_optimizer, str(folder))
        scheduler = torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.lr_scheduler.load_state_dict(scheduler)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if is_loaded_in_shards(self.model):
            _load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if is_loaded_in_shards(self.model):
            _load_weights(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    @property
    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """Without accelerate's wrapper, whose `step` may do nothing."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)


def _load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load what the Trainer saved as a whole, sharded anew as `from_pretrained` does it.

    It alone knows how names and tensors of a checkpoint become those of a model. For a moment there
    are two sets of shards.

    Raises:
        ValueError: If there are no weights.
    """
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"resume_from_checkpoint ({folder}) must hold {SAFE_WEIGHTS_NAME}, because a model "
            "that was loaded in shards goes on from whole weights; name another checkpoint, in a "
            "folder that every process sees."
        )
    # fully_shard has made a subclass of its own of the model's class.
    kinds: list[Any] = [kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule)]
    kind = next(kind for kind in kinds if issubclass(kind, PreTrainedModel))
    sharding = model.config.distributed_config
    loaded = kind.from_pretrained(folder, distributed_config=sharding, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
