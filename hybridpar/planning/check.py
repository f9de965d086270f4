"""The deadlock check: whether a program would finish on the strictest machine.

That machine buffers nothing, keeps one queue per communicator (per pair of ranks for sends) and makes no progress
beyond a start: an operation completes only once every participant has started it and everything that any of them
started earlier in the same queue is complete. A program that passes here finishes on any backend. The check also
follows the data: every action's inputs must be there when it runs (:mod:`hybridpar.planning.holdings`).

Plan replicas run programs that differ, as their samples may, and meet in the operations across them. Here these
are taken to complete once the program's own ranks are there, which is right as replicas cannot wait in a ring:

- Every rank starts the operations of one communicator in one order, whatever its samples (checked here): labels,
  metrics and norm on the one of all ranks; buckets of the last block first, and then the update of sharded state,
  on the one of a position; moments of a position's forward, then those of its backward. Moments are across only
  where every replica has one chunk of the position, so that a position's whole forward comes before, and its whole
  backward behind, all of the positions behind it.
- In the global sequence whatever waits for the buckets of a position comes after all backwards of it and of those
  behind it, on all ranks, and so after the starts of all their buckets. The sums of right factors of compressed
  ones start at one place of the sequence, for all ranks: behind the waits for the left ones, before any wait for
  a right one, and from the last position to the first. Whatever waits for the norm comes after all its starts;
  updates of sharded state are started one after the other, of the last position first, by ranks that wait for
  nothing else than them and the metrics from then on; metrics are waited for at the end, labels started before
  anything else.

Let every replica stop at the first action of its sequence that hangs: a wait for an operation across. Order what
they wait for as labels, moments of forwards from the first position to the last, moments of backwards from the
last to the first, buckets from the last position to the first (of each the right factors last), norm, updates of
sharded state in their order, metrics, and take a replica whose operation is first in this order. Some participant
has not started it, or one before it on its communicator, so its replica stopped before that; but it waits for the
same or something later, before which it has started them all.

A rank may wait for a bucket before another one of its replica starts moments of an earlier position's backward. It
holds nothing up: it waits for buckets only when it has no pass left to run, and so has started all moments and all
that its replica waits for.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Hashable

from hybridpar.errors import ProgramError
from hybridpar.planning.communicators import communicators
from hybridpar.planning.compression import SUMS
from hybridpar.planning.holdings import Holdings
from hybridpar.planning.moments import calls
from hybridpar.planning.program import Action, Operation, Program

Place = tuple[str, int, int, bool, int]
"""Start or wait of the moments of a norm: (kind, block, micro-batch, backward, norm)."""


def check(program: Program) -> None:
    """Raise ProgramError if the program could hang or an action would run without its inputs.

    The message names the rank, the action and what it waits for.
    """
    _check_membership(program)
    _check_pairs(program)
    _check_queues(program)
    _check_order_across(program)
    for rank in range(program.plan.replica_world):
        _check_moments(program, rank)
    for rank in range(program.plan.replica_world):
        Holdings(program, rank).check()


def queue_of(operation: Operation) -> Hashable:
    """Return the queue an operation waits in: its communicator, or one way between two ranks."""
    return (operation.communicator, operation.ranks) if operation.kind == "send" else operation.communicator


def _check_membership(program: Program) -> None:
    known = {c.name: c for c in communicators(program.plan)}
    for operation in program.operations:
        own = known.get(operation.communicator)
        if own is None or not set(operation.ranks) <= set(own.ranks) or operation.across != own.across:
            raise ProgramError(f"operation {operation} uses a communicator that its ranks are not members of")


def _check_pairs(program: Program) -> None:
    """Every participant starts and waits exactly once, in this order; nobody else does."""
    for rank, actions in enumerate(program.actions):
        starts: Counter[int] = Counter()
        waits: Counter[int] = Counter()
        for action in actions:
            if action.operation is None:
                continue
            operation = program.operations[action.operation]
            if rank not in operation.ranks:
                raise ProgramError(f"rank {rank} takes part in '{program.describe(action)}', which is not its own")
            if action.kind == "start":
                starts[action.operation] += 1
            else:
                waits[action.operation] += 1
                if waits[action.operation] > starts[action.operation]:
                    raise ProgramError(f"rank {rank} would '{program.describe(action)}' before it starts it")
        for operation in program.operations:
            wanted = int(rank in operation.ranks and not operation.alone)
            if starts[operation.index] != wanted or waits[operation.index] != wanted:
                name = program.describe(Action("start", operation=operation.index))
                raise ProgramError(
                    f"rank {rank}: '{name}' is started {starts[operation.index]} and waited for "
                    f"{waits[operation.index]} times instead of {wanted}"
                )


def _check_queues(program: Program) -> None:
    """Run all ranks in turn on the strictest machine until they finish or none can go on."""
    machine, moved = _StrictMachine(program), True
    while moved:
        moved = bool([rank for rank in range(program.plan.replica_world) if machine.advance(rank)])
    stuck = [rank for rank, actions in enumerate(program.actions) if machine.at[rank] < len(actions)]
    if stuck:
        lines = "; ".join(_stuck_line(program, rank, machine.at[rank]) for rank in stuck)
        raise ProgramError(f"the program hangs: {lines}")


class _StrictMachine:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.at = [0] * program.plan.replica_world
        self.queues: dict[tuple[int, Hashable], deque[int]] = defaultdict(deque)
        self.complete: set[int] = set()

    def advance(self, rank: int) -> bool:
        """Run a rank until it waits for something incomplete; return whether it got anywhere."""
        before, actions = self.at[rank], self.program.actions[rank]
        while self.at[rank] < len(actions):
            action = actions[self.at[rank]]
            if action.kind == "wait" and action.operation not in self.complete:
                break
            if action.kind == "start" and action.operation is not None:
                operation = self.program.operations[action.operation]
                self.queues[rank, queue_of(operation)].append(operation.index)
                self._settle(operation)
            self.at[rank] += 1
        return self.at[rank] > before

    def _settle(self, operation: Operation) -> None:
        """Complete an operation that leads the queues of all its participants, and what it held up."""
        ready = [operation]
        while ready:
            index, queue = ready[-1].index, queue_of(ready[-1])
            own = [self.queues[rank, queue] for rank in ready.pop().ranks]
            if any(not q or q[0] != index for q in own):
                continue
            self.complete.add(index)
            for q in own:
                q.popleft()
            ready += [self.program.operations[q[0]] for q in own if q]


def _check_order_across(program: Program) -> None:
    """Every rank starts what is across replicas in the one order that holds for all of them."""
    for rank, actions in enumerate(program.actions):
        last: dict[str, tuple[int, ...]] = {}
        for action in actions:
            if action.kind != "start" or action.operation is None:
                continue
            operation = program.operations[action.operation]
            if not operation.across:
                continue
            place = _place_across(operation)
            if place <= last.get(operation.communicator, ()):
                name = program.describe(action)
                raise ProgramError(f"rank {rank} would '{name}' in another order than other plan replicas")
            last[operation.communicator] = place


def _place_across(operation: Operation) -> tuple[int, ...]:
    """Return where an operation stands in the one order of a communicator's operations across replicas."""
    block, norm = operation.block or 0, operation.norm or 0
    if operation.content == "moments":
        return (1, -block, -norm) if operation.backward else (0, block, norm)
    within = SUMS.index(operation.content) if operation.content in SUMS else 0
    order = {"label": 0, "metrics": 1, "best": 1, "norm": 2, "right": 4, "zero": 5}
    return order.get(operation.content, 3), -block, within


