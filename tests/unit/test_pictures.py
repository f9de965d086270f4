"""The pictures: what is in their scenes, where it lies, and that the files are valid, small and readable."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from hybridpar import cli
from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.errors import ConfigError
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.costs import Costs
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.planning.program import Action, Program
from hybridpar.planning.simulate import simulate
from hybridpar.planning.timeline import Span, Timeline
from hybridpar.profiling.analytic import estimate
from hybridpar.profiling.record import Profile
from hybridpar.report import figure as figures
from hybridpar.report.chart import timeline_figure
from hybridpar.report.figure import fitted, prepare_folder, save, text_width
from hybridpar.report.map import WIDTH, arrange, placement_figure
from hybridpar.report.palette import INK_ON_FULL, INK_ON_PALE, ink_on, stage_name
from hybridpar.report.pictures import FILES, draw
from hybridpar.report.placement import placement_board
from hybridpar.report.timeline import MOST_CELLS, MOST_ROWS, Cell, Paint, paint_of, summed, timeline_scene, united
from hybridpar.report.trace import trace
from hybridpar.report.wording import duration, ranges, rate, size
from tests.support.plans import make_plan, random_plan
from tests.support.training import make_case

CHAIN = make_case().traced.chain
SAMPLES = 64


def cluster_of(nodes: int, devices: int) -> Cluster:
    device = Device("paper", 2e6, {"float64": 1e9, "float32": 1e9}, 1e9, 1e-5)
    links = {"node": Link(1e-5, 1e8), "rack": Link(3e-5, 2e7)}
    return Cluster("paper", device, tuple(Node(devices) for _ in range(nodes)), links)


def three_stages(*, front: tuple[int, ...], middle: tuple[int, ...], tail: tuple[int, ...]) -> tuple[Stage, ...]:
    cut = CHAIN.tail_start
    first = cut // 2
    linears = sum(layer.linear is not None for layer in CHAIN.layers[cut:])
    segments = tuple(
        Segment((first + i, first + i + 1 if i + 1 < len(middle) else cut), (r,)) for i, r in enumerate(middle)
    )
    return (
        Stage("front", 2, (Segment((0, first), front),)),
        Stage("middle", 4, segments),
        Stage(
            "tail", 16, (Segment((cut, len(CHAIN.layers)), tail),), ("column",) * linears if len(tail) > 1 else ()
        ),
    )


SHARED = three_stages(front=(0, 1), middle=(2, 3), tail=(0, 1, 2, 3))
OWN = three_stages(front=(0, 1), middle=(2,), tail=(3,))
OVERLAPPING = three_stages(front=(0, 1, 2), middle=(2, 3), tail=(3, 0))


def run(plan: Plan, cluster: Cluster) -> tuple[Program, Timeline]:
    program = compile_program(plan, CHAIN, plan.global_batch, "train")
    return program, simulate(program, Costs(estimate(CHAIN, cluster.device, "float64"), cluster))


def planned(
    stages: tuple[Stage, ...] = SHARED, nodes: int = 4, devices: int = 1
) -> tuple[Program, Timeline, Cluster]:
    cluster = cluster_of(nodes, devices)
    return *run(make_plan(CHAIN, *stages, world=nodes * devices, global_batch=SAMPLES), cluster), cluster


def wide(nodes: int, devices: int, batch: int = 1024) -> tuple[Program, Timeline, Cluster]:
    """Data parallel, one sample in a micro-batch."""
    cluster, world = cluster_of(nodes, devices), nodes * devices
    stage = Stage("front", 1, (Segment((0, len(CHAIN.layers)), tuple(range(world))),))
    return *run(make_plan(CHAIN, stage, world=world, global_batch=batch), cluster), cluster


def check_texts(figure: Figure) -> None:
    """No text is clipped by the figure, and no two texts overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [
        (t.get_text(), t.get_window_extent(renderer)) for axes in figure.axes for t in axes.texts if t.get_text()
    ]
    whole = figure.bbox
    for text, box in texts:
        assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
        assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
    for (a, first), (b, second) in combinations(texts, 2):
        wide_ = min(first.x1, second.x1) - max(first.x0, second.x0)
        high = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert wide_ <= 0 or high <= 1, f"{a!r} lies over {b!r}"


