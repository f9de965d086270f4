"""Random valid plans for a small chain, and mutations of their programs."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

from hybridpar.errors import PlanError
from hybridpar.model.chain import Chain
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.layout import chunks, length
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage, validate
from hybridpar.planning.program import Action, Program

MOST_RANKS, MOST_SAMPLES = 4, 14


def make_plan(chain: Chain, *stages: Stage, world: int, global_batch: int = 13, **fields: object) -> Plan:
    """A validated float64 plan."""
    recipe = replace(fields.pop("recipe", Recipe()), synchronised=chain.synchronised)  # type: ignore[type-var]
    plan = Plan(chain.model, chain.fingerprint, world, global_batch, "float64", stages, recipe=recipe, **fields)  # type: ignore[arg-type]
    validate(plan, chain)
    return plan


def random_plan(chain: Chain, dice: random.Random) -> Plan:
    """Random cuts, degrees, rank sets (own, shared or overlapping, in any order), micro-batches, shares, rules."""
    world, batch = dice.randint(2, MOST_RANKS), dice.randint(1, MOST_SAMPLES)
    front, middle, tail = dice.choice(
        [(1, 0, 1), (1, 1, 1), (1, 2, 1), (0, 2, 1), (1, 0, 0), (1, 2, 0), (0, 3, 0), (0, 1, 1), (0, 0, 1)]
    )
    segments = front + middle + tail
    cuts = _cuts(chain, dice, segments, tail)
    stages = []
    ranks = [_ranks(dice, world) for _ in range(segments)]
    if tail and segments == 1:
        ranks = [ranks[0][:1]]
    named = {old: new for new, old in enumerate(sorted({r for group in ranks for r in group}))}
    made = [
        Segment(layers, tuple(named[r] for r in group), _shares(dice, len(group)))
        for layers, group in zip(cuts, ranks, strict=True)
    ]
    if front:
        stages.append(Stage("front", _micro_batch(dice, batch, made[:1]), (made[0],)))
    if middle:
        own = made[front : front + middle]
        stages.append(Stage("middle", _micro_batch(dice, batch, own), tuple(own)))
    if tail:
        linears = sum(layer.linear is not None for layer in chain.layers[slice(*made[-1].layers)])
        degree = len(made[-1].ranks)
        ways = tuple(dice.choice(("column", "row")) for _ in range(linears)) if degree > 1 else ()
        stages.append(Stage("tail", dice.randint(1, batch), (made[-1],), ways))  # type: ignore[arg-type]
    plan = make_plan(
        chain,
        *stages,
        world=len(named),
        global_batch=batch,
        order=dice.choice(("fill_drain", "one_forward_one_backward")),
        bucket_bytes=dice.choice((1, 700, 8 * 2**20)),
        recipe=Recipe(clipping=dice.random() < 0.4),
    )
    return _capped(plan, chain, dice) if dice.random() < 0.3 else plan


def random_replicated(chain: Chain, dice: random.Random) -> Plan:
    """A random plan several times side by side, with random shares."""
    while True:
        plan, count = random_plan(chain, dice), dice.randint(2, 3)
        shares = None if dice.random() < 0.4 else tuple(dice.choice((1.0, 1.5, 3.0)) for _ in range(count))
        batch = plan.global_batch * count + dice.randint(0, count - 1)
        plan = replace(
            plan,
            world=plan.world * count,
            replicas=count,
            replica_shares=shares,
            global_batch=batch,
            stages=tuple(replace(s, recompute=dice.random() < 0.3) for s in plan.stages),
        )
        try:
            validate(plan, chain)
            for replica in range(count):
                compile_program(plan, chain, batch, "train", replica)
        except PlanError:
            continue
        return plan


def random_samples(plan: Plan, dice: random.Random) -> int:
    """The plan's whole batch, or a last partial one."""
    return plan.global_batch if dice.random() < 0.7 else dice.randint(1, plan.global_batch)


def _cuts(chain: Chain, dice: random.Random, segments: int, tail: int) -> list[tuple[int, int]]:
    count = len(chain.layers)
    last_linear = max(i for i, layer in enumerate(chain.layers) if layer.linear)
    if tail and segments > 1:
        start = dice.randint(max(chain.tail_start, segments - 1), last_linear)
        inner = sorted(dice.sample(range(1, start), segments - 2))
        points = [0, *inner, start, count]
    else:
        points = [0, *sorted(dice.sample(range(1, count), segments - 1)), count]
    return list(pairwise(points))


def _ranks(dice: random.Random, world: int) -> tuple[int, ...]:
    return tuple(dice.sample(range(world), dice.randint(1, min(3, world))))


def _shares(dice: random.Random, degree: int) -> tuple[float, ...] | None:
    if dice.random() < 0.5:
        return None
    return tuple(dice.choice((1.0, 1.5, 2.0)) for _ in range(degree))


def _micro_batch(dice: random.Random, batch: int, segments: list[Segment]) -> int:
    whole = [max(length(i) for i in chunks(batch, batch, s.weights)[0]) for s in segments]
    return dice.randint(1, max(min(whole), 1))


def _capped(plan: Plan, chain: Chain, dice: random.Random) -> Plan:
    """Cap one stage; where the cap is too low, at the least value that the refusal names."""
    chosen = dice.randrange(len(plan.stages))

    def capped(cap: int) -> Plan:
        stages = [replace(s, in_flight=cap) if i == chosen else s for i, s in enumerate(plan.stages)]
        return replace(plan, stages=tuple(stages))

    wanted = capped(dice.randint(1, plan.global_batch))
    try:
        compile_program(wanted, chain, plan.global_batch, "train")
    except PlanError as e:
        (least,) = re.findall(r"least that works is (\d+)", str(e))
        return capped(int(least))
    return wanted


def mutate(program: Program, dice: random.Random) -> tuple[Program, str]:
    """Swap two actions of a rank, drop one, or move one, mostly communications; says what it did."""
    rank = dice.choice([r for r, own in enumerate(program.actions) if len(own) > 1])
    own = list(program.actions[rank])
    way = dice.choices(("swap", "drop", "move", "nudge"), (5, 1, 5, 2))[0]
    communications = [i for i, a in enumerate(own) if a.operation is not None]
    among = communications if communications and dice.random() < 0.7 else range(len(own))
    at = min(dice.choice(among), len(own) - 1 - (way == "nudge"))
    said = f"rank {rank}: {way} {at} '{program.describe(own[at])}'"
    if way == "swap":
        other = dice.choice(among)
        own[at], own[other] = own[other], own[at]
        said += f" with {other}"
    elif way == "drop":
        del own[at]
    else:
        to = at + 1 if way == "nudge" else dice.randrange(len(own))
        own.insert(to, own.pop(at))
        said += f" to {to}"
    return with_actions(program, rank, own), said


def with_actions(program: Program, rank: int, actions: list[Action]) -> Program:
    """The program with other actions on one rank."""
    changed = [tuple(actions) if r == rank else own for r, own in enumerate(program.actions)]
    return replace(program, actions=tuple(changed))
