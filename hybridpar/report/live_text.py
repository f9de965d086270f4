"""A run at the moment, on a terminal or as a line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hybridpar.monitor.record import HostSample
from hybridpar.planning.blocks import positions
from hybridpar.report.advice import Advised, effect_text
from hybridpar.report.live import Moment
from hybridpar.report.palette import stage_name
from hybridpar.report.text import in_bytes, in_time, spans, titled

MOST_GPUS, MOST_RANKS = 16, 32
"""Rows of the tables."""
BAR = 14
"""Width of a bar, in characters."""


def view(moment: Moment, advised: Advised | None, now_s: float) -> RenderableType:
    """Return the whole view; what is unknown has no bar."""
    parts: list[RenderableType] = [_head(moment, now_s), Text(), _stages(moment)]
    if moment.gpus:
        parts += [Text(), _gpus(moment)]
    if moment.hosts:
        parts += [Text(), _hosts(moment)]
        ranks = _ranks(moment)
        if ranks.row_count:
            parts += [Text(), ranks]
    parts += [Text(f"no data: {reason}", style="dim") for reason in moment.gaps]
    if advised is not None:
        parts += [Text(), *_advice(advised)]
    return Group(*parts)


def line(moment: Moment) -> str:
    """Return the moment on one line, for where there is no terminal."""
    parts = [*_progress(moment)]
    for gpu in moment.gpus[:MOST_GPUS]:
        known = (("busy", gpu.utilisation), ("occupancy", gpu.occupancy))
        told = " ".join(f"{name} {value:.0%}" for name, value in known if value is not None)
        parts.append(f"GPU {gpu.gpu} {told or 'unknown'}")
    parts += [
        f"{host.host} {host.cpu_cores:.1f} of {host.cpus or '?'} CPUs"
        for host in moment.hosts
        if host.cpu_cores is not None
    ]
    return "  ".join(parts)


def state(moment: Moment, now_s: float) -> str:
    """Say whether the run goes on."""
    if moment.ended:
        return "the run has ended"
    silent_s = moment.silent_s(now_s)
    if silent_s is not None:
        return f"nothing new for {in_time(round(silent_s))}: the run may have been ended without a word"
    return "running" if moment.step is not None else "no step yet"


def _head(moment: Moment, now_s: float) -> RenderableType:
    plan = moment.plan
    colour = "green" if moment.ended else "yellow" if moment.silent_s(now_s) is not None else "cyan"
    first = Text.assemble((moment.name, "bold"), "  ", (state(moment, now_s), colour))
    second = f"{plan.model}, global batch {plan.global_batch}, {plan.precision}, {plan.world} ranks"
    if moment.news_s is not None:
        second += f", last news {time.strftime('%H:%M:%S', time.localtime(moment.news_s))}"
    return Group(first, Text(second, style="dim"), Text("  ".join(_progress(moment))))


def _progress(moment: Moment) -> Iterator[str]:
    if moment.step is None:
        yield "no step yet"
        return
    yield f"step {moment.step.step + 1}"
    yield f"loss {moment.step.loss:.4f}"
    if moment.step_s:
        prediction = moment.plan.prediction
        expected = "" if prediction is None else f" ({in_time(prediction.step_s)} predicted)"
        yield f"{in_time(moment.step_s)}/step{expected}"
        yield f"{moment.plan.global_batch / moment.step_s:.1f} samples/s"
    if moment.evaluated is not None:
        yield f"test accuracy {moment.evaluated.top1:.4f} after {moment.evaluated.step}"


def _stages(moment: Moment) -> Table:
    """What runs where, with the means over each stage's GPUs."""
    table = titled("stages")
    for name in ("stage", "ranks", "micro-batch", "CPUs"):
        table.add_column(name)
    on_gpus = bool(moment.places.gpu_of)
    if on_gpus:
        table.add_column("busy")
        table.add_column("occupancy")
    cores = {rank.rank: rank.cpu_cores for host in moment.hosts for rank in host.ranks}
    samples = {(gpu.host, gpu.uuid): gpu for gpu in moment.gpus}
    for position in positions(moment.plan):
        ranks = moment.plan.everywhere(position.ranks)
        used = [cores.get(rank) for rank in ranks]
        row: list[RenderableType] = [
            stage_name(position),
            spans(ranks),
            str(position.micro_batch),
            _sum(used),
        ]
        if on_gpus:
            own = [samples.get(moment.places.gpu_of[r]) for r in ranks if r in moment.places.gpu_of]
            row += [_bar(_mean(gpu.utilisation for gpu in own if gpu is not None))]
            row += [_bar(_mean(gpu.occupancy for gpu in own if gpu is not None))]
        table.add_row(*row)
    return table


