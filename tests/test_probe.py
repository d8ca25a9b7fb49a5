"""GradientProbe against per-micro-batch gradients of the bare model, in float64."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from hf_adaptive_batch.measure.leaves import GradientLeaves
from hf_adaptive_batch.measure.moments import GradientMoments
from hf_adaptive_batch.measure.probe import GradientProbe, gradient_norm
from tests import reference


# ------------------------------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: a model, its micro-batches, and the loss in both of its forms."""

    model: nn.Module
    batches: Sequence[Any]
    mean_loss: Callable[[nn.Module, Any], Tensor]
    """Of one micro-batch by itself: what the reference differentiates."""
    weights: list[float]
    samples: int
    step_loss: Callable[[nn.Module, Any, float], Tensor] | None = None
    """A micro-batch's part of the step's loss, given the sum of the weights; if not its share."""

    def backward(self, index: int, scale: float = 1.0) -> None:
        """Backward of one micro-batch's part of the step's loss."""
        batch, total = self.batches[index], sum(self.weights)
        if self.step_loss is not None:
            loss = self.step_loss(self.model, batch, total)
        else:
            loss = self.mean_loss(self.model, batch) * (self.weights[index] / total)
        (loss * scale).backward()

    def truth(self) -> dict[str, float]:
        gradients = reference.micro_batch_gradients(self.model, self.batches, self.mean_loss)
        return reference.moments(gradients, self.weights, self.samples)

    def measure(
        self, *, loss_scale: float = 1.0, total_from_backward: bool = False
    ) -> GradientMoments:
        with GradientProbe(self.model, total_from_backward=total_from_backward) as probe:
            self.run_through(probe, scale=loss_scale)
            moments = probe.finish(self.samples, self.weights, loss_scale=loss_scale)
        self.model.zero_grad(set_to_none=True)
        assert moments is not None
        return moments

    def run_through(self, probe: GradientProbe, *, scale: float = 1.0) -> None:
        for index in range(len(self.batches)):
            self.backward(index, scale)
            probe.end_micro_batch()


def assert_equal_to_reference(
    moments: GradientMoments, truth: dict[str, float], *, relative: float = 1e-6
) -> None:
    """S and L to `relative`; the estimates, which are differences, to as much of S or L."""
    spread = 1 / (moments.workers - 1)
    assert moments.small_sq_norm == pytest.approx(truth["S"], rel=relative)
    assert moments.big_sq_norm == pytest.approx(truth["L"], rel=relative)
    assert moments.noise_trace == pytest.approx(
        truth["noise_trace"], abs=relative * truth["S"] * moments.global_batch_size * spread
    )
    assert moments.grad_sq_norm == pytest.approx(
        truth["grad_sq_norm"], abs=relative * (truth["L"] + truth["S"] * spread)
    )


def is_equal_to_reference(moments: GradientMoments, truth: dict[str, float]) -> bool:
    try:
        assert_equal_to_reference(moments, truth)
    except AssertionError:
        return False
    return True


class Mlp(nn.Module):
    """Weights of every shape: matrices, vectors, a scalar."""

    def __init__(self, features: int = 16, *, unused: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(features, 24)
        self.second = nn.Linear(24, 4)
        self.gain = nn.Parameter(torch.tensor(1.5))
        if unused:
            self.unused = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.gain


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(2, 4, 3)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.convolution(x.unflatten(1, (2, -1)))).mean(-1))


class ComplexMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 4, dtype=torch.complex64) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex64) @ self.weight).abs()


class TinyClassifier(nn.Module):
    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, sparse=sparse)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(x).mean(1))


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return functional.mse_loss(model(x), y)


def regression_batches(
    sizes: Sequence[int], features: int = 16, dtype: torch.dtype = torch.float32
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, features, generator=generator).to(dtype),
            torch.randn(size, 4, generator=generator).to(dtype),
        )
        for size in sizes
    ]


