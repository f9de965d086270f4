"""Compilation, order and check on small plans that can be read."""

from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest

from hybridpar.errors import PlanError, ProgramError
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.planning.blocks import blocks, positions
from hybridpar.planning.boundary import boundaries
from hybridpar.planning.check import check, queue_of
from hybridpar.planning.communicators import communicators, connections, groups
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.order import default_caps
from hybridpar.planning.plan import Recipe, Segment, Stage
from tests.support.plans import make_plan, with_actions
from tests.support.training import make_case


def linear(name, inputs, outputs):
    parameters = (Parameter(f"{name}.weight", (outputs, inputs)), Parameter(f"{name}.bias", (outputs,)))
    return Layer(name, "Linear", (inputs,), (outputs,), 2, parameters, linear=Linear(inputs, outputs, bias=True))


def relu(name, width):
    return Layer(name, "ReLU", (width,), (width,), 1, channelwise=True)


CHAIN = Chain(
    "small",
    (
        Layer("conv", "Conv2d", (2, 4, 4), (6, 4, 4), 9, (Parameter("conv.weight", (6, 2, 3, 3)),)),
        Layer("pool", "MaxPool2d", (6, 4, 4), (6, 1, 1), 1, channelwise=True),
        Layer("flat", "Flatten", (6, 1, 1), (6,), 0, channelwise=True),
        linear("a", 6, 8),
        relu("r", 8),
        linear("b", 8, 10),
        relu("s", 10),
        linear("c", 10, 5),
    ),
)
LAST = len(CHAIN.layers)
BATCH = 8


def plan_of(*stages, world, **fields):
    return make_plan(CHAIN, *stages, world=world, global_batch=BATCH, **fields)


def tail_of(ways, ranks=(0, 1), start=3, front=(0, 1), **fields):
    """A replicated front and a sharded tail."""
    tail = Stage("tail", 4, (Segment((start, LAST), ranks),), tuple(ways))
    return plan_of(Stage("front", 2, (Segment((0, start), front),)), tail, world=1 + max(*ranks, *front), **fields)


def compiled(plan, samples=BATCH, mode="train"):
    program = compile_program(plan, CHAIN, samples, mode)
    check(program)
    return program


def crossing(program):
    """Kinds of operation at each boundary: (boundary, pass) -> kinds."""
    found = defaultdict(set)
    for o in program.operations:
        if o.content in {"activation", "gradient", "sum"}:
            backward = o.backward or o.content == "gradient"
            found[o.block, "backward" if backward else "forward"].add(o.kind)
    return dict(found)


# Operations


def test_labels_are_gathered_once_by_all_ranks_before_anything_else():
    program = compiled(tail_of(("column", "row", "column")))
    (labels,) = [o for o in program.operations if o.content == "label"]
    assert labels.index == 0
    assert (labels.kind, labels.communicator, labels.ranks, labels.bytes) == (
        "all_reduce",
        "control",
        (0, 1),
        8 * BATCH,
    )
    for own in program.actions:
        assert next(a.kind for a in own if a.content is None) == "load"
        starts = [a.operation for a in own if a.kind == "start"]
        control = [i for i in starts if program.operations[i].communicator == "control"]
        assert control[0] == labels.index
        waits = [i for i, a in enumerate(own) if a.kind == "wait" and a.operation == labels.index]
        scores = [i for i, a in enumerate(own) if a.kind == "score"]
        assert waits == [scores[0] - 1]


def test_a_rank_that_alone_reads_labels_or_sees_logits_tells_the_others():
    """A sum in which all others have zeros takes gloo many messages more."""
    segments = (Segment((0, 3), (2,)), Segment((3, 5), (0,)), Segment((5, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 2, segments), world=3))
    control = {o.content: (o.kind, o.ranks) for o in program.operations if o.communicator == "control"}
    assert control == {"label": ("broadcast", (2, 0, 1)), "metrics": ("broadcast", (1, 0, 2))}