# The timeline's scene


@pytest.mark.parametrize("seed", range(12))
def test_every_rank_has_its_computations_and_its_communications(seed: int) -> None:
    dice = random.Random(seed)  # noqa: S311 - test data
    plan = random_plan(CHAIN, dice)
    cluster = cluster_of(plan.world, 1)
    program, timeline = run(plan, cluster)
    scene = timeline_scene(program, timeline, cluster)
    assert [row.ranks for row in scene.rows] == [(r,) for r in range(plan.world)]
    assert [row.node for row in scene.rows] == list(range(plan.world))
    for row in scene.rows:
        (rank,) = row.ranks
        expected: dict[Paint, float] = defaultdict(float)
        for span in timeline.spans:
            if span.rank == rank:
                expected[paint_of(program, span.action)] += span.end_s - span.start_s
        drawn: dict[Paint, float] = defaultdict(float)
        for cell in row.cells:
            drawn[cell.paint] += cell.end_s - cell.start_s
        assert drawn.keys() == expected.keys()
        # Blocks of a micro-batch are joined over gaps that nobody sees.
        for paint, seconds in expected.items():
            assert drawn[paint] == pytest.approx(seconds, abs=1e-2 * scene.length_s)
        touched = [f for f in timeline.flights if rank in program.operations[f.operation].ranks]
        assert bool(touched) == any(row.lanes.values())
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(row.cells))


def test_time_starts_with_the_first_computation() -> None:
    program, timeline, cluster = planned()
    scene = timeline_scene(program, timeline, cluster)
    assert min(cell.start_s for row in scene.rows for cell in row.cells) == 0.0
    ends = [c.end_s for row in scene.rows for cells in (row.cells, *row.lanes.values()) for c in cells]
    assert max(ends) <= scene.length_s * (1 + 1e-9)


def test_the_end_of_the_step_before_is_marked_where_it_can_be_seen() -> None:
    program, timeline, cluster = planned()
    begin, end = min(s.start_s for s in timeline.spans), timeline.ends_s[-1]
    for before, marked in ((0.5, 0.5), (1e-6, 0.0), (-0.1, 0.0)):
        moved = replace(timeline, ends_s=[begin + before * (end - begin), end])
        scene = timeline_scene(program, moved, cluster)
        assert scene.previous_end_s == pytest.approx(marked * (end - begin))


def test_the_title_is_the_plan_in_a_line() -> None:
    program, timeline, cluster = planned()
    title = timeline_scene(program, timeline, cluster).title
    for part in (
        "front 2 replicas x micro-batch 2",
        "middle 2 segments x micro-batch 4",
        "tail 4 shards",
        "global batch 64",
    ):
        assert part in title
    assert f"step {duration(timeline.period_s)}" in title


def test_cells_too_short_to_be_seen_are_summed_up_by_colour() -> None:
    a, b = Paint("a", "forward", "#0072b2", 0), Paint("b", "backward", "#d55e00", 1)
    cells = [Cell(float(i), i + 0.75, (a, b)[i % 2], str(i)) for i in range(10)] + [Cell(10.0, 20.0, a, "10")]
    short = summed(cells, 5.0)
    assert short[-1] == cells[-1]
    assert len(short) == 5
    assert all(not cell.label for cell in short[:-1])
    for paint in (a, b):
        time = sum(c.end_s - c.start_s for c in cells if c.paint == paint)
        assert sum(c.end_s - c.start_s for c in short if c.paint == paint) == pytest.approx(time)
    assert summed(cells, 0.1) == tuple(cells)


def test_communications_of_a_kind_are_joined_over_invisible_gaps() -> None:
    a, b = Paint("a", "communication", "#0072b2", 0), Paint("b", "communication", "#d55e00", 1)
    cells = [Cell(0, 3, a), Cell(1, 2, b), Cell(2, 4, a), Cell(4.5, 5, a), Cell(9, 10, a)]
    assert united(cells, 1.0) == (Cell(0, 5, a), Cell(1, 2, b), Cell(9, 10, a))


