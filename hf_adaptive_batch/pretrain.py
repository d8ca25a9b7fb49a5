"""`hf-adaptive-batch pretrain`: a Llama from scratch on any text, and what its batch size did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging as hf_logging

from .byte_tokenizer import byte_tokenizer
from .checkpoint import find_complete_checkpoint
from .corpus import load_text
from .flags import expand_settings
from .hf_compat import argument_name
from .hf_parallel import layout_of, ranks_of
from .language_modeling import language_modeling_metrics, sample_losses
from .packed_stream import PackedStream
from .packing import count_tokens, pack, utf8_bytes
from .pretrain_arguments import DataArguments, ModelArguments, PretrainArguments
from .pretrain_model import build_model
from .report.picture import draw_run
from .report.records import RECORDS_FILE, read_records
from .report.summary import RunSummary, trajectory
from .text_stream import stream_text
from .trainer import AdaptiveBatchTrainer


# Tokenizers make a token of about four bytes of text. Twice as many leave room for others.
_BYTES_PER_TOKEN = 8


def pretrain(arguments: Sequence[str]) -> RunSummary:
    """Train a Llama from scratch, and leave model, records and picture in the output folder.

    Args:
        arguments: The flags, as on the command line.

    Returns:
        What the run came to.

    Raises:
        ValueError: If a flag does not fit, or the folder holds another run's checkpoints.
    """
    model_args, data_args, args = parse_flags(arguments)
    if data_args.streaming:
        _check_stream_budget(args)
    resume = args.resume_from_checkpoint
    if isinstance(resume, str) and resume.lower() in ("true", "false"):
        resume = resume.lower() == "true"
    folder = Path(str(args.output_dir))
    if not resume and args.save_strategy != "no":
        if find_complete_checkpoint(folder) is not None:
            raise ValueError(
                f"output_dir ({folder}) must hold no checkpoints of an earlier run, because they "
                "would be mixed up with this one's; add --resume_from_checkpoint true to go on "
                "with it, or name another folder."
            )
    if not torch.accelerator.is_available():
        args.dataloader_pin_memory = False  # torch warns that it pins for nothing
    # Soft wrapping leaves a path whole, so that it can be copied.
    console = Console(highlight=False, quiet=args.process_index > 0, soft_wrap=True)
    hf_logging.disable_progress_bar()  # one for every file saved, in the middle of our own
    set_seed(args.seed)
    data = _load(data_args, args.seed if args.data_seed is None else args.data_seed)
    model = build_model(model_args, args, data.tokenizer, data_args.block_size)
    trainer = AdaptiveBatchTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=data.tokenizer,
        data_collator=collate_blocks,
        compute_metrics=language_modeling_metrics(data.tokens_per_byte),
        preprocess_logits_for_metrics=sample_losses,
    )
    ranks = ranks_of(trainer)
    size = args.initial_batch_plan(ranks.size).global_batch_size
    first = f"{size} samples at first, " if ":" not in args.batch_schedule else ""
    for name, value in (
        ("text", f"{data_args.dataset}, in samples of {data_args.block_size} tokens"),
        ("", f"{_amount(data.train)} to train on, {len(data.validation):,} to validate"),
        ("model", f"Llama with {model.num_parameters():,} parameters"),
        ("batch", f"{first}schedule {args.batch_schedule}"),
    ):
        console.print(f"{name:7}{value}")
    if ranks.processes > 1:
        console.print(f"ranks  {ranks.processes} processes, {layout_of(trainer)}")
    output = trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    averaging = trainer.weight_averaging
    if averaging is not None:
        with averaging.averaged_weights():
            trainer.save_model(str(folder / "averaged"))
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not history or history[-1]["step"] != trainer.state.global_step:
        history.append({**trainer.evaluate(), "adaptive_batch/samples_seen": None})
    summary = _conclude(trainer, data, history, output.metrics["train_runtime"], console)
    if averaging is not None:
        console.print(f"average         {folder / 'averaged'}, the weights that were validated")
    return summary


def parse_flags(
    arguments: Sequence[str],
) -> tuple[ModelArguments, DataArguments, PretrainArguments]:
    """Read and check the flags.

    Args:
        arguments: As on the command line. The first may be a YAML or JSON file of flags; those that
            follow win.

    Returns:
        The model's, the data's and the training's.

    Raises:
        ValueError: If a flag is unknown or does not fit.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, PretrainArguments), prog="hf-adaptive-batch pretrain"
    )
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            [_as_known(word) for word in expand_settings(arguments)], return_remaining_strings=True
        )
    except (ValueError, ImportError) as error:  # of a flag's value, from here or from transformers
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(f"flags ({' '.join(unknown)}) must be known; see pretrain --help.")
    return tuple(parsed)