def test_the_first_shard_tells_what_all_shards_know():
    plan = tail_of(("column", "row", "column"), recipe=Recipe(clipping=True))
    control = {o.content: (o.kind, o.ranks) for o in compiled(plan).operations if o.communicator == "control"}
    assert control["metrics"] == ("broadcast", (0, 1))
    assert control["label"] == control["norm"] == ("all_reduce", (0, 1))


def test_a_small_step_s_only_replica_with_samples_tells():
    plan = plan_of(Stage("front", 2, (Segment((0, LAST), (2, 0, 1)),)), world=3)
    kinds = [{o.kind for o in compiled(plan, samples=n).operations if o.communicator == "control"} for n in (1, 2)]
    assert kinds == [{"broadcast"}, {"all_reduce"}]


def test_replicas_sum_even_what_one_rank_of_each_knows():
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 2, segments), world=4, replicas=2))
    assert {o.kind for o in program.operations if o.communicator == "control"} == {"all_reduce"}


def test_only_ranks_with_samples_load():
    """A partial batch may leave a replica idle: it once loaded a batch that nobody gave it."""
    plan = plan_of(Stage("front", 2, (Segment((0, LAST), (2, 0, 1)),)), world=3)
    program = compiled(plan, samples=2)
    assert [program.reads(r) for r in range(3)] == [((1, 2),), (), ((0, 1),)]
    assert ["load" in {a.kind for a in own} for own in program.actions] == [True, False, True]


@pytest.mark.parametrize("clipping", [False, True])
def test_one_rank_communicates_with_nobody(clipping):
    stages = [
        Stage("front", 2, (Segment((0, 2), (0,)),)),
        Stage("middle", 3, (Segment((2, 4), (0,)), Segment((4, 6), (0,)))),
        Stage("tail", 4, (Segment((6, LAST), (0,)),)),
    ]
    program = compiled(plan_of(*stages, world=1, recipe=Recipe(clipping=clipping)))
    assert all(a.operation is None for a in program.actions[0])
    assert {"copy", "forward", "backward", "update"} <= {a.kind for a in program.actions[0]}


def test_gradients_are_reduced_in_runs_of_layers_from_the_back():
    """Layers a, b and c have 448, 720 and 440 bytes; the convolution 864."""
    front = Stage("front", 2, (Segment((0, LAST), (0, 1)),))
    runs = {}
    for size in (1, 500, 10**6):
        program = compiled(plan_of(front, world=2, bucket_bytes=size))
        buckets = [o for o in program.operations if o.content == "bucket"]
        assert [o.block for o in buckets] == sorted((o.block for o in buckets), reverse=True)
        assert all((o.kind, o.communicator, o.ranks) == ("all_reduce", "gradients:front", (0, 1)) for o in buckets)
        runs[size] = [o.bytes for o in buckets]
    assert runs == {1: [440, 720, 448, 864], 500: [1160, 1312], 10**6: [2472]}


def test_a_bucket_starts_right_after_the_backward_that_completes_it():
    program = compiled(plan_of(Stage("front", 2, (Segment((0, LAST), (0, 1)),)), world=2, bucket_bytes=1))
    for own in program.actions:
        for i, action in enumerate(own):
            if action.content == "bucket" and action.kind == "start":
                block = program.operations[action.operation].block
                done = [a.block for a in own[:i] if a.kind == "backward"]
                assert done.count(block) == 2
                assert not block or done.count(block - 1) == 1, "an earlier layer's backward is still to come"


def test_updates_without_clipping_need_no_norm():
    program = compiled(tail_of(("column", "row", "column")))
    assert "norm" not in {o.content for o in program.operations}
    clipped = compiled(tail_of(("column", "row", "column"), recipe=Recipe(clipping=True)))
    (norm,) = [o for o in clipped.operations if o.content == "norm"]
    assert (norm.kind, norm.ranks, norm.bytes) == ("all_reduce", (0, 1), 8)
    for own in clipped.actions:
        waits = [i for i, a in enumerate(own) if a.kind == "wait" and a.operation == norm.index]
        assert all(i > waits[0] for i, a in enumerate(own) if a.kind == "update")


