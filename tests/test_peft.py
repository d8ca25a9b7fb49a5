"""Adapters of peft, also on bases that bitsandbytes has quantised: they alone are measured."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft import prepare_model_for_kbit_training as prepared
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from examples.finetune_lora import main as finetune
from hf_adaptive_batch import AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.pretrain import pretrain
from tests import reference
from tests.cases import arguments, sequences, weights


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated",  # peft 0.21 asks by that name
    "ignore:MatMul8bitLt",  # bitsandbytes says once a call that int8 is computed in fp16
)

QUANTISED = {
    "none": None,
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8 bits": {"load_in_8bit": True},
}
GROWING = {"eta": 0.2, "batch_warmup_samples": 0, "max_global_batch_size": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base model, as a user has one."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
    LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(folder)
    return folder


def load(folder, quantised: str = "none"):
    options = {}
    if QUANTISED[quantised] is not None:
        config = BitsAndBytesConfig(**QUANTISED[quantised], bnb_4bit_compute_dtype=torch.float32)
        options = {"quantization_config": config, "device_map": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return prepared(model, use_gradient_checkpointing=False) if options else model


def with_lora(model, **options):
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{**config, **options}))


class Seen(AdaptiveBatchTrainer):
    """Keeps its micro-batches."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, num_items_in_batch)


@pytest.mark.parametrize("quantised", QUANTISED)
def test_the_moments_are_those_of_the_adapters_gradients(tmp_path, base, quantised):
    def make():
        return with_lora(load(base, quantised))

    given = {"model": make(), "train_dataset": sequences(8)}
    options = {"batch_schedule": "constant", "gradient_accumulation_steps": 4}
    args = arguments(tmp_path, per_device_train_batch_size=2, num_train_epochs=1, **options)
    trainer = Seen(args=args, **given)
    trainer.train()
    records = read_records(tmp_path)
    twin = make().train()
    gradients = reference.micro_batch_gradients(twin, trainer.seen, lambda m, b: m(**b).loss)
    tokens = reference.token_weights(batch["labels"] for batch in trainer.seen)
    expected = reference.moments(gradients, tokens, samples=8)
    assert gradients[0].numel() == sum(p.numel() for p in twin.parameters() if p.requires_grad)
    assert records["small_sq_norm"][0] == pytest.approx(expected["S"], rel=1e-5)
    assert records["big_sq_norm"][0] == pytest.approx(expected["L"], rel=1e-5)


def test_with_the_bases_gradients_the_moments_would_be_others(base):
    """What the test above can tell."""
    batches = [{"input_ids": torch.tensor([[1, 2, 3, i]])} for i in range(4)]
    norms = []
    for everything in (False, True):
        model = with_lora(load(base))
        if everything:
            model.requires_grad_(True)
        found = reference.micro_batch_gradients(
            model, batches, lambda m, b: m(**b, labels=b["input_ids"]).loss
        )
        norms.append(reference.moments(found, [1.0] * 4, samples=4)["L"])
    assert norms[1] > 1.5 * norms[0]


@pytest.mark.parametrize("quantised", QUANTISED)
def test_the_batch_grows_and_a_checkpoint_resumes(tmp_path, base, quantised):
    def new():
        args = arguments(
            tmp_path, **GROWING, learning_rate=1e-3, save_strategy="steps", save_steps=4
        )
        data = sequences(64)
        return AdaptiveBatchTrainer(
            model=with_lora(load(base, quantised)), args=args, train_dataset=data
        )

    whole = new()
    whole.train()
    assert max(read_records(tmp_path)["global_batch_size"]) == 16
    resumed = new()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    whole.save_model()
    loaded = PeftModel.from_pretrained(load(base, quantised), str(tmp_path))
    trained = {n: p for n, p in whole.model.named_parameters() if "lora_" in n}
    assert trained
    for name, value in loaded.named_parameters():
        if "lora_" in name:
            assert torch.equal(value, trained[name]), name


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", r=2, use_dora=True, target_modules=["q_proj"]),
        LoraConfig(
            task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
        ),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    ],
    ids=["dora", "saved modules", "prompt tuning"],
)
def test_other_adapters_train_and_grow(tmp_path, base, config):
    model = get_peft_model(load(base), config)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = arguments(tmp_path, **GROWING, learning_rate=1e-3)
    AdaptiveBatchTrainer(model=model, args=args, train_dataset=sequences(64)).train()
    records = read_records(tmp_path)
    assert max(records["global_batch_size"]) == 16
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trained


@pytest.mark.slow
def test_the_example_fine_tunes_a_model_that_pretrain_made(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text("utf-8") * 4, "utf-8")
    shared = ["--dataset", str(text), "--block_size", "32"]
    small = ["--hidden_size", "48", "--num_hidden_layers", "1", "--max_train_samples", "200"]
    base = str(tmp_path / "base")
    pretrain([*shared, *small, "--output_dir", base, "--save_strategy", "no"])
    finetune(["--model", base, *shared, "--output_dir", str(tmp_path / "lora")])
    shown = capsys.readouterr().out
    before, after = (
        float(word) for word in shown.split("validation loss ")[-1].split(" nats")[0].split(" -> ")
    )
    assert after < before
    sizes = read_records(tmp_path / "lora")["global_batch_size"]
    assert f"batch size 8 -> {sizes[-1]} in {len(sizes)} optimizer steps" in shown
    assert sizes[-1] > 8
    assert (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size < 10**6