def test_more_ranks_than_rows_share_rows_and_none_is_forgotten() -> None:
    program, timeline, cluster = wide(20, 8)
    scene = timeline_scene(program, timeline, cluster)
    assert len(scene.rows) <= MOST_ROWS
    assert sorted(r for row in scene.rows for r in row.ranks) == list(range(160))
    assert "for 160 ranks" in scene.notes[0]


def test_ranks_that_are_not_drawn_are_named() -> None:
    """A hundred ranks of which every one does more than the one before."""
    program, timeline, cluster = wide(13, 8)
    spans = [Span(r, i * 1.0, i + 0.9, Action("forward", 0, i)) for r in range(104) for i in range(r + 1)]
    scene = timeline_scene(program, Timeline([0.0, 110.0], spans, timeline.flights), cluster)
    assert [row.ranks for row in scene.rows] == [(r,) for r in range(MOST_ROWS)]
    assert "not drawn: 40 ranks of 104 (64-103)" in scene.notes


def test_plan_replicas_are_drawn_once_in_time_and_all_in_space() -> None:
    program, timeline, _ = planned()
    both = replace(program, plan=replace(program.plan, world=8, replicas=2))
    cluster = cluster_of(8, 1)
    scene = timeline_scene(both, timeline, cluster)
    assert len(scene.rows) == 4
    assert scene.notes[0] == "plan replica 0 of 2, 4 ranks each: rank r also stands for r+4"
    board = placement_board(both, cluster)
    cards = [card for node in board.nodes for card in node.cards]
    assert [card.replica for card in cards] == [0] * 4 + [1] * 4
    assert [c.parts for c in cards[4:]] == [c.parts for c in cards[:4]]
    assert "2 plan replicas of 4 ranks each" in board.notes
    check_texts(placement_figure(board))
    assert trace(both, timeline, cluster)["otherData"]["plan_replicas"] == 2


def test_of_many_plan_replicas_one_is_placed() -> None:
    program, _, _ = planned()
    many = replace(program, plan=replace(program.plan, world=80, replicas=20))
    board = placement_board(many, cluster_of(80, 1))
    assert [card.rank for node in board.nodes for card in node.cards] == [0, 2, 3]
    said = "drawn are 3 of 80 ranks; the other plan replicas (ranks 4-79) as replica 0; neighbouring nodes"
    assert any(note.startswith(said) for note in board.notes)


# The files