def built(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of fixed weights that leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        return model if dtype is torch.float32 else model.to(dtype)


def mlp_case(
    sizes: Sequence[int] = (8, 8, 8, 8),
    *,
    make: Callable[[], nn.Module] = Mlp,
    features: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    return Case(
        model=built(make, dtype),
        batches=regression_batches(sizes, features, dtype),
        mean_loss=squared_error,
        weights=[float(size) for size in sizes],  # equal for equal sizes, else samples weigh alike
        samples=sum(sizes),
    )


def classifier_case(model: nn.Module) -> Case:
    generator = torch.Generator().manual_seed(4)
    batches = [
        (torch.randint(20, (6, 5), generator=generator), torch.randn(6, 4, generator=generator))
        for _ in range(3)
    ]
    return Case(
        model=model,
        batches=batches,
        mean_loss=squared_error,
        weights=reference.plain_weights(batches),
        samples=18,
    )


def frozen_embedding_case() -> Case:
    case = classifier_case(built(TinyClassifier))
    case.model.embedding.weight.requires_grad_(False)
    return case


def tiny_llama(*, tied: bool) -> nn.Module:
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        attention_dropout=0.0,
    )
    return built(lambda: LlamaForCausalLM(config)).train()


# Target tokens of each sample, padded to 12; the first token of a sample is never a target.
EQUAL_LENGTHS = [[12, 12]] * 4
UNEQUAL_LENGTHS = [[12, 3], [4, 2], [11, 12], [2, 5]]
ONE_WITHOUT_TARGETS = [[12, 3], [1, 1], [11, 12]]


def llama_case(lengths: list[list[int]], *, tied: bool) -> Case:
    """A step whose loss is the mean over all of its target tokens, as the Trainer computes it."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for sample_lengths in lengths:
        ids = torch.randint(48, (len(sample_lengths), 12), generator=generator)
        mask = torch.arange(12) < torch.tensor(sample_lengths)[:, None]
        labels = ids.masked_fill(~mask, -100)
        batches.append({"input_ids": ids, "attention_mask": mask.long(), "labels": labels})
    return Case(
        model=tiny_llama(tied=tied),
        batches=batches,
        mean_loss=lambda model, batch: model(**batch).loss,
        step_loss=lambda model, batch, total: model(**batch, num_items_in_batch=total).loss,
        weights=reference.token_weights(batch["labels"] for batch in batches),
        samples=sum(len(sample_lengths) for sample_lengths in lengths),
    )


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp_case,
    "accumulation 2": lambda: mlp_case((8, 8)),
    "accumulation 3": lambda: mlp_case((8, 8, 8)),
    "short last micro-batch": lambda: mlp_case((8, 8, 8, 3)),
    "single samples": lambda: mlp_case((1, 1)),
    "unused parameter": lambda: mlp_case(make=lambda: Mlp(unused=True)),
    "convolution": lambda: mlp_case(make=Convolution),
    "complex parameter": lambda: mlp_case(make=ComplexMlp),
    "row longer than 16384": lambda: mlp_case((2, 2), make=lambda: Mlp(20_000), features=20_000),
    "embedding": lambda: classifier_case(built(TinyClassifier)),
    "frozen embedding": frozen_embedding_case,
    "untied llama": lambda: llama_case(EQUAL_LENGTHS, tied=False),
    "tied llama": lambda: llama_case(EQUAL_LENGTHS, tied=True),
    "untied llama, unequal token counts": lambda: llama_case(UNEQUAL_LENGTHS, tied=False),
    "tied llama, unequal token counts": lambda: llama_case(UNEQUAL_LENGTHS, tied=True),
    "micro-batch without targets": lambda: llama_case(ONE_WITHOUT_TARGETS, tied=True),
}


# ------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_moments_equal_the_reference(make: Callable[[], Case], total_from_backward: bool) -> None:
    case = make()
    moments = case.measure(total_from_backward=total_from_backward)
    assert moments.workers == sum(weight > 0 for weight in case.weights)
    assert moments.global_batch_size == case.samples
    assert_equal_to_reference(moments, case.truth())


@pytest.mark.parametrize(
    "name", ["short last micro-batch", "untied llama, unequal token counts"], ids=["short", "llama"]
)
def test_the_reference_tells_token_weighted_from_plain_mean(name: str) -> None:
    case = CASES[name]()
    gradients = reference.micro_batch_gradients(case.model, case.batches, case.mean_loss)
    plain = reference.moments(gradients, reference.plain_weights(case.batches), case.samples)
    assert not is_equal_to_reference(case.measure(), plain)


def test_the_reference_tells_a_tied_weight_from_two() -> None:
    tied, untied = (llama_case(EQUAL_LENGTHS, tied=tied) for tied in (True, False))
    untied.model.lm_head.weight.data.copy_(untied.model.get_input_embeddings().weight.data)
    tied.model.load_state_dict(untied.model.state_dict())  # the same function, other gradients
    assert not is_equal_to_reference(tied.measure(), untied.truth())
    assert is_equal_to_reference(tied.measure(), tied.truth())


def test_moments_of_a_float64_model_equal_the_reference_to_rounding() -> None:
    case = mlp_case(dtype=torch.float64, make=Convolution)
    assert_equal_to_reference(case.measure(), case.truth(), relative=1e-12)


def test_a_float64_scalar_parameter_is_measured() -> None:
    case = mlp_case(dtype=torch.float64)
    assert_equal_to_reference(case.measure(), case.truth(), relative=1e-12)


def test_moments_of_a_bfloat16_model_equal_what_the_optimizer_gets() -> None:
    """S is as exact as in float32: four equal shares scale a bfloat16 gradient without rounding.

    L is the norm of `.grad`, in which bfloat16 was added up with a rounding of 2^-9 a time: exact
    for the sum that the optimizer is given, and within three such roundings, both ways squared, of
    the sum without rounding.
    """
    case = mlp_case(dtype=torch.bfloat16)
    truth = case.truth()
    with GradientProbe(case.model) as probe:
        case.run_through(probe)
        moments = probe.finish(case.samples, case.weights)
    assert moments is not None
    given = reference.flat_gradient(case.model)
    assert moments.small_sq_norm == pytest.approx(truth["S"], rel=1e-6)
    assert moments.big_sq_norm == pytest.approx(given.dot(given).item(), rel=1e-6)
    assert moments.big_sq_norm == pytest.approx(truth["L"], rel=2 * 3 * 2**-9)
    assert moments.big_sq_norm != pytest.approx(truth["L"], rel=1e-6)


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_the_loss_scale_is_divided_out(total_from_backward: bool) -> None:
    case = mlp_case()
    scaled = case.measure(loss_scale=2.0**14, total_from_backward=total_from_backward)
    assert_equal_to_reference(scaled, case.truth())


def test_a_loss_scale_that_is_not_told_would_show() -> None:
    case = mlp_case()
    with GradientProbe(case.model) as probe:
        case.run_through(probe, scale=2.0**14)
        moments = probe.finish(case.samples, case.weights)
    assert moments is not None
    assert moments.small_sq_norm == pytest.approx(case.truth()["S"] * 2.0**28, rel=1e-6)


def test_weights_count_up_to_a_common_factor() -> None:
    case = mlp_case((8, 8, 8, 3))
    truth = case.truth()
    with GradientProbe(case.model) as probe:
        case.run_through(probe)
        moments = probe.finish(case.samples, [weight / 7 for weight in case.weights])
    assert moments is not None
    assert_equal_to_reference(moments, truth)


def test_a_micro_batch_of_weight_zero_that_spoils_the_gradient_spoils_the_moments() -> None:
    """It is no worker, but what the optimizer would get is not hidden."""
    case = dataclasses.replace(mlp_case((8, 8, 8)), weights=[8.0, 8.0, 0.0])
    assert case.measure().workers == 2
    assert_equal_to_reference(case.measure(), case.truth())
    case.batches[2][0][0, 0] = torch.nan
    assert not case.measure().is_finite


def test_one_probe_measures_step_after_step() -> None:
    case = mlp_case()
    truth = case.truth()
    with GradientProbe(case.model) as probe:
        for _ in range(3):
            case.run_through(probe)
            moments = probe.finish(case.samples, case.weights)
            assert moments is not None
            assert_equal_to_reference(moments, truth)
            case.model.zero_grad()


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_a_leaf_that_fired_in_an_earlier_step_alone_leaves_nothing_in_the_next(
    total_from_backward: bool,
) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return functional.mse_loss(model.first(x)[:, :4], y)

    whole = mlp_case()
    partial = dataclasses.replace(whole, mean_loss=loss)
    truth = partial.truth()
    with GradientProbe(whole.model, total_from_backward=total_from_backward) as probe:
        whole.run_through(probe)
        assert probe.finish(whole.samples, whole.weights) is not None
        whole.model.zero_grad(set_to_none=True)
        partial.run_through(probe)
        moments = probe.finish(partial.samples, partial.weights)
    assert moments is not None
    assert_equal_to_reference(moments, truth)


def test_a_leaf_that_fires_in_some_micro_batches_counts_zero_in_the_others() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        hidden = model.first(x).tanh()
        return functional.mse_loss(model.second(hidden) if len(x) > 4 else hidden[:, :4], y)

    for total_from_backward in (False, True):
        case = Case(
            model=built(Mlp),
            batches=regression_batches((8, 8, 4)),
            mean_loss=loss,
            weights=[8.0, 8.0, 4.0],
            samples=20,
        )
        moments = case.measure(total_from_backward=total_from_backward)
        assert_equal_to_reference(moments, case.truth())


# ------------------------------------------------------------------------------ leaving no trace


def train(
    case: Case, *, steps: int, probed: bool, clip: float = 0.1, nudged: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of every step and the final weights of some AdamW steps."""
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=1e-2)
    history: list[Tensor] = []
    for step in range(steps):
        probe = GradientProbe(case.model, total_from_backward=step % 2 == 1)
        if probed and step % 3 != 2:  # some steps go unmeasured, as between two tests
            probe.attach()
        for index in range(len(case.batches)):
            case.backward(index)
            if probe.attached:
                probe.end_micro_batch()
        if probe.attached:
            assert probe.finish(case.samples, case.weights) is not None
            probe.detach()
        parameters = [p for p in case.model.parameters() if p.grad is not None]
        if nudged:
            for parameter in parameters:
                parameter.grad.nextafter_(torch.tensor(torch.inf))
        history += [p.grad.clone() for p in parameters]
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
    return history, [p.detach().clone() for p in case.model.parameters()]


