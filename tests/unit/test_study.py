"""The batch study: what is seen of layers on a CPU and in a GPU's trace, and how it is told."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hybridpar import watcher
from hybridpar.config import compose
from hybridpar.errors import ConfigError, ProfileError
from hybridpar.monitor.gpus import Gpu, Gpus
from hybridpar.monitor.source import Figures as Counters
from hybridpar.profiling import watch as watching
from hybridpar.profiling.measure import measure
from hybridpar.profiling.record import LayerProfile, Profile
from hybridpar.profiling.study import DeviceUse, LayerUse, Study
from hybridpar.profiling.watch import CpuWatch, Pass, Seen
from hybridpar.report.study import FILES, Part, curve, draw, parts_of, show
from hybridpar.watcher import GpuWatch, seen_in
from tests.support.chains import convolutional, traced
from tests.support.command import run
from tests.support.plans import make_plan
from tests.unit.test_profile_cli import NARROW

SIZES = (1, 2, 4)


class Scripted:
    """Sees of every layer what it is told to."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.sources, self.gaps = seen, {"utilisation": "kineto"}, ("a gap",)
        self.passes: list[int] = []

    def layers(self, run: Pass, count: int, passes: int) -> list[Seen]:
        del run
        self.passes.append(passes)
        return [self.seen] * count

    def device(self, run: Callable[[], object]) -> dict[str, float | None]:
        run()
        return {"graphics_activity": 0.9, "tensor_activity": None}


def measured(watch: watching.Watch, budget_s: float = 30.0) -> tuple[Profile, list[str]]:
    model, notes = traced(convolutional()), list[str]()
    found = measure(
        model.modules,
        model.chain,
        micro_batches=SIZES,
        fractions=(1.0,),
        budget_s=budget_s,
        report=notes.append,
        watch=watch,
    )
    return replace(found, described=model.chain), notes


# Measuring


def test_on_a_cpu_utilisation_is_that_of_its_thread_and_occupancy_is_unknown(tmp_path: Path) -> None:
    profile, notes = measured(CpuWatch())
    study = profile.study
    assert study is not None
    assert study.sources == {"utilisation": "cpu time"}
    for use in study.layers:
        assert use.occupancy == use.below_half == (None,) * 3
    assert any(value is not None for use in study.layers for value in use.utilisation)
    assert study.device == DeviceUse(*[(None,) * 3] * 4)
    assert any(note.startswith("occupancy is unknown: a CPU has none") for note in notes)
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


def test_what_is_seen_is_put_down_by_layer_and_size() -> None:
    watch = Scripted(Seen(busy_s=1.0, wall_s=4.0, occupancy=0.3, below_half=0.6))
    profile, notes = measured(watch)
    assert profile.study is not None
    for use in profile.study.layers:
        assert use == LayerUse((0.25,) * 3, (0.3,) * 3, (0.6,) * 3)
    assert profile.study.device.graphics_activity == (0.9,) * 3
    assert profile.study.device.tensor_activity == profile.study.device.dram_activity == (None,) * 3
    assert "a gap" in notes
    assert len(watch.passes) == 3
    assert all(1 <= passes <= watching.MOST_PASSES for passes in watch.passes)


def test_the_time_of_a_layer_is_its_timed_one_where_the_watch_knows_none() -> None:
    assert Seen(busy_s=1.0).utilisation(timed_s=4.0) == 0.25
    assert Seen(busy_s=5.0).utilisation(timed_s=4.0) == 1.0, "a rounding of clocks"
    assert Seen(busy_s=0.0).utilisation(timed_s=1e-7) is None, "noise"


def test_watching_ends_with_the_budget_and_says_from_where_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_COST", 1e9)
    watch = Scripted(Seen(1.0, 2.0))
    profile, notes = measured(watch)
    assert profile.study is not None
    for use in profile.study.layers:
        assert use.utilisation == (0.5, None, None)
    assert profile.study.device.graphics_activity == (0.9, None, None)
    (note,) = (n for n in notes if "from micro-batch 2 on" in n)
    assert "raise profile.budget_s, or name fewer batches" in note


