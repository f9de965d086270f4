"""Every plan of a small space, one after the other: what the search is held against.

It knows the space from its definition alone and shares nothing with the search: plans are made by plain loops, and
each is compiled and simulated. The space, per shape (the kinds of its stages):

- a position (segment, counted over all stages) ends at a cut; cuts lie before layers with parameters, and before a
  tail where it may start, which is up to the last linear layer;
- a micro-batch above the samples of a stage's rank that has most stands for as many;
- a middle has two segments or more, the front of several stages two replicas, a tail two shards, unless pinned;
- every rank of a plan replica holds a set of positions. Of equal ranks of a node the sets ascend, and of equal
  nodes the lists of sets. The ranks of a position stand node by node, the faster ones first, then in order;
- plan replicas lie within nodes, or fill them; pinned ranks mean a single one;
- ranks of different speed share samples and features in proportion to it;
- ZeRO-1 needs a front of several ranks and no plan replicas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise, product

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.layout import split
from hybridpar.planning.plan import Kind, OrderRule, Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Program
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.simulate import simulate
from hybridpar.profiling.record import Profile

Groups = tuple[tuple[int, ...], ...]
"""Ranks, per position of a stage or of a whole plan."""


@dataclass(frozen=True)
class Question:
    """A planning problem, and for every dimension of the space what there is to choose from."""

    chain: Chain
    profile: Profile
    cluster: Cluster
    global_batch: int
    cuts: tuple[int, ...]
    micro_batches: tuple[int, ...]
    segments: tuple[int, ...] = (2,)
    replicas: tuple[int, ...] = (1,)
    in_flight: tuple[int | None, ...] = (None,)
    orders: tuple[OrderRule, ...] = ("one_forward_one_backward",)
    sharding: tuple[str, ...] = ("column",)
    recompute: tuple[bool, ...] = (False,)
    optimizer_sharding: tuple[str, ...] = ("none",)
    ranks: dict[Kind, Groups] = field(default_factory=dict)
    """Pinned ones, by segment."""
    buckets: tuple[int, ...] = (8 * 2**20,)
    """Of plans that reduce gradients; others have the one nearest to 8 MiB."""
    clipping: bool = False


@dataclass
class Found:
    """What all plans of a shape come to."""

    best_s: float | None = None
    plan: Plan | None = None
    simulated: int = 0
    too_large: int = 0
    """For a rank's memory."""
    impossible: int = 0

    @property
    def tried(self) -> int:
        """All plans that were looked at."""
        return self.simulated + self.too_large + self.impossible


def brute_force(question: Question, kinds: tuple[Kind, ...]) -> Found:
    """Compile and simulate all plans of a shape."""
    found, costs = Found(), Costs(question.profile, question.cluster)
    for plan in plans(question, kinds):
        try:
            validate(plan, question.chain)
            program = compile_program(plan, question.chain, plan.global_batch, "train")
        except PlanError:
            found.impossible += 1
            continue
        if not _fits(program, question, costs):
            found.too_large += 1
            continue
        found.simulated += 1
        step_s = simulate(program, costs).period_s
        if found.best_s is None or step_s < found.best_s:
            found.best_s, found.plan = step_s, plan
    return found


def _fits(program: Program, question: Question, costs: Costs) -> bool:
    plan, cluster = program.plan, question.cluster
    return all(
        peak <= cluster.memory_bytes(rank + copy * plan.replica_world)
        for rank, peak in enumerate(peak_per_rank(program, costs.workspaces))
        for copy in range(plan.replicas)
    )


def plans(question: Question, kinds: tuple[Kind, ...]) -> Iterator[Plan]:
    """Yield all plans of a shape; some of them may not be valid."""
    if "tail" in kinds and question.chain.tail_start == len(question.chain.layers):
        return
    pinned = [kind for kind in kinds if kind in question.ranks]
    for replicas in question.replicas:
        if question.cluster.world % replicas or (replicas > 1 and pinned):
            continue
        size = question.cluster.world // replicas
        if not _lies_well(question.cluster, size) or question.global_batch < replicas:
            continue
        middles = (len(question.ranks["middle"]),) if "middle" in pinned else question.segments
        for middle in middles if "middle" in kinds else (1,):
            counts = [middle if kind == "middle" else 1 for kind in kinds]
            for ranks in rank_sets(question, kinds, counts, size):
                if _parallel(question, kinds, counts, ranks):
                    yield from _plans_on(question, kinds, replicas, _by_stage(ranks, counts))


def _lies_well(cluster: Cluster, size: int) -> bool:
    nodes = [n.devices for n in cluster.nodes]
    if size == cluster.world or all(n % size == 0 for n in nodes):
        return True
    return len(set(nodes)) == 1 and size % nodes[0] == 0


