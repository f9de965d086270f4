"""Sweeps over the kernels of a window, and traces of torch's profiler, made and counted by hand."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybridpar.errors import RecordError
from hybridpar.planning.compile import compile as compile_program
from hybridpar.report.kernels import Kernel, KernelUse, RankKernels, load, path_of, swept, together
from hybridpar.report.kineto import Request, digest, name_of, step_name, summed_up
from tests.unit.test_course import CHAIN, plan_of


def use(kernels: list[Kernel], end_s: float = 10.0) -> KernelUse:
    return swept(kernels, 0.0, end_s)[0]


def known(found: KernelUse) -> dict[int, float]:
    return {number: seconds for number, seconds in enumerate(found.histogram_s) if seconds}


# The sweep


def test_one_kernel_by_hand() -> None:
    found = use([Kernel(2.0, 6.0, "front", 0.25)])
    assert (found.window_s, found.kernels, found.busy_s, found.known_s) == (10.0, 1, 4.0, 4.0)
    assert found.busy == pytest.approx(0.4)
    assert found.occupancy == pytest.approx(0.25)
    assert found.occupancy_over_window == pytest.approx(0.1)
    assert found.below_half == 1.0
    assert known(found) == {2: 4.0}


def test_occupancies_of_kernels_that_overlap_add_up_to_one_at_most() -> None:
    """0-2 at 0.3, 2-4 at 0.3 + 0.2, 4-5 at 0.2 + 0.9, which is 1, 5-6 at 0.9; then idle."""
    found = use([Kernel(0.0, 4.0, "a", 0.3), Kernel(2.0, 5.0, "a", 0.2), Kernel(4.0, 6.0, "a", 0.9)])
    assert found.busy_s == pytest.approx(6.0)
    assert found.occupied_s == pytest.approx(2 * 0.3 + 2 * 0.5 + 1 * 1.0 + 1 * 0.9)
    assert found.below_half_s == pytest.approx(2.0), "0.5 itself is not below"
    assert known(found) == pytest.approx({3: 2.0, 5: 2.0, 9: 2.0})


def test_stages_that_share_a_device_have_their_own_kernels() -> None:
    device, stages = swept(
        [Kernel(0.0, 4.0, "front", 0.2), Kernel(3.0, 5.0, "tail", 0.6), Kernel(6.0, 7.0, None, 0.1)], 0.0, 10.0
    )
    front, tail = stages["front"], stages["tail"]
    assert (front.busy_s, tail.busy_s, device.busy_s) == (4.0, 2.0, 6.0)
    assert front.occupancy == pytest.approx(0.2)
    assert tail.occupancy == pytest.approx(0.6)
    assert device.occupied_s == pytest.approx(3 * 0.2 + 1 * 0.8 + 1 * 0.6 + 1 * 0.1)
    assert (front.below_half, tail.below_half) == (1.0, 0.0)
    assert front.window_s == tail.window_s == 10.0


def test_communication_stands_apart_and_is_exposed_where_nothing_is_computed() -> None:
    """Communication from 1 to 6, of which the tail's computation hides 3 to 5."""
    device, stages = swept(
        [
            Kernel(1.0, 4.0, "front", 0.9, True),
            Kernel(2.0, 6.0, "front", 0.9, True),
            Kernel(3.0, 5.0, "tail", 0.4),
        ],
        0.0,
        10.0,
    )
    assert (device.communication_s, device.exposed_s, device.busy_s) == (5.0, 3.0, 2.0)
    assert device.occupancy == pytest.approx(0.4)
    front = stages["front"]
    assert (front.communication_s, front.exposed_s, front.busy_s, front.kernels) == (5.0, 3.0, 0.0, 0)
    assert front.occupancy is None
    assert front.occupancy_over_window is None
    assert front.below_half is None
    assert stages["tail"].communication_s == 0.0


