"""Drafts: the choices behind a plan, and how they become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from hybridpar.cluster.topology import Cluster
from hybridpar.model.chain import Chain
from hybridpar.planning.cuts import Cuts
from hybridpar.planning.layout import length, split
from hybridpar.planning.placement import Placement
from hybridpar.planning.plan import Kind, OptimizerSharding, OrderRule, Plan, Segment, Stage
from hybridpar.planning.request import Mode, Request
from hybridpar.planning.sharding import Sharded, best_sharding, ways
from hybridpar.planning.sizes import usual_sizes
from hybridpar.profiling.record import Profile

Sharding = tuple[Mode, ...]


@dataclass(frozen=True)
class Draft:
    """Everything a plan leaves open once its chain and the request are given."""

    placement: Placement
    bounds: tuple[int, ...]
    """Layer indices where positions (segments, counted over all stages) meet, ascending."""
    micro_batches: tuple[int, ...]
    """One per stage, as all fields below but the last four."""
    in_flight: tuple[int | None, ...]
    recompute: tuple[bool, ...]
    sharding: Sharding
    order: OrderRule
    optimizer_sharding: OptimizerSharding = "none"
    bucket_bytes: int | None = None
    """Least bytes of a gradient bucket; None: the size to begin with."""

    def stage_bounds(self, layers: int) -> tuple[tuple[int, ...], ...]:
        """Return the bounds of every stage's segments, its first and last layer included."""
        edges, result, at = (0, *self.bounds, layers), [], 0
        for groups in self.placement.groups:
            result.append(edges[at : at + len(groups) + 1])
            at += len(groups)
        return tuple(result)


