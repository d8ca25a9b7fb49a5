"""TrainingClock: progress in samples and tokens, the only clock that survives a batch change.

Everything that Hugging Face counts in optimizer steps (learning-rate schedules, fractional
intervals, the end of training) is read from this clock in *initial steps*: the optimizer steps that
the same samples would have taken at the initial batch size. While the batch has not grown, initial
steps and optimizer steps are the same numbers.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any


_STATE_VERSION = 2
_PROGRESS = (
    "steps",
    "samples_seen",
    "tokens_seen",
    "epoch_index",
    "epoch_offset",
    "epochs_initial_steps",
)


@dataclass(kw_only=True)
class TrainingClock:
    """Progress through a budget of samples or of tokens; the same on all ranks.

    The short step at the end of an epoch counts as a whole initial step, as it does in the plain
    Trainer, so that its learning-rate schedules are met exactly.

    Attributes:
        epoch_samples: Samples of one epoch, without those that `drop_last` leaves out; None for a
            stream, whose end is only known when it is reached.
        initial_global_batch_size: B at the start, in samples.
        initial_round_size: Samples of one micro-batch on every rank at the start; `epoch` moves in
            these, as the plain Trainer's does.
        budget_samples: Samples to train on; None for another budget.
        budget_tokens: Tokens to train on; None for another budget.
        budget_steps: Initial steps to train for; None for another budget. What `max_steps` means
            for a stream: how many samples that is depends on where its epochs end.
        tokens_per_sample: Mean tokens of a sample over all ranks, which fixes how many tokens an
            initial step is.
        steps: Optimizer steps done.
        samples_seen: Samples that reached the optimizer.
        tokens_seen: Tokens that reached the optimizer.
        epoch_index: The epoch that the next sample belongs to.
        epoch_offset: Samples of that epoch that have been trained on.
        epochs_initial_steps: Initial steps of the epochs that have ended.

    Raises:
        ValueError: If not exactly one budget is given, the token budget has no token count, or a
            budget in steps comes with epochs of a known length.
    """

    epoch_samples: int | None
    initial_global_batch_size: int
    initial_round_size: int
    budget_samples: int | None = None
    budget_tokens: int | None = None
    budget_steps: int | None = None
    tokens_per_sample: float = 0.0
    steps: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0
    epoch_index: int = 0
    epoch_offset: int = 0
    epochs_initial_steps: int = 0

    def __post_init__(self) -> None:
        budgets = (self.budget_samples, self.budget_tokens, self.budget_steps)
        if sum(budget is not None for budget in budgets) != 1:
            raise ValueError(
                f"budget_samples ({self.budget_samples}), budget_tokens ({self.budget_tokens}) and "
                f"budget_steps ({self.budget_steps}): exactly one must be given, because training "
                "ends when it is used up."
            )
        if self.budget_steps is not None and self.epoch_samples is not None:
            raise ValueError(
                f"budget_steps ({self.budget_steps}) must come without epoch_samples "
                f"({self.epoch_samples}), because with it the steps are a number of samples; give "
                "budget_samples."
            )
        if self.budget_tokens is not None and self.tokens_per_sample <= 0:
            raise ValueError(
                f"tokens_per_sample ({self.tokens_per_sample}) must be above 0 for a budget in "
                "tokens, because progress is counted in them; use a budget in samples for data "
                "without tokens."
            )

    @staticmethod
    def samples_in_initial_steps(
        initial_steps: int, *, epoch_samples: int | None, initial_global_batch_size: int
    ) -> int:
        """The samples that so many steps of the initial size train on, epoch ends included.

        Args:
            initial_steps: Optimizer steps at the initial batch size.
            epoch_samples: Samples of one epoch; None for a stream, taken to be long.
            initial_global_batch_size: B at the start, in samples.

        Returns:
            Samples.
        """
        if epoch_samples is None:
            return initial_steps * initial_global_batch_size
        epochs, rest = divmod(initial_steps, math.ceil(epoch_samples / initial_global_batch_size))
        return epochs * epoch_samples + rest * initial_global_batch_size

    @property
    def initial_steps_per_epoch(self) -> int:
        """Initial steps of an epoch; for a stream, as the Trainer has it, of the whole budget."""
        if self.epoch_samples is None:
            return self.total_initial_steps
        return self._initial_steps_of(self.epoch_samples)

    @property
    def total_initial_steps(self) -> int:
        """The whole budget in initial steps, rounded up: the length of learning-rate schedules."""
        if self.budget_steps is not None:
            return self.budget_steps
        if self.budget_tokens is not None:
            return math.ceil(self.budget_tokens / self._tokens_per_initial_step)
        assert self.budget_samples is not None
        if self.epoch_samples is None:
            return self._initial_steps_of(self.budget_samples)
        epochs, rest = divmod(self.budget_samples, self.epoch_samples)
        return epochs * self.initial_steps_per_epoch + self._initial_steps_of(rest)

    @property
    def budget(self) -> str:
        """The budget in words."""
        if self.budget_tokens is not None:
            return f"{self.budget_tokens:,} tokens"
        if self.budget_samples is not None:
            return f"{self.budget_samples:,} samples"
        return f"{self.budget_steps:,} steps of {self.initial_global_batch_size} samples"

    @property
    def initial_steps(self) -> float:
        """Progress in initial steps, fractional once the batch has grown."""
        if self.budget_tokens is not None:
            return self.tokens_seen / self._tokens_per_initial_step
        return self.epochs_initial_steps + self.epoch_offset / self.initial_global_batch_size

    @property
    def budget_share(self) -> float:
        """The used part of the budget."""
        return min(self.initial_steps / max(self.total_initial_steps, 1), 1.0)

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        if self.budget_tokens is not None:
            return self.tokens_seen >= self.budget_tokens
        return self.remaining_samples == 0

    @property
    def remaining_samples(self) -> int | None:
        """Samples that the budget leaves, should the epoch go on for as long; None for tokens."""
        if self.budget_tokens is not None:
            return None
        if self.budget_samples is not None:
            return max(0, self.budget_samples - self.samples_seen)
        assert self.budget_steps is not None
        steps = self.budget_steps - self.epochs_initial_steps
        return max(0, steps * self.initial_global_batch_size - self.epoch_offset)

    @property
    def epoch(self) -> float:
        """Epochs done, in the plain Trainer's unit: micro-batches of the initial size."""
        return self.epoch_after(0)

    def epoch_after(self, samples: int) -> float:
        """`epoch` once so many more samples have been seen.

        Args:
            samples: Samples that are about to be committed.

        Returns:
            Epochs; of a stream, whose length is not known, the share of the whole budget.
        """
        index, offset = self.epoch_index, self.epoch_offset + samples
        if self.epoch_samples is None:
            accumulated = self.initial_global_batch_size // self.initial_round_size
            rounds = self.initial_steps_per_epoch * accumulated
        else:
            more, offset = divmod(offset, self.epoch_samples)
            index += more
            rounds = math.ceil(self.epoch_samples / self.initial_round_size)
        return index + offset / self.initial_round_size / rounds

    @property
    def epoch_limit(self) -> int:
        """Samples of the current epoch to train on: fewer than all where the budget ends in it."""
        left = 0 if self.finished else self.remaining_samples
        budget_end = sys.maxsize if left is None else self.epoch_offset + left
        return min(sys.maxsize if self.epoch_samples is None else self.epoch_samples, budget_end)

    def remaining_steps(self, global_batch_size: int) -> int:
        """Optimizer steps that the rest of the budget takes at a batch size.

        Args:
            global_batch_size: B in samples.

        Returns:
            Steps, counting the short one at each epoch's end; estimated for a budget in tokens and
            for a stream.
        """
        if self.finished:
            return 0
        left = self.remaining_samples
        if left is None:
            assert self.budget_tokens is not None
            tokens = self.budget_tokens - self.tokens_seen
            return max(1, math.ceil(tokens / (self.tokens_per_sample * global_batch_size)))
        if self.epoch_samples is None:
            return math.ceil(left / global_batch_size)
        here = self.epoch_limit - self.epoch_offset
        later, last = divmod(left - here, self.epoch_samples)
        return (
            math.ceil(here / global_batch_size)
            + later * math.ceil(self.epoch_samples / global_batch_size)
            + math.ceil(last / global_batch_size)
        )

    def advance(self, *, samples: int, tokens: int, ends_stream: bool = False) -> None:
        """Count one optimizer step.

        Args:
            samples: Samples that it trained on, over all ranks.
            tokens: Tokens that it trained on, over all ranks.
            ends_stream: Whether they were the last ones of a stream's epoch.
        """
        self.steps += 1
        self.samples_seen += samples
        self.tokens_seen += tokens
        self.epoch_offset += samples
        if self.epoch_samples is not None:
            ended, self.epoch_offset = divmod(self.epoch_offset, self.epoch_samples)
            self.epoch_index += ended
            self.epochs_initial_steps += ended * self.initial_steps_per_epoch
        elif ends_stream:
            self.epochs_initial_steps += self._initial_steps_of(self.epoch_offset)
            self.epoch_index, self.epoch_offset = self.epoch_index + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Progress as plain JSON, with the epoch's size for the check on loading."""
        return {
            "version": _STATE_VERSION,
            "epoch_samples": self.epoch_samples,
            "initial_global_batch_size": self.initial_global_batch_size,
            "tokens_per_sample": self.tokens_per_sample,
            "budget": self.budget,
            **{name: getattr(self, name) for name in _PROGRESS},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the progress; the budget and the batch sizes stay as configured.

        Args:
            state: A dictionary from `state_dict`.

        Raises:
            ValueError: If the state has another version, or the dataset another size.
        """
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"version ({state.get('version')}) of the clock state must be {_STATE_VERSION}, "
                "because its fields are read by name; resume with the release that wrote it."
            )
        if state["epoch_samples"] != self.epoch_samples:
            raise ValueError(
                f"train_dataset ({_length(self.epoch_samples)}) must be the one of the "
                f"checkpoint ({_length(state['epoch_samples'])}), because the run goes on in the "
                "middle of its order; pass the same dataset (with dataloader_drop_last also the "
                "same ranks and micro-batch), or start a new run from the checkpoint's weights."
            )
        for name in _PROGRESS:
            setattr(self, name, int(state[name]))
        if state["tokens_per_sample"] and self.tokens_per_sample:
            self.tokens_per_sample = state["tokens_per_sample"]  # a stream's mean may be another
        if state["initial_global_batch_size"] != self.initial_global_batch_size:
            # Steps of another size: those of the epochs that have ended are counted anew.
            past = self.samples_seen - self.epoch_offset
            length = past / max(1, self.epoch_index)
            self.epochs_initial_steps = self.epoch_index * self._initial_steps_of(length)

    def _initial_steps_of(self, epoch_samples: float) -> int:
        return math.ceil(epoch_samples / self.initial_global_batch_size)

    @property
    def _tokens_per_initial_step(self) -> float:
        return self.tokens_per_sample * self.initial_global_batch_size


def _length(epoch_samples: int | None) -> str:
    return "a stream" if epoch_samples is None else f"{epoch_samples} samples an epoch"