def all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@pytest.mark.parametrize(
    "name", ["short last micro-batch", "unused parameter", "tied llama, unequal token counts"]
)
def test_fifteen_adamw_steps_are_bitwise_those_of_a_run_without_the_probe(name: str) -> None:
    bare = train(CASES[name](), steps=15, probed=False)
    probed = train(CASES[name](), steps=15, probed=True)
    assert all_equal(bare[0], probed[0])
    assert all_equal(bare[1], probed[1])


def test_gradients_off_by_one_rounding_would_show_in_such_a_run() -> None:
    bare = train(mlp_case(), steps=15, probed=False)
    nudged = train(mlp_case(), steps=15, probed=False, nudged=True)
    assert not all_equal(bare[0], nudged[0])
    assert not all_equal(bare[1], nudged[1])


def hooks_on(model: nn.Module) -> int:
    return sum(
        len(hooks or ())
        for leaf in model.parameters()
        for hooks in (leaf._backward_hooks, leaf._post_accumulate_grad_hooks)
    )


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_hooks_are_on_inside_the_with_and_off_after_it(total_from_backward: bool) -> None:
    case = mlp_case()
    leaves = len(list(case.model.parameters()))
    probe = GradientProbe(case.model, total_from_backward=total_from_backward)
    assert not probe.attached
    assert hooks_on(case.model) == 0
    with probe:
        assert probe.attached
        assert hooks_on(case.model) == leaves * (2 if total_from_backward else 1)
    assert not probe.attached
    assert hooks_on(case.model) == 0


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_hooks_are_off_after_an_exception_and_the_step_is_forgotten(
    total_from_backward: bool,
) -> None:
    case = mlp_case()
    truth = case.truth()
    probe = GradientProbe(case.model, total_from_backward=total_from_backward)
    with contextlib.suppress(KeyboardInterrupt), probe:
        case.backward(0)
        probe.end_micro_batch()
        case.backward(1)
        assert hooks_on(case.model) > 0
        raise KeyboardInterrupt
    assert hooks_on(case.model) == 0
    case.model.zero_grad()
    with probe:
        case.run_through(probe)
        moments = probe.finish(case.samples, case.weights)
    assert moments is not None
    assert_equal_to_reference(moments, truth)


