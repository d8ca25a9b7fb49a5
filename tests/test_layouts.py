"""The central test, without the Trainer: whoever holds which part, the measurement is the same.

One step of eight samples in four micro-batches is trained by one, two and four processes with gloo,
under every kind of parallelism that the probe knows. Each is held against the papers' formulas in
float64 on a bare model, and against a run without the probe, bitwise.
"""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from hf_adaptive_batch.measure.moments import GradientMoments

from . import reference
from .layouts import MODELS, freeze, precision
from .measure_on_ranks import SAMPLES, Decisions, Job, batches_of, launch, weights_of


pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# -------------------------------------------------------------------------------------- the jobs

HSDP = {"replicas": 2}
TP = {"copies": 2}
TIES = ["untied", "tied"]


def of_both(name: str, layout: str, **options: Any) -> list[Job]:
    """With tied weights and without, for as many steps as it takes to decide."""
    return [
        Job(f"{name}, {ties}", layout, options, model=ties, steps=3, between="evaluate")
        for ties in TIES
    ]


# The same samples, laid out in every way: these are held against each other, too.
LAYOUTS = {
    1: of_both("single", "single"),
    2: [
        *of_both("ddp", "ddp"),
        *of_both("fsdp2", "fsdp2"),
        *of_both("fsdp2 of accelerate", "by_accelerate"),
        *of_both("fsdp2 of transformers", "at_load_time", fsdp_size=2),
        *of_both("fsdp1", "fsdp1"),
        *of_both("tp", "fsdp2", **TP),
    ],
    4: [
        *of_both("ddp", "ddp"),
        *of_both("fsdp2", "fsdp2"),
        *of_both("hsdp", "fsdp2", **HSDP),
        *of_both("hsdp of accelerate", "by_accelerate", **HSDP),
        *of_both("hsdp of transformers", "at_load_time", fsdp_size=2, dp_replicate_size=2),
        *of_both("fsdp2 and tp", "fsdp2", **TP),
        *of_both("fsdp2 and tp of transformers", "at_load_time", fsdp_size=2, tp_size=2),
    ],
}

