"""The script of a step: what all ranks do, in one sequence, as it is written down, and the operations in it."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from hybridpar.planning.layout import Transfer
from hybridpar.planning.program import Action, Content, Operation, OperationKind

SEND_LAG = 2
"""A send is waited for after this many further computations of its rank: late enough to overlap, early enough to
free its buffer."""

OTHER, PASSES, RECEIVES, ARRIVALS = range(4)
"""What the arrangement of a rank's actions goes by: forwards and backwards, starts and waits of receives."""
WAYS = {
    (content, up): f"{way}.{'up' if up else 'down'}"
    for content, way in (("activation", "forward"), ("gradient", "backward"))
    for up in (True, False)
}
"""Communicators of sends."""


class Script:
    """Takes down what the ranks of ``world`` do, and knows what each of them has yet to wait for."""

    def __init__(self, world: tuple[int, ...]) -> None:
        self.world = world
        self.operations: list[Operation] = []
        self.shared: dict[str, Operation] = {}
        """Operations that were made once for several ranks, by their names."""
        self._emitted: list[tuple[int, Action, int]] = []
        """All actions with their ranks, and whether they are receives or passes."""
        self._starts: list[Action] = []
        self._waits: list[Action] = []
        """By operation, as every participant has it."""
        self._unsent: list[deque[list[int]]] = [deque([[]]) for _ in world]
        self._arriving: dict[tuple[str, int, int, int], list[int]] = defaultdict(list)
        self._unwaited: list[dict[int, None]] = [{} for _ in world]

    # Operations

    def operation(
        self,
        kind: OperationKind,
        content: Content,
        communicator: str,
        ranks: tuple[int, ...],
        size: int,
        block: int | None = None,
        micro_batch: int | None = None,
        transfer: Transfer | None = None,
        *,
        backward: bool = False,
        across: bool = False,
        norm: int | None = None,
    ) -> Operation:
        """Return a new operation of ``size`` bytes; nobody starts it yet."""
        index = len(self.operations)
        made = Operation(
            index, kind, content, communicator, ranks, size, block, micro_batch, transfer, backward, across, norm
        )
        self.operations.append(made)
        self._starts.append(Action("start", operation=index, content=content))
        self._waits.append(Action("wait", operation=index, content=content))
        return made

    def once(self, name: str, make: Callable[[], Operation]) -> Operation:
        """Return the operation of this name, made when it is first asked for."""
        return self.shared.get(name) or self.shared.setdefault(name, make())

    def send(self, content: Content, boundary: int, t: Transfer, size: int) -> None:
        """Send a transfer to another rank, which waits for it where it requires it."""
        communicator, ranks = WAYS[content, t.source < t.target], (t.source, t.target)
        send = self.operation("send", content, communicator, ranks, size, boundary, t.target_micro_batch, t)
        for rank in ranks:
            self.start(rank, send)
        self._unsent[t.source][-1].append(send.index)
        self.expect(t.target, send, content, boundary, t.target_micro_batch)

    # Actions

    def act(self, rank: int, action: Action) -> None:
        """Let a rank do something that is no communication."""
        self._emitted.append((rank, action, PASSES if action.kind in {"forward", "backward"} else OTHER))

    def start(self, rank: int, operation: Operation) -> None:
        """Start an operation and owe its wait; what one rank has for itself needs neither."""
        if operation.alone:
            return
        self._unwaited[rank][operation.index] = None
        self._emitted.append(
            (rank, self._starts[operation.index], RECEIVES if _receives(rank, operation) else OTHER)
        )

    def wait(self, rank: int, operation: int) -> None:
        """Wait for an operation that the rank has started."""
        del self._unwaited[rank][operation]
        arrives = _receives(rank, self.operations[operation])
        self._emitted.append((rank, self._waits[operation], ARRIVALS if arrives else OTHER))

    def wait_once(self, rank: int, operation: int) -> None:
        """Wait for an operation, unless the rank has done so or never started it."""
        if operation in self._unwaited[rank]:
            self.wait(rank, operation)

    def expect(self, rank: int, operation: Operation, content: Content, block: int, micro_batch: int) -> None:
        """Note that an operation brings a rank a content of a block, or of the boundary behind it."""
        self._arriving[content, block, micro_batch, rank].append(operation.index)

    def require(self, rank: int, content: Content, block: int, micro_batch: int) -> None:
        """Wait for all that brings a rank such a content."""
        unwaited = self._unwaited[rank]
        for operation in self._arriving.pop((content, block, micro_batch, rank), ()):
            if operation in unwaited:
                self.wait(rank, operation)

    def settle_sends(self, rank: int) -> None:
        """Wait for sends that were started a while ago, now that the rank has computed once more."""
        self._unsent[rank].append([])
        if len(self._unsent[rank]) > SEND_LAG:
            for operation in self._unsent[rank].popleft():
                self.wait_once(rank, operation)

    def close(self) -> None:
        """Wait for all that was started."""
        for rank in self.world:
            for operation in list(self._unwaited[rank]):
                self.wait(rank, operation)

    def arranged(self) -> tuple[tuple[tuple[Action, ...], ...], tuple[int, ...]]:
        """Return every rank's actions, and the ranks of all actions in one order that none of them waits against.

        Every receive starts before the computation that precedes it, so that the data can flow meanwhile. All
        receives move by one computation, so their order per communicator stays. They also start before the waits
        for what that computation receives: behind them the announcement would reach the sender while it writes the
        message before into the same connection, and meanwhile gloo's thread there asks for events in vain.
        """
        actions: list[list[Action]] = [[] for _ in self.world]
        numbers: list[tuple[int, int]] = []
        last: list[list[Action]] = [[] for _ in self.world]
        last_numbers: list[list[tuple[int, int]]] = [[] for _ in self.world]
        awaiting = [False] * len(self.world)
        """Whether what is last are waits for receives, whose computation comes next."""

        def settle(rank: int) -> None:
            actions[rank] += last[rank]
            numbers.extend(last_numbers[rank])
            last[rank], last_numbers[rank] = [], []

        for number, (rank, action, role) in enumerate(self._emitted):
            if role == RECEIVES:
                actions[rank].append(action)
                numbers.append((last_numbers[rank][0][0] if last[rank] else number, rank))
                continue
            if role != OTHER:
                if not awaiting[rank]:
                    settle(rank)
                awaiting[rank] = role == ARRIVALS
            last[rank].append(action)
            last_numbers[rank].append((number, rank))
        for rank in self.world:
            settle(rank)
        return tuple(map(tuple, actions)), tuple([rank for _, rank in sorted(numbers)])


def _receives(rank: int, operation: Operation) -> bool:
    return operation.kind == "send" and operation.ranks[1] == rank