def _as_known(word: str) -> str:
    """A word of the command line; a flag by the name that this version of transformers has."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{argument_name(name)}{equals}{value}"


class _Data(NamedTuple):
    train: Any
    validation: Any
    tokenizer: PreTrainedTokenizerBase
    tokens_per_byte: float


def _load(args: DataArguments, seed: int) -> _Data:
    options: dict[str, Any] = {
        "config": args.dataset_config,
        "split": args.dataset_split,
        "text_column": args.text_column,
        "validation_split": args.validation_split,
        "validation_fraction": args.validation_fraction,
    }
    tokenizer = _tokenizer(args.tokenizer)
    train: Any
    if args.streaming:
        assert args.max_eval_samples is not None
        wanted = _BYTES_PER_TOKEN * args.block_size * args.max_eval_samples
        documents, validation = stream_text(
            args.dataset, validation_bytes=wanted, seed=seed, **options
        )
        train = PackedStream(
            documents, tokenizer, args.block_size, shuffle_blocks=args.shuffle_blocks, seed=seed
        )
    else:
        loaded, validation = load_text(args.dataset, **options)
        train = pack(loaded, tokenizer, args.block_size)
    blocks = pack(validation, tokenizer, args.block_size)
    tokens_per_byte = count_tokens(validation, tokenizer) / utf8_bytes(validation)
    if args.max_eval_samples is not None and args.max_eval_samples < len(blocks):
        count = args.max_eval_samples
        blocks = blocks.select([i * len(blocks) // count for i in range(count)])
    return _Data(train, blocks, tokenizer, tokens_per_byte)


def _amount(train: Any) -> str:
    """What is known of the samples before they are read."""
    if isinstance(train, PackedStream):
        return f"a stream of {train.num_shards:,} shard{'s' * (train.num_shards > 1)}"
    return f"{len(train):,}"


def _check_stream_budget(args: PretrainArguments) -> None:
    if args.max_training_samples is None and args.max_train_tokens is None and args.max_steps <= 0:
        raise ValueError(
            f"num_train_epochs ({args.num_train_epochs}) must not be the only budget with "
            "streaming, because nobody knows how long a stream is before its end; give "
            "--max_train_samples, --max_train_tokens or --max_steps."
        )


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    if name == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer ({name!r}) must be 'bytes', a folder with a tokenizer or one in reach on "
            f"the Hub, but loading it gave {type(error).__name__}: {error}"
        ) from error


def collate_blocks(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocks of equal length as one batch; every token is a target.

    Args:
        samples: Each with `input_ids`, a list of `block_size` integers.

    Returns:
        `input_ids` and `labels`, both (len(samples), block_size).
    """
    batch: dict[str, Any] = default_data_collator(samples)
    batch["labels"] = batch["input_ids"].clone()
    return batch


def _conclude(
    trainer: AdaptiveBatchTrainer,
    data: _Data,
    evaluations: list[dict[str, Any]],
    seconds: float,
    console: Console,
) -> RunSummary:
    """The picture and the summary of a run that has ended."""
    folder = Path(trainer.args.output_dir)
    run = trainer.run
    # The first rank writes them, and looks at them; what the others print is not shown.
    recorded = trainer.is_world_process_zero() and (folder / RECORDS_FILE).is_file()
    records = read_records(folder) if recorded else None
    plan = run.initial_plan
    summary = RunSummary(
        validation_loss=evaluations[-1]["eval_loss"],
        tokens_per_byte=data.tokens_per_byte,
        samples=run.clock.samples_seen,
        tokens=run.clock.tokens_seen,
        steps=run.clock.steps,
        constant_steps=math.ceil(run.clock.initial_steps),
        skipped_steps=run.skipped_steps,
        seconds=seconds,
        trajectory=trajectory(records) if records else [(0, plan.global_batch_size)],
    )
    summary.show(console)
    if records is not None and len(records["step"]) > 1:
        points = [(e["adaptive_batch/samples_seen"], e["eval_loss"]) for e in evaluations]
        draw_run(records, [point for point in points if point[0] is not None], folder / "run.png")
        console.print(f"picture         {folder / 'run.png'}")
    return summary