def test_evaluation_has_no_backward_and_no_update():
    program = compiled(tail_of(("row", "column", "row"), recipe=Recipe(clipping=True)), mode="evaluate")
    kinds = {a.kind for own in program.actions for a in own}
    assert not kinds & {"backward", "norm", "update"}
    assert {o.content for o in program.operations} == {"label", "activation", "sum", "statistics", "metrics"}


# Columns and rows. Blocks: the front is 0, the tail follows.


def test_column_then_row_sums_once_forward_and_once_backward():
    """Megatron's pair: [a r b] is one block, its output is summed; the next linear takes all features."""
    program = compiled(tail_of(("column", "row", "column")))
    assert [b.layers for b in program.blocks] == [(0, 3), (3, 6), (6, 8)]
    assert [(b.enters, b.leaves) for b in program.blocks[1:]] == [("full", "partial"), ("full", "sharded")]
    # The exchange backward from the tail is the sum that column-sharded layers need.
    assert crossing(program) == {
        (0, "forward"): {"send"},
        (0, "backward"): {"send"},
        (1, "forward"): {"all_reduce"},
        (1, "backward"): {"all_reduce"},
    }
    sums = [o for o in program.operations if o.content == "sum"]
    assert {o.bytes for o in sums} == {4 * 10 * plan_itemsize(program)}


def plan_itemsize(program):
    return program.plan.itemsize


def test_column_then_column_gathers_forward_and_reduce_scatters_backward():
    program = compiled(tail_of(("column", "column", "row")))
    assert [b.layers for b in program.blocks] == [(0, 3), (3, 5), (5, 8), (8, 8)]
    found = crossing(program)
    assert found[1, "forward"] == found[1, "backward"] == {"send"}
    gathered = boundaries(program.positions, program.blocks, CHAIN, BATCH)[1]
    assert not any(t.add for t in gathered.activation)
    assert any(t.add for t in gathered.gradient)


def test_row_then_row_reduce_scatters_forward_and_gathers_backward():
    program = compiled(tail_of(("row", "row", "column")))
    assert [(b.enters, b.leaves) for b in program.blocks[1:]] == [
        ("sharded", "partial"),
        ("sharded", "partial"),
        ("full", "sharded"),
    ]
    scattered = boundaries(program.positions, program.blocks, CHAIN, BATCH)[1]
    assert any(t.add for t in scattered.activation)
    assert not any(t.add for t in scattered.gradient)


def test_rows_take_their_features_without_a_full_gather():
    """Half of the features cross to each shard, against all of them for columns."""
    sent = {}
    for way in ("column", "row"):
        program = compiled(tail_of((way, "column", "column"), ranks=(2, 3)))
        sent[way] = sum(o.bytes for o in program.operations if o.content == "activation" and o.block == 0)
    assert sent["row"] * 2 == sent["column"]


def test_logits_of_a_last_linear_cut_by_rows_are_summed_into_class_slices():
    """They once went into the loss as summands, and training went wrong in silence."""
    program = compiled(tail_of(("column", "column", "row")))
    last = program.blocks[-1]
    assert last.layers == (LAST, LAST)
    assert (last.enters, last.leaves) == ("sharded", "sharded")
    assert [last.features(CHAIN, shard, "out") for shard in (0, 1)] == [(0, 3), (3, 5)]
    assert program.describe(next(a for a in program.actions[0] if a.kind == "score")) == (
        "score tail (loss) micro-batch 0"
    )
    logits = boundaries(program.positions, program.blocks, CHAIN, BATCH)[-1]
    assert any(t.add for t in logits.activation)


def test_the_classes_are_never_gathered():
    for ways in (("column", "row", "column"), ("row", "column", "row")):
        program = compiled(tail_of(ways))
        statistics = [o for o in program.operations if o.content == "statistics"]
        assert {o.bytes for o in statistics} == {3 * 4 * program.plan.itemsize}


# Order


