"""The placement of stages over nodes as a scene: what every rank's card says, without any drawing.

Above ``MOST_RANKS`` ranks, one plan replica is kept, and one of neighbouring nodes with the same stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hybridpar.cluster.topology import Cluster, Level, Link
from hybridpar.planning.blocks import Position
from hybridpar.planning.memory import memory
from hybridpar.planning.program import Program
from hybridpar.report.palette import stage_colour
from hybridpar.report.timeline import title
from hybridpar.report.wording import duration, plural, ranges, rate, size

MOST_RANKS = 64
LINE_CHARACTERS = 25
"""That fit on the narrowest card."""


@dataclass(frozen=True)
class Part:
    """What a rank holds of a stage."""

    position: int
    colour: str
    lines: tuple[str, ...]
    """The first is a heading."""


@dataclass(frozen=True)
class Card:
    """A rank."""

    rank: int
    replica: int
    """Of the plan."""
    parts: tuple[Part, ...]
    memory_bytes: int
    limit_bytes: float


@dataclass(frozen=True)
class NodeBox:
    """A node with its ranks."""

    name: str
    cards: tuple[Card, ...]
    link: str | None
    """To the node drawn before it: level, bandwidth and latency; None for the first."""
    also: str = ""
    """Nodes after it that are not drawn, as they hold the same."""


@dataclass(frozen=True)
class Board:
    """All nodes."""

    title: str
    notes: tuple[str, ...]
    nodes: tuple[NodeBox, ...]
    replicas: int


def placement_board(program: Program, cluster: Cluster) -> Board:
    """Collect what every rank holds; its memory as the plan predicts, or counted where it does not.

    The program is one of a training step; the cluster must have the plan's ranks.
    """
    local, world = len(program.actions), program.plan.world
    predicted = program.plan.prediction
    peaks = predicted.memory_bytes if predicted else [memory(program, rank).peak for rank in range(local)]
    cards = [_card(program, cluster, rank, peaks[rank % len(peaks)]) for rank in range(world)]
    groups: list[list[Card]] = []
    for card in cards:
        if card.rank == 0 or cluster.node_of[card.rank] != cluster.node_of[card.rank - 1]:
            groups.append([])
        groups[-1].append(card)
    notes = [f"links: {_links(cluster)}"]
    replicas = world // local
    if replicas > 1:
        notes.append(f"{replicas} plan replicas of {plural(local, 'rank')} each")
    shown = [(group, 0) for group in groups]
    if world > MOST_RANKS:
        shown = _folded(groups)
        kept = [c.rank for group, _ in shown for c in group]
        notes.append(f"drawn are {len(kept)} of {world} ranks; {_left_out(groups, shown)}")
    nodes = tuple(_node(cluster, shown, i) for i in range(len(shown)))
    return Board(title(program, cluster), tuple(notes), nodes, replicas)


def _card(program: Program, cluster: Cluster, rank: int, peak: int) -> Card:
    local = len(program.actions)
    own = [p for p in program.positions if rank % local in p.ranks]
    parts = tuple(_part(program, p, p.ranks.index(rank % local)) for p in own)
    return Card(rank, rank // local, parts, peak, cluster.memory_bytes(rank))


def _part(program: Program, position: Position, index: int) -> Part:
    stage, layers = program.plan.stages[position.stage], program.chain.layers
    count, number = len(position.ranks), index + 1
    head: str = position.kind
    if position.kind == "middle":
        head += f" {position.segment}" + (f" of {len(stage.segments)}" if len(stage.segments) > 1 else "")
    lines = [head]
    if position.sharded:
        lines.append(f"shard {number} of {count}")
    elif count > 1:
        lines.append(f"replica {number} of {count}")
    first, last = position.layers
    lines += _names(layers[first].name, layers[last - 1].name, last - first)
    calls = program.micro_batches[position.index]
    own = sum(1 for call in calls if call[index][1] > call[index][0])
    lines.append(f"micro-batch {stage.micro_batch}, {plural(own, 'call')}")
    if len(set(position.weights)) > 1:
        lines.append(f"share {position.weights[index] / sum(position.weights):.0%}")
    if stage.recompute:
        lines.append("recomputed")
    return Part(position.index, stage_colour(position), tuple(lines))


def _names(first: str, last: str, count: int) -> list[str]:
    """Name a run of layers, in two lines where one would be too long for a narrow card."""
    if count == 1:
        return [first]
    whole = f"{first} .. {last} ({count})"
    return [whole] if len(whole) <= LINE_CHARACTERS else [f"{first} ..", f".. {last} ({count})"]


def _folded(groups: Sequence[list[Card]]) -> list[tuple[list[Card], int]]:
    """Keep the first plan replica's nodes, and of neighbours with the same stages the first.

    Returns nodes, at most ``MOST_RANKS`` ranks, with the number of neighbours that each stands for.
    """
    result: list[tuple[list[Card], int]] = []
    ranks = 0
    for group in (g for g in groups if g[0].replica == 0):
        if result and _held(result[-1][0]) == _held(group):
            result[-1] = result[-1][0], result[-1][1] + 1
            continue
        ranks += len(group)
        if result and ranks > MOST_RANKS:
            break
        result.append((group[:MOST_RANKS], 0))
    return result


def _held(group: Sequence[Card]) -> list[list[int]]:
    return [[p.position for p in card.parts] for card in group]


def _left_out(groups: Sequence[list[Card]], shown: Sequence[tuple[list[Card], int]]) -> str:
    """Say what became of the ranks that are not drawn."""
    said = []
    later = [c.rank for g in groups for c in g if g[0].replica > 0]
    if later:
        said.append(f"the other plan replicas (ranks {ranges(later, 2)}) as replica 0")
    if any(count for _, count in shown):
        said.append("neighbouring nodes with the same stages once")
    covered = sum(count + 1 for _, count in shown)
    rest = [c.rank for g in [g for g in groups if g[0].replica == 0][covered:] for c in g]
    rest += [c.rank for group in groups for c in group[MOST_RANKS:] if group[0] is shown[0][0][0]]
    if rest:
        said.append(f"ranks {ranges(sorted(rest), 3)} not at all")
    return "; ".join(said)


def _node(cluster: Cluster, shown: Sequence[tuple[list[Card], int]], index: int) -> NodeBox:
    cards, count = shown[index]
    number = cluster.node_of[cards[0].rank]
    place = cluster.nodes[number]
    several = len({(n.rack, n.site) for n in cluster.nodes}) > 1
    name = f"node{number}" + (f" · {place.site} {place.rack}" if several else "")
    link = None
    if index:
        level = cluster.level(shown[index - 1][0][0].rank, cards[0].rank)
        link = f"{level}: {_link(cluster.link(level))}"
    also = "" if not count else f"the same: node{number + 1}" + (f"-{number + count}" if count > 1 else "")
    return NodeBox(name, tuple(cards), link, also)


def _links(cluster: Cluster) -> str:
    ranks = [0, *(r for r in range(1, cluster.world) if cluster.node_of[r] != cluster.node_of[r - 1])]
    levels: list[Level] = ["node"] if any(n.devices > 1 for n in cluster.nodes) else []
    levels += sorted(
        {cluster.level(a, b) for i, a in enumerate(ranks[:64]) for b in ranks[:i]} - {"node", "device"}
    )
    where = {
        "node": "within a node",
        "rack": "between nodes of a rack",
        "site": "between racks",
        "wan": "between sites",
    }
    return "; ".join(f"{where[level]} {_link(cluster.link(level))}" for level in levels) or "none, a single rank"


def _link(link: Link) -> str:
    back = link.reverse_bytes_per_s
    both = rate(link.bytes_per_s) + (
        f" ({rate(back)} back)" if back not in {None, link.bytes_per_s} and back else ""
    )
    return f"{both}, {duration(link.latency_s)}"


def memory_text(card: Card) -> str:
    """Return a rank's memory: used of limit."""
    return f"{size(card.memory_bytes)} of {size(card.limit_bytes)} ({card.memory_bytes / card.limit_bytes:.0%})"