def _by_stage(ranks: Groups, counts: list[int]) -> list[Groups]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [ranks[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _parallel(question: Question, kinds: tuple[Kind, ...], counts: list[int], ranks: Groups) -> bool:
    least = min(2, question.cluster.world)
    for kind, count, own in zip(kinds, counts, _by_stage(ranks, counts), strict=True):
        free = kind not in question.ranks and kinds != ("front",)
        if free and (count if kind == "middle" else len(own[0])) < least:
            return False
    return True


def rank_sets(question: Question, kinds: tuple[Kind, ...], counts: list[int], size: int) -> Iterator[Groups]:
    """Yield the ranks of every position."""
    wanted = [g for k, n in zip(kinds, counts, strict=True) for g in question.ranks.get(k, (None,) * n)]
    positions = range(sum(counts))
    sets = sorted(s for n in range(1, len(positions) + 1) for s in combinations(positions, n))
    allowed = [
        [s for s in sets if all(w is None or (r in w) == (p in s) for p, w in enumerate(wanted))]
        for r in range(size)
    ]
    pinned = any(w is not None for w in wanted)
    pairs = [] if pinned else _equals(question.cluster, size)
    every: list[tuple[tuple[int, ...], ...]] = [()]
    for rank in range(size):
        ending = [pair for pair in pairs if pair[1][-1] == rank]
        longer = ((*held, own) for held in every for own in allowed[rank])
        every = [h for h in longer if all([h[r] for r in a] <= [h[r] for r in b] for a, b in ending)]
    cluster = question.cluster
    speeds = [min(cluster.speed(c) for c in range(r, cluster.world, size)) for r in range(size)]
    order = sorted(range(size), key=lambda r: (cluster.node_of[r], -speeds[r], r))
    for held in every:
        ranks = tuple(w or tuple(r for r in order if p in held[r]) for p, w in zip(positions, wanted, strict=True))
        if all(ranks):
            yield ranks


def _equals(cluster: Cluster, size: int) -> list[tuple[list[int], list[int]]]:
    """Return the pairs of equal ranks of a node, and of equal nodes, as the ranks of either."""

    def device(rank: int) -> list[tuple[float, float]]:
        return [(cluster.speed(r), cluster.memory_bytes(r)) for r in range(rank, cluster.world, size)]

    def place(node: list[int]) -> list[object]:
        own = [cluster.nodes[cluster.node_of[r]] for r in range(node[0], cluster.world, size)]
        return [[device(r) for r in node], [(n.rack, n.site, n.cores) for n in own]]

    nodes = [[r for r in range(size) if cluster.node_of[r] == n] for n in range(len(cluster.nodes))]
    nodes = [node for node in nodes if node]
    ranks = [([a], [b]) for node in nodes for a, b in combinations(node, 2) if device(a) == device(b)]
    return ranks + [(a, b) for a, b in combinations(nodes, 2) if place(a) == place(b)]


def _plans_on(question: Question, kinds: tuple[Kind, ...], replicas: int, ranks: list[Groups]) -> Iterator[Plan]:
    """Yield all plans on given ranks."""
    samples = -(-question.global_batch // replicas)
    sizes = []
    for kind, own in zip(kinds, ranks, strict=True):
        shares = [_segment(question, (0, 1), group, replicas).weights for group in own]
        share = (
            samples if kind == "tail" else max(stop - start for w in shares for start, stop in split(samples, w))
        )
        sizes.append(sorted({min(size, share) for size in question.micro_batches}))
    shared = any(len(g) * replicas > 1 for k, own in zip(kinds, ranks, strict=True) if k != "tail" for g in own)
    states = [s for s in question.optimizer_sharding if s == "none" or shared]
    reduced = replicas > 1 or any(
        len(g) > 1 for k, own in zip(kinds, ranks, strict=True) if k != "tail" for g in own
    )
    buckets = question.buckets if reduced else (min(question.buckets, key=lambda size: abs(size - 8 * 2**20)),)
    for bounds in _bounds(question, kinds, ranks):
        linears = sum(1 for layer in question.chain.layers[bounds[-2] :] if layer.linear)
        modes = [question.sharding] * (linears if kinds[-1] == "tail" and len(ranks[-1][0]) > 1 else 0)
        per_stage = len(kinds)
        for chosen, caps, again, mode, order, state, bucket in product(
            product(*sizes),
            product(question.in_flight, repeat=per_stage),
            product(question.recompute, repeat=per_stage),
            product(*modes),
            question.orders,
            states,
            buckets,
        ):
            stages, at = [], 0
            for i, kind in enumerate(kinds):
                edges = list(pairwise(bounds[at : at + len(ranks[i]) + 1]))
                at += len(ranks[i])
                segments = tuple(_segment(question, *s, replicas) for s in zip(edges, ranks[i], strict=True))
                own = mode if kind == "tail" else ()
                stages.append(Stage(kind, chosen[i], segments, own, caps[i], again[i]))  # type: ignore[arg-type]
            yield Plan(
                question.chain.model,
                question.chain.fingerprint,
                question.cluster.world,
                question.global_batch,
                "float32",
                tuple(stages),
                order,
                bucket,
                Recipe(question.clipping, state),  # type: ignore[arg-type]
                replicas,
            )


def _bounds(question: Question, kinds: tuple[Kind, ...], ranks: list[Groups]) -> Iterator[tuple[int, ...]]:
    """Yield where positions begin and end, the first layer and the end of the chain included."""
    layers = question.chain.layers
    last_linear = max((i for i, layer in enumerate(layers) if layer.linear), default=0)
    points = [c for c in question.cuts if layers[c].parameters or c == question.chain.tail_start]
    for inner in combinations(sorted(points), sum(len(own) for own in ranks) - 1):
        if kinds[-1] == "tail" and not question.chain.tail_start <= inner[-1] <= last_linear:
            continue
        yield 0, *inner, len(layers)


def _segment(question: Question, layers: tuple[int, int], ranks: tuple[int, ...], replicas: int) -> Segment:
    size = question.cluster.world // replicas
    speeds = tuple(min(question.cluster.speed(r + k * size) for k in range(replicas)) for r in ranks)
    return replace(Segment(layers, ranks), shares=speeds if len(set(speeds)) > 1 else None)