def test_where_an_occupancy_is_missing_it_is_unknown_and_not_zero() -> None:
    """Known from 0 to 2 only: from 2 to 4 another kernel runs whose occupancy nobody knows."""
    found = use([Kernel(0.0, 4.0, "a", 0.4), Kernel(2.0, 6.0, "a")])
    assert (found.busy_s, found.known_s) == (6.0, 2.0)
    assert found.occupancy == pytest.approx(0.4)
    assert found.occupancy_over_window == pytest.approx(0.4 * 0.6)
    nothing = use([Kernel(0.0, 4.0, "a")])
    assert nothing.busy == pytest.approx(0.4)
    assert (nothing.occupancy, nothing.occupancy_over_window, nothing.below_half) == (None, None, None)
    assert KernelUse().busy is None


def test_only_what_lies_in_the_window_counts() -> None:
    found = swept([Kernel(-5.0, 2.0, "a", 0.5), Kernel(9.0, 20.0, "a", 0.5), Kernel(11.0, 12.0, "a", 1.0)], 0, 10)[
        0
    ]
    assert (found.kernels, found.busy_s, found.window_s) == (2, 3.0, 10)
    assert use([Kernel(3.0, 3.0, "a", 0.5)]).kernels == 0


def test_many_sums_leave_no_rounding_behind() -> None:
    kernels = [Kernel(i, i + 10, "a", 0.1) for i in range(1000)]
    found = use(kernels, 2000.0)
    assert found.busy_s == 1009.0
    assert found.occupied_s == pytest.approx(1000 * 10 * 0.1)
    assert found.histogram_s[9] == pytest.approx(993.0)


def test_devices_are_put_together_by_time() -> None:
    one, two = use([Kernel(0.0, 1.0, "a", 0.2)]), use([Kernel(0.0, 3.0, "a", 0.6)])
    both = together([one, two])
    assert both.busy == pytest.approx(4.0 / 20.0)
    assert both.occupancy == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert both.below_half == pytest.approx(0.25)
    assert together([]) == KernelUse()


# Traces


def ranged(
    name: str, start_us: float, dur_us: float, category: str = "user_annotation", **args: Any
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start_us,
        "dur": dur_us,
        "pid": 1,
        "tid": 1,
        "args": args,
    }


def launched(number: int, at_us: float, start_us: float, dur_us: float, **args: Any) -> list[dict[str, Any]]:
    """A kernel that another thread launches, as autograd's does in a backward."""
    name = args.pop("name", "gemm")
    return [
        {**ranged("cudaLaunchKernel", at_us, 1.0, "cuda_runtime", correlation=number), "tid": 2},
        ranged(name, start_us, dur_us, "kernel", correlation=number, **args),
    ]


OCCUPANCY = "est. achieved occupancy %"


def gpu_trace() -> dict[str, Any]:
    """Step 20 is the first and does not count; step 21 lasts from 1000 to 2000 us.

    Kernels run later than they are launched, and the launch tells for which action they are.
    """
    return {
        "traceEvents": [
            ranged("hybridpar/step/20", 0, 900),
            ranged("hybridpar/step/21", 1000, 1000),
            ranged("hybridpar/front/micro-batch 0/forward", 1000, 100),
            ranged("hybridpar/tail/micro-batch 0/backward", 1100, 100),
            ranged("hybridpar/tail/micro-batch 0/start all_reduce of sum", 1120, 20),  # within the pass
            ranged("hybridpar/whole step/norm", 1200, 50),
            *launched(1, 1010, 1300, 200, **{OCCUPANCY: 25}),  # front, while the CPU is past its actions
            *launched(2, 1110, 1400, 200, **{OCCUPANCY: 60}),  # tail
            *launched(3, 1125, 1500, 300, name="ncclDevKernel_AllReduce_Sum_f32", **{OCCUPANCY: 100}),
            *launched(4, 1150, 1600, 100),  # tail, without an occupancy
            *launched(5, 1210, 1900, 50, **{OCCUPANCY: 50}),  # of the whole step
            *launched(6, 990, 800, 50, **{OCCUPANCY: 100}),  # of the step before
            ranged("memcpy", 1950, 10, "gpu_memcpy"),
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        ]
    }


