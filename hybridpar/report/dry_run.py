"""The dry run: a plan and its alternatives as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table

from hybridpar.cluster.topology import Cluster
from hybridpar.model.chain import Chain
from hybridpar.planning.blocks import blocks, positions
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.explain import reason, verdicts
from hybridpar.planning.explanation import Explanation
from hybridpar.planning.parameters import parameter_count
from hybridpar.planning.plan import Kind, Plan, Prediction, Segment, Stage
from hybridpar.planning.program import Program
from hybridpar.planning.search import Candidate, Planned
from hybridpar.planning.zero import is_zero
from hybridpar.profiling.record import Profile
from hybridpar.report.explanation import show as show_explanation
from hybridpar.report.palette import stage_name
from hybridpar.report.text import in_bytes, in_ms, in_thousands, in_time, plural, spans, titled


def show(
    planned: Planned,
    chain: Chain,
    profile: Profile,
    cluster: Cluster,
    console: Console,
    explanation: Explanation | None = None,
) -> None:
    """Print stages, prediction, memory, the comparison of shapes and the explanation.

    The long form of an explanation brings the losers' stages along.
    """
    plan = planned.plan
    console.print(_head(plan, chain, profile, cluster))
    console.print(_stages(planned.chosen, chain, cluster))
    console.print(_prediction(planned.chosen.prediction, plan, profile))
    console.print(_memory(planned.chosen.prediction, cluster))
    if len(planned.candidates) > 1:
        console.print(Group(_comparison(planned, cluster), f"Why: {reason(planned)}"))
    if explanation is None:
        return
    if explanation.full:
        for candidate in planned.candidates:
            if candidate.plan is not None and candidate.shape != planned.shape:
                console.print(_stages(candidate, chain, cluster))
                console.print(_prediction(candidate.prediction, candidate.plan, profile))
    show_explanation(explanation, planned, console)


def compiled(plan: Plan, chain: Chain, stages: Sequence[Kind] | None, backend: str) -> str:
    """Say what is compiled of a plan, what is not, and what the figures know of it. ``stages``: None for all."""
    places = positions(plan)
    chosen = [b for b in blocks(plan, chain) if stages is None or places[b.position].kind in stages]
    inside = {i for b in chosen for run in chain.compiled(*b.layers) for i in range(*run)}
    eager = [chain.layers[i].name for b in chosen for i in range(*b.layers) if i not in inside]
    kinds = dict.fromkeys(places[b.position].kind for b in chosen)
    left = f"; left as they are: {', '.join(eager)}" if eager else ""
    return (
        f"compiled by {backend}: layers of {', '.join(kinds)}{left}. Times and memory above are of "
        "layers that are not compiled"
    )


def _head(plan: Plan, chain: Chain, profile: Profile, cluster: Cluster) -> str:
    shape = " and ".join("x".join(map(str, shape)) or "1" for shape in chain.in_shapes)
    source = "measured" if profile.source == "measured" else "estimated from the device's data sheet"
    unkeyed = [layer.name for layer in chain.layers if layer.random == "unkeyed"]
    random = f"\nrandom numbers that depend on the plan (no parity with one process): {', '.join(unkeyed)}"
    trained = parameter_count(chain, (0, len(chain.layers)), trained=True)
    lowered = f" with {chain.autocast} autocast" if chain.autocast else ""
    scaled = ", loss scaled" if plan.recipe.scaling else ""
    order = f", {chain.memory_format}" if chain.memory_format else ""
    frozen = f" ({in_thousands(trained)} trained)" if chain.frozen else ""
    return (
        f"{plan.model}: {len(chain.layers)} layers, {in_thousands(chain.parameter_count)} parameters{frozen}, "
        f"input {shape}, global batch {plan.global_batch}, {plan.precision}{lowered}{order}{scaled}\n"
        f"{cluster.name}: {cluster.world} ranks on {plural(len(cluster.nodes), 'node')}, {cluster.device.name}, "
        f"layer times {source} ({profile.device}){random if unkeyed else ''}"
    )


def _sharded(program: Program) -> str:
    """Return which positions shard their optimizer's state, or nothing."""
    plan = program.plan
    names = [stage_name(p) for p in program.positions if is_zero(plan, p)]
    where = ", in the memory of the host" if plan.recipe.offload else ""
    return f", optimizer state of {', '.join(names)} sharded ({plan.recipe.sharding}{where})" if names else ""


