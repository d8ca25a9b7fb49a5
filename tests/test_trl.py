"""TRL's trainers with the mixin in front: the same losses, and batches that grow."""

import random
from dataclasses import dataclass
from itertools import pairwise

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, set_seed
from trl import (
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from hf_adaptive_batch import AdaptiveBatchMixin, AdaptiveBatchOptions, read_records
from hf_adaptive_batch.byte_tokenizer import byte_tokenizer
from tests import reference


# TRL 1.16 reads a flag by the name that transformers 5.23 has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")

TOKENIZER = byte_tokenizer()
SAMPLES = 96
WORDS = "measure the noise of a step decide the next batch size apply it and lose no sample".split()


@dataclass
class Arguments(AdaptiveBatchOptions, SFTConfig):
    """What the documentation says to write."""


class AdaptiveSFTTrainer(AdaptiveBatchMixin, SFTTrainer):
    """What the documentation says to write."""


def model(kind=LlamaForCausalLM, **options):
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
        pad_token_id=TOKENIZER.pad_token_id,
        **options,
    )
    return kind(config)


def text(numbers: random.Random, most: int) -> str:
    return " ".join(numbers.choices(WORDS, k=numbers.randint(1, most)))[: 8 * most]


def texts() -> datasets.Dataset:
    numbers = random.Random(0)
    return datasets.Dataset.from_dict({"text": [text(numbers, 12) for _ in range(SAMPLES)]})


def completions() -> datasets.Dataset:
    """Prompts that do not count, and completions of very different lengths."""
    numbers = random.Random(1)
    prompts = [text(numbers, 4) for _ in range(SAMPLES)]
    answers = [" " + text(numbers, 10) for _ in range(SAMPLES)]
    return datasets.Dataset.from_dict({"prompt": prompts, "completion": answers})


# What each gives: its data and what SFTConfig says of it.
CASES = {
    "padded": (texts, {"max_length": 64}),
    "packed without padding": (texts, {"packing": True, "max_length": 64}),
    "packed and wrapped": (
        texts,
        {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
    ),
    "padding-free": (texts, {"padding_free": True, "max_length": None}),
    "completions only": (completions, {"max_length": 128}),
}
FORWARD = ("input_ids", "labels", "attention_mask", "position_ids")
COMMON = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "save_strategy": "no",
}
GROWING = {"eta": 0.05, "batch_warmup_samples": 8, "max_global_batch_size": 16}


def trained(trainer):
    trainer.train()
    return trainer


def column(trainer, name: str) -> list:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("case", CASES)
def test_a_constant_batch_trains_bitwise_as_sft_trainer(tmp_path, case):
    data, options = CASES[case]
    given = {"train_dataset": data(), "processing_class": TOKENIZER}
    args = SFTConfig(str(tmp_path / "plain"), **COMMON, **options)
    plain = trained(SFTTrainer(model=model(), args=args, **given))
    args = Arguments(str(tmp_path / "ours"), batch_schedule="constant", **COMMON, **options)
    ours = trained(AdaptiveSFTTrainer(model=model(), args=args, **given))
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"):
        assert column(ours, name) == column(plain, name) != []
    assert torch.equal(weights(ours), weights(plain))


@pytest.mark.parametrize("case", CASES)
def test_the_batch_grows_and_every_sample_is_trained_on_once(tmp_path, case):
    data, options = CASES[case]
    trainer = AdaptiveSFTTrainer(
        model=model(),
        args=Arguments(str(tmp_path), **GROWING, **COMMON, **options),
        train_dataset=data(),
        processing_class=TOKENIZER,
    )
    trainer.train()
    records = read_records(tmp_path)
    sizes = records["global_batch_size"]
    assert sizes[0] == 4
    assert max(sizes) == 16
    # Packed, a sample is what fills a row.
    assert sum(records["step_samples"]) == len(trainer.train_dataset)
    assert (len(trainer.train_dataset) != SAMPLES) == bool(options.get("packing"))
    assert len(column(trainer, "mean_token_accuracy")) == len(sizes)