def test_attaching_twice_puts_on_one_set_of_hooks_and_detaching_twice_is_allowed() -> None:
    case = mlp_case()
    probe = GradientProbe(case.model)
    probe.attach()
    probe.attach()
    assert hooks_on(case.model) == len(list(case.model.parameters()))
    probe.detach()
    probe.detach()
    assert hooks_on(case.model) == 0


def test_the_users_own_hooks_stay_on() -> None:
    case = mlp_case()
    case.model.first.weight.register_hook(lambda gradient: gradient)
    case.measure()
    assert hooks_on(case.model) == 1


def test_a_model_that_was_measured_can_be_copied_and_measured_again() -> None:
    case = mlp_case()
    case.measure()
    again = copy.deepcopy(case.model)
    assert hooks_on(again) == 0
    assert len(GradientLeaves(again).trainable()) == len(list(case.model.parameters()))


# -------------------------------------------------------------------------------- what is measured


def modify_gradients(model: nn.Module) -> None:
    """Linear, so that it does not matter that the probe sees shares of the mean gradients."""
    mask = (torch.arange(16) % 2).float()
    model.first.weight.register_hook(lambda gradient: gradient * mask)
    model.second.weight.register_hook(lambda gradient: -3 * gradient)


def test_gradients_are_measured_as_the_users_hooks_have_changed_them() -> None:
    case = mlp_case()
    unmodified = case.truth()
    modify_gradients(case.model)
    moments = case.measure()
    assert_equal_to_reference(moments, case.truth())
    assert not is_equal_to_reference(moments, unmodified)