def _check_moments(program: Program, rank: int) -> None:
    """What batch norms tell each other in a pass follows it at once, in their order; each start with its wait.

    A rank without samples in the pass takes part in the same way, but between its own passes.
    """
    due: list[Place] = []
    for action in program.actions[rank]:
        found = _place_of_moments(program, action)
        if due:
            if found != due.pop(0):
                raise ProgramError(
                    f"rank {rank} would '{program.describe(action)}' within a pass whose batch norms have to meet "
                    "other ranks first"
                )
        elif found is not None:
            kind, block, micro_batch, *rest = found
            if kind == "wait" or program.works(block, micro_batch, rank):
                raise ProgramError(f"rank {rank} would '{program.describe(action)}' outside of the pass it is for")
            due = [("wait", block, micro_batch, *rest)]  # type: ignore[list-item]
        elif program.mode == "train" and action.kind in {"forward", "backward"}:
            due = _expected_moments(program, action)
    if due:
        raise ProgramError(f"rank {rank} would end within a pass whose batch norms have to meet other ranks first")


def _place_of_moments(program: Program, action: Action) -> Place | None:
    if action.operation is None or program.operations[action.operation].content != "moments":
        return None
    o = program.operations[action.operation]
    return action.kind, o.block or 0, o.micro_batch or 0, o.backward, o.norm or 0


def _expected_moments(program: Program, action: Action) -> list[Place]:
    """Return what has to follow a pass."""
    number, micro_batch, backward = action.block or 0, action.micro_batch or 0, action.kind == "backward"
    block = program.blocks[number]
    own = calls(program.positions[block.position], block, program.chain, backward=backward)
    return [(kind, number, micro_batch, backward, c.number) for c in own for kind in ("start", "wait")]


def _stuck_line(program: Program, rank: int, at: int) -> str:
    return f"rank {rank} waits forever in '{program.describe(program.actions[rank][at])}' (action {at})"
