"""Throughput against memory: the plans of which none is both slower and larger than another one.

Points come from searches. Of every global batch the ordinary plan is the first; then the devices' memory is
lowered to a share of what the last plan needs, and planned again, until nothing fits or ``STEPS`` times. The
points are therefore as good as the search, and between two of them there may be others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import MemoryLimitError, PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan, Prediction
from hybridpar.planning.request import Request, Shape
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.search import Candidate, Planned, search
from hybridpar.profiling.record import Profile

STEPS = 6
"""Searches with less memory, per global batch."""
SHRINK = 0.8
"""Share of the last plan's memory that the next one may take."""


@dataclass(frozen=True)
class Point:
    """A plan, and what it trades."""

    plan: Plan
    shape: Shape
    memory_bytes: float
    """Of the fullest rank, workspace included."""
    limit_bytes: float
    """Memory of the largest device that the plan was searched for; with it the search gives this plan again."""

    @property
    def prediction(self) -> Prediction:
        """The plan's prediction."""
        assert self.plan.prediction is not None
        return self.plan.prediction

    @property
    def samples_per_s(self) -> float:
        """Throughput."""
        return self.prediction.samples_per_s

    def dominates(self, other: Point) -> bool:
        """Whether this plan is as fast and as small as the other one, and faster or smaller."""
        mine, its = (self.samples_per_s, -self.memory_bytes), (other.samples_per_s, -other.memory_bytes)
        return mine != its and all(a >= b for a, b in zip(mine, its, strict=True))


@dataclass(frozen=True)
class Front:
    """The points that no other one dominates, by ascending memory, and so by ascending throughput."""

    points: tuple[Point, ...]
    refused: tuple[tuple[int, str], ...]
    """Global batches without any plan, and why."""
    searches: int


def batches_between(least: int, most: int, configured: int) -> tuple[int, ...]:
    """Return the global batches of a range: its ends, the powers of two inside, and the configured one."""
    powers = {1 << k for k in range(least.bit_length() - 1, most.bit_length())}
    return tuple(sorted({least, most} | {b for b in {*powers, configured} if least <= b <= most}))


def front(
    chain: Chain,
    profile: Profile,
    cluster: Cluster,
    request: Request,
    batches: Iterable[int],
    report: Callable[[str], None] = lambda _: None,
) -> Front:
    """Return the front over some global batches, which replace the request's. A pure function.

    Raises PlanError or MemoryLimitError, the first batch's, where no batch has a plan.
    """
    found: list[Point] = []
    refused: list[tuple[int, PlanError | MemoryLimitError]] = []
    searches = 0
    for batch in batches:
        try:
            own, count = _trade(chain, profile, cluster, replace(request, global_batch=batch))
        except (PlanError, MemoryLimitError) as e:
            report(f"global batch {batch}: no plan")
            refused.append((batch, e))
            searches += 1
        else:
            report(f"global batch {batch}: {count} searches")
            found += own
            searches += count
    if not found:
        raise refused[0][1]
    return Front(undominated(found), tuple((batch, str(e)) for batch, e in refused), searches)


def undominated(points: Iterable[Point]) -> tuple[Point, ...]:
    """Return the points that no other one dominates, by ascending memory; of equal ones the first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.memory_bytes, -p.samples_per_s)):
        if not kept or point.samples_per_s > kept[-1].samples_per_s:
            kept.append(point)
    return tuple(kept)


def _trade(chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> tuple[list[Point], int]:
    """Return plans of one global batch that need ever less memory, the ordinary one first, and the searches."""
    largest = max(cluster.memory_bytes(rank) for rank in range(cluster.world))
    points = [_point(search(chain, profile, cluster, request), chain, profile, cluster, largest)]
    for step in range(STEPS):
        limit = SHRINK * points[-1].memory_bytes
        small = with_memory(cluster, limit)
        try:
            points.append(_point(search(chain, profile, small, request), chain, profile, small, limit))
        except MemoryLimitError:
            return points, step + 2
    return points, 1 + STEPS


def _point(planned: Planned, chain: Chain, profile: Profile, cluster: Cluster, limit_bytes: float) -> Point:
    chosen: Candidate = planned.chosen
    assert chosen.shape != "from_file"
    program = compile_program(planned.plan, chain, planned.plan.global_batch, "train")
    costs = Costs(profile, cluster)
    peaks = peak_per_rank(program, costs.workspaces)
    return Point(planned.plan, chosen.shape, max(peaks), limit_bytes)


def with_memory(cluster: Cluster, most_bytes: float) -> Cluster:
    """Return a cluster whose devices have at most so much memory."""
    nodes = tuple(
        node if node.memory_bytes is None else replace(node, memory_bytes=min(node.memory_bytes, most_bytes))
        for node in cluster.nodes
    )
    device = replace(cluster.device, memory_bytes=min(cluster.device.memory_bytes, most_bytes))
    return replace(cluster, device=device, nodes=nodes)
