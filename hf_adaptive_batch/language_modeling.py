"""How well a language model predicts: loss per token, perplexity, bits per byte.

As a module of `evaluate`, which needs no download, and for any Trainer:

    Trainer(
        ...,
        compute_metrics=language_modeling_metrics(tokens_per_byte=0.25),
        preprocess_logits_for_metrics=sample_losses,
    )

A Trainer's own `eval_loss` is a mean over batches, weighted by their samples. Where samples have
different numbers of target tokens that is no mean over tokens, and depends on the batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch import nn


def sample_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduce the logits of a causal model to two numbers a sample.

    A Trainer calls this for each batch, so that it never keeps logits.

    Args:
        logits: Of shape (samples, tokens, vocabulary), in any floating type; of a tuple, the first.
        labels: Of shape (samples, tokens); -100 is no target. Token t is predicted at t - 1.

    Returns:
        Of shape (samples, 2), in float64: the sum of -log p over the sample's target tokens, in
        nats, and their number.
    """
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    sums = logits.new_zeros((len(labels), 2), dtype=torch.float64)
    for place, (row, targets) in enumerate(zip(logits, labels[:, 1:], strict=True)):
        # A row at a time: float32 logits of a whole batch may be larger than the model.
        nats = nn.functional.cross_entropy(
            row[:-1].float(), targets, ignore_index=-100, reduction="none"
        )
        sums[place, 0] = nats.double().sum()
        sums[place, 1] = (targets != -100).sum()
    return sums


def token_weighted_scores(
    nats: Sequence[float], tokens: Sequence[float], *, tokens_per_byte: float | None = None
) -> dict[str, float]:
    """The measures, from sums of samples.

    Args:
        nats: Sum of -log p over the target tokens of each sample.
        tokens: Target tokens of each sample; 0 is allowed.
        tokens_per_byte: Tokens of the text per UTF-8 byte of it.

    Returns:
        `token_loss`, in nats per target token; `perplexity`, its exponential, infinite above 709
        nats; and with `tokens_per_byte` also `bits_per_byte`, which compares models across
        tokenizers.

    Raises:
        ValueError: If there is no target token, or a number that cannot be.
    """
    total = math.fsum(tokens)
    if not total > 0 or min(tokens) < 0:
        raise ValueError(
            f"tokens ({total:g} in {len(tokens)} samples) must be positive, because a mean is "
            "taken over target tokens; check that labels are not all -100."
        )
    if tokens_per_byte is not None and not 0 < tokens_per_byte < math.inf:
        raise ValueError(
            f"tokens_per_byte ({tokens_per_byte}) must be positive and finite, because it turns "
            "nats per token into bits per byte; divide the text's tokens by its UTF-8 bytes."
        )
    loss = math.fsum(nats) / total
    found = {"token_loss": loss, "perplexity": math.inf if loss > 709 else math.exp(loss)}
    if tokens_per_byte is not None:
        found["bits_per_byte"] = loss / math.log(2) * tokens_per_byte
    return found


class LanguageModeling(evaluate.Metric):
    """The measures as a metric of `evaluate`.

        metric = LanguageModeling()
        metric.add_batch(predictions=nats, references=tokens)
        metric.compute(tokens_per_byte=0.25)

    Predictions are the sums of nats of each sample, references its target tokens: what
    `sample_losses` gives. `evaluate.load` with the path of this file gives the same metric.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Loss per target token, perplexity and bits per byte of a language model.",
            citation="",
            inputs_description="predictions: nats of each sample; references: its target tokens.",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("float64"),
                }
            ),
        )

    def _compute(
        self,
        *,
        predictions: Sequence[float],
        references: Sequence[float],
        tokens_per_byte: float | None = None,
    ) -> dict[str, float]:
        return token_weighted_scores(predictions, references, tokens_per_byte=tokens_per_byte)


def language_modeling_metrics(
    tokens_per_byte: float | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A Trainer's `compute_metrics`, beside `sample_losses`.

    Args:
        tokens_per_byte: Tokens of the validation text per UTF-8 byte of it.

    Returns:
        Gives `token_loss`, `perplexity` and with `tokens_per_byte` also `bits_per_byte`; the
        Trainer puts `eval_` in front. With `batch_eval_metrics` it is called for each batch, and
        gives nothing before the last.
    """
    # In memory: a metric otherwise leaves a file in the user's cache for each evaluation.
    metric = LanguageModeling(keep_in_memory=True)

    def compute(prediction: Any, compute_result: bool = True) -> dict[str, float]:
        nats, tokens = prediction.predictions.T
        metric.add_batch(predictions=nats, references=tokens)
        if not compute_result:
            return {}
        found: dict[str, float] = metric.compute(tokens_per_byte=tokens_per_byte)
        return found

    return compute