def test_layers_that_are_timed_one_by_one_are_watched_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model does not fit into memory."""
    from hybridpar.profiling import rounds  # noqa: PLC0415

    need = rounds.need_bytes

    def lacking(job: Any, active: Any, samples: int, item_bytes: int) -> float:
        return 1e18 if len(next(iter(job)).layers) > 1 else need(job, active, samples, item_bytes)

    monkeypatch.setattr(rounds, "need_bytes", lacking)
    profile, _ = measured(Scripted(Seen(1.0, 2.0)))
    assert profile.study is not None
    assert all(use.utilisation[0] == 0.5 for use in profile.study.layers)
    assert profile.study.device.graphics_activity == (None,) * len(profile.micro_batches)


# A GPU's trace, by hand: two layers; marks at 0, 10, 20, 30, ... us


def traced_kernel(
    name: str, ts: float, dur: float, launched: float, occupancy: float | None
) -> list[dict[str, Any]]:
    number = int(ts * 1000)
    args = {"correlation": number} | ({} if occupancy is None else {"est. achieved occupancy %": occupancy})
    return [
        {
            "ph": "X",
            "cat": "cuda_runtime",
            "name": "launch",
            "ts": launched,
            "dur": 1,
            "args": {"correlation": number},
        },
        {"ph": "X", "cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args},
    ]


def trace_by_hand(*, occupied: bool = True) -> dict[str, Any]:
    """Forward of layer 0 at 0..10, of layer 1 at 10..20; backward of 1 at 30..40, of 0 at 40..50."""
    marks = [
        {"ph": "X", "cat": "user_annotation", "name": f"hybridpar/mark/{i}", "ts": at, "dur": 0}
        for i, at in enumerate((0, 10, 10, 20, 30, 40, 50))
    ]
    figure = {1: 20.0, 2: 80.0, 3: 40.0} if occupied else {}
    kernels = [
        *traced_kernel("conv", 100, 10, launched=5, occupancy=figure.get(1)),
        *traced_kernel("relu", 110, 20, launched=15, occupancy=figure.get(2)),
        *traced_kernel("relu_backward", 130, 20, launched=35, occupancy=figure.get(2)),
        *traced_kernel("conv_backward", 150, 30, launched=45, occupancy=figure.get(3)),
        *traced_kernel("of nobody", 200, 30, launched=70, occupancy=figure.get(3)),
    ]
    return {"traceEvents": [*marks, *kernels]}


SPANS = [(0.0, 1.0), (5.0, 6.0), (2.0, 3.0), (4.0, 5.0)]
"""Forward and backward of layer 0, then of layer 1, by the numbers of their marks."""


def test_kernels_are_of_the_layer_that_launched_them() -> None:
    first, second = seen_in(trace_by_hand(), [SPANS], 2)
    assert first.busy_s == pytest.approx(40e-6)
    assert first.occupancy == pytest.approx((10 * 0.2 + 30 * 0.4) / 40)
    assert first.below_half == pytest.approx(1.0)
    assert second.busy_s == pytest.approx(40e-6)
    assert second.occupancy == pytest.approx(0.8)
    assert second.below_half == 0.0
    assert first.wall_s is None
    assert first.utilisation(timed_s=80e-6) == pytest.approx(0.5)


def test_a_trace_without_occupancy_gives_none_and_one_without_kernels_nothing() -> None:
    assert [s.occupancy for s in seen_in(trace_by_hand(occupied=False), [SPANS], 2)] == [None, None]
    marks_only = {"traceEvents": [e for e in trace_by_hand()["traceEvents"] if e["cat"] == "user_annotation"]}
    assert seen_in(marks_only, [SPANS], 3) == [Seen(0.0)] * 3


class StubProfile:
    """torch's profiler, whose trace is made by hand."""

    trace: dict[str, Any]

    def __init__(self, **_: object) -> None: ...

    def __enter__(self) -> StubProfile:
        return self

    def __exit__(self, *_: object) -> None: ...

    def export_chrome_trace(self, path: str) -> None:
        Path(path).write_text(json.dumps(self.trace))