class Seen(AdaptiveSFTTrainer):
    """Keeps the micro-batches of its first steps, and the weights that they met."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        copy = {k: v.clone() if torch.is_tensor(v) else v for k, v in inputs.items()}
        self.seen.append((copy, float(num_items_in_batch)))
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("case", CASES)
def test_the_moments_are_those_of_the_formulas(tmp_path, case):
    """Of the first step: its micro-batches' gradients one by one, in float64."""
    data, options = CASES[case]
    options = {**options, "gradient_accumulation_steps": 4, "max_training_samples": 8}
    trainer = Seen(
        model=model(),
        args=Arguments(str(tmp_path), batch_schedule="constant", **{**COMMON, **options}),
        train_dataset=data(),
        processing_class=TOKENIZER,
    )
    trainer.train()
    records = read_records(tmp_path)
    assert len(records["step"]) == 1
    batches = [
        {name: inputs[name] for name in FORWARD if name in inputs} for inputs, _ in trainer.seen
    ]
    tokens = reference.token_weights(batch["labels"] for batch in batches)
    assert {items for _, items in trainer.seen} == {sum(tokens)}
    gradients = reference.micro_batch_gradients(
        model().double(), batches, lambda twin, batch: twin(**batch, use_cache=False).loss
    )
    expected = reference.moments(gradients, tokens, samples=8)
    assert records["small_sq_norm"][0] == pytest.approx(expected["S"], rel=1e-5)
    assert records["big_sq_norm"][0] == pytest.approx(expected["L"], rel=1e-5)
    weighed_alike = reference.moments(gradients, reference.plain_weights(batches), samples=8)
    assert (weighed_alike["L"] == pytest.approx(expected["L"], rel=1e-5)) == (len(set(tokens)) == 1)


def test_a_checkpoint_resumes_bitwise(tmp_path):
    data, options = CASES["packed without padding"]
    saved = {**COMMON, "save_strategy": "steps", "save_steps": 3}

    def new(folder):
        return AdaptiveSFTTrainer(
            model=model(),
            args=Arguments(str(folder), **GROWING, **saved, **options),
            train_dataset=data(),
            processing_class=TOKENIZER,
        )

    whole = trained(new(tmp_path))
    resumed = new(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert column(resumed, "loss") == column(whole, "loss")
    assert torch.equal(weights(resumed), weights(whole))


def test_pairs_of_a_reward_trainer_are_samples(tmp_path):
    @dataclass
    class Options(AdaptiveBatchOptions, RewardConfig):
        pass

    class Adaptive(AdaptiveBatchMixin, RewardTrainer):
        pass

    numbers = random.Random(0)
    pairs = {
        name: [text(numbers, 6) for _ in range(SAMPLES)]
        for name in ("prompt", "chosen", "rejected")
    }
    args = {**COMMON, **GROWING, "center_rewards_coefficient": None}
    trainer = Adaptive(
        model=model(LlamaForSequenceClassification, num_labels=1),
        args=Options(str(tmp_path), **args),
        train_dataset=datasets.Dataset.from_dict(pairs),
        processing_class=TOKENIZER,
    )
    trainer.train()
    sizes = read_records(tmp_path)["global_batch_size"]
    assert all(a <= b for a, b in pairwise(sizes))
    assert sum(read_records(tmp_path)["step_samples"]) == SAMPLES


@pytest.mark.parametrize(
    ("trainer", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
)
def test_a_trainer_that_samples_what_it_trains_on_is_refused(tmp_path, trainer, config):
    options = dataclass(type("Options", (AdaptiveBatchOptions, config), {}))
    adaptive = type("Adaptive", (AdaptiveBatchMixin, trainer), {})
    model().save_pretrained(tmp_path / "model")  # the reference model is loaded from there
    args = options(
        str(tmp_path), **{**COMMON, "per_device_train_batch_size": 4, "num_generations": 4}
    )
    with pytest.raises(ValueError, match=rf"trainer \({trainer.__name__}\) must train on") as error:
        adaptive(
            model=LlamaForCausalLM.from_pretrained(tmp_path / "model"),
            args=args,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            train_dataset=datasets.Dataset.from_dict({"prompt": ["def "] * 16}),
            processing_class=TOKENIZER,
        )
    assert "without AdaptiveBatchMixin" in str(error.value)
