"""AdaptiveBatch: a batch size that follows the gradient noise, in a loop without a Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from .accelerate_budget import LoopBudget, horizon_of
from .accelerate_step import AdaptiveStep, Trained
from .accelerate_support import check_loop, check_options, check_stream
from .apply.plan import BatchPlan
from .batch_options import BatchOptions
from .build_run import build_run
from .decide.controllers import BatchController
from .hf_loader import loader_parts
from .journal import log_values
from .measure.leaves import check_trainable
from .ranks import Ranks
from .run import AdaptiveRun
from .run_state import restore, state_of


if TYPE_CHECKING:
    from accelerate import Accelerator


_STATE_VERSION = 1


class AdaptiveBatch:
    """The optimizer steps of a budget, each with as many samples as the gradient noise asks for.

        adaptive = AdaptiveBatch(accelerator, model, optimizer, dataloader, num_train_epochs=3)
        accelerator.register_for_checkpointing(adaptive)
        for step in adaptive:
            for batch in step:                              # its micro-batches
                step.backward(model(**batch).loss)          # weighs the loss; accelerator.backward
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    The last backward of a step measures it and decides the next batch size: before clipping. Ranks
    must run the same loop.

    Args:
        accelerator: Without gradient accumulation of its own.
        model: As `accelerator.prepare` returns it.
        optimizer: Of the model, prepared or not.
        dataloader: A torch `DataLoader`, prepared or not. Its dataset, order, collator and workers
            are taken, and its `batch_size` as the samples of a first micro-batch on each process;
            it is not iterated itself.
        accumulation_steps: Micro-batches of a first step on each process.
        num_train_epochs: Budget in epochs. One budget is to be given.
        max_train_samples: Budget in samples.
        max_train_tokens: Budget in tokens, without padding where there is an attention mask.
        controller: Decides instead of the one that the options describe.
        weigh: What the mean loss of a micro-batch weighs in the step. Default: its samples; give
            `target_tokens` for a mean over the target tokens of batches with padding.
        seed: What random draws of a collator in loader workers depend on.
        output_dir: Where the records of decisions go, for `hf-adaptive-batch report`.
        **options: Those of `AdaptiveBatchArguments` that decide the batch size, such as `eta`,
            `max_global_batch_size`, `max_micro_batch_size` and `batch_schedule`.

    Attributes:
        run: The parts, with their state: `clock`, `estimator`, `controller`, `loader` and more.

    Raises:
        ValueError: If something is configured whose gradients cannot be measured, or whose batches
            cannot be cut.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        dataloader: DataLoader[Any],
        *,
        accumulation_steps: int = 1,
        num_train_epochs: float | None = None,
        max_train_samples: int | None = None,
        max_train_tokens: int | None = None,
        controller: BatchController | None = None,
        weigh: Callable[[Any], float] | None = None,
        seed: int = 0,
        output_dir: str | os.PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        chosen = BatchOptions(**options)
        chosen.check_options()
        check_loop(accelerator)
        check_options(chosen)
        check_trainable(model)
        data = loader_parts(dataloader)
        ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
        plan = BatchPlan(
            micro_batch_size=data.micro_batch_size,
            accumulation_steps=accumulation_steps,
            data_parallel_size=ranks.size,
        )
        if controller is None:
            chosen.check_initial_plan(plan)
        if data.sampler is None:
            check_stream(data.dataset, ranks, accelerator)
        run = build_run(
            chosen,
            data,
            plan,
            ranks,
            accelerator.unwrap_model(model),
            budget=LoopBudget(num_train_epochs, max_train_samples, max_train_tokens),
            horizon=horizon_of,
            seed=seed,
            controller=controller,
        )
        self.run: AdaptiveRun = run
        self._trained = Trained(
            accelerator,
            model,
            optimizer,
            run,
            weigh,
            chosen.skip_nonfinite_steps,
            {id(p) for p in model.parameters() if p.requires_grad},
        )
        self._trained.check_reduced()
        self._output_dir = output_dir
        self._step: AdaptiveStep | None = None
        self._iterating = self._resumed = False
        self._applied = True  # whether the last step has reached the optimizer
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        self._hears_optimizer = isinstance(optimizer, torch.optim.Optimizer)
        if self._hears_optimizer:
            optimizer.register_step_pre_hook(self._refuse_early_step)
            optimizer.register_step_post_hook(self._note_optimizer_step)

    def __iter__(self) -> Iterator[AdaptiveStep]:
        """Yield optimizer steps until the budget is used up; after a break, go on behind it.

        Yields:
            One step, to be iterated over and then applied by the optimizer.

        Raises:
            RuntimeError: If a loop is running already, or a step was left without its optimizer.
        """
        if self._iterating:
            raise RuntimeError(
                "One loop must be left before another begins, because they share the place in the "
                "data; use one `for step in adaptive`."
            )
        run = self.run
        if not self._applied:
            self._refuse_unapplied()
        if self._output_dir is not None and run.records is None and run.ranks.is_first:
            run.open_records(
                os.fspath(self._output_dir), run.clock.steps if self._resumed else None
            )
        self._iterating = True
        try:
            while not run.clock.finished:
                yield from self._epoch()
        finally:
            self._iterating = False
            if run.clock.finished:
                run.loader.close()

    def _epoch(self) -> Iterator[AdaptiveStep]:
        run = self.run
        run.start_timer()
        for batch in run.loader:
            run.begin_step(batch)
            self._step = AdaptiveStep(batch, self._trained)
            self._applied = not self._hears_optimizer
            try:
                yield self._step
            finally:
                if not self._step.ended:  # begun or not, it will come again
                    self._applied, run.in_hand = True, False
            if not self._step.ended:
                raise RuntimeError(
                    "`for batch in step` must run to its end in every step, because all ranks "
                    "share it and its micro-batches are one sum; leave the loop over steps to "
                    "stop."
                )
            if not self._applied:
                self._refuse_unapplied()
            run.start_timer()

    @property
    def plan(self) -> BatchPlan:
        """The next step's batch size and how it is cut."""
        return self.run.plan

    @property
    def progress(self) -> float:
        """The used share of the budget, 0 to 1: what learning rates are to follow."""
        return self.run.clock.budget_share

    @property
    def loss(self) -> float | None:
        """The last step's, over all ranks."""
        return self._step.loss if self._step is not None else None

    @property
    def logs(self) -> dict[str, Any]:
        """What is known after the last step, named as in the Trainer's log; for a tracker."""
        loss = {} if self.loss is None else {"loss": self.loss}
        return {**loss, "epoch": self.run.clock.epoch, **log_values(self.run)}

    def record_evaluation(self, **metrics: float) -> None:
        """Write an evaluation beside the records; on the first rank, if there is a folder.

        Args:
            **metrics: Such as `eval_loss`.
        """
        self.run.record_evaluation(metrics)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed loop needs, as plain JSON; to be called on all ranks.

        Returns:
            For `accelerator.save_state`, between two steps.

        Raises:
            RuntimeError: In the middle of a step.
        """
        if not self._applied:
            raise RuntimeError(
                "accelerator.save_state must be called after optimizer.step() and before the next "
                "step, because gradients are not saved; move it to the end of the loop's body."
            )
        return {"version": _STATE_VERSION, **state_of(self.run)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; what this object was made with stays.

        Args:
            state: From `state_dict`.

        Raises:
            RuntimeError: If a step was done already.
            ValueError: If the state has another version, or is of other data.
        """
        if self._step is not None:
            raise RuntimeError(
                "accelerator.load_state must be called before the loop, because the order of the "
                "data was drawn from its beginning; make a new AdaptiveBatch to go back."
            )
        if state.get("version") != _STATE_VERSION:
            raise ValueError(
                f"version ({state.get('version')}) of the AdaptiveBatch state must be "
                f"{_STATE_VERSION}, because its fields are read by name; resume with the release "
                "that wrote it."
            )
        restore(self.run, state)
        self._resumed = True

    def _refuse_early_step(self, *_: Any) -> None:
        if self._step is not None and self._step.running:
            raise RuntimeError(
                "optimizer.step() must come after the step's last micro-batch, because the batch "
                "is all of them; move it behind `for batch in step`."
            )

    def _note_optimizer_step(self, *_: Any) -> None:
        self._applied = self._applied or (self._step is not None and self._step.ended)

    def _refuse_unapplied(self) -> None:
        """Refuse to go on after a step that changed nothing, unless it was to be skipped.

        Raises:
            RuntimeError: With the way out.
        """
        step, self._applied = self._step, True
        if step is None or not step.finite or self._trained.accelerator.scaler is not None:
            return  # nothing to apply, or a gradient scaler has seen that
        raise RuntimeError(
            "optimizer.step() must be called after each step's micro-batches, because the step is "
            "counted as trained on; call it, or give AdaptiveBatch the optimizer that is stepped."
        )
