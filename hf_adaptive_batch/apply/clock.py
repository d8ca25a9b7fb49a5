"""TrainingClock: progress in samples and tokens, the only clock that survives a batch change.

Everything that Hugging Face counts in optimizer steps (learning-rate schedules, fractional
intervals, the end of training) is read from this clock in *initial steps*: the optimizer steps that
the same samples would have taken at the initial batch size. While the batch has not grown, initial
steps and optimizer steps are the same numbers.
"""

import math
from dataclasses import dataclass
from typing import Any


_STATE_VERSION = 1


@dataclass(kw_only=True)
class TrainingClock:
    """Progress through a budget of samples or of tokens; the same on all ranks.

    The short step at the end of an epoch counts as a whole initial step, as it does in the plain
    Trainer, so that its learning-rate schedules are met exactly.

    Attributes:
        epoch_samples: Samples of one epoch, without those that `drop_last` leaves out.
        initial_global_batch_size: B at the start, in samples.
        initial_round_size: Samples of one micro-batch on every rank at the start; `epoch` moves in
            these, as the plain Trainer's does.
        budget_samples: Samples to train on; None for a budget in tokens.
        budget_tokens: Tokens to train on; None for a budget in samples.
        tokens_per_sample: Mean tokens of a sample, which fixes how many tokens an initial step is.
        steps: Optimizer steps done.
        samples_seen: Samples that reached the optimizer.
        tokens_seen: Tokens that reached the optimizer.

    Raises:
        ValueError: If not exactly one budget is given, or the token budget has no token count.
    """

    epoch_samples: int
    initial_global_batch_size: int
    initial_round_size: int
    budget_samples: int | None = None
    budget_tokens: int | None = None
    tokens_per_sample: float = 0.0
    steps: int = 0
    samples_seen: int = 0
    tokens_seen: int = 0

    def __post_init__(self) -> None:
        if (self.budget_samples is None) == (self.budget_tokens is None):
            raise ValueError(
                f"budget_samples ({self.budget_samples}) and budget_tokens "
                f"({self.budget_tokens}): exactly one must be given, because training ends when "
                "it is used up."
            )
        if self.budget_tokens is not None and self.tokens_per_sample <= 0:
            raise ValueError(
                f"tokens_per_sample ({self.tokens_per_sample}) must be above 0 for a budget in "
                "tokens, because progress is counted in them; use a budget in samples for data "
                "without tokens."
            )

    @staticmethod
    def samples_in_initial_steps(
        initial_steps: int, *, epoch_samples: int, initial_global_batch_size: int
    ) -> int:
        """The samples that so many steps of the initial size train on, epoch ends included.

        Args:
            initial_steps: Optimizer steps at the initial batch size.
            epoch_samples: Samples of one epoch.
            initial_global_batch_size: B at the start, in samples.

        Returns:
            Samples.
        """
        epochs, rest = divmod(initial_steps, math.ceil(epoch_samples / initial_global_batch_size))
        return epochs * epoch_samples + rest * initial_global_batch_size

    @property
    def initial_steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch at the initial batch size."""
        return math.ceil(self.epoch_samples / self.initial_global_batch_size)

    @property
    def total_initial_steps(self) -> int:
        """The whole budget in initial steps, rounded up: the length of learning-rate schedules."""
        if self.budget_samples is None:
            assert self.budget_tokens is not None
            return math.ceil(self.budget_tokens / self._tokens_per_initial_step)
        epochs, rest = divmod(self.budget_samples, self.epoch_samples)
        return epochs * self.initial_steps_per_epoch + math.ceil(
            rest / self.initial_global_batch_size
        )

    @property
    def initial_steps(self) -> float:
        """Progress in initial steps, fractional once the batch has grown."""
        if self.budget_samples is None:
            return self.tokens_seen / self._tokens_per_initial_step
        epochs, rest = divmod(self.samples_seen, self.epoch_samples)
        return epochs * self.initial_steps_per_epoch + rest / self.initial_global_batch_size

    @property
    def finished(self) -> bool:
        """Whether the budget is used up."""
        if self.budget_samples is None:
            assert self.budget_tokens is not None
            return self.tokens_seen >= self.budget_tokens
        return self.samples_seen >= self.budget_samples

    @property
    def epoch(self) -> float:
        """Epochs done, in the plain Trainer's unit: micro-batches of the initial size."""
        return self.epoch_after(0)

    def epoch_after(self, samples: int) -> float:
        """`epoch` once so many more samples have been seen.

        Args:
            samples: Samples that are about to be committed.

        Returns:
            Epochs.
        """
        epochs, rest = divmod(self.samples_seen + samples, self.epoch_samples)
        rounds = math.ceil(self.epoch_samples / self.initial_round_size)
        return epochs + rest / self.initial_round_size / rounds

    @property
    def epoch_index(self) -> int:
        """The epoch that the next sample belongs to."""
        return self.samples_seen // self.epoch_samples

    @property
    def epoch_offset(self) -> int:
        """Samples of that epoch that have been trained on."""
        return self.samples_seen % self.epoch_samples

    @property
    def epoch_limit(self) -> int:
        """Samples of the current epoch to train on: fewer than all where the budget ends in it."""
        if self.finished:
            return self.epoch_offset
        if self.budget_samples is None:
            return self.epoch_samples
        start = self.epoch_index * self.epoch_samples
        return min(self.epoch_samples, self.budget_samples - start)

    def remaining_steps(self, global_batch_size: int) -> int:
        """Optimizer steps that the rest of the budget takes at a batch size.

        Args:
            global_batch_size: B in samples.

        Returns:
            Steps, counting the short one at each epoch's end; estimated for a budget in tokens.
        """
        if self.finished:
            return 0
        if self.budget_samples is None:
            assert self.budget_tokens is not None
            left = self.budget_tokens - self.tokens_seen
            return max(1, math.ceil(left / (self.tokens_per_sample * global_batch_size)))
        here = self.epoch_limit - self.epoch_offset
        later, last = divmod(self.budget_samples - self.samples_seen - here, self.epoch_samples)
        return (
            math.ceil(here / global_batch_size)
            + later * math.ceil(self.epoch_samples / global_batch_size)
            + math.ceil(last / global_batch_size)
        )

    def advance(self, *, samples: int, tokens: int) -> None:
        """Count one optimizer step.

        Args:
            samples: Samples that it trained on, over all ranks.
            tokens: Tokens that it trained on, over all ranks.
        """
        self.steps += 1
        self.samples_seen += samples
        self.tokens_seen += tokens

    def state_dict(self) -> dict[str, Any]:
        """Progress as plain JSON, with the epoch's size for the check on loading."""
        return {
            "version": _STATE_VERSION,
            "epoch_samples": self.epoch_samples,
            "steps": self.steps,
            "samples_seen": self.samples_seen,
            "tokens_seen": self.tokens_seen,
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
                f"train_dataset ({self.epoch_samples} samples an epoch) must be the one of the "
                f"checkpoint ({state['epoch_samples']} samples an epoch), because the run goes "
                "on in the middle of its order; pass the same dataset, or start a new run from "
                "the checkpoint's weights."
            )
        self.steps = int(state["steps"])
        self.samples_seen = int(state["samples_seen"])
        self.tokens_seen = int(state["tokens_seen"])

    @property
    def _tokens_per_initial_step(self) -> float:
        return self.tokens_per_sample * self.initial_global_batch_size
