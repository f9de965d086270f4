"""What a report says of stages' devices, of hosts and of their networks, as tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping

from hybridpar.monitor.summary import Summary
from hybridpar.report.attribution import Attribution, StageAttribution
from hybridpar.report.comparison import programs_of
from hybridpar.report.devices import gpu_name
from hybridpar.report.findings import MOST_ROWS, Finding
from hybridpar.report.recording import GpuRecord, HostRecord, Moved
from hybridpar.report.run import Run
from hybridpar.report.text import in_bytes, in_time, plural, spans
from hybridpar.report.traffic import Crossing, Flows, crossings, flows_of
from hybridpar.report.turns import Places, Turns, places_of
from hybridpar.report.wording import size

PARTS = ("busy", "communication", "bubble", "input", "other")
USE = ("occupancy", "tensor", "memory")
LOOPBACK = "lo"
MOST_RANKS = 16
"""Of the table of the network."""


def device_findings(run: Run, attribution: Attribution | None, turns: Mapping[int, Turns]) -> tuple[Finding, ...]:
    """Return the tables whose data the run has; :func:`lacking` says what it has not."""
    places = places_of(run)
    tables = (
        None if attribution is None else _attribution(attribution),
        _gpus(run, places, turns),
        _hosts(run),
        _network(run, places),
    )
    return tuple(table for table in tables if table is not None)


def lacking(run: Run) -> str | None:
    """Say in one sentence which data of devices is missing, and why; None where all is there."""
    recording = run.recording
    if recording is None:
        return "no monitor.jsonl with samples: train with monitor=auto, the default, for more than a second"
    if recording.gpus and not any(sum(gpu.while_busy) for gpu in recording.gpus):
        reasons = "; ".join(recording.summary.gaps) or "the samples hold none"
        return f"no occupancy of GPUs: {reasons}"
    return None


def _attribution(attribution: Attribution) -> Finding:
    several = any(stage.replica for stage in attribution.stages)
    rows = [_parts(stage, several=several) for stage in attribution.stages]
    notes = ["predicted → measured; waits are bubble until all participants have come, communication from then on"]
    sources = sorted({source for stage in attribution.stages for source in stage.use.sources.values()})
    if sources:
        notes.append(f"occupancy, tensor and memory activity while the stage computed, by {', '.join(sources)}")
    if len(rows) > MOST_ROWS:
        notes.append(f"and {len(rows) - MOST_ROWS} more stages")
    known = len(rows[0]) if sources else -len(USE)
    columns = ("stage", "ranks", *PARTS, *USE)[:known]
    shown = tuple(row[:known] for row in rows[:MOST_ROWS])
    return Finding("stages and their devices", columns, shown, ("; ".join(notes),), texts=2)


def _parts(stage: StageAttribution, *, several: bool) -> tuple[str, ...]:
    name = f"{stage.stage} of replica {stage.replica}" if several else stage.stage
    times = [
        f"{in_time(getattr(stage.predicted, f'{part}_s'))} → {in_time(getattr(stage.measured, f'{part}_s'))}"
        for part in PARTS
    ]
    use = stage.use
    return (
        name,
        spans(stage.ranks),
        *times,
        *map(_share, (use.occupancy, use.tensor_activity, use.dram_activity)),
    )


def _gpus(run: Run, places: Places, turns: Mapping[int, Turns]) -> Finding | None:
    if run.recording is None or not run.recording.gpus:
        return None
    totals = {(g.host, g.gpu, g.uuid): g for g in run.recording.summary.gpus}
    rows = []
    for gpu in run.recording.gpus[:MOST_ROWS]:
        known = totals[gpu.host, gpu.gpu, gpu.uuid]
        total = known.total
        rows.append(
            (
                gpu_name(gpu),
                gpu_stages(gpu, places, turns),
                _share(total.mean_utilisation),
                _share(total.mean_occupancy),
                _share(total.mean_occupancy_while_busy),
                _share(gpu.below_half),
                _bytes(total.peak_memory_bytes),
                _bytes(known.memory_total_bytes),
                "+".join(sorted(set(known.sources.values()))) or "none",
            )
        )
    columns = (
        "GPU",
        "ranks and their stages",
        "utilisation",
        "occupancy",
        "while busy",
        "below 50%",
        "peak memory",
        "limit",
        "source",
    )
    note = (
        "means over the recording; below 50%: share of the monitor's windows with kernels in which the occupancy "
        "while busy is below a half; memory is that of all processes"
    )
    notes = (note, *_errors(run.recording.summary), *_left_out(len(run.recording.gpus), "GPU"))
    return Finding("GPUs", columns, tuple(rows), notes, texts=2)


def _errors(summary: Summary) -> Iterator[str]:
    """Tell the errors that drivers reported, by GPU."""
    numbers: dict[tuple[str, int | None], list[int]] = defaultdict(list)
    for event in summary.events:
        numbers[event.host, event.gpu].append(event.xid)
    for (host, gpu), found in numbers.items():
        told = ", ".join(f"{xid} ({count} times)" for xid, count in sorted(Counter(found).items()))
        yield f"Xid errors of GPU {'unknown' if gpu is None else gpu} of {host}, by NVIDIA's list: {told}"


def gpu_stages(gpu: GpuRecord, places: Places, turns: Mapping[int, Turns]) -> str:
    """Return the ranks of a GPU with their stages: ``rank 1: front 40%, tail 22%``; empty where nothing tells."""
    known = [(rank, turns.get(rank)) for rank in places.ranks_on(gpu.host, gpu.uuid)]
    return "; ".join(f"rank {rank}" + (f": {own}" if own else "") for rank, own in known)


def _hosts(run: Run) -> Finding | None:
    if run.recording is None or not run.recording.hosts:
        return None
    rows = []
    for host in run.recording.summary.hosts[:MOST_ROWS]:
        cores, cpus = host.mean_cpu_cores, host.cpus
        share = "unknown" if cores is None else f"{cores:.2f}"
        if cores is not None and cpus:
            share += f" of {cpus} ({cores / cpus:.0%})"
        own, workers = host.rank_cpu_cores, host.workers_cpu_cores
        rows.append(
            (
                host.host,
                spans(tuple(sorted(own))),
                share,
                f"{sum(own.values()):.2f}" if own else "unknown",
                f"{sum(workers.values()):.2f}" if workers else "unknown",
                _bytes(host.peak_memory_bytes),
                _bytes(host.memory_total_bytes),
            )
        )
    columns = ("host", "ranks", "CPUs busy", "by the ranks", "by what they started", "peak memory", "of")
    return Finding("hosts", columns, tuple(rows), _left_out(len(run.recording.hosts), "host"), texts=2)


def _network(run: Run, places: Places) -> Finding | None:
    """Lay what the program sends beside what the interfaces counted; None where neither is known."""
    flows = {} if run.basis is None else flows_of(programs_of(run, run.basis))
    rows: list[tuple[str, ...]] = []
    if run.basis is not None:
        for rank in range(min(run.plan.world, MOST_RANKS)):
            sent = sum(count for (source, _), count in flows.items() if source == rank)
            received = sum(count for (_, target), count in flows.items() if target == rank)
            rows.append((f"rank {rank}", size(sent), "", "", size(received), "", ""))
    rows += list(_interfaces(run, flows, places))
    if not rows:
        return None
    notes = ["bytes per step; evaluations, checkpoints and other programs count with what is measured"]
    if run.plan.world > MOST_RANKS and run.basis is not None:
        notes.append(f"and {plural(run.plan.world - MOST_RANKS, 'more rank')}")
    if places.gpu_of:
        notes.append("what NVLink and RDMA move passes by these interfaces")
    columns = ("where", "sent: predicted", "measured", "off", "received: predicted", "measured", "off")
    return Finding("network", columns, tuple(rows), ("; ".join(notes),))


def _interfaces(run: Run, flows: Flows, places: Places) -> Iterator[tuple[str, ...]]:
    """Yield a row for what stays on a host, and one for what leaves it, of every host."""
    known = flows and set(places.host_of) == set(range(run.plan.world))
    expected = crossings(flows, places.host_of) if known else {}
    for host in run.recording.hosts if run.recording is not None else ():
        crossing = expected.get(host.host)
        yield from _inside(host, crossing, on_cpu=not places.gpu_of)
        yield from _outside(host, crossing)


def _inside(host: HostRecord, crossing: Crossing | None, *, on_cpu: bool) -> Iterator[tuple[str, ...]]:
    """Only gloo, which works on CPUs, sends over the loopback interface what stays on a host."""
    moved = host.moved.get(LOOPBACK)
    if moved is not None:
        told = None if crossing is None or not on_cpu else crossing.inside
        yield (f"{host.host} {LOOPBACK} (inside)", *_pair(told, moved, "sent"), *_pair(told, moved, "received"))


def _outside(host: HostRecord, crossing: Crossing | None) -> Iterator[tuple[str, ...]]:
    """All other interfaces together, as the program does not know which one is taken."""
    others = {name: moved for name, moved in host.moved.items() if name != LOOPBACK}
    if not others:
        return
    steps = max(moved.steps for moved in others.values())
    together = Moved(
        sum(moved.sent_bytes for moved in others.values()),
        sum(moved.received_bytes for moved in others.values()),
        steps,
    )
    sent = None if crossing is None else crossing.sent
    received = None if crossing is None else crossing.received
    yield (
        f"{host.host} {'+'.join(others)} (to others)",
        *_pair(sent, together, "sent"),
        *_pair(received, together, "received"),
    )


def _pair(expected: float | None, moved: Moved, way: str) -> tuple[str, str, str]:
    """Return predicted, measured and how far off, per step."""
    counted: int = getattr(moved, f"{way}_bytes")
    found = counted / moved.steps if moved.steps else None
    off = f"{found / expected - 1:+.0%}" if found is not None and expected else ""
    return (
        "unknown" if expected is None else size(expected),
        "unknown" if found is None else size(found),
        off,
    )


def _left_out(count: int, noun: str) -> tuple[str, ...]:
    return (f"and {plural(count - MOST_ROWS, f'more {noun}')}",) if count > MOST_ROWS else ()


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.0%}"


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else in_bytes(count)
