"""The metric of language models against the naive sums, in `evaluate`, and in the Trainer."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainingArguments

from hf_adaptive_batch import (
    LanguageModeling,
    language_modeling_metrics,
    read_evaluations,
    sample_losses,
)
from hf_adaptive_batch.language_modeling import token_weighted_scores
from tests.cases import adaptive, llama, sequences
from tests.evaluate_on_ranks import differing, evaluated
from tests.scenarios import launch


FILE = Path(__file__).parents[1] / "hf_adaptive_batch" / "language_modeling.py"


def naive(logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[float, int]]:
    """-log softmax, token by token, in float64."""
    found = []
    for row, targets in zip(logits.double().tolist(), labels.tolist(), strict=True):
        nats, count = 0.0, 0
        for place in range(1, len(targets)):
            if targets[place] == -100:
                continue
            scores = row[place - 1]
            nats += math.log(sum(math.exp(score) for score in scores)) - scores[targets[place]]
            count += 1
        found.append((nats, count))
    return found


def example(dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(4, 6, 9).to(dtype)
    labels = torch.randint(0, 9, (4, 6))
    labels[0, 3:] = -100
    labels[1] = -100  # a sample without any target
    labels[2, :5] = -100
    return logits, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_samples_sums_are_the_naive_ones(dtype):
    logits, labels = example(dtype)
    found = sample_losses(logits, labels)
    assert found.dtype == torch.float64
    assert found.tolist() == [pytest.approx(pair, rel=1e-6) for pair in naive(logits, labels)]
    assert torch.equal(sample_losses((logits, "cache"), labels), found)


def test_the_measures_weigh_tokens_alike_and_not_samples():
    pairs = naive(*example())
    nats, tokens = [n for n, _ in pairs], [t for _, t in pairs]
    found = token_weighted_scores(nats, tokens, tokens_per_byte=0.25)
    assert tokens == [2, 0, 1, 5]
    assert found["token_loss"] == pytest.approx(sum(nats) / 8, rel=1e-12)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 8), rel=1e-12)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / 8 / math.log(2) / 4, rel=1e-12)
    samples = [n / t for n, t in pairs if t]
    assert found["token_loss"] != pytest.approx(sum(samples) / 3, rel=1e-3)


def test_what_cannot_be_measured_is_an_error_and_what_overflows_infinite():
    with pytest.raises(ValueError, match=r"tokens \(0 in 2 samples\) must be positive"):
        token_weighted_scores([0.0, 0.0], [0, 0])
    with pytest.raises(ValueError, match=r"tokens_per_byte \(0\) must be positive"):
        token_weighted_scores([1.0], [1], tokens_per_byte=0)
    assert token_weighted_scores([1e6], [1])["perplexity"] == math.inf
    assert all(math.isnan(value) for value in token_weighted_scores([math.nan], [1]).values())


@pytest.mark.parametrize("loaded", [False, True], ids=["imported", "evaluate.load"])
def test_it_is_a_module_of_evaluate(loaded, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {"cache_dir": str(tmp_path)}
    metric = evaluate.load(str(FILE), **options) if loaded else LanguageModeling(**options)
    pairs = naive(*example())
    for at in (0, 2):  # batch by batch
        nats, tokens = zip(*pairs[at : at + 2], strict=True)
        metric.add_batch(predictions=nats, references=tokens)
    expected = token_weighted_scores(*zip(*pairs, strict=True), tokens_per_byte=0.5)
    assert metric.compute(tokens_per_byte=0.5) == pytest.approx(expected, rel=1e-12)


def test_it_is_combined_with_others(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = naive(*example())
    nats, tokens = zip(*pairs, strict=True)
    options = {"cache_dir": str(tmp_path)}
    both = evaluate.combine(
        {"imported": LanguageModeling(**options), "loaded": evaluate.load(str(FILE), **options)},
        force_prefix=True,
    )
    both.add_batch(predictions=nats, references=tokens)
    expected = token_weighted_scores(nats, tokens)
    assert both.compute() == {
        f"{name}_{measure}": pytest.approx(value, rel=1e-12)
        for name in ("imported", "loaded")
        for measure, value in expected.items()
    }


def test_several_processes_add_up(tmp_path):
    """As `evaluate` has it: each adds its share, and the first computes."""
    pairs = naive(*example())

    def share(rank: int):
        options = {"experiment_id": "shares", "cache_dir": str(tmp_path)}
        metric = LanguageModeling(num_process=2, process_id=rank, **options)
        nats, tokens = zip(*pairs[2 * rank : 2 * rank + 2], strict=True)
        return metric.compute(predictions=nats, references=tokens)

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(share, range(2))
    assert first == pytest.approx(token_weighted_scores(*zip(*pairs, strict=True)), rel=1e-12)
    assert second is None


def mean_over_tokens(samples: int = 13) -> float:
    """Of the evaluation in `evaluate_on_ranks`, a sample at a time."""
    model, pairs = differing().eval(), []
    for row in sequences(samples, uneven=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            pairs += naive(model(input_ids=ids).logits, ids)
    return sum(n for n, _ in pairs) / sum(t for _, t in pairs)


def measures_of(loss: float) -> dict[str, float]:
    return {
        "eval_token_loss": pytest.approx(loss, rel=1e-5),
        "eval_perplexity": pytest.approx(math.exp(loss), rel=1e-5),
        "eval_bits_per_byte": pytest.approx(loss / math.log(2) / 2, rel=1e-5),
    }


@pytest.mark.parametrize("options", [{}, {"batch_eval_metrics": True}], ids=["whole", "by batch"])
@pytest.mark.parametrize("batch", [2, 5])
def test_any_trainer_gives_the_mean_over_tokens_whatever_its_batches(tmp_path, batch, options):
    found, loss = evaluated(tmp_path, batch, **options), mean_over_tokens()
    assert {**found, **measures_of(loss)} == found
    assert found["eval_loss"] != pytest.approx(loss, rel=1e-5)  # weighted by samples


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_give_the_mean_over_tokens(tmp_path):
    """13 samples in batches of 2 on 2 ranks: the last ones are repeated, and not counted twice."""
    ranks = launch("tests.evaluate_on_ranks", 2, ["whole_and_by_batch"], tmp_path)
    expected = measures_of(mean_over_tokens())
    for rank in ranks["whole_and_by_batch"]:
        for found in (rank["whole"], rank["by batch"]):
            assert {**found, **expected} == found


def test_the_trainers_own_loss_stays_what_it_was_bit_by_bit(tmp_path):
    options = {
        "compute_metrics": language_modeling_metrics(),
        "preprocess_logits_for_metrics": sample_losses,
    }
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    first, second = (
        Trainer(model=llama(dropout=0.0), args=args, eval_dataset=sequences(16), **given).evaluate()
        for given in ({}, options)
    )
    assert first["eval_loss"] == second["eval_loss"]
    assert "eval_token_loss" in second


def test_after_an_evaluation_that_failed_the_next_one_starts_afresh():
    compute = language_modeling_metrics()
    batch = EvalPrediction(predictions=np.array([[0.0, 0.0]]), label_ids=None)
    assert compute(batch, compute_result=False) == {}
    with pytest.raises(ValueError, match="must be positive"):
        compute(batch)
    found = compute(EvalPrediction(predictions=np.array([[3.0, 2.0]]), label_ids=None))
    assert found["token_loss"] == 1.5


def test_an_adaptive_trainer_records_it(tmp_path):
    data = sequences(32)
    trainer = adaptive(
        tmp_path,
        trainer={
            "model": llama(),
            "train_dataset": data,
            "eval_dataset": data,
            "compute_metrics": language_modeling_metrics(),
            "preprocess_logits_for_metrics": sample_losses,
        },
        eval_strategy="epoch",
    )
    trainer.train()
    row = read_evaluations(tmp_path)[-1]["metrics"]
    assert row["eval_token_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)  # of even samples
    assert row["eval_perplexity"] == pytest.approx(np.exp(row["eval_token_loss"]), rel=1e-12)
