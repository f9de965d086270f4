"""The attribution of a step's time and of what devices did, on steps and samples made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hybridpar.errors import HybridparError
from hybridpar.monitor.record import Gap, GpuSample, to_line
from hybridpar.planning.timeline import Flight
from hybridpar.report.attribution import attribute
from hybridpar.report.comparison import compare
from hybridpar.report.device_use import UNKNOWN, DeviceUse, Schedule, Stage, unmixed
from hybridpar.report.kernels import Kernel, KernelUse, RankKernels, swept
from hybridpar.report.parts import Parts, stage_parts, stages_of
from tests.support.reports import SLOWER, run_of
from tests.unit.test_course import by_hand, find, plan_of, predicted

FRONT, TAIL = (0, 0), (0, 2)


# Times


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_parts_of_every_stage_are_the_step(replicas: int) -> None:
    for course in predicted(plan_of(replicas)):
        parts = stage_parts(course)
        assert [own.step_s for own in parts] == pytest.approx([course.length_s] * len(parts))
        for position, own in zip(course.program.positions, parts, strict=True):
            others = {r for p in course.program.positions if p is not position for r in p.ranks}
            assert own.busy_s > 0
            if others.isdisjoint(position.ranks):
                assert own.other_s == pytest.approx(0.0, abs=1e-9), "a simulated rank computes or waits"
            else:
                assert own.other_s > 0


def test_a_wait_is_bubble_until_all_have_started_and_communication_from_then_on() -> None:
    (course,) = predicted(plan_of())
    program = course.program
    sent = next(
        o for o in program.operations if o.kind == "send" and o.content == "activation" and o.ranks[1] == 2
    )
    times = {
        find(program, 2, "wait", operation=sent.index): (1.0, 5.0),
        find(program, 2, "forward"): (5.0, 8.0),
        find(program, sent.ranks[0], "wait", operation=sent.index): (6.0, 6.5),
    }
    made = replace(by_hand(program, times, (Flight(sent.index, 3.5, 5.0),)), inputs_s=(0.5, 1.5, 0.0, 0.0))
    front, middle, tail = stage_parts(made)
    assert middle == Parts(3.0, pytest.approx(1.5), pytest.approx(2.5), 0.0, pytest.approx(3.0))
    assert front == Parts(0.0, 0.0, pytest.approx(0.25), pytest.approx(1.0), pytest.approx(8.75)), "the sender's"
    assert tail == Parts(0.0, 0.0, 0.0, 0.0, 10.0)
    assert middle.share("bubble") == pytest.approx(0.25)
    assert Parts(0, 0, 0, 0, 0).share("busy") is None


def test_every_action_is_for_a_stage_of_its_rank() -> None:
    (course,) = predicted(plan_of())
    for rank, actions in enumerate(course.program.actions):
        stages = stages_of(course.program, rank)
        assert len(stages) == len(actions)
        for stage in stages:
            assert stage is not None
            assert rank in course.program.positions[stage].ranks


def test_predicted_and_measured_are_told_by_stage() -> None:
    run = run_of()
    comparison = compare(run)
    assert comparison is not None
    found = attribute(run, comparison)
    assert found.predicted_step_s == comparison.predicted[0].length_s
    assert found.measured_step_s == comparison.measured[0].length_s
    assert [(s.stage, s.ranks, s.micro_batch, s.alone) for s in found.stages] == [
        ("front", (0, 1), 3, False),
        ("middle 0", (2,), 4, True),
        ("tail", (1, 3), 6, False),
    ]
    for stage in found.stages:
        assert stage.measured.busy_s == pytest.approx(SLOWER * stage.predicted.busy_s)
        waited_s = [p.communication_s + p.bubble_s for p in (stage.predicted, stage.measured)]
        assert waited_s[1] == pytest.approx(SLOWER * waited_s[0])
        assert stage.use is UNKNOWN
        assert stage.kernels is None
    assert len({stage.stage for stage in found.stages}) == len(found.stages)


def test_traces_of_a_stages_ranks_are_put_together(tmp_path: Path) -> None:
    run = run_of(str(tmp_path))
    comparison = compare(run)
    assert comparison is not None
    stages: list[dict[str, KernelUse]] = [
        {"front": use(2.0, 0.2)},
        {"front": use(6.0, 0.6), "tail": use(1.0, 0.9)},
    ]
    run = replace(
        run, traces=tuple(RankKernels(k, "plan", "kineto", (21,), KernelUse(), s) for k, s in enumerate(stages))
    )
    found = attribute(run, comparison)
    front, middle, tail = (s.kernels for s in found.stages)
    assert front is not None
    assert front.occupancy == pytest.approx((2 * 0.2 + 6 * 0.6) / 8)
    assert front.busy == pytest.approx(8.0 / 20.0)
    assert middle is None
    assert tail is not None
    assert tail.busy == pytest.approx(0.1), "only one of its ranks was traced"


def use(busy_s: float, occupancy: float) -> KernelUse:
    return swept([Kernel(0.0, busy_s, "a", occupancy)], 0.0, 10.0)[0]


# Devices


def sample(start_s: float, end_s: float, **figures: float | None) -> GpuSample:
    sources = {name: "gpm" for name, value in figures.items() if value is not None}
    return GpuSample(end_s, "a", 0, "GPU-1", **figures, window_s=end_s - start_s, sources=sources)  # type: ignore[arg-type]


def schedule(**busy: Sequence[tuple[float, float]]) -> Schedule:
    stages: Mapping[str, Stage] = {"front": FRONT, "tail": TAIL}
    return Schedule(((0.0, 100.0),), {stages[name]: times for name, times in busy.items()})


def test_stages_that_share_a_device_are_told_apart_by_their_schedule() -> None:
    """Window 1: front for 0.8 of it, tail for 0.2; window 2: 0.3 and 0.5. Front at 0.4, tail at 0.9."""
    samples = [
        sample(0.0, 10.0, occupancy=0.4 * 0.8 + 0.9 * 0.2, tensor_activity=0.1 * 0.8),
        sample(10.0, 20.0, occupancy=0.4 * 0.3 + 0.9 * 0.5, tensor_activity=0.1 * 0.3),
        sample(99.0, 109.0, occupancy=0.0, tensor_activity=1.0),  # reaches beyond the recorded steps
    ]
    found = unmixed(samples, schedule(front=[(0.0, 8.0), (10.0, 13.0)], tail=[(8.0, 10.0), (14.0, 19.0)]))
    assert found[FRONT].occupancy == pytest.approx(0.4)
    assert found[TAIL].occupancy == pytest.approx(0.9)
    assert found[FRONT].tensor_activity == pytest.approx(0.1)
    assert found[TAIL].tensor_activity == pytest.approx(0.0)
    assert found[FRONT].dram_activity is None
    assert found[FRONT].windows == 2
    assert found[FRONT].sources == {"occupancy": "gpm, timeline", "tensor_activity": "gpm, timeline"}


def test_windows_in_which_all_stages_had_the_same_share_tell_nothing() -> None:
    samples = [sample(0.0, 10.0, occupancy=0.5), sample(10.0, 20.0, occupancy=0.5)]
    alike = schedule(front=[(0.0, 4.0), (10.0, 14.0)], tail=[(4.0, 8.0), (14.0, 18.0)])
    assert unmixed(samples, alike) == {FRONT: DeviceUse(), TAIL: DeviceUse()}
    assert unmixed(samples[:1], alike)[FRONT].occupancy is None


def test_longer_windows_count_more_and_what_cannot_be_is_not_believed() -> None:
    long, short = sample(0.0, 30.0, occupancy=0.2), sample(30.0, 40.0, occupancy=0.6)
    (found,) = unmixed([long, short], schedule(front=[(0.0, 40.0)])).values()
    assert found.occupancy == pytest.approx((30 * 0.2 + 10 * 0.6) / 40)
    (found,) = unmixed([sample(0.0, 10.0, occupancy=0.9)], schedule(front=[(0.0, 5.0)])).values()
    assert found.occupancy is None, "1.8 while busy"
    (found,) = unmixed([sample(0.0, 10.0, occupancy=0.51)], schedule(front=[(0.0, 5.0)])).values()
    assert found.occupancy == 1.0, "1.02 is noise"


def test_a_device_with_one_stage_has_the_samples_of_the_whole_run() -> None:
    outside = [
        sample(200.0, 210.0, occupancy=0.3, graphics_activity=0.5),
        sample(210.0, 230.0, occupancy=0.2, graphics_activity=1.0, dram_activity=0.4),
        sample(230.0, 240.0, occupancy=0.0, graphics_activity=0.0),
    ]
    (found,) = unmixed(outside, schedule(front=[(0.0, 5.0)])).values()
    assert found.occupancy == pytest.approx((0.3 * 10 + 0.2 * 20) / (5 + 20))
    assert found.dram_activity == pytest.approx(0.4)
    assert found.tensor_activity is None
    assert found.sources["occupancy"] == "gpm, whole run"
    both = unmixed(outside, schedule(front=[(0.0, 5.0)], tail=[(5.0, 9.0)]))
    assert both == {FRONT: DeviceUse(), TAIL: DeviceUse()}


def test_samples_of_a_runs_folder_meet_its_timeline_on_one_clock(tmp_path: Path) -> None:
    """Rank 2 has the middle for itself; its clock began 1000 s after the epoch; the GPU of rank 0 is another's."""
    run = run_of(str(tmp_path))
    timings = [replace(r, host="a", gpu=f"GPU-{r.rank}", epoch_s=1000.0) for r in run.timings]
    run = replace(run, timings=tuple(timings))
    comparison = compare(run)
    assert comparison is not None
    step = timings[2].steps[0]
    begin_s = 1000.0 + step.start_s
    busy = comparison.measured[0].computations(2)
    one = GpuSample(begin_s + step.length_s, "a", 2, "GPU-2", occupancy=0.1, window_s=step.length_s)
    write(tmp_path / "monitor.jsonl", Gap(0.0, "a", "none"), one, replace(one, host="b", occupancy=0.9))
    found = attribute(run, comparison)
    stages = {stage.stage: stage for stage in found.stages}
    middle = stages["middle 0"]
    assert middle.use.occupancy == pytest.approx(0.1 * step.length_s / sum(t.seconds for t in busy), rel=1e-3)
    assert stages["front"].use == DeviceUse()
    (tmp_path / "monitor-1.jsonl").write_text("nonsense\n")
    with pytest.raises(HybridparError, match=r"monitor-1.jsonl:1 is not JSON"):
        attribute(run, comparison)


def write(path: Path, *records: GpuSample | Gap) -> None:
    path.write_text("".join(map(to_line, records)))