def test_a_gpu_trace_by_hand() -> None:
    found = summed_up(gpu_trace(), 3, "plan")
    assert (found.rank, found.plan, found.source, found.steps) == (3, "plan", "kineto", (21,))
    front, tail, device = found.stages["front"], found.stages["tail"], found.device
    assert device.window_s == pytest.approx(1000e-6)
    assert front.busy_s == pytest.approx(200e-6)
    assert front.occupancy == pytest.approx(0.25)
    assert (tail.busy_s, tail.known_s) == pytest.approx((300e-6, 200e-6))
    assert tail.occupancy == pytest.approx(0.6)
    assert (tail.communication_s, tail.exposed_s) == pytest.approx((300e-6, 100e-6))
    assert device.busy_s == pytest.approx((400 + 50) * 1e-6)
    assert device.occupied_s == pytest.approx((100 * 0.25 + 100 * 0.85 + 100 * 0.6 + 50 * 0.5) * 1e-6)
    assert device.kernels == 4


def test_a_cpu_trace_has_operators_for_kernels_and_no_occupancy() -> None:
    events = [
        ranged("hybridpar/step/0", 0, 100),
        ranged("hybridpar/front/micro-batch 0/forward", 10, 30),
        ranged("aten::linear", 12, 20, "cpu_op"),
        ranged("aten::addmm", 14, 16, "cpu_op"),  # within the operator before
        ranged("hybridpar/front/micro-batch 0/wait send of gradient", 50, 30),
        ranged("aten::copy_", 55, 5, "cpu_op"),
        ranged("aten::add", 90, 5, "cpu_op"),  # of no action
    ]
    found = summed_up({"traceEvents": events}, 0, "plan")
    assert (found.source, found.steps) == ("cpu", (0,))
    front = found.stages["front"]
    assert front.busy_s == pytest.approx(20e-6)
    assert (front.occupancy, front.below_half) == (None, None)
    assert (front.communication_s, front.exposed_s) == pytest.approx((30e-6, 30e-6))
    assert found.device.busy_s == pytest.approx(20e-6)


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(RecordError, match="the trace of rank 2 holds no step of hybridpar"):
        summed_up({"traceEvents": [ranged("aten::add", 0, 1, "cpu_op")]}, 2, "plan")


def test_names_of_actions_tell_stage_micro_batch_and_phase() -> None:
    program = compile_program(plan_of(), CHAIN, 24, "train")
    names = {name_of(program, rank, a) for rank, own in enumerate(program.actions) for a in own}
    for said in (
        "hybridpar/front/micro-batch 2/forward",
        "hybridpar/middle 0/micro-batch 0/backward",
        "hybridpar/tail/update",
        "hybridpar/front/load",
        "hybridpar/middle 0/micro-batch 1/wait send of activation",
        "hybridpar/whole step/wait broadcast of metrics",
    ):
        assert said in names
    assert step_name(20) == "hybridpar/step/20"


def test_a_digest_keeps_the_trace_compressed_and_the_sums_beside_it(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    raw = tmp_path / "trace" / "rank3.raw"
    raw.write_text(json.dumps(gpu_trace()))
    record = digest(Request(str(raw), str(tmp_path), 3, "plan"))
    assert load(tmp_path, 4, "plan") == (record,)
    assert load(tmp_path, 4, "another plan") == load(tmp_path, 3, "plan") == ()
    assert {p.name for p in raw.parent.iterdir()} == {"rank3.json", "rank3.trace.json.gz"}
    with gzip.open(raw.parent / "rank3.trace.json.gz", "rt") as file:
        assert json.load(file) == gpu_trace()
    path_of(tmp_path, 3).write_text(json.dumps({"rank": 3}))
    with pytest.raises(RecordError, match=r"rank3.json.plan: missing"):
        load(tmp_path, 4, "plan")
    with pytest.raises(RecordError, match="schema 7 is not 1"):
        replace(RankKernels(0, "plan", "cpu", (1,), KernelUse()), schema=7)
