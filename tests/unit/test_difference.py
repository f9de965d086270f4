"""The diff of two plans: what differs in words, both times on one cluster, and where the change comes from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from hybridpar.planning.difference import Difference, compare, differences
from hybridpar.planning.plan import Plan, Recipe, Segment, Stage
from hybridpar.planning.search import assess
from hybridpar.planning.trial import Trials
from hybridpar.report.difference import show
from tests.support.paper import chain_of, cluster_of, trials_of
from tests.support.plans import make_plan

CHAIN = chain_of(4, 6, 5, 3)


def front(batch: int = 4, micro_batch: int = 2) -> Plan:
    return make_plan(CHAIN, Stage("front", micro_batch, (Segment((0, 3), (0, 1)),)), world=2, global_batch=batch)


def front_and_tail(*, cut: int = 1, sharding: tuple[str, ...] = ("column", "row"), micro_batch: int = 4) -> Plan:
    stages = (
        Stage("front", 2, (Segment((0, cut), (0, 1)),)),
        Stage("tail", micro_batch, (Segment((cut, 3), (0, 1)),), sharding),  # type: ignore[arg-type]
    )
    return make_plan(CHAIN, *stages, world=2, global_batch=4)


def pipeline(cut: int, *ranks: int) -> Plan:
    segments = Segment((0, cut), ranks[:1]), Segment((cut, 3), ranks[1:])
    return make_plan(CHAIN, Stage("middle", 4, segments), world=2, global_batch=4)


def trials(world: int = 2, bytes_per_s: float = 100.0) -> Trials:
    return trials_of(CHAIN, cluster_of(world, bytes_per_s), update_s_per_byte=1e-3)


def assessed(plan: Plan, on: Trials) -> Plan:
    return assess(plan, CHAIN, on.profile, on.cluster)


def test_equal_plans_have_no_differences() -> None:
    assert differences(front(), replace(front()), CHAIN) == ()


def test_a_stage_that_one_plan_lacks_is_described_whole() -> None:
    found = differences(front(), pipeline(1, 0, 1), CHAIN)
    assert found == (
        Difference("stages", "front", "middle"),
        Difference("front", "fc0 .. fc2 (3), 2 replicas on ranks 0,1, micro-batch 2", "none"),
        Difference("middle", "none", "fc0 .. fc2 (3), 2 segments on ranks 0 | 1, micro-batch 4"),
    )


def test_cuts_ranks_micro_batches_and_sharding_are_named() -> None:
    assert differences(pipeline(1, 0, 1), pipeline(2, 1, 0), CHAIN) == (
        Difference("middle: cuts", "before fc1", "before fc2"),
        Difference("middle: ranks", "0 | 1", "1 | 0"),
    )
    other = front_and_tail(sharding=("row", "row"), micro_batch=2)
    assert differences(front_and_tail(), other, CHAIN) == (
        Difference("tail: micro-batch", "4", "2"),
        Difference("tail: sharding", "column, row", "row, row"),
    )
    moved = front_and_tail(cut=2, sharding=("column",))
    assert Difference("front: layers", "fc0 .. fc0 (1)", "fc0 .. fc1 (2)") in differences(
        front_and_tail(), moved, CHAIN
    )


def test_whatever_else_a_plan_says_is_named() -> None:
    stage = replace(front().stages[0], in_flight=4, recompute=True)
    shares = (Segment((0, 3), (0, 1), (1.0, 2.0)),)
    changed = replace(
        front(batch=6),
        stages=(replace(stage, segments=shares),),
        order="fill_drain",
        bucket_bytes=1,
        recipe=Recipe(clipping=True, optimizer_states=2),
    )
    named = {d.field: (d.this, d.other) for d in differences(front(), changed, CHAIN)}
    assert named == {
        "front: shares": ("equal", "1:2"),
        "front: in-flight cap, samples": ("none", "4"),
        "front: recomputation": ("no", "yes"),
        "global batch": ("4", "6"),
        "order": ("one_forward_one_backward", "fill_drain"),
        "gradient buckets, bytes": (str(front().bucket_bytes), "1"),
        "gradient clipping": ("no", "yes"),
        "optimizer states": ("1", "2"),
    }


@pytest.mark.parametrize("batch", [4, 8])
def test_the_changes_of_all_parts_are_the_change_of_the_step(batch: int) -> None:
    """The other plan's times are scaled to this plan's batch."""
    on = trials()
    this = assessed(pipeline(1, 0, 1), on)
    found = compare(this, front(batch), on)
    assert found.other is not None
    assert this.prediction is not None
    assert found.other.prediction is not None
    change = this.prediction.step_s - found.other.prediction.step_s * 4 / batch
    assert sum(c.change_s for c in found.contrasts) == pytest.approx(change)
    sizes = [abs(c.change_s) for c in found.contrasts]
    assert sizes == sorted(sizes, reverse=True)


def test_a_plan_that_cannot_run_here_says_why() -> None:
    on = trials(world=2)
    stage = Stage("front", 1, (Segment((0, 3), (0, 1, 2, 3)),))
    large = make_plan(CHAIN, stage, world=4, global_batch=4)
    found = compare(assessed(front(), on), large, on)
    assert found.other is None
    assert "needs 4 ranks" in str(found.reason)
    assert Difference("ranks", "2", "4") in found.differences


def text_of(this: Plan, other: Plan, on: Trials) -> str:
    console = Console(width=160, highlight=False)
    with console.capture() as captured:
        show(compare(assessed(this, on), other, on), "old.json", console)
    return " ".join(captured.get().split())


def test_the_report_names_fields_times_and_reasons() -> None:
    """With a slow network it is the reduction that makes data parallelism slow."""
    text = text_of(pipeline(1, 0, 1), front(), trials())
    assert "what differs" in text
    assert "old.json here: step" in text
    assert "front exposed communication -" in text
    text = text_of(front(), replace(front()), trials())
    assert "diff: the plan is the one of old.json" in text
    assert "this plan is 1x as fast" in text
