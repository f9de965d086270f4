"""Holdings: which values a rank has at hand while it runs a program, so that no action lacks an input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from hybridpar.errors import ProgramError
from hybridpar.planning.blocks import Position
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.compression import SUMS, WORKS
from hybridpar.planning.layout import length
from hybridpar.planning.parameters import reduction_of
from hybridpar.planning.program import Action, Operation, Program
from hybridpar.planning.zero import calls_until, rounds

Token = tuple[str, int, int]
"""A value that a rank holds: what, block (or position), micro-batch."""


class Holdings:
    """Follows which values a rank holds while it runs a program: every action needs tokens and gives tokens."""

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