def plans():
    front = Stage("front", 1, (Segment((0, 1), (1, 0)),))
    middle = Stage("middle", 2, (Segment((1, 3), (2,)), Segment((3, 5), (1, 3))))
    tail = Stage("tail", 4, (Segment((5, LAST), (3, 0, 2)),), ("column", "row"))
    for rule in ("fill_drain", "one_forward_one_backward"):
        for clipping in (False, True):
            recipe = Recipe(clipping=clipping)
            yield plan_of(front, middle, tail, world=4, order=rule, recipe=recipe, bucket_bytes=1)
            yield tail_of(("row", "column", "row"), ranks=(2, 0, 1), order=rule, recipe=recipe, bucket_bytes=1)


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("samples", [BATCH, 5, 1])
@pytest.mark.parametrize("plan", list(plans()), ids=range(8))
def test_all_members_start_the_operations_of_a_queue_in_one_order(plan, samples, mode):
    program = compiled(plan, samples, mode)
    orders = defaultdict(dict)
    for rank, own in enumerate(program.actions):
        for action in own:
            if action.kind == "start":
                operation = program.operations[action.operation]
                orders[queue_of(operation)].setdefault(rank, []).append(operation.index)
    for queue, per_rank in orders.items():
        first, *others = per_rank.values()
        assert all(o == first for o in others), queue
        members = program.operations[first[0]].ranks
        assert per_rank.keys() == set(members)


@pytest.mark.parametrize("plan", list(plans()), ids=range(8))
def test_every_rank_starts_and_waits_for_its_operations_once(plan):
    program = compiled(plan)
    for rank, own in enumerate(program.actions):
        wanted = {o.index: 1 for o in program.operations if rank in o.ranks and len(o.ranks) > 1}
        for kind in ("start", "wait"):
            assert Counter(a.operation for a in own if a.kind == kind) == wanted


def test_fill_and_drain_forwards_everything_first():
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 2, segments), world=2, order="fill_drain"))
    for own in program.actions:
        kinds = [a.kind for a in own if a.kind in {"forward", "backward"}]
        assert kinds == ["forward"] * 4 + ["backward"] * 4


def test_one_forward_one_backward_alternates_after_its_warm_up():
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 1, segments), world=2))
    passes = [[a.kind[0] for a in own if a.kind in {"forward", "backward"}] for own in program.actions]
    assert "".join(passes[1]) == "fb" * BATCH
    assert "".join(passes[0]) == "fff" + "bf" * (BATCH - 3) + "bbb"
    assert default_caps(positions(program.plan), BATCH) == (3, 2)


def _receives(program, rank, action, kind):
    if action.kind != kind or action.operation is None:
        return False
    operation = program.operations[action.operation]
    return operation.kind == "send" and operation.ranks[1] == rank


def test_receives_start_before_the_computation_ahead_of_them_and_what_it_waits_for():
    """A receive that starts behind a wait is announced while the sender still writes the message before."""
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 2, segments), world=2))
    for rank, own in enumerate(program.actions):
        computed, posted = 0, {}
        for a, b in pairwise(own):
            assert not (_receives(program, rank, a, "wait") and _receives(program, rank, b, "start"))
        for action in own:
            computed += action.kind in {"forward", "backward"}
            if action.operation is None or program.operations[action.operation].kind != "send":
                continue
            if program.operations[action.operation].ranks[1] == rank:
                if action.kind == "start":
                    posted[action.operation] = computed
                elif computed:
                    assert posted[action.operation] < computed, "a computation overlaps with the message"


def test_what_others_wait_for_goes_back_first_and_reduced_updates_wait_for_all_work():
    """Ranks 0 and 1 hold the front and a segment each: others wait for the segments, nobody for the front.

    A segment is reduced with nobody: rank 1 updates its own while it waits for the gradient of the front's output.
    """
    segments = (Segment((3, 7), (0,)), Segment((7, LAST), (1,)))
    stages = (Stage("front", 4, (Segment((0, 3), (0, 1)),)), Stage("middle", 1, segments))
    program = compiled(plan_of(*stages, world=2, order="fill_drain"))
    for rank, own in enumerate(program.actions):
        back = [program.blocks[a.block].position for a in own if a.kind == "backward"]
        front = back.index(0)
        assert set(back[front:]) == {0}, "all of a segment before any of the front"
        last_backward = max(i for i, a in enumerate(own) if a.kind == "backward")
        updates = {a.block: i for i, a in enumerate(own) if a.kind == "update"}
        assert updates[0] > last_backward
        assert (min(updates.values()) < last_backward) == (rank == 1)