class Drafting:
    """Turns drafts into plans for one chain, profile, cluster and request, and knows what there is to choose."""

    def __init__(self, chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> None:
        self.chain, self.profile, self.cluster, self.request = chain, profile, cluster, request
        self.cuts = Cuts(chain, profile, request)
        self._shardings: dict[tuple[int, int], Sharded] = {}
        self._equal = len({cluster.speed(r) for r in range(cluster.world)}) == 1

    def plan(self, draft: Draft) -> Plan:
        """Build the plan."""
        stages = []
        bounds = draft.stage_bounds(len(self.chain.layers))
        for i, (kind, groups) in enumerate(zip(draft.placement.kinds, draft.placement.groups, strict=True)):
            segments = tuple(
                Segment(layers, ranks, self._shares(draft.placement, kind, ranks))
                for layers, ranks in zip(pairwise(bounds[i]), groups, strict=True)
            )
            sharded = kind == "tail" and len(groups[0]) > 1
            stages.append(
                Stage(
                    kind,
                    draft.micro_batches[i],
                    segments,
                    draft.sharding if sharded else (),
                    draft.in_flight[i],
                    draft.recompute[i],
                )
            )
        return Plan(
            model=self.chain.model,
            chain=self.chain.fingerprint,
            world=self.cluster.world,
            global_batch=self.request.global_batch,
            precision=self.request.precision,
            stages=tuple(stages),
            order=draft.order,
            bucket_bytes=draft.bucket_bytes or self.request.usual_bucket,
            recipe=replace(
                self.request.recipe, sharding=draft.optimizer_sharding, synchronised=self.chain.synchronised
            ),
            replicas=draft.placement.replicas,
        )

    def _shares(self, placement: Placement, kind: Kind, ranks: tuple[int, ...]) -> tuple[float, ...] | None:
        """Return the shares of samples or features: pinned, or of unequal devices in proportion to their speed."""
        pinned = self.request.pin(kind).shares
        if pinned is not None and kind != "middle":
            return pinned
        if self._equal:
            return None
        size = placement.world
        speeds = tuple(
            min(self.cluster.speed(r) for r in range(rank, size * placement.replicas, size)) for rank in ranks
        )
        return speeds if len(set(speeds)) > 1 else None

    # The choices of each dimension

    def samples(self, placement: Placement) -> int:
        """Return the samples per step of the largest plan replica."""
        return -(-self.request.global_batch // placement.replicas)

    def share(self, placement: Placement, stage: int) -> int:
        """Return the most samples that one rank of a stage can work on in a step."""
        samples, kind = self.samples(placement), placement.kinds[stage]
        if kind == "tail":
            return samples
        shares = [self._shares(placement, kind, ranks) for ranks in placement.groups[stage]]
        return max(
            -(-samples // len(ranks)) if own is None else max(length(i) for i in split(samples, own))
            for ranks, own in zip(placement.groups[stage], shares, strict=True)
        )

    def sizes(self, placement: Placement, stage: int) -> list[int]:
        """Return the micro-batch sizes worth trying, ascending.

        The share in up to 64 parts, and powers of two.
        """
        pinned = self.request.pin(placement.kinds[stage]).micro_batch
        if pinned is not None:
            return [pinned]
        share = self.share(placement, stage)
        if self.request.space.micro_batches is not None:
            return sorted({min(size, share) for size in self.request.space.micro_batches})
        least = min(self.request.least_micro_batch, share)
        return [size for size in usual_sizes(share) if size >= least]

    def caps(self, draft: Draft, stage: int) -> tuple[int | None, ...]:
        """Return the in-flight caps to try: the rule's, and one to four of the stage's own chunks."""
        pinned = self.request.pin(draft.placement.kinds[stage]).in_flight
        if pinned is not None:
            return (pinned,)
        if self.request.space.in_flight is not None:
            return self.request.space.in_flight
        chunk = draft.micro_batches[stage]
        if draft.placement.kinds[stage] != "tail":
            chunk *= max(len(ranks) for ranks in draft.placement.groups[stage])
        samples = self.samples(draft.placement)
        return None, *(n * chunk for n in (1, 2, 4) if n * chunk < samples)

    def recomputations(self, placement: Placement, stage: int) -> tuple[bool, ...]:
        """Return whether to recompute a stage: no, or either."""
        pinned = self.request.pin(placement.kinds[stage]).recompute
        return self.request.space.recompute if pinned is None else (pinned,)

    def shardings(self, placement: Placement) -> tuple[OptimizerSharding, ...]:
        """Return the optimizer shardings that a placement allows."""
        stages = zip(placement.kinds, placement.groups, strict=True)
        widths = [len(ranks) for kind, groups in stages if kind != "tail" for ranks in groups]
        shared = any(width * placement.replicas > 1 for width in widths)
        fits = shared and self.request.precision == "float32" and self.request.recipe.compression is None
        choices = self.request.optimizer_shardings
        return tuple(c for c in choices if c == "none" or fits or len(choices) == 1)

    def buckets(self, placement: Placement) -> tuple[int | None, ...]:
        """Return the sizes of gradient buckets to try, ascending; one where no gradient is reduced."""
        return self.request.buckets if placement.reduces else (None,)

    def modes(self, draft: Draft) -> list[Sharding]:
        """Return, for every linear of a draft's tail that is sharded, the modes to choose from."""
        if not self._sharded(draft.placement):
            return []
        start = draft.stage_bounds(len(self.chain.layers))[-1][0]
        return ways(self.chain, start, self.request.space.sharding, sampled=self.request.sampled)

    def sharded(self, start: int, shards: int) -> Sharded:
        """Return the sharding of a tail from a layer on that moves fewest bytes."""
        key = (start, shards)
        if key not in self._shardings:
            allowed, sampled = self.request.space.sharding, self.request.sampled
            self._shardings[key] = best_sharding(self.chain, start, shards, allowed, sampled=sampled)
        return self._shardings[key]

    @staticmethod
    def _sharded(placement: Placement) -> bool:
        return placement.kinds[-1] == "tail" and len(placement.groups[-1][0]) > 1

    def resharded(self, draft: Draft) -> Draft:
        """Give a draft one mode per sharded linear of its tail: the best ones, or what it has and some more."""
        free = self.modes(draft)
        count = len(free)
        pinned = self.request.pin("tail").sharding
        if pinned is not None:
            return replace(draft, sharding=pinned if self._sharded(draft.placement) else ())
        if count and not draft.sharding:
            start = draft.stage_bounds(len(self.chain.layers))[-1][0]
            return replace(draft, sharding=self.sharded(start, len(draft.placement.groups[-1][0])).modes)
        kept = draft.sharding[max(len(draft.sharding) - count, 0) :]
        fresh = tuple(free[i][0] if (count - i) % 2 else free[i][-1] for i in range(count - len(kept)))
        return replace(draft, sharding=fresh + kept)

    def allowed(self, draft: Draft) -> bool:
        """Whether the stages' micro-batches differ, where the request wants that."""
        sizes = draft.micro_batches
        return not self.request.distinct or len(set(sizes)) == len(sizes)

    def lean(self, draft: Draft) -> Draft:
        """Return a draft with the smallest micro-batches, recomputing where that is allowed."""
        placement, chosen = draft.placement, []
        again = []
        for i in range(len(placement.kinds)):
            sizes = self.sizes(placement, i)
            chosen.append(next((s for s in sizes if not self.request.distinct or s not in chosen), sizes[0]))
            again.append(max(self.recomputations(placement, i)))
        return replace(draft, micro_batches=tuple(chosen), recompute=tuple(again))