def _stages(candidate: Candidate, chain: Chain, cluster: Cluster) -> Table:
    plan, prediction = candidate.plan, candidate.prediction
    assert plan is not None
    program = compile_program(plan, chain, plan.global_batch, "train")
    limit = cluster.device.memory_bytes
    replicas = f", {plan.replicas} replicas of {plan.replica_world} ranks" if plan.replicas > 1 else ""
    sharded = _sharded(program)
    lossy = f", gradients compressed ({plan.recipe.compression}; lossy)" if plan.recipe.compression else ""
    norms = ", batch norms synchronised" if plan.recipe.synchronised else ""
    table = titled(f"plan: {candidate.shape}, order {plan.order}{replicas}{sharded}{lossy}{norms}")
    for name, style in (
        ("stage", "left"),
        ("layers", "left"),
        ("degree", "left"),
        ("ranks", "left"),
        ("micro-batch", "right"),
        ("params", "right"),
        ("memory/rank", "right"),
        ("fwd+bwd+update", "right"),
    ):
        table.add_column(name, justify="right" if style == "right" else "left")
    for index, stage in enumerate(plan.stages):
        seconds = prediction.stages[index]
        for number, segment in enumerate(stage.segments):
            peak = max(prediction.memory_bytes[r] for r in segment.ranks)
            times = "" if number else in_ms(seconds.forward_s, seconds.backward_s, seconds.update_s)
            table.add_row(
                stage.kind if len(stage.segments) == 1 else f"{stage.kind} {number}",
                _layers(segment, chain),
                _degree(stage, segment) + (", recomputed" if stage.recompute else ""),
                _ranks(segment.ranks, cluster),
                f"{stage.micro_batch} x{_calls(program, index, number)}",
                in_thousands(parameter_count(chain, segment.layers)),
                f"{in_bytes(peak)} ({peak / limit:.0%})",
                times,
            )
    return table


def _layers(segment: Segment, chain: Chain) -> str:
    first, last = segment.layers
    if last - first == 1:
        return chain.layers[first].name
    return f"{chain.layers[first].name} .. {chain.layers[last - 1].name} ({last - first})"


def _degree(stage: Stage, segment: Segment) -> str:
    count = len(segment.ranks)
    if stage.kind == "tail":
        sharding = f" ({', '.join(stage.sharding)})" if stage.sharding else ""
        return f"{plural(count, 'shard')}{sharding}"
    if stage.kind == "front":
        return plural(count, "replica")
    return f"1 of {len(stage.segments)}" + (f", {plural(count, 'replica')}" if count > 1 else "")


def _calls(program: Program, stage: int, segment: int) -> int:
    position = next(p for p in program.positions if (p.stage, p.segment) == (stage, segment))
    return len(program.micro_batches[position.index])


def _ranks(ranks: tuple[int, ...], cluster: Cluster) -> str:
    nodes = sorted({cluster.node_of[r] for r in ranks})
    where = f" (node {spans(tuple(nodes))})" if len(cluster.nodes) > 1 else ""
    return f"{spans(ranks)}{where}"


def _prediction(prediction: Prediction, plan: Plan, profile: Profile) -> str:
    return (
        f"predicted ({profile.source}): step {in_time(prediction.step_s)}, "
        f"{prediction.samples_per_s:,.0f} samples/s, bubble {prediction.bubble:.0%}, "
        f"{in_bytes(prediction.wire_bytes)} on the wire per step of {plan.global_batch} samples"
    )


def _memory(prediction: Prediction, cluster: Cluster) -> str:
    limit = cluster.device.memory_bytes
    peaks = prediction.memory_bytes
    worst = max(range(len(peaks)), key=lambda r: peaks[r])
    most = f"{in_bytes(peaks[worst])} of {in_bytes(limit)}"
    return f"memory: at most {most}, on rank {worst} (tensors and workspace)"


def _comparison(planned: Planned, cluster: Cluster) -> Table:
    table = titled(f"shapes compared ({planned.tried} plans simulated)")
    table.add_column("shape")
    for name in ("step", "samples/s", "bubble", "on the wire", "memory/rank", "micro-batches"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    for candidate, verdict in zip(planned.candidates, verdicts(planned), strict=True):
        table.add_row(*_comparison_row(candidate, cluster), verdict)
    return table


def _comparison_row(candidate: Candidate, cluster: Cluster) -> list[RenderableType]:
    if candidate.plan is None:
        return [candidate.shape, *["-"] * 6]
    p = candidate.prediction
    peak = max(p.memory_bytes)
    return [
        candidate.shape,
        in_time(p.step_s),
        f"{p.samples_per_s:,.0f}",
        f"{p.bubble:.0%}",
        in_bytes(p.wire_bytes),
        f"{in_bytes(peak)} ({peak / cluster.device.memory_bytes:.0%})",
        " ".join(str(s.micro_batch) for s in candidate.plan.stages),
    ]