def _gpus(moment: Moment) -> Table:
    table = titled("GPUs")
    for name in ("GPU", "stages", "busy", "occupancy", "memory", "", "clocks kept down by"):
        table.add_column(name)
    for gpu in moment.gpus[:MOST_GPUS]:
        table.add_row(
            f"{gpu.host} GPU {'?' if gpu.gpu is None else gpu.gpu}",
            "; ".join(moment.stages_of(rank) for rank in moment.places.ranks_on(gpu.host, gpu.uuid)),
            _bar(gpu.utilisation),
            _bar(gpu.occupancy),
            _bar(_quotient(gpu.memory_used_bytes, gpu.memory_total_bytes)),
            _of(gpu.memory_used_bytes, gpu.memory_total_bytes),
            ", ".join(gpu.throttle or ()),
        )
    if len(moment.gpus) > MOST_GPUS:
        table.caption = f"and {len(moment.gpus) - MOST_GPUS} more"
    return table


def _hosts(moment: Moment) -> Table:
    table = titled("hosts")
    for name in ("host", "CPUs busy", "", "memory", "", "network"):
        table.add_column(name)
    for host in moment.hosts:
        table.add_row(
            host.host,
            _bar(_quotient(host.cpu_cores, host.cpus)),
            "unknown" if host.cpu_cores is None else f"{host.cpu_cores:.1f} of {host.cpus or '?'}",
            _bar(_quotient(host.memory_used_bytes, host.memory_total_bytes)),
            _of(host.memory_used_bytes, host.memory_total_bytes),
            _network(host),
        )
    return table


def _ranks(moment: Moment) -> Table:
    """The ranks' own processes; where there are GPUs, these tell more."""
    table = titled("ranks")
    for name in ("rank", "stages", "CPUs", "by what it started", "memory"):
        table.add_column(name)
    ranks = [] if moment.gpus else [rank for host in moment.hosts for rank in host.ranks]
    for rank in sorted(ranks, key=lambda r: r.rank)[:MOST_RANKS]:
        table.add_row(
            str(rank.rank),
            moment.stages_of(rank.rank),
            _sum([rank.cpu_cores]),
            _sum([rank.workers_cpu_cores]),
            "unknown" if rank.memory_bytes is None else in_bytes(rank.memory_bytes),
        )
    return table


def _advice(advised: Advised) -> Iterator[RenderableType]:
    yield Text("advice", style="bold italic")
    if not advised.advices:
        yield Text("nothing that the planner predicts a gain for")
    for number, advice in enumerate(advised.advices, 1):
        yield Text(f"{number}. {advice.what} {' '.join(advice.overrides)}".rstrip())
        yield Text(f"   predicted: {effect_text(advice.effect)}", style="dim")
    yield from (Text(text, style="dim") for text in advised.remarks)
    yield from (Text(f"not judged: {text}", style="dim") for text in advised.lacking)


def _network(host: HostSample) -> str:
    known = sorted(host.network.items(), key=lambda item: -(item[1].sent_bytes_per_s or 0.0))
    return ", ".join(
        f"{name} {traffic.sent_bytes_per_s / 1e6:.1f} MB/s out, {traffic.received_bytes_per_s / 1e6:.1f} in"
        for name, traffic in known[:2]
        if traffic.sent_bytes_per_s is not None and traffic.received_bytes_per_s is not None
    )


def _bar(share: float | None) -> RenderableType:
    if share is None:
        return Text("unknown", style="dim")
    row = Table.grid(padding=(0, 1))
    row.add_row(ProgressBar(total=1.0, completed=min(share, 1.0), width=BAR), Text(f"{share:4.0%}"))
    return row


def _mean(values: Iterator[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sum(cores: Sequence[float | None]) -> str:
    known = [value for value in cores if value is not None]
    return f"{sum(known):.2f}" if known else "unknown"


def _quotient(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _of(used: int | None, total: int | None) -> str:
    told = "unknown" if used is None else in_bytes(used)
    return told if total is None else f"{told} of {in_bytes(total)}"
