"""The explanation of a planning result: axes, where the time goes, where the answer flips, what neighbours do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hybridpar.planning.axes import Axes, axes
from hybridpar.planning.explain import rivals
from hybridpar.planning.flips import Flips, flips
from hybridpar.planning.microbatches import StageEffects, micro_batch_effects
from hybridpar.planning.search import Candidate, Planned
from hybridpar.planning.timesplit import TimeSplit, split_time
from hybridpar.planning.trial import Trials

MOST_BRIEF_ACTIONS = 20_000
"""Actions of the chosen plan's and the runner-up's programs above which the short form leaves the flips out."""


@dataclass(frozen=True)
class Account:
    """One candidate in figures."""

    candidate: Candidate
    axes: Axes
    split: TimeSplit


@dataclass(frozen=True)
class Obstacle:
    """What keeps a shape from having a plan."""

    shape: str
    constraint: Literal["memory", "rule"]
    """A device's memory, or a rule of the plan (pins, ranks, layers, tensor parallelism)."""
    detail: str
    """Which rank, limit or rule, and by how much."""


@dataclass(frozen=True)
class Explanation:
    """Why a plan was chosen, and how far the choice holds."""

    full: bool
    """Whether it is the long form."""

    accounts: tuple[Account, ...]
    """The possible candidates in their order; in the short form the chosen one and its runner-up."""
    obstacles: tuple[Obstacle, ...]
    flips: Flips | None
    """None without a runner-up, and in the short form of large programs."""
    effects: tuple[StageEffects, ...]
    """Of the chosen plan's stages; empty in the short form."""

    def account(self, shape: str) -> Account:
        """Return a candidate's figures by its shape."""
        return next(a for a in self.accounts if a.candidate.shape == shape)


def explain(planned: Planned, trials: Trials, *, full: bool) -> Explanation:
    """Explain a planning result by simulations of its candidates; nothing is searched again.

    ``full`` covers every candidate and the neighbouring micro-batches; otherwise it is the chosen plan and its
    runner-up.
    """
    brief = [planned.chosen, *rivals(planned)[:1]]
    told = planned.candidates if full else brief
    return Explanation(
        full,
        tuple(_account(c, trials) for c in told if c.plan is not None),
        tuple(_obstacle(c) for c in planned.candidates if c.plan is None),
        flips(trials, planned, full=full) if full or _quick(brief, trials) else None,
        micro_batch_effects(trials, planned.plan) if full else (),
    )


def _quick(candidates: list[Candidate], trials: Trials) -> bool:
    """Whether simulating the candidates some 25 times takes no more than a few seconds."""
    programs = (trials.program(c.plan) for c in candidates if c.plan is not None)
    return sum(len(own) for program in programs for own in program.actions) <= MOST_BRIEF_ACTIONS


def _account(candidate: Candidate, trials: Trials) -> Account:
    assert candidate.plan is not None
    program = trials.program(candidate.plan)
    split = split_time(program, trials.timeline(program))
    return Account(candidate, axes(trials, program, split), split)


def _obstacle(candidate: Candidate) -> Obstacle:
    return Obstacle(candidate.shape, "memory" if candidate.over_memory else "rule", str(candidate.reason))
