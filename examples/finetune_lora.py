"""Fine-tune a small local model by LoRA: only the adapters are trained, and only they are measured.

    hf-adaptive-batch pretrain --output_dir runs/base --max_train_samples 3000   # the base model
    python examples/finetune_lora.py --model runs/base --dataset my_texts/

Without --model a small base model is pretrained first. All TrainingArguments are flags as well.
"""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    set_seed,
)

from hf_adaptive_batch import AdaptiveBatchArguments, AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.cli import main as command
from hf_adaptive_batch.corpus import load_text
from hf_adaptive_batch.packing import pack


@dataclass
class Arguments(AdaptiveBatchArguments):
    """Those of the Trainer, with defaults for a small model and adapters."""

    output_dir: str = "runs/lora"
    learning_rate: float = 3e-3
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 2
    eta: float = 0.3
    max_global_batch_size: int | None = 64
    max_training_samples: int | None = 1500
    logging_steps: float = 0.1
    save_strategy: str = "no"


@dataclass
class LoraArguments:
    """The model, the text and the adapters."""

    model: str | None = field(default=None, metadata={"help": "Folder of a causal model."})
    dataset: str = field(default="python-stdlib", metadata={"help": "As pretrain's --dataset."})
    block_size: int = field(default=128, metadata={"help": "Tokens of a sample."})
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters."})


def collate(blocks: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Every token of a block is to be predicted."""
    ids = torch.tensor([block["input_ids"] for block in blocks])
    return {"input_ids": ids, "labels": ids}


def main(words: list[str] | None = None) -> None:
    lora, args = HfArgumentParser((LoraArguments, Arguments)).parse_args_into_dataclasses(words)
    set_seed(args.seed)
    args.dataloader_pin_memory = torch.accelerator.is_available()
    if lora.model is None:
        lora.model = str(Path(args.output_dir) / "base")
        base = ["--output_dir", lora.model, "--save_strategy", "no", "--max_train_samples", "1000"]
        command(["pretrain", *base])
    tokenizer = AutoTokenizer.from_pretrained(lora.model)
    model = AutoModelForCausalLM.from_pretrained(lora.model)
    adapters = LoraConfig(task_type="CAUSAL_LM", r=lora.lora_rank, target_modules="all-linear")
    with warnings.catch_warnings():  # peft asks by a name that transformers 5.23 deprecates
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(model, adapters)
    model.print_trainable_parameters()

    train, validation = load_text(lora.dataset)
    trainer = AdaptiveBatchTrainer(
        model=model,
        args=args,
        train_dataset=pack(train, tokenizer, lora.block_size),
        eval_dataset=pack(validation.select(range(min(8, len(validation)))), tokenizer, 128),
        data_collator=collate,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # the adapters alone: some hundred kilobytes
    sizes = read_records(args.output_dir)["global_batch_size"]
    print(f"validation loss {before:.3f} -> {after:.3f} nats per token")
    print(f"batch size {sizes[0]} -> {sizes[-1]} in {len(sizes)} optimizer steps")
    print(f"adapters in {args.output_dir}")


if __name__ == "__main__":
    main()