def test_an_idle_replica_joins_the_reductions_at_once():
    """Rank 2 has no samples in the last segment. Did it join after the norm, all would wait in a ring."""
    stages = [
        Stage("front", 1, (Segment((0, 7), (2, 1, 3), (2.0, 1.0, 1.0)),)),
        Stage("middle", 1, (Segment((7, 11), (3, 2)), Segment((11, 16), (2, 1, 0), (1.0, 2.0, 2.0)))),
    ]
    chain = make_case(samples=1).traced.chain
    recipe = Recipe(clipping=True)
    plan = make_plan(chain, *stages, world=4, global_batch=5, order="fill_drain", bucket_bytes=700, recipe=recipe)
    program = compile_program(plan, chain, 5, "train")
    check(program)
    assert [m[0] for m in program.micro_batches[2]] == [(0, 0), (2, 2), (4, 4)]
    mine = {o.index for o in program.operations if o.communicator == "gradients:middle.1"}
    own = program.actions[2]
    starts = [a for a in own if a.kind == "start" and a.operation in mine]
    assert own.index(starts[-1]) < next(i for i, a in enumerate(own) if a.kind == "forward")
    late = [a for a in own if a.operation not in mine]
    (norm,) = (o.index for o in program.operations if o.content == "norm")
    (normed,) = (i for i, a in enumerate(late, 1) if a.kind == "wait" and a.operation == norm)
    late[normed:normed] = [a for a in own if a.operation in mine]
    with pytest.raises(ProgramError, match="hangs"):
        check(with_actions(program, 2, late))


def test_a_cap_below_a_whole_chunk_is_refused():
    front = Stage("front", 2, (Segment((0, 3), (0, 1)),), in_flight=3)
    tail = Stage("tail", 4, (Segment((3, LAST), (2,)),))
    with pytest.raises(PlanError, match=r"plan\.front\.in_flight: 3 samples .* least that works is 4$"):
        compile_program(plan_of(front, tail, world=3), CHAIN, BATCH, "train")


# Names, cache, communicators


def test_programs_are_cached_by_plan_samples_and_mode():
    plan = tail_of(("column", "row", "column"))
    first = compile_program(plan, CHAIN, BATCH, "train")
    assert compile_program(replace(plan), CHAIN, BATCH, "train") is first
    assert compile_program(plan, CHAIN, BATCH - 1, "train") is not first
    assert compile_program(plan, CHAIN, BATCH, "evaluate") is not first


def test_communicators_have_one_plan_derived_order():
    plan = next(plans())
    world = (0, 1, 2, 3)
    assert [c[:2] for c in communicators(plan)] == [
        ("control", world),
        ("forward.up", world),
        ("forward.down", world),
        ("backward.up", world),
        ("backward.down", world),
        ("gradients:front", (1, 0)),
        ("gradients:middle.1", (1, 3)),
        ("tail", (3, 0, 2)),
    ]
    assert groups(plan) == tuple(c[:2] for c in communicators(plan))


def test_there_is_no_communicator_for_a_way_that_nothing_goes():
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    pipeline = plan_of(Stage("middle", 2, segments), world=2)
    assert [c.name for c in communicators(pipeline)] == ["control", "forward.up", "backward.down"]
    front = plan_of(Stage("front", 2, (Segment((0, LAST), (0, 1)),)), world=2)
    assert [c.name for c in communicators(front)] == ["control", "gradients:front"]


def test_shards_of_a_tail_send_to_each_other():
    plan = tail_of(("column", "column", "row"), ranks=(1, 2), front=(0,))
    assert connections(plan) == ((0, 1), (0, 2), (1, 2), (2, 1))
    sends = {o.ranks for o in compiled(plan).operations if o.content == "activation"}
    assert (1, 2) in sends