def test_a_probe_attached_before_the_users_hooks_would_miss_the_change() -> None:
    case = mlp_case()
    with GradientProbe(case.model) as probe:
        modify_gradients(case.model)
        case.run_through(probe)
        with pytest.raises(RuntimeError, match="a part of them was not seen, or the step's grad"):
            probe.finish(case.samples, case.weights)


def test_a_parameter_unfrozen_between_two_steps_is_measured_in_the_second() -> None:
    case = mlp_case()
    case.model.first.requires_grad_(False)
    frozen = case.truth()
    probe = GradientProbe(case.model)
    found = []
    for _ in range(2):
        with probe:
            case.run_through(probe)
            found.append(probe.finish(case.samples, case.weights))
        case.model.zero_grad()
        case.model.first.requires_grad_(True)
    assert found[0] is not None
    assert found[1] is not None
    assert_equal_to_reference(found[0], frozen)
    assert_equal_to_reference(found[1], case.truth())
    assert not is_equal_to_reference(found[0], case.truth())


def test_the_total_from_backward_is_the_norm_before_clipping() -> None:
    case = mlp_case()
    truth = case.truth()
    found = {}
    for total_from_backward in (True, False):
        with GradientProbe(case.model, total_from_backward=total_from_backward) as probe:
            case.run_through(probe)
            torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1e-3)
            found[total_from_backward] = probe.finish(case.samples, case.weights)
        case.model.zero_grad()
    assert found[True] is not None
    assert found[False] is not None
    assert_equal_to_reference(found[True], truth)
    assert found[False].big_sq_norm == pytest.approx(1e-6, rel=1e-2)  # clipped: why it is needed


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "infinite"])
@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_a_gradient_that_is_not_finite_gives_moments_that_say_so(
    value: float, total_from_backward: bool
) -> None:
    case = mlp_case()
    assert case.measure().is_finite
    case.batches[2][0][0, 0] = value
    assert not case.measure(total_from_backward=total_from_backward).is_finite


def test_one_micro_batch_has_no_moments() -> None:
    case = mlp_case((8,))
    with GradientProbe(case.model) as probe:
        case.run_through(probe)
        assert probe.finish(case.samples, case.weights) is None


def test_one_micro_batch_beside_one_of_weight_zero_has_no_moments() -> None:
    case = mlp_case((8, 8))
    with GradientProbe(case.model) as probe:
        case.run_through(probe)
        assert probe.finish(case.samples, [1.0, 0.0]) is None


