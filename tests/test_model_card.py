"""The model card that push_to_hub uploads says how the batch size was chosen."""

import re

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image

from hf_adaptive_batch import AdaptiveBatchTrainer, read_records
from hf_adaptive_batch.report.model_card import section
from tests.cases import arguments, llama, sequences
from tests.test_trl import COMMON, TOKENIZER, AdaptiveSFTTrainer, Arguments, model, texts


HEADING = "## How the batch size was chosen"
GROWING = {"eta": 0.2, "batch_warmup_samples": 0, "max_global_batch_size": 16}


def card(folder) -> str:
    return (folder / "README.md").read_text("utf-8")


def trained(folder, *, given=None, **options):
    args = arguments(folder, **{**GROWING, **options})
    trainer = AdaptiveBatchTrainer(model=given or llama(), args=args, train_dataset=sequences(64))
    trainer.train()
    trainer.save_model()
    return trainer


def test_the_generated_card_has_the_section_the_picture_and_the_numbers(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card(model_name="tiny", tags=["mine"], language="en")
    records, text = read_records(tmp_path), card(tmp_path)
    assert text.count(HEADING) == 1
    [picture] = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text[text.index(HEADING) :])
    with Image.open(tmp_path / picture) as image:  # beside the card, so that it is uploaded too
        assert min(image.size) > 400
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", text, re.MULTILINE))
    assert rows["decided by"] == "norm test, eta 0.2, unbiased estimate"
    assert rows["optimizer steps"] == str(len(records["step"]))
    assert rows["trained on"].startswith(f"{records['samples_seen'][-1]} samples")
    assert rows["global batch size"].startswith(f"{records['global_batch_size'][0]} -> ")
    counted = {k: int(n) for k, n in re.findall(r"([a-z ]+?) (\d+)(?:, |$)", rows["reasons"])}
    reasons = [reason.replace("_", " ") for reason in records["reason"]]
    assert counted == {name: reasons.count(name) for name in set(reasons)}
    data = ModelCard.load(tmp_path / "README.md").data  # the metadata above still parse
    assert "mine" in data.tags
    assert data.language == ["en"]


def test_a_card_that_is_made_again_has_the_section_once(tmp_path):
    trainer = trained(tmp_path)
    trainer.create_model_card()
    first = card(tmp_path)
    trainer.create_model_card()
    assert card(tmp_path) == first
    assert first.count(HEADING) == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_a_card_of_adapters_has_it_too(tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    trainer = trained(tmp_path, given=get_peft_model(llama(), config))
    trainer.create_model_card()
    assert HEADING in card(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "peft"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_a_card_of_trl_has_it_too(tmp_path):
    """Whose create_model_card takes other arguments, and is called for each checkpoint as well."""
    options = {**COMMON, "save_strategy": "steps", "save_steps": 4}
    trainer = AdaptiveSFTTrainer(
        model=model(),
        args=Arguments(str(tmp_path), **options, **GROWING),
        train_dataset=texts(),
        processing_class=TOKENIZER,
    )
    trainer.train()
    trainer.create_model_card(model_name="tiny", dataset_name="words")
    assert card(tmp_path).count(HEADING) == 1
    assert "trl" in ModelCard.load(tmp_path / "README.md").data.tags


def test_a_schedule_and_a_controller_are_named(tmp_path):
    trainer = trained(tmp_path, batch_schedule="0:8 32:16", per_device_train_batch_size=8)
    trainer.create_model_card()
    assert "| decided by | the schedule 0:8 32:16 |" in card(tmp_path)


def test_without_a_run_the_card_is_the_trainers(tmp_path):
    args = arguments(tmp_path)
    trainer = AdaptiveBatchTrainer(model=llama(), args=args, train_dataset=sequences(64))
    trainer.create_model_card()
    assert HEADING not in card(tmp_path)
    assert not (tmp_path / "adaptive_batch.png").exists()


def test_a_noise_scale_that_was_never_measurable_is_said(tmp_path):
    trained(tmp_path)
    records = {k: v[:1] for k, v in read_records(tmp_path).items()}
    records["noise_scale"] = records["noise_scale_error"] = [None]
    text = section(records, "norm test")
    assert "| noise scale at the end | not measurable |" in text
    assert "![" not in text  # one decision makes no curve
