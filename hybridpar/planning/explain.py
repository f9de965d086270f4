"""Why a plan: what sets the candidates apart, in numbers of the simulation."""

from __future__ import annotations

from hybridpar.planning.plan import Prediction
from hybridpar.planning.search import TIE, Candidate, Planned

MUCH = 0.02
"""Share by which two figures must differ to be named as a reason."""


def verdicts(planned: Planned) -> tuple[str, ...]:
    """Return one line per candidate: chosen, how much slower, or why it is impossible."""
    best = min((c.prediction.step_s for c in planned.candidates if c.plan), default=0.0)
    return tuple(_verdict(c, planned, best) for c in planned.candidates)


def _verdict(candidate: Candidate, planned: Planned, best_s: float) -> str:
    if candidate.plan is None:
        return f"impossible: {candidate.reason}"
    ratio = candidate.prediction.step_s / best_s if best_s else 1.0
    fastest = ratio <= 1 + TIE
    if candidate.shape == planned.shape:
        return "chosen" if fastest else f"chosen as asked, takes {ratio:.2f}x the fastest"
    return "fastest" if fastest else f"takes {ratio:.2f}x the fastest"


def reason(planned: Planned) -> str:
    """Say why the chosen plan wins over the runner-up and over data parallelism, or what it costs if asked for."""
    others = rivals(planned)
    if not others:
        return f"{planned.shape} is the only shape that is possible here."
    lines = [_compare(planned.chosen, others[0])]
    lines += [_compare(planned.chosen, c) for c in others[1:] if c.shape == "data_parallel"]
    return " ".join(lines)


def in_few_words(planned: Planned) -> str:
    """Say against which runner-up the chosen plan wins, or loses if it was asked for, and by what."""
    second = rival(planned)
    if second is None:
        return "the only shape that is possible"
    own, other = planned.chosen.prediction, second.prediction
    faster = own.step_s <= other.step_s * (1 + TIE)
    winner, loser = (own, other) if faster else (other, own)
    ahead = (
        (winner.wire_bytes < loser.wire_bytes * (1 - MUCH), "less on the wire"),
        (max(_busy(winner)) < max(_busy(loser)) * (1 - MUCH), "less work in the busiest stage"),
        (winner.bubble < loser.bubble - MUCH, "less idle"),
    )
    words = [word for holds, word in ahead if holds]
    head = (
        f"{loser.step_s / winner.step_s:.2f}x {second.shape}" if faster else f"asked for; {second.shape} is faster"
    )
    return f"{head}: {', '.join(words)}" if words else head


def rivals(planned: Planned) -> list[Candidate]:
    """Return the best plans of other shapes than the chosen one, the runner-up first."""
    others = [c for c in planned.candidates if c.plan is not None and c.shape != planned.shape]
    return sorted(others, key=lambda c: c.prediction.step_s)


def rival(planned: Planned) -> Candidate | None:
    """Return the runner-up: the best plan of another shape than the chosen one."""
    return next(iter(rivals(planned)), None)


def _compare(chosen: Candidate, rival: Candidate) -> str:
    own, other = chosen.prediction, rival.prediction
    faster = own.step_s <= other.step_s * (1 + TIE)
    winner, loser = (own, other) if faster else (other, own)
    names = (chosen.shape, rival.shape) if faster else (rival.shape, chosen.shape)
    head = f"{names[0]} is {loser.step_s / winner.step_s:.2f}x as fast as {names[1]}"
    if not faster:
        head = f"{chosen.shape} was asked for; {head}"
    differences = _differences(winner, loser)
    return f"{head}: it {'; it '.join(differences)}." if differences else f"{head}."


def _differences(winner: Prediction, loser: Prediction) -> list[str]:
    """Name what the winner does better, and at what price, strongest first."""
    result = []
    if winner.wire_bytes < loser.wire_bytes * (1 - MUCH):
        result.append(
            f"moves {_mib(winner.wire_bytes)} over the wire per step instead of {_mib(loser.wire_bytes)}"
        )
    busiest = [max(_busy(p)) for p in (winner, loser)]
    if busiest[0] < busiest[1] * (1 - MUCH):
        result.append(
            f"computes {busiest[0] * 1e3:.3g} ms in its busiest stage instead of {busiest[1] * 1e3:.3g} ms"
        )
    if winner.bubble < loser.bubble - MUCH:
        result.append(f"leaves devices idle {winner.bubble:.0%} of the time instead of {loser.bubble:.0%}")
    updates = [max(s.update_s for s in p.stages) for p in (winner, loser)]
    if updates[0] < updates[1] * (1 - MUCH) and updates[1] > MUCH * loser.step_s:
        result.append(f"updates for {updates[0] * 1e3:.3g} ms instead of {updates[1] * 1e3:.3g} ms")
    memory = [max(p.memory_bytes) for p in (winner, loser)]
    if memory[0] < memory[1] * (1 - MUCH):
        result.append(f"needs {_mib(memory[0])} per rank instead of {_mib(memory[1])}")
    if winner.wire_bytes > loser.wire_bytes * (1 + MUCH):
        result.append(f"pays with {_mib(winner.wire_bytes)} on the wire against {_mib(loser.wire_bytes)}")
    return result


def _busy(prediction: Prediction) -> list[float]:
    return [s.forward_s + s.backward_s + s.update_s for s in prediction.stages]


def _mib(count: float) -> str:
    return f"{count / 2**20:.4g} MiB"
