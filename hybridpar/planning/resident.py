"""The memory that a rank's device has to have: its tensors, and the workspace of what it computes.

Of a GPU it is the peak of the tensors alive, workspace included. Of a host it is the peak of the resident set
above what the process had before: small blocks come from a heap that never shrinks, large ones from the system one
by one (:mod:`hybridpar.planning.workspaces`), so it is the peak of the former plus the peak of the latter. For the
former the heap takes more than is in use at once (:mod:`hybridpar.planning.heap`), but for what lives through the
step.
"""

from __future__ import annotations

from hybridpar.model.chain import Chain
from hybridpar.planning.books import Books, Own
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.compression import WORKS, Reduction
from hybridpar.planning.heap import Heap
from hybridpar.planning.memory import memory_of, parts_of
from hybridpar.planning.parameters import bucket_elements, reduction_of
from hybridpar.planning.plan import Plan, Precision, Segment, Stage
from hybridpar.planning.program import Action, Program
from hybridpar.planning.workspaces import Bytes, Workspaces
from hybridpar.planning.zero import is_zero, keeps_no_bucket

NORM_ITEMSIZE = 8 + 8
"""The norm of a gradient takes it in float64, and its squares."""
SUMMING_BYTES, SUMMING_THREADS = 4 * 2**20, 2
"""A host's backend keeps a buffer of at most so many bytes in each thread that works for a process group, for the
pieces of a sum on their way (gloo's ring; measured with torch 2.14)."""
NOTHING = Bytes(0.0, 0.0)
_PASSES = 2
"""One that finds no gradients, and one that does."""


def peak_per_rank(program: Program, workspaces: Workspaces) -> tuple[int, ...]:
    """Return the peak bytes that every rank of the program's plan replica needs above an idle process."""
    return tuple(_Rank(program, rank, workspaces).peak() for rank in range(program.plan.replica_world))


def heap_of(workspaces: Workspaces, chain: Chain) -> Heap:
    """Return the heap of a host as the profile measured it; of a device, or unmeasured, one without holes.

    The measured passes were those of the whole chain on one rank, with gradients that have their place.
    """
    if workspaces.heap is None:
        profile = workspaces.profile
        sizes = zip(profile.micro_batches, profile.heap_bytes, strict=False) if workspaces.host else ()
        workspaces.heap = Heap((size, _passing(workspaces, chain, size), taken) for size, taken in sizes)
    return workspaces.heap


def _passing(workspaces: Workspaces, chain: Chain, micro_batch: int) -> float:
    """Return the small bytes that passes through the whole chain make and free."""
    front = Stage("front", micro_batch, (Segment((0, len(chain.layers)), (0, 1)),))
    precision: Precision = "float64" if workspaces.profile.dtype == "float64" else "float32"
    batch = 2 * _PASSES * micro_batch
    plan = Plan(chain.model, chain.fingerprint, 2, batch, precision, (front,))
    return _Rank(compile_program(plan, chain, batch, "train"), 0, workspaces).step()[0].small


def summing_bytes(program: Program, rank: int) -> int:
    """Return what a host's backend keeps for the sums that a rank of the program's plan replica takes part in."""
    largest: dict[str, int] = {}
    for operation in program.operations:
        if operation.kind == "all_reduce" and rank in operation.ranks and not operation.alone:
            largest[operation.communicator] = max(largest.get(operation.communicator, 0), operation.bytes)
    return SUMMING_THREADS * sum(min(size, SUMMING_BYTES) for size in largest.values())


