"""A training script as people have it becomes adaptive by exchanging two names and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_adaptive_batch import read_records
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer


ROOT = Path(__file__).resolve().parents[1]

SCRIPT = """
import math
from dataclasses import dataclass, field
from itertools import chain

from datasets import load_dataset
from transformers import AutoTokenizer, HfArgumentParser, LlamaConfig, LlamaForCausalLM
from transformers import default_data_collator, set_seed
from transformers import Trainer, TrainingArguments


@dataclass
class DataTrainingArguments:
    train_file: str = field(metadata={"help": "Text."})
    tokenizer_name: str = field(metadata={"help": "Folder."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Cuts the dataset."})
    block_size: int = field(default=32, metadata={"help": "Tokens."})


def main():
    parser = HfArgumentParser((DataTrainingArguments, TrainingArguments))
    data_args, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    raw = load_dataset("text", data_files={"train": data_args.train_file})["train"]
    tokenizer = AutoTokenizer.from_pretrained(data_args.tokenizer_name)

    def tokenize(examples):
        return tokenizer(examples["text"])

    def group(examples):
        size = data_args.block_size
        joined = {k: list(chain(*examples[k])) for k in examples}
        total = len(joined["input_ids"]) // size * size
        blocks = {k: [v[i : i + size] for i in range(0, total, size)] for k, v in joined.items()}
        return {**blocks, "labels": blocks["input_ids"].copy()}

    with training_args.main_process_first(desc="texts"):
        data = raw.map(tokenize, batched=True, remove_columns=["text"]).map(group, batched=True)
    parts = data.train_test_split(test_size=16, seed=0, shuffle=False)
    train = parts["train"]
    if data_args.max_train_samples is not None:
        train = train.select(range(data_args.max_train_samples))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **sizes)
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        args=training_args,
        train_dataset=train,
        eval_dataset=parts["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())
        },
    )
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    metrics["perplexity"] = math.exp(metrics["eval_loss"])
    trainer.save_metrics("eval", metrics)
    trainer.create_model_card(tasks="text-generation")


if __name__ == "__main__":
    main()
"""
ADAPTIVE = SCRIPT.replace(
    "from transformers import Trainer, TrainingArguments",
    "from hf_adaptive_batch import AdaptiveBatchArguments, AdaptiveBatchTrainer",
)
ADAPTIVE = ADAPTIVE.replace("= Trainer(", "= AdaptiveBatchTrainer(")
ADAPTIVE = ADAPTIVE.replace(
    "(DataTrainingArguments, TrainingArguments)", "(DataTrainingArguments, AdaptiveBatchArguments)"
)


def run(folder: Path, script: str, *flags: str, processes: int = 1) -> None:
    path = folder / "script.py"
    path.write_text(script, "utf-8")
    if not (folder / "text.txt").exists():
        (folder / "text.txt").write_text(Path(__file__).read_text("utf-8") * 4, "utf-8")
        byte_tokenizer().save_pretrained(folder / "tokenizer")
    command = [sys.executable]
    if processes > 1:
        config = ROOT / "accelerate_configs" / "ddp_cpu.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [str(path), "--train_file", "text.txt", "--tokenizer_name", "tokenizer"]
    command += "--per_device_train_batch_size 4 --num_train_epochs 1 --learning_rate 3e-3".split()
    command += "--report_to none --use_cpu --max_train_samples 192 --logging_steps 4".split()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "cache"),
    }
    done = subprocess.run(
        [*command, *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def evaluated(folder: Path) -> dict:
    return json.loads((folder / "eval_results.json").read_text("utf-8"))


@pytest.mark.slow
def test_two_names_are_exchanged_and_it_trains_as_before_or_adapts(tmp_path):
    run(tmp_path, SCRIPT, "--output_dir", "plain")
    run(tmp_path, ADAPTIVE, "--output_dir", "constant", "--batch_schedule", "constant")
    for name in ("eval_loss", "eval_accuracy", "perplexity"):
        assert evaluated(tmp_path / "constant")[name] == evaluated(tmp_path / "plain")[name]
    run(tmp_path, ADAPTIVE, "--output_dir", "grown", "--eta", "0.1", "--warmup_steps", "2")
    records = read_records(tmp_path / "grown")
    assert max(records["global_batch_size"]) > 4
    assert sum(records["step_samples"]) == 192
    assert "How the batch size was chosen" in (tmp_path / "grown" / "README.md").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_run_it_as_well(tmp_path):
    flags = ["--output_dir", "two", "--eta", "0.1", "--warmup_steps", "2"]
    run(tmp_path, ADAPTIVE, *flags, processes=2)
    records = read_records(tmp_path / "two")
    assert set(records["data_parallel_size"]) == {2}
    assert max(records["global_batch_size"]) > 8
    assert sum(records["step_samples"]) == 192
    assert evaluated(tmp_path / "two")["perplexity"] > 1