def test_replicas_meet_in_gradients_and_control_and_have_all_else_for_themselves():
    front = Stage("front", 1, (Segment((0, 1), (1, 0)),))
    middle = Stage("middle", 2, (Segment((1, 3), (2,)),))
    tail = Stage("tail", 2, (Segment((3, LAST), (2, 0)),), ("column", "row", "column"))
    plan = plan_of(front, middle, tail, world=6, replicas=2)
    ways = ("forward.up", "forward.down", "backward.up", "backward.down")
    assert groups(plan) == (
        ("control", (0, 1, 2, 3, 4, 5)),
        *((way, members) for way in ways for members in ((0, 1, 2), (3, 4, 5))),
        ("gradients:front", (1, 0, 4, 3)),
        ("gradients:middle.0", (2, 5)),
        ("tail", (2, 0)),
        ("tail", (5, 3)),
        ("gradients:tail.0", (2, 5)),
        ("gradients:tail.1", (0, 3)),
    )


def test_shards_are_reduced_over_replicas_in_buckets_of_their_own() -> None:
    """Each shard with its like; [a r b] is two buckets, so that the one of b travels while a computes."""
    front = Stage("front", 2, (Segment((0, 3), (0,)),))
    tail = Stage("tail", 2, (Segment((3, LAST), (0, 1)),), ("column", "row", "column"))
    program = compiled(plan_of(front, tail, world=4, replicas=2, bucket_bytes=100))
    assert [b.layers for b in program.blocks] == [(0, 3), (3, 5), (5, 6), (6, 8)]
    buckets = [o for o in program.operations if o.content == "bucket"]
    assert all(o.across for o in buckets)
    sizes = {}
    for o in buckets:
        sizes.setdefault(o.communicator, []).append(o.bytes // program.plan.itemsize)
    assert sizes == {
        "gradients:tail.0": [3 * 11, 10 * 4 + 10, 4 * 7],
        "gradients:tail.1": [2 * 11, 10 * 4, 4 * 7],
        "gradients:front": [108],
    }
    starts = [a.operation for a in program.actions[0] if a.kind == "start" and a.content == "bucket"]
    wider = compiled(plan_of(front, tail, world=4, replicas=2, bucket_bytes=10**6))
    assert [b.layers for b in wider.blocks] == [(0, 3), (3, 6), (6, 8)]
    assert len(starts) == 4


@pytest.mark.parametrize("first", ["norm", "last bucket"])
def test_another_order_across_replicas_is_refused(first: str) -> None:
    """Within one replica it would finish: all its ranks agree on it."""
    stage = Stage("front", 2, (Segment((0, LAST), (0,)),))
    program = compiled(plan_of(stage, world=2, replicas=2, bucket_bytes=1, recipe=Recipe(clipping=True)))
    own = list(program.actions[0])
    starts = [i for i, a in enumerate(own) if a.kind == "start" and program.operations[a.operation].across]
    buckets = [i for i in starts if own[i].content == "bucket"]
    if first == "norm":
        (a,), (b,) = ([i for i in starts if own[i].content == c] for c in ("metrics", "norm"))
    else:
        a, b = buckets[-2:]
    own[a], own[b] = own[b], own[a]
    with pytest.raises(ProgramError, match="in another order than other plan replicas"):
        check(with_actions(program, 0, own))


@pytest.mark.parametrize("clipping", [False, True])
def test_a_replica_without_samples_takes_part_in_all_that_is_across(clipping: bool) -> None:
    front = Stage("front", 2, (Segment((0, 3), (0, 1)),), in_flight=2)
    tail = Stage("tail", 2, (Segment((3, LAST), (1, 0)),), ("column", "row", "column"))
    plan = plan_of(front, tail, world=6, replicas=3, bucket_bytes=1, recipe=Recipe(clipping=clipping))
    for mode in ("train", "evaluate"):
        programs = [compile_program(plan, CHAIN, 2, mode, replica) for replica in range(3)]
        assert [(p.samples, p.first, p.step_samples) for p in programs] == [(1, 0, 2), (1, 1, 2), (0, 2, 2)]
        for program in programs:
            check(program)
        wanted, idle = ([o.place for o in p.operations if o.across] for p in (programs[0], programs[2]))
        assert Counter(idle) == Counter(wanted)
        assert not {a.kind for own in programs[2].actions for a in own} & {"load", "forward", "copy", "backward"}


def test_actions_have_names_that_a_reader_understands():
    program = compiled(tail_of(("column", "row", "column")))
    names = [program.describe(a) for a in program.actions[0]]
    assert "load" in names
    assert "forward front (conv..flat) micro-batch 1" in names
    assert "forward tail (a..b) micro-batch 0" in names
    assert "start all_reduce of sum at tail (a..b) micro-batch 0 (tail)" in names
    assert "start send of activation at front (conv..flat) micro-batch 0 (1>0)" in names
    assert "update tail" in names


# Check


def find(program, rank, kind, content=None):
    return next(i for i, a in enumerate(program.actions[rank]) if a.kind == kind and content in {None, a.content})


def test_the_check_sees_messages_in_different_orders():
    program = compiled(tail_of(("row", "column", "column"), ranks=(2, 3)))
    sends = [
        i
        for i, a in enumerate(program.actions[0])
        if a.kind == "start" and program.operations[a.operation].ranks == (0, 2)
    ]
    own = list(program.actions[0])
    own[sends[0]], own[sends[1]] = own[sends[1]], own[sends[0]]
    with pytest.raises(ProgramError, match="rank 0"):
        check(with_actions(program, 0, own))


def test_the_check_sees_ranks_that_wait_for_each_other():
    """Rank 0 wants the first gradient before it sends the activation that it comes from."""
    segments = (Segment((0, 3), (0,)), Segment((3, LAST), (1,)))
    program = compiled(plan_of(Stage("middle", 4, segments), world=2))
    own = list(program.actions[0])
    gradient = [own.pop(find(program, 0, "start", "gradient"))]
    gradient.append(own.pop(next(i for i, a in enumerate(own) if a.kind == "wait" and a.content == "gradient")))
    send = next(i for i, a in enumerate(own) if a.kind == "start" and a.content == "activation")
    own[send:send] = gradient
    with pytest.raises(
        ProgramError, match=r"hangs: rank 0 waits forever in 'wait send of gradient.*; rank 1 waits"
    ):
        check(with_actions(program, 0, own))


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("load", None, "without loaded"),
        ("forward", None, "without output"),
        ("loss", None, "without loss"),
        ("backward", None, "input gradient"),
        ("start", "bucket", "before it starts it"),
        ("wait", "bucket", "waited for 0 times"),
        ("update", None, "does update"),
    ],
)
def test_the_check_misses_no_dropped_action(kind, content, said):
    program = compiled(tail_of(("column", "row", "column")))
    own = list(program.actions[0])
    del own[find(program, 0, kind, content)]
    with pytest.raises(ProgramError, match=rf"rank 0.*{said}"):
        check(with_actions(program, 0, own))


