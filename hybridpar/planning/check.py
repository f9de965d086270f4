"""The deadlock check: whether a program would finish on the strictest machine.

That machine buffers nothing, keeps one queue per communicator (per pair of ranks for sends) and makes no progress
beyond a start: an operation completes only once every participant has started it and everything that any of them
started earlier in the same queue is complete. A program that passes here finishes on any backend. The check also
follows the data: every action's inputs must be there when it runs.

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
from hybridpar.planning.blocks import Position
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.communicators import communicators
from hybridpar.planning.compression import SUMS, WORKS
from hybridpar.planning.layout import length
from hybridpar.planning.moments import calls
from hybridpar.planning.parameters import reduction_of
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.planning.zero import calls_until, rounds

Place = tuple[str, int, int, bool, int]
"""Start or wait of the moments of a norm: (kind, block, micro-batch, backward, norm)."""
Token = tuple[str, int, int]
"""A value that a rank holds: what, block (or position), micro-batch."""


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
        _RankData(program, rank).check()


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


class _RankData:
    """Follows which values a rank holds: every action needs tokens and gives tokens."""

    def __init__(self, program: Program, rank: int) -> None:
        self.program, self.rank = program, rank
        self.last = len(program.blocks) - 1
        self.train = program.mode == "train"
        self.held: Counter[Token] = Counter()
        self.expected: Counter[Token] = Counter()
        self.filled: set[Hashable] = set()
        crossing = boundaries(program.positions, program.blocks, program.chain, program.samples)
        for i, boundary in enumerate(crossing):
            for content, transfers in (("activation", boundary.activation), ("gradient", boundary.gradient)):
                for t in transfers:
                    if t.target == rank:
                        token = (content, i, t.target_micro_batch)
                        self.expected[token] = 1 if boundary.summed(content) else self.expected[token] + 1

    def check(self) -> None:
        """Raise ProgramError at the first action that lacks an input, or if work of the step is left out."""
        for action in self.program.actions[self.rank]:
            for token, count in self._needs(action).items():
                if self.held[token] < count:
                    name = self.program.describe(action)
                    raise ProgramError(f"rank {self.rank} would '{name}' without {_token_name(token)}")
            self._place(action)
            self.held.update(self._gives(action))
        for token, count in self._work().items():
            if self.held[token] != count:
                raise ProgramError(
                    f"rank {self.rank} does {_token_name(token)} {self.held[token]} times instead of {count}"
                )

    def _place(self, action: Action) -> None:
        """Note where a transfer puts its part; a summand must find there what it is added to."""
        content, block, transfer = action.content, action.block, action.transfer
        if action.kind == "wait" and action.operation is not None:
            operation = self.program.operations[action.operation]
            content, block, transfer = operation.content, operation.block, operation.transfer
        if transfer is None or transfer.target != self.rank:
            return
        place = content, block, transfer.target_micro_batch, transfer.samples, transfer.features
        if transfer.add and place not in self.filled:
            name = self.program.describe(action)
            raise ProgramError(f"rank {self.rank} would '{name}' before the first summand is there")
        self.filled.add(place)

    def _own(self, position: Position) -> list[int]:
        """Micro-batches of the position in which this rank has samples."""
        if self.rank not in position.ranks:
            return []
        own, all_intervals = position.ranks.index(self.rank), self.program.micro_batches[position.index]
        return [m for m, intervals in enumerate(all_intervals) if length(intervals[own]) > 0]

    def _work(self) -> dict[Token, int]:
        """What the rank has to do in the step."""
        tokens: dict[Token, int] = {}
        for block in self.program.blocks:
            for m in self._own(self.program.positions[block.position]):
                tokens["output", block.index, m] = 1
                if self.train and block.backward:
                    tokens["input gradient", block.index, m] = 1
                if block.index == self.last:
                    tokens["loss", self.last, m] = 1
        if self.train:
            tokens |= {("update", p.index, 0): 1 for p in self.program.positions if self.rank in p.ranks}
        return tokens

    def _gradients(self, position: Position) -> dict[Token, int]:
        """The complete gradients of a position: of all its micro-batches, summed over its replicas."""
        tokens: dict[Token, int] = {}
        for block in self.program.blocks:
            if block.position != position.index or self.rank not in position.ranks:
                continue
            if block.backward:
                tokens |= {("input gradient", block.index, m): 1 for m in self._own(position)}
            if not position.reduced:
                continue
            reduction = reduction_of(self.program.plan, self.program.chain, position, block, self.rank)
            if reduction.elements:
                content = "restored" if reduction.compressed else "bucket"
                tokens |= {(content, block.index, number): 1 for number in range(self._rounds(position))}
        return tokens

    def _rounds(self, position: Position) -> int:
        return rounds(self.program.plan, position, self.program.samples)

    def _needs(self, action: Action) -> dict[Token, int]:
        block, m = action.block or 0, action.micro_batch or 0
        alone = self.program.plan.world == 1
        if action.kind == "forward":
            token: Token = ("loaded", 0, 0) if block == 0 else ("activation", block - 1, m)
            return {token: self.expected.get(token, 1)}
        if action.kind == "score":
            labelled = not alone and self.program.mode != "predict"
            return {("output", block, m): 1, ("label", 0, 0): int(labelled)}
        if action.kind == "loss":
            sharded = self.program.positions[-1].sharded
            return {("scores", block, m): 1, ("statistics", block, m): int(sharded)}
        if action.kind == "backward":
            token = ("loss", block, m) if block == self.last else ("gradient", block, m)
            return {("output", block, m): 1, token: self.expected.get(token, 1)}
        if action.kind == "copy" and action.transfer is not None:
            return {_source(action.content, block, action.transfer.source_micro_batch): 1}
        if action.kind == "start" and action.operation is not None:
            return self._needs_of_start(self.program.operations[action.operation])
        if action.kind in {"norm", "update"}:
            return self._needs_of_update(action, alone=alone)
        return self._needs_of_compression(action) if action.kind in WORKS else {}

    def _needs_of_compression(self, action: Action) -> dict[Token, int]:
        block, program = action.block or 0, self.program
        if action.kind == "compress":
            return self._passed_back(block)
        if action.kind == "factor":
            return {("left", block, 0): 1}
        described = program.blocks[block]
        position = program.positions[described.position]
        reduction = reduction_of(program.plan, program.chain, position, described, self.rank)
        sums = {content for content, _ in reduction.sums(program.plan.itemsize)} - {"left"}
        return {(content, block, 0): 1 for content in (*sums, *["right"] * bool(reduction.matrices))}

    def _passed_back(self, block: int, number: int = 0) -> dict[Token, int]:
        """All backwards of a block on this rank, up to those of a round."""
        position = self.program.positions[self.program.blocks[block].position]
        own = self._own(position)
        done = own[: calls_until(len(own), self._rounds(position), number)]
        return {("input gradient", block, call): 1 for call in done}

    def _needs_of_start(self, operation: Operation) -> dict[Token, int]:
        block, m = operation.block or 0, operation.micro_batch or 0
        if operation.transfer is not None:
            sends = operation.transfer.source == self.rank
            return {_source(operation.content, block, operation.transfer.source_micro_batch): int(sends)}
        if operation.content == "moments":
            return {}
        if operation.content == "bucket":
            return self._passed_back(block, m)
        if operation.content in SUMS:
            return {("factored" if operation.content == "right" else "compressed", block, 0): 1}
        if operation.content == "zero":
            return self._needs_of_update(Action("update", block), alone=False)
        if operation.content in {"metrics", "best"}:
            return {("loss", self.last, own): 1 for own in self._own(self.program.positions[-1])}
        tokens: dict[str, tuple[Token, int]] = {
            "sum": (_source("gradient" if operation.backward else "activation", block, m), 1),
            "statistics": (("scores", block, m), 1),
            "label": (("loaded", 0, 0), int(bool(self.program.reads(self.rank)))),
            "norm": (("norm", 0, 0), 1),
        }
        return dict([tokens[operation.content]])

    def _needs_of_update(self, action: Action, *, alone: bool) -> dict[Token, int]:
        if action.kind == "norm":
            own = [self._gradients(p) for p in self.program.positions]
            return {token: count for tokens in own for token, count in tokens.items()}
        needs = self._gradients(self.program.positions[action.block or 0])
        if self.program.plan.recipe.normed:
            needs["global norm" if not alone else "norm", 0, 0] = 1
        return needs

    def _gives(self, action: Action) -> list[Token]:
        block, m = action.block or 0, action.micro_batch or 0
        simple = {
            "load": "loaded",
            "forward": "output",
            "score": "scores",
            "loss": "loss",
            "backward": "input gradient",
            "compress": "compressed",
            "factor": "factored",
            "restore": "restored",
            "norm": "norm",
            "update": "update",
        }
        if action.kind in simple:
            return [(simple[action.kind], block, m)]
        if action.kind == "copy" and action.transfer is not None:
            return [(str(action.content), block, action.transfer.target_micro_batch)]
        if action.kind == "wait" and action.operation is not None:
            return self._given_by(self.program.operations[action.operation])
        return []

    def _given_by(self, operation: Operation) -> list[Token]:
        block, m = operation.block or 0, operation.micro_batch or 0
        if operation.transfer is not None:
            return [(operation.content, block, m)] if operation.transfer.target == self.rank else []
        if operation.content == "sum":
            return [("gradient" if operation.backward else "activation", block, m)]
        names = {"norm": "global norm", "zero": "update"}
        return [(names.get(operation.content, operation.content), block, m)]


def _source(content: str | None, boundary: int, micro_batch: int) -> Token:
    """The value that crosses a boundary: an output forward, an input's gradient backward."""
    if content == "activation":
        return "output", boundary, micro_batch
    return "input gradient", boundary + 1, micro_batch


def _token_name(token: Token) -> str:
    return f"{token[0]} of block {token[1]} micro-batch {token[2]}"
