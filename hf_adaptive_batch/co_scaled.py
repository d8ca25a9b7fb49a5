"""Holds an optimizer's beta2 and weight decay where the rules want them for the batch."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from .decide.co_scaling import CoScaling, OptimizerKind, beta2_at, weight_decay_at


_ADAM = re.compile(r"(Paged|Fused)?Adam(?P<w>W)?((4|8|32)bit|Fp8)?|[NR]Adam")


def kind_of(optimizer: Any) -> OptimizerKind | None:
    """What an optimizer is, by its class or one that it derives from.

    Args:
        optimizer: It may be wrapped, as accelerate does.

    Returns:
        Its kind; None if it is none that a rule is known for.
    """
    optimizer = _unwrapped(optimizer)
    for cls in type(optimizer).__mro__:
        if cls.__name__ == "SGD":
            return OptimizerKind.SGD
        match = _ADAM.fullmatch(cls.__name__)
        if match is not None:
            groups = optimizer.param_groups
            decoupled = match["w"] or all(g.get("decoupled_weight_decay") for g in groups)
            return OptimizerKind.ADAMW if decoupled else OptimizerKind.ADAM
    return None


def _unwrapped(optimizer: Any) -> Any:
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


class CoScaledOptimizer:
    """Sets beta2 and weight decay from the user's values, for the batch of the step to come.

    Args:
        optimizer: The optimizer, also before a checkpoint is loaded into it.
        rules: What is to follow the batch.
        seesaw: Whether the Seesaw schedule scales the learning rate.

    Raises:
        ValueError: If a rule does not fit the optimizer.
    """

    def __init__(self, optimizer: Any, rules: CoScaling, *, seesaw: bool = False) -> None:
        self.kind = kind_of(optimizer)
        name = type(_unwrapped(optimizer)).__name__
        rules.check_optimizer(name, self.kind, seesaw=seesaw)
        self._rules = rules
        # Groups are read anew each time: loading a checkpoint replaces their dictionaries.
        self._optimizer = optimizer
        self.begin()

    def begin(self) -> None:
        """Take the optimizer's values for the user's, as training begins or goes on with them."""
        self._base: list[tuple[Any, Any]] = [
            (group.get("betas"), group.get("weight_decay"))
            for group in self._optimizer.param_groups
        ]

    def set(self, ratio: float, learning_rate_factor: float) -> None:
        """Set the values for a batch.

        Args:
            ratio: B / B0.
            learning_rate_factor: What multiplies the learning rate of that step.
        """
        rules = self._rules
        for group, (betas, weight_decay) in zip(
            self._optimizer.param_groups, self._base, strict=True
        ):
            if rules.beta2:
                group["betas"] = (betas[0], beta2_at(betas[1], ratio, rules.min_beta2))
            if rules.weight_decay and learning_rate_factor > 0:
                group["weight_decay"] = weight_decay_at(weight_decay, ratio, learning_rate_factor)

    @contextlib.contextmanager
    def at_base(self) -> Iterator[None]:
        """Let the optimizer have the user's values: what is saved needs no rule to be resumed.

        Yields:
            Nothing.
        """
        names = ("betas", "weight_decay")
        scaled = [[group.get(name) for name in names] for group in self._optimizer.param_groups]
        self.set(1.0, 1.0)
        try:
            yield
        finally:
            for group, values in zip(self._optimizer.param_groups, scaled, strict=True):
                group.update({n: v for n, v in zip(names, values, strict=True) if v is not None})