class NoGradientForTheWeight(torch.autograd.Function):
    """Such as fused kernels that leave out the gradient of an input they do not train."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * 2, None


@pytest.mark.parametrize("total_from_backward", [False, True], ids=["from grad", "from backward"])
def test_a_trainable_parameter_whose_gradient_is_undefined_counts_as_zero(
    total_from_backward: bool,
) -> None:
    class Model(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(NoGradientForTheWeight.apply(x, self.unused.weight))

    case = mlp_case(make=lambda: Model(unused=True))
    for x, _ in case.batches:
        x.requires_grad_()
    moments = case.measure(total_from_backward=total_from_backward)
    assert_equal_to_reference(moments, case.truth())


# ---------------------------------------------------------------------------------------- guards


class Checkpointed(nn.Module):
    """Two checkpointed segments, of one shared weight or of two."""

    def __init__(self, *, shared: bool, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = self.first if shared else nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # reentrant checkpoints need an input with a gradient
        for layer in (self.first, self.second):
            x = checkpoint(lambda y, layer=layer: layer(y).tanh(), x, use_reentrant=self.reentrant)
        return self.out(x)


@pytest.mark.parametrize(
    ("shared", "reentrant"),
    [(False, False), (False, True), (True, False)],
    ids=["not shared", "not shared, reentrant", "shared"],
)
def test_checkpointed_segments_are_measured(shared: bool, reentrant: bool) -> None:
    case = mlp_case(make=lambda: Checkpointed(shared=shared, reentrant=reentrant))
    assert_equal_to_reference(case.measure(), case.truth())


def test_reentrant_checkpointing_of_a_shared_weight_is_an_error_with_a_way_out() -> None:
    case = mlp_case(make=lambda: Checkpointed(shared=True, reentrant=True))
    with pytest.raises(RuntimeError, match=r"first\.weight|first\.bias") as error:
        case.measure()
    assert "in two parts within one micro-batch" in str(error.value)
    assert '{"use_reentrant": False}' in str(error.value)
    assert hooks_on(case.model) == 0


def test_two_backward_passes_in_one_micro_batch_are_an_error() -> None:
    case = mlp_case()
    with GradientProbe(case.model) as probe:
        case.backward(0)
        case.backward(1)
        with pytest.raises(RuntimeError, match="two backward passes"):
            probe.end_micro_batch()
    case.model.zero_grad()
    assert_equal_to_reference(case.measure(), case.truth())  # nothing of it stays behind


def test_a_step_without_any_gradient_is_an_error_not_a_zero() -> None:
    case = mlp_case()
    with GradientProbe(case.model) as probe:
        for _ in case.batches:
            probe.end_micro_batch()
        with pytest.raises(RuntimeError, match="No gradient reached the trainable parameters"):
            probe.finish(case.samples, case.weights)


@pytest.mark.parametrize("count", [3, 5])
def test_weights_that_are_not_one_per_micro_batch_are_an_error(count: int) -> None:
    case = mlp_case()
    with GradientProbe(case.model) as probe:
        case.run_through(probe)
        with pytest.raises(ValueError, match=rf"weights \({count}\) must be one .* \(4 were ended"):
            probe.finish(case.samples, [1.0] * count)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_sparse_embedding_is_refused_and_a_frozen_one_is_not(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"words": kind(20, 8, sparse=True), "out": nn.Linear(8, 4)})
    probe = GradientProbe(model)
    with pytest.raises(ValueError, match=r"sparse \(True\) of the embedding 'words' must be False"):
        probe.attach()
    assert not probe.attached
    model["words"].weight.requires_grad_(False)
    assert [leaf.name for leaf in GradientLeaves(model).trainable()] == ["out.weight", "out.bias"]


def test_a_frozen_sparse_embedding_is_measured_around() -> None:
    model = built(lambda: TinyClassifier(sparse=True))
    model.embedding.weight.requires_grad_(False)
    case = classifier_case(model)
    assert_equal_to_reference(case.measure(), case.truth())


def test_a_model_with_nothing_to_train_is_refused() -> None:
    model = Mlp().requires_grad_(False)
    with pytest.raises(ValueError, match="model must have a trainable parameter, because"):
        GradientProbe(model).attach()


# ------------------------------------------------------------------------------- accurate norms


@pytest.fixture(scope="module")
def ten_million() -> tuple[Tensor, float]:
    values = torch.randn(10_000_000, generator=torch.Generator().manual_seed(6))
    return values, values.double().square().sum().sqrt().item()


@pytest.mark.parametrize(
    "shape",
    [(2500, 4000), (10, 1000, 1000), (500, 20_000), (10_000_000,)],
    ids=["matrix", "three dimensions", "long rows", "vector"],
)
def test_the_norm_of_ten_million_elements_is_accurate(
    ten_million: tuple[Tensor, float], shape: tuple[int, ...]
) -> None:
    values, truth = ten_million
    assert gradient_norm(values.view(shape)).item() == pytest.approx(truth, rel=1e-6)


def test_torchs_own_flat_norm_of_them_is_not_which_is_why_rows_come_first(
    ten_million: tuple[Tensor, float],
) -> None:
    values, truth = ten_million
    assert torch.linalg.vector_norm(values).item() != pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_norm_takes_any_shape_and_dtype(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """The meta device stands for every accelerator: it takes their path, without numbers."""
    norm = gradient_norm(torch.full(shape, 2, dtype=dtype, device=device))
    assert norm.shape == ()
    assert norm.dtype in (torch.float32, torch.float64)
    if device == "cpu":
        truth = 2 * torch.Size(shape).numel() ** 0.5
        assert norm.item() == pytest.approx(truth, rel=1e-6)