class Meter:
    source = "gpm"

    def read(self, time_s: float) -> Counters:
        del time_s
        return {"graphics_activity": 0.8, "occupancy": 0.2, "tensor_activity": 0.1, "dram_activity": 0.3}

    def close(self) -> None: ...


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> GpuWatch:
    monkeypatch.setattr(watcher, "gpu_uuid", lambda _: "GPU-1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(watcher, "profile", StubProfile)
    monkeypatch.setattr(watcher, "open_nvml", lambda _: Gpus([Gpu(0, "GPU-1", (Meter(),))], []))
    StubProfile.trace = trace_by_hand()
    return GpuWatch(torch.device("cuda", 0))


def spans_of(clock: Any) -> list[tuple[Any, Any]]:
    marks = [clock.mark() for _ in range(7)]
    return [(marks[int(begin)], marks[int(end)]) for begin, end in SPANS]


def test_a_gpu_is_watched_by_profiler_and_counters(gpu: GpuWatch) -> None:
    seen = gpu.layers(spans_of, 2, passes=1)
    assert [s.occupancy for s in seen] == [pytest.approx(0.35), pytest.approx(0.8)]
    found = gpu.device(lambda: None)
    assert found["graphics_activity"] == 0.8
    assert found["occupancy_while_busy"] == pytest.approx(0.25)
    assert gpu.sources == {"utilisation": "kineto", "occupancy": "kineto", "device": "gpm"}
    assert not gpu.gaps


def test_what_a_gpu_does_not_tell_is_said(gpu: GpuWatch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "open_nvml", lambda _: watcher.Unavailable("no driver"))
    StubProfile.trace = trace_by_hand(occupied=False)
    gpu.layers(spans_of, 2, passes=1)
    assert gpu.device(lambda: None) == {}
    assert gpu.sources == {"utilisation": "kineto"}
    assert gpu.gaps == (
        "occupancy is unknown: the trace's kernels do not tell it",
        "the GPU's counters are unknown: no driver",
    )


@pytest.mark.gpu
def test_a_real_gpu_tells_utilisation_and_occupancy() -> None:
    model = traced(convolutional())
    watch = GpuWatch(torch.device("cuda", 0))
    profile = measure(model.modules, model.chain, "cuda", micro_batches=(16,), fractions=(1.0,), watch=watch)
    assert profile.study is not None
    assert profile.study.sources["occupancy"] == "kineto"
    known = [use.occupancy[0] for use in profile.study.layers if use.occupancy[0] is not None]
    assert known
    assert all(0 < value <= 1 for value in known)


# The record


def by_hand(source: str = "kineto") -> Profile:
    """Two layers at two sizes: the first takes 1 and 2 s, busy for half of it, the second 3 and 4 s, all busy."""
    layers = (
        LayerProfile("a", ((0.25, 0.5),), ((0.75, 1.5),)),
        LayerProfile("b", ((1.0, 2.0),), ((2.0, 2.0),)),
    )
    study = Study(
        (LayerUse((0.5, 0.5), (0.2, None), (1.0, None)), LayerUse((1.0, 1.0), (0.6, 0.8), (0.5, 0.0))),
        DeviceUse((0.9, 1.0), (0.3, None), (0.1, 0.2), (0.4, 0.5)),
        {"utilisation": source},
    )
    return Profile("c", "measured", "gpu", "float32", (1, 4), (1.0,), layers, 0.0, 0.0, study=study)


def test_a_study_fits_its_profile() -> None:
    profile = by_hand()
    assert profile.study is not None
    one = profile.study.layers[0]
    with pytest.raises(ProfileError, match=r"study\.layers: 1 for 2 layers"):
        replace(profile, study=replace(profile.study, layers=(one,)))
    wrong = replace(profile.study, layers=(one, replace(one, occupancy=(1.5, None))))
    with pytest.raises(ProfileError, match=r"study\.layers\[1\]\.occupancy: .* is not one of 0\.\.1 or null"):
        replace(profile, study=wrong)


# How it is told


def test_a_part_has_the_mean_over_the_time_that_a_figure_describes() -> None:
    whole = curve(by_hand(), Part("all", (0, 2)))
    assert whole.sample_s == (4.0, pytest.approx(6.0 / 4))
    assert whole.utilisation[0] == pytest.approx((1 * 0.5 + 3 * 1.0) / 4)
    assert whole.occupancy[0] == pytest.approx((0.5 * 0.2 + 3 * 0.6) / 3.5)
    assert whole.below_half[0] == pytest.approx((0.5 * 1.0 + 3 * 0.5) / 3.5)
    assert whole.occupancy[1] is None, "of a fifth of the busy time it is unknown"


def test_on_a_cpu_the_times_are_what_the_thread_worked() -> None:
    """Layer a worked 1 s within 2 s, layer b 3 s within 3 s."""
    whole = curve(by_hand("cpu time"), Part("all", (0, 2)))
    assert whole.utilisation[0] == pytest.approx((1 + 3) / (2 + 3))


def test_a_plan_tells_the_parts() -> None:
    model = traced(convolutional())
    from hybridpar.planning.plan import Segment, Stage  # noqa: PLC0415

    last = len(model.chain.layers)
    front = Stage("front", 1, (Segment((0, 1), (0, 1)),))
    middle = Stage("middle", 1, (Segment((1, 2), (0,)), Segment((2, last), (1,))))
    plan = make_plan(model.chain, front, middle, world=2, global_batch=4)
    assert parts_of(by_hand(), plan) == (
        Part("front", (0, 1)),
        Part("middle 0", (1, 2)),
        Part("middle 1", (2, last)),
    )


def test_tables_and_pictures_show_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    console = Console(width=160, file=io.StringIO())
    show(by_hand(), None, console)
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "whole model" in text
    assert "layers: occupancy while busy" in text
    assert "unknown" in text
    assert "utilisation: kineto" in text
    assert {p.name for p in draw(by_hand(), None, tmp_path)} == set(FILES)
    svg = (tmp_path / "occupancy.svg").read_text()
    assert "occupancy while busy" in svg
    assert "occupancy unknown" not in svg


# The command


def test_the_command_prints_draws_and_saves_the_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pictures = tmp_path / "profile.json", tmp_path / "pictures"
    said, noted = run(
        capsys,
        "profile",
        "occupancy=true",
        "batches=[1,2]",
        *NARROW,
        "profile.cache=false",
        "profile.fractions=[1.0]",
        "profile.budget_s=40",
        f"out={out}",
        f"pictures={pictures}",
    )
    profile = Profile.load(out)
    assert profile.micro_batches == (1, 2)
    assert profile.study is not None
    assert "utilisation: cpu time" in said
    assert "occupancy is unknown: a CPU has none" in noted
    assert "occupancy unknown" in (pictures / FILES[0]).read_text()
    planned, _ = run(capsys, "plan", "profile=from_file", f"profile.path={out}", "cluster=p100_4x1_40g")
    assert "predicted (measured)" in planned


def test_what_asks_for_no_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"out={tmp_path / 'profile.json'}"
    _, err = run(capsys, "profile", *NARROW, out, f"pictures={tmp_path}", code=2)
    assert "pictures: " in err
    assert "set occupancy=true" in err
    _, err = run(capsys, "profile", "occupancy=true", "batches=[4,2]", *NARROW, out, code=2)
    assert "profile.micro_batches: [4, 2] must ascend" in err
    with pytest.raises(ConfigError, match=r"profile\.occupancy: True is measured; use profile=measured"):
        replace(compose().profile, occupancy=True)