VARIANTS = {
    1: [
        Job("unfrozen", "single", model="frozen", between="unfreeze"),
        Job("frozen later", "single", between="freeze"),
        Job("other tensors", "single", between="assign"),
        Job("every second step", "single", steps=4, interval=2),
    ],
    2: [
        # Which micro-batches are reduced, and what they weigh.
        Job("ddp reduces each", "ddp", policy="each"),
        Job("fsdp2 reduces each", "fsdp2", policy="each"),
        Job("ddp, tokens", "ddp", data="uneven"),
        Job("fsdp2, tokens", "fsdp2", data="uneven"),
        Job("ddp, tokens, mean loss", "ddp", data="uneven", loss="mean"),
        Job("ddp, no targets", "ddp", data="one without targets"),
        Job("ddp, loss scale", "ddp", loss_scale=2.0**14),
        Job("fsdp2, loss scale", "fsdp2", loss_scale=2.0**14),
        # Options of DDP.
        Job("bucket view", "ddp", {"gradient_as_bucket_view": True}),
        Job("static graph", "ddp", {"static_graph": True}, policy="each"),
        Job("ddp, unused", "ddp", {"find_unused_parameters": True}, model="unused"),
        Job("ddp, sometimes", "ddp", {"find_unused_parameters": True}, model="sometimes"),
        Job("ddp in fp16", "ddp", {"fp16": True}),
        # Which weights are trained, and how they are computed with.
        Job("ddp, lora", "ddp", model="lora"),
        Job("fsdp2, lora", "fsdp2", model="lora"),
        Job("late lora", "at_load_time", {"fsdp_size": 2}, model="lora"),
        Job("fsdp2, unused", "fsdp2", model="unused"),
        Job("ddp, checkpointed", "ddp", model="checkpointed"),
        Job("fsdp2, checkpointed", "fsdp2", model="checkpointed"),
        Job("ddp, autocast", "ddp", precision="autocast"),
        Job("fsdp2, autocast", "fsdp2", precision="autocast"),
        Job("fsdp2 in bf16", "fsdp2", {"bfloat16": True}, precision="bfloat16"),
        Job("offload", "fsdp2", {"offload": True}),
        Job("held whole", "fsdp2", {"reshard_after_forward": False}, between="evaluate"),
        # What happens between steps.
        Job("ddp, frozen", "ddp", model="frozen"),
        Job("fsdp2, unfrozen", "fsdp2", model="frozen", between="unfreeze"),
        Job("fsdp2, frozen later", "fsdp2", between="freeze"),
        Job("ddp, loaded", "ddp", between="save and load", steps=3),
        Job("fsdp2, loaded", "fsdp2", between="save and load", steps=3),
        Job("fsdp2, other tensors", "fsdp2", between="assign"),
        Job("fsdp2, every second step", "fsdp2", steps=4, interval=2),
        # TP alone, and FSDP1.
        Job("tp of transformers", "at_load_time", {"tp_size": 2}, model="tied", data="uneven"),
        Job("tp, sequences", "fsdp2", {**TP, "sequence": True}),
        Job("fsdp1, flat", "fsdp1", {"original": False}),
        Job("fsdp1, grad op", "fsdp1", {"strategy": "SHARD_GRAD_OP"}),
        Job("fsdp1, grad op, flat", "fsdp1", {"strategy": "SHARD_GRAD_OP", "original": False}),
        Job("fsdp1, no shard", "fsdp1", {"strategy": "NO_SHARD"}, policy="each"),
        Job("fsdp1, no shard, flat", "fsdp1", {"strategy": "NO_SHARD", "original": False}),
    ],
    4: [
        Job("uneven shards", "fsdp2", model="uneven", data="uneven"),
        Job("empty shards", "fsdp2", model="lora"),
        Job("hsdp reduces each", "fsdp2", HSDP, policy="each"),
        Job("hsdp all-reduces last", "fsdp2", HSDP, policy="all-reduce last"),
        Job("hsdp 4 x 1", "fsdp2", {"replicas": 4}),
        Job("hsdp 1 x 4", "fsdp2", {"replicas": 1}),
        Job("replicate", "replicated"),
        Job("hsdp, lora", "by_accelerate", HSDP, model="lora"),
        Job(
            "hsdp, checkpointed, offload", "by_accelerate", {"offload": True}, model="checkpointed"
        ),
        Job("halves after forward", "fsdp2", {"halves": True}, between="evaluate"),
        Job("fsdp2 and tp reduce each", "fsdp2", TP, policy="each"),
        Job("fsdp2 and tp, uneven", "fsdp2", TP, model="uneven", data="uneven"),
        Job("fsdp2 and tp, unfrozen", "fsdp2", TP, model="frozen", between="unfreeze"),
        Job("fsdp2 and tp, sequences", "fsdp2", {**TP, "sequence": True}),
        Job("tp of transformers", "at_load_time", {"tp_size": 4}),
        Job("fsdp1, hybrid", "fsdp1", {"strategy": "HYBRID_SHARD"}),
        Job("fsdp1, hybrid, flat", "fsdp1", {"strategy": "HYBRID_SHARD", "original": False}),
    ],
}

EAGER = "aot_eager"
COMPILED = {  # last in a launch: dynamo leaves much behind to be searched through
    1: [
        Job("compiled", "single", {"backend": EAGER}, steps=5, interval=2),
    ],
    2: [
        Job("compiled in ddp", "ddp", {"inner": EAGER}, steps=4, interval=2),
        Job("compiled in fsdp2", "fsdp2", {"inner": EAGER}, steps=4, interval=2),
        Job("compiled fsdp2", "fsdp2", {"outer": EAGER}),
    ],
    4: [],
}

REFUSED = {
    2: [
        Job("fsdp1, some frozen", "fsdp1", model="frozen"),
        Job("fsdp1, lora", "fsdp1", model="lora"),
    ]
}

# A gradient that one process can hold, and whose sum in fp16 is infinite.
OVERFLOWING = {
    2: [Job("overflow", "ddp", {"fp16": True}, loss_scale=2.0**20, steps=1)],
}