def test_a_summand_is_not_added_before_the_first_one_is_there():
    """The check once counted summands without looking at their order."""
    program = compiled(tail_of(("column", "column", "column")))
    own = list(program.actions[0])
    first = next(i for i, a in enumerate(own) if a.kind == "copy" and a.content == "gradient" and a.block == 1)
    added = next(
        i
        for i, a in enumerate(own)
        if a.kind == "wait"
        and a.content == "gradient"
        and program.operations[a.operation].block == 1
        and program.operations[a.operation].transfer.target == 0
    )
    assert program.operations[own[added].operation].transfer.add
    own.insert(added, own.pop(first))
    with pytest.raises(ProgramError, match="before the first summand is there"):
        check(with_actions(program, 0, own))


def test_an_operation_on_a_foreign_communicator_is_refused():
    program = compiled(tail_of(("column", "row", "column"), ranks=(1, 2)))
    operations = list(program.operations)
    (bucket,) = [o for o in operations if o.content == "bucket"]
    operations[bucket.index] = replace(bucket, communicator="tail")
    with pytest.raises(ProgramError, match="members"):
        check(replace(program, operations=tuple(operations)))


def test_blocks_of_a_plan_cover_the_chain():
    for plan in plans():
        own = blocks(plan, CHAIN)
        assert [b.index for b in own] == list(range(len(own)))
        covered = [i for b in own for i in range(*b.layers)]
        assert covered == list(range(LAST))
