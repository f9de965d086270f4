"""Scores of drafts: compile, count the memory, simulate; and lower bounds that spare doing so."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybridpar.cluster.topology import Cluster
from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.ample import ample
from hybridpar.planning.bound import Bounds
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.draft import Draft, Drafting
from hybridpar.planning.plan import Plan, validate
from hybridpar.planning.program import Program
from hybridpar.planning.request import Request
from hybridpar.planning.resident import peak_per_rank
from hybridpar.planning.simulate import predict, step_time, step_time_at_least
from hybridpar.profiling.record import Profile

Score = tuple[int, float]
"""(0, step seconds), or (1, bytes above the memory limit), or (2, 0) where the plan is impossible."""
IMPOSSIBLE: Score = (2, 0.0)


class Scorer:
    """Scores drafts for one chain, profile, cluster and request, and remembers what it has seen."""

    def __init__(self, chain: Chain, profile: Profile, cluster: Cluster, request: Request) -> None:
        self.chain, self.cluster, self.request = chain, cluster, request
        self.costs = Costs(profile, cluster)
        self.drafting = Drafting(chain, profile, cluster, request)
        self.scores: dict[Draft, Score] = {}
        self.bounds: dict[Draft, float] = {}
        self._bounds = Bounds(chain, self.costs)
        self._plans: dict[Draft, Plan] = {}
        self.reasons: dict[Draft, str] = {}
        self._timed: set[Draft] = set()
        self.actions = 0
        """Actions of all programs that were compiled: the search's measure of its own work."""

    @property
    def tried(self) -> int:
        """How many drafts were compiled and timed; a draft counts once."""
        return len(self._timed)

    def score(self, draft: Draft, below: Score | None = None) -> Score:
        """Return a draft's score; one that is certain not to be ``below`` may come as its bound."""
        if draft in self.scores:
            return self.scores[draft]
        if below is not None and (0, self.bound(draft)) >= below:
            return 0, self.bounds[draft]
        score, exact = self._score(draft, below)
        if exact:
            self.scores[draft] = score
        else:
            self.bounds[draft] = score[1]
        return score

    def _plan(self, draft: Draft) -> Plan:
        """Return a draft's plan; raises PlanError where it is not a possible or allowed one."""
        if not self.drafting.allowed(draft):
            raise PlanError(f"the stages' micro-batches {draft.micro_batches} are not distinct")
        if draft not in self._plans:
            plan = self.drafting.plan(draft)
            validate(plan, self.chain)
            self._plans[draft] = plan
        return self._plans[draft]

    def _score(self, draft: Draft, below: Score | None) -> tuple[Score, bool]:
        """Return a score, and whether it is exact rather than a bound that is not below ``below``."""
        try:
            plan = self._plan(draft)
            program = self._compile(plan)
        except PlanError as e:
            self.reasons[draft] = str(e)
            return IMPOSSIBLE, True
        self.actions += len(program.sequence)
        self._timed.add(draft)
        if below is not None and self.costs.contended:
            least = step_time_at_least(program, self.costs)
            if (0, least) >= below:
                return (0, least), False
        seconds = step_time(program, self.costs)
        if below is not None and (0, seconds) >= below:
            return (0, seconds), False  # whether it fits does not matter
        lack = shortage(program, self.costs)
        if lack is not None:
            self.reasons[draft] = lack.text
            return (1, lack.over_bytes), True
        return (0, seconds), True

    def _compile(self, plan: Plan) -> Program:
        return compile_program(plan, self.chain, plan.global_batch, "train")

    def least(self, draft: Draft) -> Score:
        """Return a draft's score, or what is known to be at most that, without simulating anything."""
        return self.scores.get(draft, (0, self.bound(draft)))

    def fits(self, draft: Draft) -> bool:
        """Whether the draft's plan is possible and fits into memory."""
        return self.score(draft)[0] == 0

    def bound(self, draft: Draft) -> float:
        """Return a lower bound of the step time; infinite where the plan is impossible."""
        if draft not in self.bounds:
            try:
                plan = self._plan(draft)
            except PlanError as e:
                self.scores[draft], self.reasons[draft] = IMPOSSIBLE, str(e)
                self.bounds[draft] = float("inf")
            else:
                self.bounds[draft] = self._bounds.of(plan)
        return self.bounds[draft]

    def predicted(self, draft: Draft) -> Plan | None:
        """Return the draft's plan with its prediction, or None where it is impossible."""
        if self.score(draft)[0]:
            return None
        plan = self._plan(draft)
        return replace(plan, prediction=predict(self._compile(plan), self.costs))


@dataclass(frozen=True)
class Shortage:
    """Of memory, on the rank that lacks most."""

    needed_bytes: float
    over_bytes: float
    text: str


def shortage(program: Program, costs: Costs) -> Shortage | None:
    """Return by how much a program exceeds its devices' memory; None where it fits."""
    if ample(program, costs):
        return None
    worst: Shortage | None = None
    for rank, needed in enumerate(peak_per_rank(program, costs.workspaces)):
        limit = costs.memory_bytes(program.plan, rank)
        if needed > limit and (worst is None or needed - limit > worst.over_bytes):
            text = (
                f"rank {rank} needs {needed / 2**20:.1f} MiB, {(needed - limit) / 2**20:.1f} MiB more than the "
                f"{limit / 2**20:.1f} MiB of {costs.cluster.device.name}, "
                f"at global batch {program.plan.global_batch}"
            )
            worst = Shortage(needed, needed - limit, text)
    return worst