# What these tests are to notice.
WRONG = {
    2: [
        Job("one process twice", "ddp", fault="one process twice"),
        Job("shards left out", "fsdp2", fault="shards left out"),
        Job("copies left out", "fsdp2", TP, fault="copies left out"),
        Job("hooks on shards", "fsdp2", fault="hooks on shards"),
        Job("hooks that round", "ddp", fault="hooks that round"),
    ]
}

MEASURED = {n: LAYOUTS[n] + VARIANTS[n] + COMPILED[n] for n in (1, 2, 4)}


def on_processes(jobs: dict[int, list[Job]]) -> Any:
    cases = [
        pytest.param(processes, job, id=f"{job.name} on {processes}")
        for processes in jobs
        for job in jobs[processes]
    ]
    return pytest.mark.parametrize(("processes", "job"), cases)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What was seen, by number of processes, job and process."""
    found = {}
    for processes in (1, 2, 4):
        folder = tmp_path_factory.mktemp(f"on{processes}")
        for ties in TIES:
            MODELS[ties]().save_pretrained(folder / ties)
        jobs = [
            job
            for kind in (REFUSED, OVERFLOWING, WRONG, MEASURED)
            for job in kind.get(processes, [])
        ]
        found[processes] = launch(processes, jobs, folder)
    return found


# ------------------------------------------------------------------------------------- reference


def bare_model(job, weights, step):
    """The model of a job on one process: in float64, or in whatever precision is in question."""
    model = MODELS[job.model]()
    model.load_state_dict(weights)
    if step and job.between == "unfreeze":
        model.requires_grad_(True)
    if step and job.between == "freeze":
        freeze(model)
    if job.precision == "float32":
        return model.double()
    if job.precision == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    return model


def mean_loss(model, batch):
    return model(**batch).loss


_known: dict[Any, dict[str, float]] = {}


def truth_of(job, weights, step):
    """Of one step with the weights that it began with; once for all that began with the same."""
    told = hashlib.sha256(b"".join(value.numpy().tobytes() for value in weights.values()))
    changed = step and job.between in ("freeze", "unfreeze")
    key = told.digest(), step, changed, job.model, job.data, job.loss, job.precision
    if key not in _known:
        batches = batches_of(job.data, step)
        taking_part = [(b, w) for b, w in zip(batches, weights_of(job, batches), strict=True) if w]
        with precision(job.precision):
            gradients = reference.micro_batch_gradients(
                bare_model(job, weights, step), [batch for batch, _ in taking_part], mean_loss
            )
        _known[key] = reference.moments(gradients, [w for _, w in taking_part], SAMPLES)
    return _known[key]


def truths_of(job, found):
    steps = range(0, job.steps, job.interval)
    return [
        truth_of(job, weights, k) for weights, k in zip(found[0]["weights"], steps, strict=True)
    ]


def found_in(seen, processes, job):
    found = seen[processes][job.name]
    for process in found:
        assert "error" not in process, process["trace"]
    return found


def relative_of(job):
    """fp16 rounds what is exchanged by up to 2^-11 an element, at random and by the processor.

    Over some thousand elements that is a standard error of 1e-5 in their sum of squares.
    """
    return {"S": 1e-6, "L": 4e-5 if job.options.get("fp16") else 1e-6}


def distances(moments, truth, relative):
    """Of S, L and both estimates, in units of what is tolerated: of S and L, that of either."""
    spread = 1 / (moments.workers - 1)
    small, big = relative["S"] * truth["S"], relative["L"] * truth["L"]
    return {
        "S": abs(moments.small_sq_norm - truth["S"]) / small,
        "L": abs(moments.big_sq_norm - truth["L"]) / big,
        "noise_trace": abs(moments.noise_trace - truth["noise_trace"])
        / (SAMPLES * spread * (small + big)),
        "grad_sq_norm": abs(moments.grad_sq_norm - truth["grad_sq_norm"])
        / (big + spread * (small + big)),
    }


def moments_in(process):
    return [GradientMoments(**values) for values in process["moments"]]


# ----------------------------------------------------------------------------------------- tests


@on_processes(MEASURED)
def test_the_moments_are_those_of_the_formulas_on_every_process(seen, processes, job):
    found = found_in(seen, processes, job)
    truths = truths_of(job, found)
    assert len(truths) == len(range(0, job.steps, job.interval))
    for process in found:
        for moments, truth in zip(moments_in(process), truths, strict=True):
            assert moments.workers == (3 if job.data == "one without targets" else 4)
            assert max(distances(moments, truth, relative_of(job)).values()) < 1


@on_processes(MEASURED)
def test_all_processes_decide_alike_and_as_the_formulas_do(seen, processes, job):
    found = found_in(seen, processes, job)
    decisions = Decisions()
    for step, truth in enumerate(truths_of(job, found)):
        size, reason, statistic = decisions.after(
            GradientMoments(
                workers=found[0]["moments"][step]["workers"],
                global_batch_size=SAMPLES,
                small_sq_norm=truth["S"],
                big_sq_norm=truth["L"],
            )
        )
        for process in found:
            assert process["moments"] == found[0]["moments"]
            assert process["decisions"] == found[0]["decisions"]
            assert process["decisions"][step][:2] == (size, reason)
            assert process["decisions"][step][2] == (
                None if statistic is None else pytest.approx(statistic, rel=1e-3)
            )


@pytest.mark.parametrize("ties", TIES)
def test_the_decision_does_not_depend_on_who_trains_what(seen, ties):
    found = {
        (processes, job.name): [decision[:2] for decision in process["decisions"]]
        for processes, jobs in LAYOUTS.items()
        for job in jobs
        if job.model == ties
        for process in found_in(seen, processes, job)
    }
    expected = found[1, f"single, {ties}"]
    assert [size for size, _ in expected] == [8, 16, 32]
    assert len(found) == 14
    assert all(decisions == expected for decisions in found.values())


@on_processes(MEASURED)
def test_gradients_and_weights_are_bitwise_those_without_the_probe(seen, processes, job):
    for process in found_in(seen, processes, job):
        assert len(process["digests"]) == 2 * job.steps
        assert len(set(process["digests"])) == 2 * job.steps
        assert process["bitwise"]


@on_processes(MEASURED)
def test_hooks_are_on_in_the_with_alone(seen, processes, job):
    for process in found_in(seen, processes, job):
        for before, inside, after in zip(*[iter(process["hooks"])] * 3, strict=True):
            assert before == after == process["hooks"][0]
            assert inside > before


@on_processes(COMPILED)
def test_hooks_that_come_and_go_compile_nothing_anew(seen, processes, job):
    for process in found_in(seen, processes, job):
        assert process["graphs"] == process["bare graphs"] > 0


@on_processes(REFUSED)
def test_a_unit_of_fsdp1_of_which_only_a_part_is_trained_is_refused(seen, processes, job):
    for process in seen[processes][job.name]:
        assert "ValueError" in process["error"]
        assert "must be all trainable or all frozen" in process["error"]


@on_processes(OVERFLOWING)
def test_a_sum_that_overflows_is_told_and_no_error(seen, processes, job):
    """As under a gradient scaler, which then skips the step."""
    found = found_in(seen, processes, job)
    [truth] = truths_of(job, found)
    for process in found:
        [moments] = moments_in(process)
        assert not moments.is_finite
        assert moments.small_sq_norm == pytest.approx(truth["S"], rel=1e-6)


# ------------------------------------------------------------------------- that they can fail


@pytest.mark.parametrize(("name", "wrong"), [("one process twice", "S"), ("shards left out", "L")])
def test_a_share_that_is_counted_wrong_is_noticed(seen, name, wrong):
    job = next(job for job in WRONG[2] if job.name == name)
    found = found_in(seen, 2, job)
    for process in found:
        [moments, *_] = moments_in(process)
        [truth, *_] = truths_of(job, found)
        assert distances(moments, truth, relative_of(job))[wrong] > 1e5


def test_copies_that_are_counted_as_ranks_are_noticed(seen):
    job = next(job for job in WRONG[2] if job.name == "copies left out")
    for process in found_in(seen, 2, job):
        assert {moments.workers for moments in moments_in(process)} == {8}


def test_hooks_on_shards_see_nothing(seen):
    for process in seen[2]["hooks on shards"]:
        assert "No gradient reached the trainable parameters" in process["error"]


def test_a_gradient_off_by_one_rounding_is_noticed(seen):
    for process in seen[2]["hooks that round"]:
        assert not process["bitwise"]