def test_thirty_two_ranks_with_hundreds_of_micro_batches_stay_small(tmp_path: Path) -> None:
    program, timeline, cluster = wide(4, 8, batch=32 * 150)
    scene = timeline_scene(program, timeline, cluster)
    assert len(timeline.spans) > 32 * 300
    assert scene.cells <= MOST_CELLS
    figure = timeline_figure(scene)
    save(figure, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").stat().st_size < 2e6
    check_texts(figure)


@pytest.mark.parametrize("stages", [SHARED, OWN, OVERLAPPING], ids=["shared", "own", "overlapping"])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_no_text_is_clipped_or_covered(stages: tuple[Stage, ...], devices: int) -> None:
    program, timeline, cluster = planned(stages, 4 // devices, devices)
    check_texts(timeline_figure(timeline_scene(program, timeline, cluster)))
    check_texts(placement_figure(placement_board(program, cluster)))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "new" / "folder"
    program, _, cluster = planned()
    draw(program.plan, CHAIN, profile_for(cluster), cluster, folder)
    return folder


def profile_for(cluster: Cluster) -> Profile:
    return estimate(CHAIN, cluster.device, "float64")


def test_all_files_are_there_and_valid(drawn: Path) -> None:
    assert sorted(p.name for p in drawn.iterdir()) == sorted(FILES)
    for name in ("timeline.png", "placement.png"):
        with Image.open(drawn / name) as image:
            image.verify()
            assert image.format == "PNG"
    for name in ("timeline.svg", "placement.svg"):
        texts = [t.text for t in ET.parse(drawn / name).iter("{http://www.w3.org/2000/svg}text")]  # noqa: S314
        assert any(str(t).endswith("rank 3") for t in texts)
    ids = {e.get("id") for e in ET.parse(drawn / "timeline.svg").iter()}  # noqa: S314
    assert {"front", "middle 0", "tail", "update", "idle"} <= ids


def test_the_same_plan_gives_the_same_bytes(drawn: Path, tmp_path: Path) -> None:
    program, _, cluster = planned()
    draw(program.plan, CHAIN, profile_for(cluster), cluster, tmp_path)
    assert all((tmp_path / name).read_bytes() == (drawn / name).read_bytes() for name in FILES)


# The trace


@pytest.mark.parametrize("stages", [SHARED, OWN, OVERLAPPING], ids=["shared", "own", "overlapping"])
def test_the_trace_follows_the_format(stages: tuple[Stage, ...]) -> None:
    program, timeline, cluster = planned(stages, 2, 2)
    data = json.loads(json.dumps(trace(program, timeline, cluster)))
    events = data["traceEvents"]
    assert data["displayTimeUnit"] == "ms"
    threads: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        assert event["ph"] in {"M", "X", "s", "f"}
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] != "M":
            assert event["name"]
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
            threads[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for own in threads.values():
        assert all(a[1] <= b[0] + 1e-5 for a, b in pairwise(sorted(own))), "events of a thread overlap"
    named = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert named.keys() >= threads.keys()
    assert {n for n in named.values() if "communication" not in n} == {f"rank {r}" for r in range(4)}
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"node0", "node1"}


def test_the_trace_has_the_time_of_every_stage() -> None:
    program, timeline, cluster = planned()
    expected: dict[str, float] = defaultdict(float)
    for span in timeline.spans:
        if span.action.kind == "update":
            expected[stage_name(program.positions[span.action.block or 0])] += span.end_s - span.start_s
        elif span.action.kind in {"forward", "backward", "score", "loss"}:
            position = program.positions[program.blocks[span.action.block or 0].position]
            expected[stage_name(position)] += span.end_s - span.start_s
    found: dict[str, float] = defaultdict(float)
    for event in trace(program, timeline, cluster)["traceEvents"]:
        if event["ph"] == "X" and event["tid"] % 100 == 0 and "stage" in event["args"]:
            found[event["args"]["stage"]] += event["dur"] / 1e6
    assert found.keys() == {"front", "middle 0", "middle 1", "tail"}
    assert found == pytest.approx(expected)


def test_every_message_of_the_trace_flows_from_sender_to_receiver() -> None:
    program, timeline, cluster = planned()
    events = trace(program, timeline, cluster)["traceEvents"]
    sends = [f for f in timeline.flights if program.operations[f.operation].kind == "send"]
    assert sends
    for flight in sends:
        operation = program.operations[flight.operation]
        (start,) = [e for e in events if e["ph"] == "s" and e["id"] == operation.index]
        (end,) = [e for e in events if e["ph"] == "f" and e["id"] == operation.index]
        assert (start["tid"] // 100, end["tid"] // 100) == operation.ranks
        assert start["ts"] <= end["ts"]
        bound = [e for e in events if e["ph"] == "X" and (e["pid"], e["tid"]) == (end["pid"], end["tid"])]
        (inside,) = [e for e in bound if e["name"] == end["name"] and e["ts"] <= end["ts"] <= e["ts"] + e["dur"]]
        assert inside["args"]["bytes"] == operation.bytes
        assert end["bp"] == "e"


# The placement


@pytest.mark.parametrize("stages", [SHARED, OWN, OVERLAPPING], ids=["shared", "own", "overlapping"])
def test_every_rank_shows_what_it_holds(stages: tuple[Stage, ...]) -> None:
    program, _, cluster = planned(stages)
    board = placement_board(program, cluster)
    cards = [card for node in board.nodes for card in node.cards]
    assert [card.rank for card in cards] == [0, 1, 2, 3]
    for card in cards:
        held = [p.index for p in program.positions if card.rank in p.ranks]
        assert [part.position for part in card.parts] == held
        for part in card.parts:
            layers = program.positions[part.position].layers
            assert any(CHAIN.layers[layers[0]].name in line for line in part.lines)
            assert any(line.startswith("micro-batch ") for line in part.lines)
        assert 0 < card.memory_bytes < card.limit_bytes == 2e6
    assert [node.link for node in board.nodes] == [None, *["rack: 20 MB/s, 30 µs"] * 3]


@pytest.mark.parametrize(("nodes", "devices"), [(1, 4), (4, 1), (2, 8), (9, 1), (4, 8), (2, 12), (20, 8), (3, 3)])
def test_nothing_lies_over_anything(nodes: int, devices: int) -> None:
    program, _, cluster = wide(nodes, devices)
    layout = arrange(placement_board(program, cluster))
    for placed in layout.nodes:
        left, bottom, width, height = placed.box
        assert 0 <= left < left + width <= WIDTH
        assert 0 <= bottom < bottom + height <= layout.height
        for _, (x, y, wide_, high) in placed.cards:
            assert left < x < x + wide_ < left + width
            assert bottom < y < y + high < bottom + height
        assert not any(_overlap(a, b) for (_, a), (_, b) in combinations(placed.cards, 2))
    assert not any(_overlap(a.box, b.box) for a, b in combinations(layout.nodes, 2))


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def test_equal_nodes_are_drawn_once_where_they_are_many() -> None:
    program, _, cluster = wide(20, 8)
    board = placement_board(program, cluster)
    (node,) = board.nodes
    assert node.also == "the same: node1-19"
    assert any("drawn are 8 of 160 ranks" in note for note in board.notes)
    check_texts(placement_figure(board))


# What a user gets wrong


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"pictures: cannot write to .*file/inside: .*; name a folder"):
        prepare_folder(tmp_path / "file" / "inside")


def test_without_matplotlib_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(figures.importlib.util, "find_spec", lambda n: None if n == "matplotlib" else find(n))
    with pytest.raises(ConfigError, match=r"needs matplotlib; pip install 'hybridpar\[pictures\]'"):
        prepare_folder(tmp_path)


def test_the_command_draws(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small = ["model=small_vgg", "cluster=p100_4x1_40g", "train.global_batch=16", "plan=data_parallel"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", *small, f"pictures={tmp_path / 'out'}"])
    assert ended.value.code == 0
    assert f"pictures saved to {tmp_path / 'out'}: timeline.svg" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)


def test_a_training_draws_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "pictures=out"])
    assert ended.value.code == 2
    assert "pictures=out: of no effect on a training" in capsys.readouterr().err


