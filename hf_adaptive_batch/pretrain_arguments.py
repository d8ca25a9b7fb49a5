"""The flags of `hf-adaptive-batch pretrain`: the model, the text, and the training."""

import math
import os
from dataclasses import dataclass, field

import torch

from .arguments import AdaptiveBatchArguments
from .corpus import PYTHON_STDLIB


_DEFAULT_SAMPLES = 8_000


@dataclass
class ModelArguments:
    """The Llama to train: 1.4 million parameters by default."""

    hidden_size: int = field(default=192, metadata={"help": "Width of the model."})
    num_hidden_layers: int = field(default=3, metadata={"help": "Number of layers."})
    num_attention_heads: int = field(default=6, metadata={"help": "Heads of attention."})
    num_key_value_heads: int | None = field(
        default=None,
        metadata={
            "help": "Heads of keys and values, each shared by as many heads of attention (grouped-"
            "query attention). Default: as many as num_attention_heads."
        },
    )
    intermediate_size: int = field(default=512, metadata={"help": "Width of the MLP."})
    rms_norm_eps: float = field(
        default=1e-6, metadata={"help": "Added to the mean square in the normalisation layers."}
    )
    tie_word_embeddings: bool = field(
        default=True, metadata={"help": "Share the weights of input and output embedding."}
    )

    fsdp_size: int = field(
        default=1,
        metadata={
            "help": "Shard the model over so many processes as it is loaded (transformers' "
            "DistributedConfig), instead of by accelerate's FSDP."
        },
    )
    dp_replicate_size: int = field(
        default=1, metadata={"help": "Hold so many replicas of such shards (HSDP)."}
    )
    tp_size: int = field(
        default=1,
        metadata={"help": "Compute every layer on so many processes (tensor parallelism)."},
    )

    def __post_init__(self) -> None:
        if self.num_attention_heads < 1 or self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of twice num_attention_heads "
                f"({self.num_attention_heads}), because a head rotates pairs of dimensions; change "
                "one of them."
            )
        groups = self.num_key_value_heads
        if groups is not None and (groups < 1 or self.num_attention_heads % groups):
            raise ValueError(
                f"num_key_value_heads ({groups}) must divide num_attention_heads "
                f"({self.num_attention_heads}), because each is shared by as many of them; change "
                "one, or leave it out."
            )
        if not (self.rms_norm_eps > 0 and math.isfinite(self.rms_norm_eps)):
            raise ValueError(
                f"rms_norm_eps ({self.rms_norm_eps}) must be above 0, because it keeps a "
                "normalisation from dividing by 0; use 1e-5 or 1e-6."
            )


@dataclass
class DataArguments:
    """The text, the tokens and their blocks."""

    dataset: str = field(
        default=PYTHON_STDLIB,
        metadata={
            "help": "'python-stdlib' (the source of Python's standard library on this machine), a "
            "local .txt, .jsonl or .parquet file or a folder of them, or the name of a Hub dataset."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the text while training, shard by shard, instead of loading it before: "
            ".jsonl or .parquet files, or a Hub dataset of any size. The shards' order is another "
            "one in every epoch. Needs a budget in samples, tokens or steps."
        },
    )
    shuffle_blocks: int = field(
        default=1024,
        metadata={
            "help": "Shuffle the samples of a stream within windows of so many; 0 for none. "
            "Without --streaming all samples are shuffled."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the Hub dataset."}
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split of the Hub dataset to train on."}
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split of the Hub dataset to validate on. Default: a share of the documents of "
            "the training split, chosen by their content."
        },
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the documents to validate on."}
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    tokenizer: str = field(
        default="bytes",
        metadata={"help": "'bytes' (no download), or a tokenizer's folder or name on the Hub."},
    )
    block_size: int = field(default=128, metadata={"help": "Tokens per sample."})
    max_eval_samples: int | None = field(
        default=512,
        metadata={"help": "Validate on so many blocks, spread evenly over all there are."},
    )

    def __post_init__(self) -> None:
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise ValueError(
                f"max_eval_samples ({self.max_eval_samples}) must be at least 1, because the run "
                "ends with a validation loss; raise it."
            )
        if self.streaming and self.max_eval_samples is None:
            raise ValueError(
                "max_eval_samples (None) must be given with streaming, because it says how much of "
                "the stream is read for validation; pass e.g. 512."
            )
        if self.shuffle_blocks < 0:
            raise ValueError(
                f"shuffle_blocks ({self.shuffle_blocks}) must not be negative, because it counts "
                "the samples of a window; pass 0 to shuffle none."
            )


@dataclass
class PretrainArguments(AdaptiveBatchArguments):
    """Training arguments with defaults for a small model: under two minutes on two CPU cores."""

    output_dir: str | None = field(
        default="runs/pretrain",
        metadata={"help": "Folder of checkpoints, records and the picture."},
    )
    per_device_train_batch_size: int = field(
        default=4, metadata={"help": "Micro-batch size that training begins with, in samples."}
    )
    max_micro_batch_size: int | None = field(
        default=16, metadata={"help": "Largest micro-batch in samples that fits on a device."}
    )
    max_global_batch_size: int | None = field(
        default=128, metadata={"help": "Cap of the global batch in samples."}
    )
    eta: float = field(
        default=0.6,
        metadata={
            "help": "Tolerated ratio of the gradient's sampling error to its size, in (0, 1). The "
            "batch settles at noise scale / eta^2: 2.8 times the noise scale at 0.6."
        },
    )
    num_train_epochs: float = field(
        default=0.0,
        metadata={"help": "Budget in epochs. Default: max_train_samples instead."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": f"Budget in samples. Default: {_DEFAULT_SAMPLES}, if none is given."},
    )
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    warmup_steps: float = field(
        default=0.02,
        metadata={"help": "Learning-rate warm-up: steps of the initial size, or a share below 1."},
    )
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    adam_beta2: float = field(default=0.95, metadata={"help": "beta2 of AdamW."})
    logging_steps: float = field(
        default=0.04, metadata={"help": "Log every so many steps, or share of the budget below 1."}
    )
    eval_strategy: str = field(default="steps", metadata={"help": "When to evaluate."})
    eval_steps: float | None = field(
        default=0.125,
        metadata={"help": "Evaluate every so many steps, or share of the budget below 1."},
    )
    per_device_eval_batch_size: int = field(
        default=64, metadata={"help": "Samples per forward pass of the evaluation."}
    )
    save_steps: float = field(
        default=0.25, metadata={"help": "Save every so many steps, or share of the budget below 1."}
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Checkpoints to keep; None for all."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "Whether DDP looks for parameters without a gradient; this Llama has none."
        },
    )
    # The order that HfArgumentParser understands, and TrainingArguments has.
    report_to: None | str | list[str] = field(  # noqa: RUF036
        default="none", metadata={"help": "Trackers, such as tensorboard."}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            # Several processes would else train on their own, each by itself.
            self.use_cpu = True
            if int(os.environ.get("WORLD_SIZE", "1")) > 1 and vars(self)["ddp_backend"] is None:
                self.ddp_backend = "gloo"
        if self.max_train_samples is not None:
            self.max_training_samples = self.max_train_samples
        given = (self.max_training_samples, self.max_train_tokens)
        if given == (None, None) and self.max_steps <= 0 and self.num_train_epochs <= 0:
            self.max_training_samples = _DEFAULT_SAMPLES
        super().__post_init__()
