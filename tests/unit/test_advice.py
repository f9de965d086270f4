"""Advice is backed by what was measured, and predicts what the planner does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.advice.advise import advise
from hybridpar.advice.replan import Replanner
from hybridpar.config import compose, load
from hybridpar.errors import ConfigError
from hybridpar.planning.search import assess
from hybridpar.report.account import Account
from hybridpar.report.advice import Advice, Advised, Forecast, advice_finding
from hybridpar.report.comparison import compare
from hybridpar.report.kernels import KernelUse, RankKernels
from hybridpar.report.run import Run
from tests.support.advised import (
    ASKED,
    on_gpus,
    planned,
    sampled,
    simulated_run,
    summarised,
    waiting_for_samples,
)

FAST = "{latency_s: 1.0e-7, bytes_per_s: 1.0e+11}"
PIPELINE = (
    "plan=pipeline",
    "plan.middle.degree=4",
    f"cluster.links.node={FAST}",
    f"cluster.links.rack={FAST}",
    "cluster.device.overhead_s=1e-8",
)
"""Where starting work and messages cost next to nothing, small micro-batches are best."""


def told(run: Run) -> Advised:
    return advise(Account.of(run))


def of_kind(advised: Advised, kind: str) -> list[Advice]:
    return [advice for advice in advised.advices if advice.kind == kind]


# Micro-batches


@pytest.mark.parametrize(
    ("asked", "stage", "word"),
    [
        (("plan=front_tail", "plan.tail.micro_batch=4"), "tail", "larger"),
        (("plan=data_parallel", "plan.front.micro_batch=1"), "front", "larger"),
        (("plan=three_stage", "plan.middle.micro_batch=1"), "middle", "larger"),
        ((*PIPELINE, "plan.middle.micro_batch=64"), "middle", "smaller"),
    ],
    ids=["tail", "front", "middle", "smaller"],
)
def test_a_bad_micro_batch_is_named_and_whoever_does_as_advised_gets_what_was_predicted(
    tmp_path: Path, asked: tuple[str, ...], stage: str, word: str
) -> None:
    run = simulated_run(tmp_path, *asked)
    (advice,) = of_kind(told(run), "micro_batch")
    assert advice.stage == stage
    assert f"a {word} micro-batch" in advice.what
    (override,) = advice.overrides
    assert override.startswith(f"plan.{stage}.micro_batch=")
    followed = simulated_run(tmp_path, *asked, override)
    assert advice.effect.now_s == run.step_s
    assert advice.effect.then_s == followed.step_s
    assert advice.effect.gain > 0.02
    assert advice.effect.then_bytes == max(followed.plan.prediction.memory_bytes)  # type: ignore[union-attr]
    assert not [a for a in of_kind(told(followed), "micro_batch") if a.stage == stage]


def test_the_evidence_is_what_was_measured(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4")
    (advice,) = of_kind(told(run), "micro_batch")
    comparison = compare(run)
    assert comparison is not None
    spent = comparison.measured_stages[1].seconds
    measured = f"{(spent['forward'] + spent['backward']) * 1e3:.4g} ms"
    assert advice.evidence[0].startswith(f"in micro-batches of 4 a rank of the tail computed {measured} per step")


def test_a_plan_that_the_planner_chose_freely_is_not_criticised(tmp_path: Path) -> None:
    assert not told(simulated_run(tmp_path)).advices


def test_of_a_plan_from_a_file_the_advice_names_its_shape(tmp_path: Path) -> None:
    _, _, plan = planned("plan=front_tail", "plan.tail.micro_batch=4")
    plan.save(tmp_path / "saved.json")
    run = simulated_run(tmp_path, "plan=from_file", f"plan.path={tmp_path / 'saved.json'}")
    (advice,) = of_kind(told(run), "micro_batch")
    assert advice.overrides[0] == "plan=front_tail"
    assert advice.effect.then_s == simulated_run(tmp_path, *advice.overrides).step_s


def test_a_run_that_went_otherwise_than_predicted_is_told_beside_the_advice(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4")
    assert not told(run).remarks
    slow = replace(run, steps=replace(run.steps, step_s=2 * run.plan.prediction.step_s))  # type: ignore[union-attr]
    (remark,) = told(slow).remarks
    assert "believe in which direction predictions point, not how far" in remark
    assert not told(replace(slow, timings=())).remarks, "nothing is advised"


def test_a_plan_that_was_searched_for_long_is_not_searched_for_as_long_again(tmp_path: Path) -> None:
    _, _, plan = planned("plan=front_tail", "plan.tail.micro_batch=4")
    run = simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4")
    assert run.basis is not None
    for asked, searched in (("quick", "quick"), ("normal", "normal"), ("long", "normal"), ("exact", "normal")):
        config = compose([*ASKED, "plan=front_tail", f"plan.effort={asked}"])
        assert Replanner(plan, run.basis, config).asked.request.effort == searched


# Evidence that is missing


def test_without_a_timeline_nothing_is_said_of_micro_batches(tmp_path: Path) -> None:
    run = replace(simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4"), timings=())
    advised = told(run)
    assert not advised.advices
    assert any("micro-batches, waits and throttling: no timeline was recorded" in text for text in advised.lacking)
    assert any("train.timeline=[10,13]" in text for text in advised.lacking)


def test_a_run_that_cannot_be_planned_again_says_why(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4")
    assert told(replace(run, basis=None)).lacking[0].startswith("no simulated timeline: the run kept no")
    (tmp_path / "config.yaml").write_text("model: [")
    (lacking,) = told(run).lacking
    assert lacking.startswith("the run cannot be planned again: ")
    assert "config.yaml cannot be read" in lacking


def test_a_run_of_a_loop_of_ones_own_is_planned_again_by_its_plan_alone(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, "plan=front_tail", "plan.tail.micro_batch=4")
    (tmp_path / "config.yaml").unlink()
    (advice,) = of_kind(told(run), "micro_batch")
    assert advice.overrides[0] == "plan=front_tail"
    assert advice.effect.then_s == simulated_run(tmp_path, *advice.overrides, "plan.effort=normal").step_s


def test_a_configuration_is_read_back_as_it_was_composed(tmp_path: Path) -> None:
    config = compose([*ASKED, "plan=front_tail", "plan.tail.micro_batch=4"])
    path = tmp_path / "config.yaml"
    path.write_text(config.resolved)
    assert load(path) == config
    for text in ("a: [", "- 1"):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml .*; train again to have one"):
            load(path)


# Memory


def test_memory_that_is_left_makes_room_for_a_larger_batch(tmp_path: Path) -> None:
    run = summarised(simulated_run(tmp_path), share=0.1)
    (advice,) = of_kind(told(run), "memory")
    assert advice.overrides == ("train.global_batch=256",)
    assert "(10%)" in advice.evidence[0]
    followed = simulated_run(tmp_path, *advice.overrides)
    assert advice.effect.then_s == followed.step_s
    assert advice.effect.then_batch == 256
    assert advice.effect.gain == pytest.approx(4 * advice.effect.now_s / advice.effect.then_s - 1)


def test_full_memory_and_a_run_that_goes_on_get_no_larger_batch(tmp_path: Path) -> None:
    run = simulated_run(tmp_path)
    assert not told(summarised(run, share=0.9)).advices
    assert any("memory head-room" in text for text in told(run).lacking)


def test_a_batch_that_would_not_fit_by_what_was_measured_is_not_advised(tmp_path: Path) -> None:
    """Ranks used far more than predicted: twice the prediction might fit, twice what was measured does not."""
    run = summarised(simulated_run(tmp_path), share=0.59)
    advised = told(run)
    assert not advised.advices
    assert any("no larger global batch is predicted to fit" in text for text in advised.remarks)


# Waits

SLOW = ("cluster.links.rack.bytes_per_s=1e7",)
ALONE = ("cluster.nodes=[{devices: 1, count: 4}]",)


def test_who_waits_for_communication_is_told_what_sends_less(tmp_path: Path) -> None:
    asked = ("plan=data_parallel", *ALONE, *SLOW)
    run = simulated_run(tmp_path, *asked)
    found = of_kind(told(run), "communication")
    assert {a.overrides for a in found} == {("plan=auto",), ("optimizer.compression=bfloat16",)}
    for advice in found:
        assert "of the step for communication that nothing hid, most of it for the front" in advice.evidence[0]
        assert advice.effect.then_s == simulated_run(tmp_path, *asked, *advice.overrides).step_s
        assert advice.effect.gain > 0.02


def test_idle_ranks_of_a_pinned_pipeline_are_told_of_a_better_plan(tmp_path: Path) -> None:
    asked = (*PIPELINE, "plan.middle.micro_batch=64")
    run = simulated_run(tmp_path, *asked)
    (advice,) = of_kind(told(run), "bubble")
    assert "of the step for other ranks that had not come so far" in advice.evidence[0]
    assert advice.overrides == ("plan=auto", "plan.middle.degree=null", "plan.middle.micro_batch=null")
    assert advice.effect.then_s == simulated_run(tmp_path, *asked, *advice.overrides).step_s


def test_waiting_without_a_remedy_is_a_remark(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, *ALONE, *SLOW, "optimizer.compression=bfloat16")
    advised = told(run)
    assert not of_kind(advised, "communication")
    (remark,) = (text for text in advised.remarks if "for communication that nothing hid" in text)
    assert (
        "the planner knows no faster plan of this global batch; twice the bandwidth between nodes: step" in remark
    )


# Input


def test_who_waits_for_samples_is_told_how_many_cores_read_fast_enough(tmp_path: Path) -> None:
    run = simulated_run(tmp_path, "plan=data_parallel")
    assert run.step_s is not None
    rate = 16 / run.step_s
    run = waiting_for_samples(run, share=0.5, read_s=rate / 2.5)
    (advice,) = of_kind(told(run), "input")
    assert advice.overrides == ("data.workers=3",)
    assert "3 cores for each of 4 ranks" in advice.evidence[1]
    assert advice.effect.now_s == pytest.approx(1.5 * run.plan.prediction.step_s)  # type: ignore[union-attr]
    assert advice.effect.then_s == run.plan.prediction.step_s  # type: ignore[union-attr]
    assert not of_kind(told(waiting_for_samples(run, share=0.05, read_s=rate / 2.5)), "input")


def test_cores_that_compute_are_not_advised_to_read(tmp_path: Path) -> None:
    """Two ranks per host compute on CPUs and need three cores each for reading."""
    asked = ("plan=data_parallel", "cluster.device.kind=cpu")
    for cores, spare in ((2, False), (7, False), (8, True)):
        run = simulated_run(tmp_path, *asked, f"cluster.nodes=[{{devices: 2, count: 2, cores: {cores}}}]")
        assert run.step_s is not None
        advised = told(waiting_for_samples(run, share=0.5, read_s=16 / run.step_s / 2.5))
        assert bool(of_kind(advised, "input")) == spare
        assert any("a node's cores are busy with computing" in text for text in advised.remarks) != spare


def test_without_the_speed_of_the_loader_no_number_of_cores_is_named(tmp_path: Path) -> None:
    run = waiting_for_samples(simulated_run(tmp_path, "plan=data_parallel"), share=0.5, read_s=None)
    advised = told(run)
    assert not of_kind(advised, "input")
    assert any(text.startswith("input: reading ranks waited") for text in advised.lacking)


def test_enough_workers_are_not_advised_again(tmp_path: Path) -> None:
    run = waiting_for_samples(simulated_run(tmp_path, "plan=data_parallel", "data.workers=2"), 0.5, 1e9)
    advised = told(run)
    assert not of_kind(advised, "input")
    assert any("and 2 workers read: fewer cores are free" in text for text in advised.remarks)


# Devices


def test_throttled_gpus_are_named_with_what_full_clocks_would_give(tmp_path: Path) -> None:
    run = on_gpus(simulated_run(tmp_path, "plan=data_parallel"))
    held = [("thermal",), (), (), ()]
    sampled(run, throttle=held, sm_clock_hz=[0.8e9, 1e9, 1e9, 1e9], sm_clock_max_hz=1e9)
    (advice,) = of_kind(told(run), "throttled")
    assert advice.what == "cool the throttled GPUs"
    assert "1 GPU throttled; the worst, of rank 0, in 100% of its samples, mostly by thermal" in advice.evidence[0]
    assert not advice.overrides
    (_, subject, plan) = planned("plan=data_parallel")
    slowed = replace(
        subject.cluster, nodes=(replace(subject.cluster.nodes[0], speed=(0.8, 1.0)), *subject.cluster.nodes[1:])
    )
    assessed = assess(plan, subject.chain, subject.profile, slowed).prediction
    assert assessed is not None
    assert advice.effect.now_s == assessed.step_s
    assert advice.effect.then_s == run.step_s
    sampled(run, throttle=("application_clocks",), sm_clock_hz=0.8e9, sm_clock_max_hz=1e9)
    assert not of_kind(told(run), "throttled"), "somebody set these clocks"


LOW = ("plan=front_tail", "plan.tail.micro_batch=4", "plan.front.ranks=[0,1]", "plan.tail.ranks=[2,3]")


def test_a_half_empty_gpu_is_evidence_for_a_larger_micro_batch(tmp_path: Path) -> None:
    run = on_gpus(simulated_run(tmp_path, *LOW))
    figures = {"occupancy": 0.1, "graphics_activity": 0.5, "tensor_activity": 0.05, "dram_activity": 0.1}
    sampled(run, **figures)
    (advice,) = (a for a in of_kind(told(run), "micro_batch") if a.stage == "tail")
    assert advice.evidence[-1] == (
        "occupancy was 20% while it computed (gpm, whole run), tensor cores 10% and memory 20% active"
    )


def test_a_trace_tells_how_long_occupancy_was_low(tmp_path: Path) -> None:
    run = on_gpus(simulated_run(tmp_path, *LOW))
    used = KernelUse(window_s=10.0, kernels=5, busy_s=8.0, known_s=8.0, occupied_s=2.4, below_half_s=6.0)
    record = RankKernels(2, run.plan.fingerprint, "kineto", (1,), used, {"tail": used})
    run = replace(run, traces=(record,))
    seen = "occupancy was 30% while it computed (kineto) and below 50% for 75% of the time (kineto)"
    assert f"tail: {seen}, but not how active tensor cores and memory were" in told(run).lacking
    sampled(run, occupancy=0.1, graphics_activity=0.5, tensor_activity=0.05, dram_activity=0.1)
    (advice,) = (a for a in of_kind(told(run), "micro_batch") if a.stage == "tail")
    assert advice.evidence[-1].startswith(
        "occupancy was 20% while it computed (gpm, whole run) and below 50% for 75% of the time (kineto), tensor"
    )


def test_low_occupancy_is_no_fault_with_busy_tensor_cores_and_no_evidence_without_them(tmp_path: Path) -> None:
    run = on_gpus(simulated_run(tmp_path, *LOW))
    sampled(run, occupancy=0.1, graphics_activity=0.5, tensor_activity=0.4, dram_activity=0.1)
    advised = told(run)
    assert not any("occupancy" in text for a in advised.advices for text in a.evidence)
    assert any("no fault with its tensor cores 80% active" in text for text in advised.remarks)
    sampled(run, occupancy=0.1, graphics_activity=0.5)
    advised = told(run)
    assert not any("occupancy" in text for a in advised.advices for text in a.evidence)
    assert any("not how active tensor cores and memory were" in text for text in advised.lacking)
    sampled(run, utilisation=1.0)
    assert "tail: occupancy is in no sample that can be told apart" in " ".join(told(run).lacking)


# How it is told


def forecast(then_s: float) -> Forecast:
    return Forecast(1.0, then_s, 64, 64, 2**20, 2**21, "measured")


def test_advices_with_the_same_overrides_become_one_with_all_evidence() -> None:
    first = Advice("bubble", None, "do", ("a", "b"), ("plan=auto",), forecast(0.9))
    second = replace(first, kind="communication", evidence=("b", "c"))
    better = replace(first, overrides=("x=1",), effect=forecast(0.4))
    merged = Advised.merged([Advised((first,), ("r",), ("l",)), Advised((second, better), ("r",), ("l",))])
    assert [a.overrides for a in merged.advices] == [("x=1",), ("plan=auto",)]
    assert merged.advices[1].evidence == ("a", "b", "c")
    assert merged.remarks == ("r",)
    assert merged.lacking == ("l",)


def test_a_table_says_what_to_type_and_what_it_will_do() -> None:
    advice = Advice("memory", None, "do this", ("seen", "known"), ("x=1", "y=2"), forecast(0.8))
    found = advice_finding(Advised((advice,), ("a remark",), ("a timeline",)))
    assert found.rows == (
        ("1.", "do this"),
        ("type", "x=1 y=2"),
        ("predicted", "step 1 s → 800 ms (+25% samples/s), 1 MiB → 2 MiB, measured profile"),
        ("since", "seen"),
        ("", "known"),
    )
    assert found.notes == ("a remark", "not judged: a timeline")
    assert advice_finding(Advised()).notes == ("nothing that the planner predicts a gain for",)
    assert "2.5x the samples/s" in advice_finding(Advised((replace(advice, effect=forecast(0.4)),))).rows[2][1]