def test_a_sweep_draws_nothing_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "-m", "train.global_batch=16,32", "pictures=out"])
    assert ended.value.code == 2
    assert "pictures: of no use with -m" in capsys.readouterr().err


# Words and measures


def test_numbers_carry_their_units() -> None:
    assert [duration(s) for s in (2.0, 0.0123, 4.5e-6, 3e-8)] == ["2 s", "12.3 ms", "4.5 µs", "30 ns"]
    assert [size(b) for b in (3 * 2**30, 2**20, 1536, 7)] == ["3 GiB", "1 MiB", "1.5 KiB", "7 B"]
    assert [rate(b) for b in (12.5e9, 3e6)] == ["12.5 GB/s", "3 MB/s"]
    assert ranges([0, 1, 2, 5, 7, 8], 2) == "0-2, 5 and 2 more"


def test_a_text_that_is_too_wide_loses_its_middle() -> None:
    text = "features.0 .. features.16 (17)"
    assert fitted(text, 9.0, 8) == text
    short = fitted(text, 1.0, 8)
    assert "…" in short
    assert short[0] == text[0]
    assert short[-1] == text[-1]
    assert text_width(short, 8) <= 1.0


def test_text_on_colours_is_readable() -> None:
    assert ink_on("#ffffff") == INK_ON_PALE
    assert ink_on("#222222") == INK_ON_FULL
    assert math.isclose(text_width("ab", 14), 2 * text_width("ab", 7), rel_tol=0.1)
