"""Trials: what a plan would take in other circumstances (links, device speeds), and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from hybridpar.cluster.topology import Cluster, Link
from hybridpar.model.chain import Chain
from hybridpar.planning.bound import Bounds
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan, Prediction, validate
from hybridpar.planning.program import Program
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.simulate import predict, simulate, step_time
from hybridpar.planning.timeline import Timeline
from hybridpar.profiling.record import Profile


@dataclass(frozen=True)
class Trials:
    """Simulates plans of one chain; nothing is searched for."""

    chain: Chain
    profile: Profile
    cluster: Cluster

    def program(self, plan: Plan) -> Program:
        """Return the plan's training program. Raises PlanError where the plan is impossible."""
        validate(replace(plan, prediction=None), self.chain)
        return compile_program(replace(plan, prediction=None), self.chain, plan.global_batch, "train")

    def timeline(self, program: Program) -> Timeline:
        """Simulate a program as things are."""
        return simulate(program, Costs(self.profile, self.cluster))

    def prediction(self, program: Program) -> Prediction:
        """Sum up a simulation of a program as things are, whether or not it fits into memory."""
        return predict(program, Costs(self.profile, self.cluster))

    def step_s(self, program: Program, *, bandwidth: float = 1.0, speed: float = 1.0) -> float:
        """Return the step time with all links of :func:`scaled_levels` and all devices faster by a factor."""
        factors = dict.fromkeys(range(self.cluster.world), speed)
        return self._period_s(program, with_speeds(with_bandwidth(self.cluster, bandwidth), factors))

    def step_with_slow_rank_s(self, program: Program, rank: int, speed: float) -> float:
        """Return the step time where one rank's device has ``speed`` times its speed.

        Of the ranks that correspond to ``rank`` in other plan replicas it is the slowest, which hurts most.
        """
        slowest = min(program.plan.everywhere((rank,)), key=self.cluster.speed)
        return self.step_with_speeds_s(program, {slowest: speed})

    def step_with_speeds_s(self, program: Program, factors: Mapping[int, float]) -> float:
        """Return the step time where some ranks' devices have a factor times their speed."""
        return self._period_s(program, with_speeds(self.cluster, factors))

    def _period_s(self, program: Program, cluster: Cluster) -> float:
        return step_time(program, Costs(self.profile, cluster))

    def bound_s(self, plan: Plan) -> float:
        """Return seconds that no simulation of the plan gets below, sooner than it is simulated.

        Raises PlanError where the plan is impossible.
        """
        validate(replace(plan, prediction=None), self.chain)
        return Bounds(self.chain, Costs(self.profile, self.cluster)).of(plan)

    def excess(self, program: Program) -> tuple[int, int, float]:
        """Return the rank that comes closest to its memory limit or exceeds it most, its peak and the excess.

        Bytes; the excess is negative where everything fits.
        """
        peaks = peak_per_rank(program, Costs(self.profile, self.cluster).workspaces)
        limits = [min(map(self.cluster.memory_bytes, program.plan.everywhere((r,)))) for r in range(len(peaks))]
        excess = [peak - limit for peak, limit in zip(peaks, limits, strict=True)]
        rank = max(range(len(peaks)), key=lambda r: excess[r])
        return rank, peaks[rank], excess[rank]


def scaled_levels(cluster: Cluster) -> tuple[str, ...]:
    """Return the link levels that a change of bandwidth means: all between nodes; within it, of a lone node."""
    if len(cluster.nodes) == 1:
        return ("node",)
    return tuple(level for level in cluster.links if level != "node")


def with_bandwidth(cluster: Cluster, factor: float) -> Cluster:
    """Return the cluster with the links of :func:`scaled_levels` at ``factor`` times their bandwidth."""
    scaled = set(scaled_levels(cluster))

    def changed(level: str, link: Link) -> Link:
        if level not in scaled:
            return link
        reverse = link.reverse_bytes_per_s
        return replace(
            link,
            bytes_per_s=link.bytes_per_s * factor,
            reverse_bytes_per_s=None if reverse is None else reverse * factor,
        )

    return replace(
        cluster,
        links={level: changed(level, link) for level, link in cluster.links.items()},
        collectives={
            level: {operation: changed(level, link) for operation, link in fitted.items()}
            for level, fitted in cluster.collectives.items()
        },
    )


def with_speeds(cluster: Cluster, factors: Mapping[int, float]) -> Cluster:
    """Return the cluster with some ranks' devices faster by a factor."""
    nodes, first = [], 0
    for node in cluster.nodes:
        ranks = range(first, first + node.devices)
        first += node.devices
        nodes.append(replace(node, speed=tuple(cluster.speed(r) * factors.get(r, 1.0) for r in ranks)))
    return replace(cluster, nodes=tuple(nodes))
