"""WeightAveragingCallback: an average of the weights to evaluate and save; training goes on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .averaging import WeightAverage, check_initialisation
from .averaging_arguments import BEST_IS_ANOTHER, check_decay
from .averaging_files import AVERAGE_FOLDER, is_saved
from .ranks import Ranks


class WeightAveragingCallback(TrainerCallback):
    """Keeps an exponential average of the weights (EWA), for evaluations and for saving.

        averaging = WeightAveragingCallback(half_life_tokens=3e8)
        trainer = AdaptiveBatchTrainer(..., callbacks=[averaging])
        trainer.train()  # evaluates the average, trains as without it
        with averaging.averaged_weights():
            trainer.save_model("averaged")

    With a constant learning rate the average is to stand in for a decay that ends here, at any time
    (Zhang et al., arXiv 2410.21676). A half-life in tokens stays what it is when the batch changes:
    their decays, tuned for each batch, are 2.9e8 to 5.8e8 tokens from 512 x 512 tokens on.

    `AdaptiveBatchTrainer` puts the average in place in every evaluation and prediction, and saves
    it with its checkpoints. A plain `Trainer` tells nobody that it is about to evaluate: there, use
    `averaged_weights()` yourself; the average is saved after each checkpoint. Every `train()`
    begins another average, or goes on with that of the checkpoint. The model's buffers, such as the
    statistics of batch normalisation, are not averaged.

    Args:
        decay: Share of the old average that a step keeps, in [0, 1).
        half_life_tokens: Instead, the tokens after which half of the old average is left: a step of
            n tokens keeps 0.5^(n / half_life_tokens).
        initialisation: "zero" forgets the first weights, by the correction for it; with "weights"
            they fade out like others.

    Raises:
        ValueError: If not exactly one of the first two is given, or a value is out of range.
    """

    def __init__(
        self,
        *,
        decay: float | None = None,
        half_life_tokens: float | None = None,
        initialisation: Literal["zero", "weights"] = "zero",
    ) -> None:
        if decay is None and half_life_tokens is None:
            raise ValueError(
                "decay (None) or half_life_tokens (None) must be given, because it says how long "
                "the average is; use half_life_tokens=3e8, or less for a short run."
            )
        check_decay("decay", decay, "half_life_tokens", half_life_tokens)
        check_initialisation(initialisation)
        self.decay, self.half_life_tokens = decay, half_life_tokens
        self.initialisation: Literal["zero", "weights"] = initialisation
        self._average: WeightAverage | None = None
        self._tokens_of: Callable[[TrainerState], int] = _tokens_counted
        self._evaluates = self._saves = self._writes = False  # the first two: the Trainer does
        self._resume: Path | None = None

    @property
    def average(self) -> WeightAverage:
        """The average of the training in progress, or of the last one.

        Raises:
            RuntimeError: Before the first training.
        """
        if self._average is None:
            raise RuntimeError("There is no average before training has begun.")
        return self._average

    @contextlib.contextmanager
    def averaged_weights(self, model: nn.Module | None = None) -> Iterator[None]:
        """Put the average into the model, and training's weights back at the end, whatever happens.

        Before training, and before the first step, the model stays as it is.

        Args:
            model: That has to be the one whose weights are averaged; None for whichever it is.

        Yields:
            Nothing.

        Raises:
            ValueError: If the average is of another model.
        """
        if model is not None and self._average is not None and not self._average.is_of(model):
            raise ValueError(
                "model must be the one that was trained last with this WeightAveragingCallback, "
                "because the average is of that one's weights; give every Trainer a callback of "
                "its own."
            )
        with self._average.averaged() if self._average else contextlib.nullcontext():
            yield

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the average into a checkpoint; to be called on all processes.

        Args:
            folder: The checkpoint's folder.
        """
        self.average.save(Path(folder) / AVERAGE_FOLDER, writes=self._writes)

    def resume_from(self, folder: str | os.PathLike[str]) -> None:
        """Let the next training go on with the average of a checkpoint.

        Args:
            folder: The checkpoint's folder.
        """
        self._resume = Path(folder)

    @contextlib.contextmanager
    def hosted(self, tokens_seen: Callable[[], int] | None = None) -> Iterator[None]:
        """For a Trainer that evaluates the average: while it trains.

        Args:
            tokens_seen: Its clock, of a Trainer that also saves and resumes the average. Without
                one, tokens are those that the Trainer counts in its state.

        Yields:
            Nothing.
        """
        self._evaluates, self._saves = True, tokens_seen is not None
        if tokens_seen is not None:
            self._tokens_of = lambda state: tokens_seen()
        try:
            yield
        finally:
            self._evaluates = self._saves = False
            self._tokens_of, self._resume = _tokens_counted, None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin an average, or go on with a checkpoint's.

        Args:
            args: The Trainer's arguments.
            state: Where training begins.
            control: Unused.
            model: The prepared model.
            optimizer: The prepared optimizer.
            **kwargs: Unused.

        Raises:
            ValueError: With the reason and the way out, if the average would be wrong or lost.
            RuntimeError: While an average is in the model's place.
        """
        assert model is not None
        if self._average is not None and self._average.is_in_place:
            raise RuntimeError(
                "Training must begin outside averaged_weights(), because at its end the weights "
                "from before it come back, and those just trained would be lost."
            )
        self._check(args, optimizer)
        self._writes = args.should_save
        resume, self._resume = self._resume, None
        if resume is None and state.global_step > 0:
            resume = _checkpoint(args, state)
        self._average = WeightAverage(model, self.initialisation)
        if resume is None:
            self._average.tokens_seen = self._tokens_of(state)
            return
        folder = resume / AVERAGE_FOLDER
        ranks = Ranks(args.process_index, args.world_size, args.device)
        [seeing] = ranks.total(is_saved(folder))
        if is_saved(folder) and seeing < ranks.processes:
            raise ValueError(
                f"resume_from_checkpoint ({resume}) must be in a folder that every process sees, "
                "because each reads its part of the average there; copy it to all nodes."
            )
        self._average.load(folder)
        here, there = self._tokens_of(state), self._average.tokens_seen
        if self.half_life_tokens is not None and here != there:
            raise ValueError(
                f"tokens_seen ({there}) of {folder} must be those of the run ({here}), because a "
                "step's tokens are the difference; resume with the Trainer that saved it, and with "
                "the same include_num_input_tokens_seen."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in what has become trainable, before its first step."""
        self.average.enter_trainable()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take in the weights: so early that all who save or evaluate at the step's end have them.

        Args:
            args: Unused.
            state: Counts tokens, if the Trainer has no clock.
            control: Unused.
            **kwargs: Unused.

        Raises:
            ValueError: If the data have no tokens to count a half-life in.
        """
        average, seen = self.average, self._tokens_of(state)
        decay = self.decay
        if self.half_life_tokens is not None:
            if seen == 0:
                raise ValueError(
                    f"half_life_tokens ({self.half_life_tokens}) must go with tokens, because a "
                    "step counts by them, but there were none in its samples: no attention_mask, "
                    "and no integers under the model's main input; give decay (averaging_decay)."
                )
            decay = 0.5 ** ((seen - average.tokens_seen) / self.half_life_tokens)
        assert decay is not None
        average.update(decay, tokens_seen=seen)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the average beside a checkpoint of a Trainer that does not do it itself."""
        if not self._saves:
            self.save(_checkpoint(args, state))

    def _check(self, args: TrainingArguments, optimizer: Any) -> None:
        """Refuse what would average wrongly, or lose the average.

        Raises:
            ValueError: With the reason and the way out.
        """
        if args.load_best_model_at_end:
            raise ValueError(BEST_IS_ANOTHER)
        if args.n_gpu > 1 or args.deepspeed or getattr(args, "deepspeed_plugin", None):
            raise ValueError(
                f"n_gpu ({args.n_gpu}) must be 1, without DeepSpeed, because a process averages "
                "the parameters that it trains, where torch keeps them; use DDP or FSDP2."
            )
        inner = getattr(optimizer, "optimizer", optimizer)  # in accelerate's wrapper
        if callable(getattr(inner, "eval", None)):
            raise ValueError(
                f"optim ({type(inner).__name__}) must not bring other weights for evaluations, "
                "because they would be taken for those of training; remove the average, or use "
                "adamw_torch."
            )
        if not self._evaluates and args.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy ({args.eval_strategy.value!r}) must be 'no' under a plain Trainer, "
                "because it tells no callback that it is about to evaluate, and would evaluate the "
                "weights of training; use AdaptiveBatchTrainer (batch_schedule 'constant' trains "
                "as Trainer does), or evaluate yourself `with callback.averaged_weights():`."
            )
        counts = self._saves or args.include_num_input_tokens_seen not in ("no", False)
        if self.half_life_tokens is not None and not counts:
            raise ValueError(
                f"include_num_input_tokens_seen ({args.include_num_input_tokens_seen}) must be "
                "'all' or 'non_padding' with half_life_tokens, because tokens are not counted "
                "otherwise; set it, or give decay, or use AdaptiveBatchArguments."
            )


def _tokens_counted(state: TrainerState) -> int:
    return state.num_input_tokens_seen


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """Where a plain Trainer saves and looks for the checkpoint of a step."""
    return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
