"""What a rank looks up in a program while it runs: worked out once per program, not in every step."""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakKeyDictionary

from hybridpar.planning.program import Program

Key = tuple[int, int]
"""(block, micro-batch)."""


class Lookup:
    """One rank's tables of one program."""

    def __init__(self, program: Program, rank: int) -> None:
        self.last_uses = _last_uses(program, rank)
        """By an action's number the outputs and input gradients that no later action needs."""
        self.first_rows = _first_rows(program, rank)
        """By micro-batch of the first block where its samples begin among all that the rank reads in a step."""


class Lookups:
    """The tables of one rank; those of a program live as long as the program."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._made: WeakKeyDictionary[Program, Lookup] = WeakKeyDictionary()

    def of(self, program: Program) -> Lookup:
        """Return the tables of a program."""
        if program not in self._made:
            self._made[program] = Lookup(program, self._rank)
        return self._made[program]


def _first_rows(program: Program, rank: int) -> dict[int, int]:
    ranks = program.positions[0].ranks
    rows, at = {}, 0
    if rank in ranks:
        own = ranks.index(rank)
        for micro_batch, intervals in enumerate(program.micro_batches[0]):
            start, stop = intervals[own]
            rows[micro_batch] = at
            at += stop - start
    return rows


def _last_uses(program: Program, rank: int) -> dict[int, list[tuple[str, Key]]]:
    last: dict[tuple[str, Key], int] = {}
    for number, action in enumerate(program.actions[rank]):
        if action.kind == "copy" and action.transfer is not None:
            source, content, block = action.transfer.source_micro_batch, str(action.content), action.block or 0
        elif action.kind == "start" and action.operation is not None:
            operation = program.operations[action.operation]
            block, content = operation.block or 0, operation.content
            if operation.transfer is not None and operation.ranks[0] == rank:
                source = operation.transfer.source_micro_batch
            elif content == "sum":
                source, content = operation.micro_batch or 0, "gradient" if operation.backward else "activation"
            else:
                continue
        else:
            continue
        last[str(content), (block + (content == "gradient"), source)] = number
    result: dict[int, list[tuple[str, Key]]] = defaultdict(list)
    for value, number in last.items():
        result[number].append(value)
    return result