class _Rank:
    """One rank's peak."""

    def __init__(self, program: Program, rank: int, workspaces: Workspaces) -> None:
        self.program, self.rank, self.workspaces = program, rank, workspaces
        self.chain, self.itemsize = program.chain, program.plan.itemsize
        self.books = Books(program, rank)
        self.books.run()
        own = self.books.own.items()
        self.parameters = {i: workspaces.parameters(self.chain, o.block, o.shard, self.itemsize) for i, o in own}

    def peak(self) -> int:
        """Return the peak of making the parameters or of a step, whichever is higher."""
        small, large = self._persistent()
        passing, gradients_small = self.step()
        taken = passing.small + self._holes(passing.small)
        of_libraries = self.workspaces.profile.library_bytes + summing_bytes(self.program, self.rank)
        most = small + large + gradients_small + taken + passing.large
        return round(max(most, self._building()) + of_libraries * self.workspaces.host)

    def _holes(self, passing: float) -> float:
        """Return the bytes of holes among small ones that pass: every block has as much say as it makes."""
        heap = heap_of(self.workspaces, self.chain)
        made = counted = holes = 0.0
        for own in self.books.own.values():
            samples = max(own.samples)
            weight = sum(own.kept.inside(samples, self.itemsize)) + (own.in_bytes + own.out_bytes) * samples
            filling = heap.at(samples)
            made, counted, holes = (
                made + weight,
                counted + weight * filling.counted,
                holes + weight * filling.holes,
            )
        whole = counted / made if made else 0.0
        return holes / made * min(1.0, passing / whole) if whole else 0.0

    def step(self) -> tuple[Bytes, float]:
        """Return the peaks of what a step makes, and the small gradients that it leaves, which the peaks lack.

        Gradients that are reduced are no part of either: they have their buckets.
        """
        most_small = most_large = most_before = most_backward = 0.0
        before_small = before_large = gradients_large = gradients = 0.0
        books = self.books
        after = zip(books.saved, books.moving, books.accumulated, books.large, books.fresh, strict=True)
        for action, (saved, moving, gradients, large_now, fresh) in zip(
            self.program.actions[self.rank], after, strict=True
        ):
            within = self._within(action, fresh=fresh)
            if action.kind == "backward" and self.workspaces.host:
                most_backward = max(most_backward, within.small)
            else:
                most_small = max(most_small, before_small + within.small)
            most_before = max(most_before, before_small)
            most_large = max(most_large, before_large + within.large)
            if fresh:
                gradients_large += self._made_large(action.block or 0)
            before_large = large_now * self.workspaces.host + gradients_large
            before_small = saved + moving + gradients - before_large
            most_small, most_large = max(most_small, before_small), max(most_large, before_large)
        # Of a heap, a backward's temporaries come on top of all that there ever was: they grow towards the first
        # layers, and the holes that later layers leave are too small for them.
        most_small = max(most_small, most_before + most_backward)
        left = max(0.0, gradients - gradients_large)
        return Bytes(most_small - left, most_large), left

    def _made_large(self, block: int) -> float:
        """Return the large ones among the gradients that a block's first backward makes."""
        own = self.books.own[block]
        return self.workspaces.split(*(n * self.itemsize for use in own.kept.uses for n in use.made)).large

    def _persistent(self) -> Bytes:
        """Return what stays all through the step, in its classes."""
        program, plan, split = self.program, self.program.plan, self.workspaces.split
        large = 0.0
        counted = memory_of(self.books)
        for index, own in self.books.own.items():
            position = program.positions[own.block.position]
            of_block = self.parameters[index][0]
            large += of_block.large
            if program.mode == "train":
                bucket = bucket_elements(self.chain, position, own.block, self.rank) * self.itemsize
                gathered = [] if position.reduced else [count * self.itemsize for count in own.gathered]
                stays = position.reduced and not keeps_no_bucket(plan, position)
                large += split(bucket * stays, *gathered).large
                large += split(*self._reduction(own).held(self.itemsize)).large
                trained = [n * self.itemsize for use in own.kept.uses for n in use.trained]
                states = 0 if is_zero(plan, position) else plan.recipe.optimizer_states
                large += split(*trained).large * (states + plan.recipe.average)
        for position in program.positions:
            if program.mode == "train" and self.rank in position.ranks and is_zero(plan, position):
                gradients, sizes = parts_of(program, position)
                large += split(gradients, *sizes).large
        large += split(counted.batch).large
        return Bytes(counted.persistent - large, large)

    def _reduction(self, own: Own) -> Reduction:
        position = self.program.positions[own.block.position]
        return reduction_of(self.program.plan, self.chain, position, own.block, self.rank)

    def _within(self, action: Action, *, fresh: bool) -> Bytes:
        """Return what an action needs while it runs."""
        kind = action.kind
        if kind == "norm":
            largest = max((size for _, size in self.parameters.values()), default=0)
            return self.workspaces.split(*[largest / self.itemsize * 8] * (NORM_ITEMSIZE // 8))
        if kind == "update":
            heads = [
                own.head * self.itemsize for own in self.books.own.values() if own.block.position == action.block
            ]
            return self.workspaces.split(*heads * self.program.plan.recipe.optimizer_states)
        if kind not in {"forward", "backward", "score", "loss", *WORKS}:
            return NOTHING
        own: Own = self.books.own[action.block or 0]
        if kind in WORKS:
            return self.workspaces.split(*self._reduction(own).workspace(kind, self.itemsize))
        samples = own.samples[action.micro_batch or 0]
        if kind in {"score", "loss"}:
            return self.workspaces.split(own.out_bytes * samples)
        passed = kind if self.program.mode == "train" else "plain"
        return self.workspaces.within(
            self.chain, own.block, own.shard, samples, self.itemsize, passed, fresh=fresh
        )

    def _building(self) -> float:
        """Return the peak while parameters are made, block after block."""
        made = most = 0.0
        for index, own in sorted(self.books.own.items()):
            most = max(most, made + self.workspaces.building(self.chain, own.block, own.shard, self.itemsize))
            made += sum(self.parameters[index][0])
        return most if self.workspaces.host else 0.0
