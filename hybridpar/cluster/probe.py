"""Measures a cluster's links: every rank of a job runs :func:`probe` with a transport of its own.

What is measured, in this order: the speed of every rank's device; messages between pairs of ranks, by link level
and direction; collectives by level; and on each level how much a computation loses while messages or a collective
are under way. All decisions come from figures that every rank has, so that all ranks take the same steps.

A message is timed on its source, as one of several in a row that are each acknowledged by a tiny one: a round trip
less half of a tiny message's round trip. So each direction has its own bandwidth; of latency only the sum of both
directions can be told without a common clock, and each gets half of it.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from hybridpar.cluster.fit import Fit, fit
from hybridpar.cluster.probed import Direction, Overlap, Probed, Series, limited, rounded
from hybridpar.cluster.survey import groups_of, levels_of, line, pair_rounds
from hybridpar.cluster.topology import COLLECTIVES, Cluster, Collective, Level, Link
from hybridpar.cluster.transport import ACK_BYTES, Pending, Transport, What

MESSAGE_BYTES = tuple(2**i for i in range(10, 26, 3))
"""1 KiB to 32 MiB."""
COLLECTIVE_BYTES = tuple(2**i for i in (10, 14, 18, 21, 24, 26))
"""Of the whole vector; the largest does not fit into the caches of a CPU, as gradients do not."""
OVERLAP_BYTES = (2**16, 2**24)
"""Of communication during which a computation goes on: mostly latency, and mostly transfer."""
LEAST_OVERLAP_BYTES = 2**20
"""The second one shrinks to this where the link is slow."""
APART = 0.2
"""The shares of latency at both sizes must differ by this, or latency and transfer are not told apart."""

LEAST_SIZES, ENOUGH_SIZES = 2, 3
"""Measured of every series, however slow the link is, and while there is time left."""
BLOCK_S = 0.02
"""Messages follow each other for about so long to give one figure: several periods of a CPU quota of 10 ms."""
BLOCKS = 9
"""The median of at most so many figures counts."""
MOST_IN_BLOCK = 256
_TICK_S = 1e-9
"""No time is shorter to a clock."""
OVERLAP_ROUNDS = 3
OVERLAP_S = 0.2
"""Communication lasts at most so long while a computation goes on for twice as long."""
UNEQUAL = 0.05
"""Devices that differ by less are taken as equal, and directions of a link that differ by less than twice that."""

SPEED_SHARE, MESSAGE_SHARE, COLLECTIVE_SHARE, OVERLAP_SHARE = 0.06, 0.2, 0.28, 0.36
"""Of the time budget; the rest is for connecting and agreeing."""


def probe(
    transport: Transport, cluster: Cluster, budget_s: float, report: Callable[[str], None] = lambda _: None
) -> Probed:
    """Measure ``cluster``: its nodes, device and level names stay, its links and the nodes' speeds are replaced.

    Links of levels that no pair of ranks crosses are left out, but for those that a cluster must have. Takes about
    ``budget_s`` seconds at most; on links that are too slow for that the larger payloads are left out, and
    ``unmeasured`` names what is missing.
    ``report`` gets lines of progress; give it on one rank. All ranks get the same result.
    """
    return _Probe(transport, cluster, budget_s, report).run()


class _Probe:
    def __init__(
        self, transport: Transport, cluster: Cluster, budget_s: float, report: Callable[[str], None]
    ) -> None:
        self.transport, self.cluster, self.budget_s, self.report = transport, cluster, budget_s, report
        self.began_s = transport.now()
        self.levels = levels_of(cluster)
        self.series: list[Series] = []
        self.overlaps: list[Overlap] = []
        self.unmeasured: list[str] = []
        self.unit_s = 0.0

    def run(self) -> Probed:
        groups = {level: groups_of(self.cluster, level) for level in self.levels}
        self.transport.open([group for level in self.levels for group in groups[level]])
        kernel_s, speeds = self._speeds()
        for level in self.levels:
            self._messages(level)
        for level in self.levels:
            for operation in COLLECTIVES:
                self._collective(level, operation, groups[level])
        for level in self.levels:
            pairs = pair_rounds(self.cluster, level, 1)[0]
            self._overlap(level, "message", pairs)
            for operation in COLLECTIVES:
                self._overlap(level, operation, groups[level])
        return Probed(
            self._measured(speeds),
            tuple(self.series),
            tuple(self.overlaps),
            kernel_s,
            tuple(self.unmeasured),
            max(self.transport.gather(self.transport.now() - self.began_s)),
        )

    # Timing

    def _timed(self, run: Callable[[], object]) -> float:
        began = self.transport.now()
        run()
        return self.transport.now() - began

    def _computed_s(self, count: int) -> float:
        return self._timed(lambda: self.transport.compute(count))

    def _left_s(self) -> float:
        """Return what is left of the budget, the same on all ranks."""
        return self.budget_s - max(self.transport.gather(self.transport.now() - self.began_s))

    def _median_s(self, run: Callable[[int], None] | None, slice_s: float) -> list[float]:
        """Time ``run(count)`` on the ranks that have one; return every rank's median seconds per count (0: none).

        The first run, which may open connections, does not count; the second tells how many fit into ``slice_s``.
        """
        once = [0.0, 0.0]
        if run is not None:
            once = [self._timed(lambda: run(1)) for _ in range(2)]
        each_s = max(_TICK_S, *self.transport.gather(once[1]))
        count = max(1, min(MOST_IN_BLOCK, round(BLOCK_S / each_s)))
        blocks = max(1, min(BLOCKS, int(slice_s / (count * each_s))))
        times = [self._timed(lambda: run(count)) / count for _ in range(blocks)] if run is not None else [0.0]
        return self.transport.gather(statistics.median(times))

    def _growing(
        self, sizes: Sequence[int], slice_s: float, measure: Callable[[int], float]
    ) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Measure size after size, until one would take too long."""
        done: dict[int, float] = {}
        for size in sizes:
            if len(done) >= LEAST_SIZES:
                last = max(done)
                expected_s = 3 * done[last] * size / last
                left_s = self._left_s()
                if left_s < expected_s or (len(done) >= ENOUGH_SIZES and expected_s > 2 * slice_s):
                    break
            done[size] = measure(size)
        return tuple(done), tuple(done.values())

    # Steps

    def _speeds(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Time the small computation on every rank, no more ranks of a node at once than it has cores.

        Returns its seconds, and each rank's speed relative to rank 0 where they differ by more than both the
        threshold and the spread of the figures.
        """
        self.report("the devices")
        place = self.transport.rank - self.cluster.node_of.index(self.cluster.node_of[self.transport.rank])
        turns = max(math.ceil(node.devices / (node.cores or node.devices)) for node in self.cluster.nodes)
        own = place // (self.cluster.nodes[self.cluster.node_of[self.transport.rank]].cores or self.cluster.world)
        blocks: list[float] = []
        for turn in range(turns):
            self.transport.gather(None)
            if turn == own:
                self.transport.compute(1)
                once_s = self._computed_s(3) / 3
                count = max(1, int(SPEED_SHARE * self.budget_s / turns / BLOCKS / once_s))
                blocks = [self._computed_s(count) / count for _ in range(BLOCKS)]
        figures = self.transport.gather((statistics.median(blocks), _spread(blocks)))
        self.unit_s = figures[self.transport.rank][0]
        base_s, base_spread = figures[0]
        speeds = []
        for seconds, spread in figures:
            equal = abs(base_s / seconds - 1) <= max(UNEQUAL, spread + base_spread)
            speeds.append(1.0 if equal else rounded(base_s / seconds))
        return tuple(seconds for seconds, _ in figures), tuple(speeds)

    def _messages(self, level: Level) -> None:
        """Time messages both ways, one way after the other at every size, so that both see the same machine."""
        self.report(f"messages, level {level}")
        rounds = pair_rounds(self.cluster, level)
        back = tuple(tuple((b, a) for a, b in pairs) for pairs in rounds)
        slice_s = MESSAGE_SHARE * self.budget_s / (len(self.levels) * len(rounds) * 2 * (len(MESSAGE_BYTES) + 1))
        tiny_s = min(self._trip_s(way, ACK_BYTES, slice_s) for way in (rounds, back))
        figures: dict[int, list[float]] = {}

        def slower_s(size: int) -> float:
            trips = [self._trip_s(way, size, slice_s) for way in (rounds, back)]
            # The answer is no longer under way than the message, however the machine was disturbed.
            figures[size] = [max(trip_s - tiny_s / 2, trip_s / 2) for trip_s in trips]
            return max(figures[size])

        self._growing(MESSAGE_BYTES, slice_s, slower_s)
        forward, reverse = zip(*figures.values(), strict=True)
        self._add(level, "message", "forward", 2, tuple(figures), forward)
        self._add(level, "message", "reverse", 2, tuple(figures), reverse)

    def _trip_s(self, rounds: Sequence[Sequence[tuple[int, int]]], size: int, slice_s: float) -> float:
        """Return the median seconds, over pairs (source, target), of a message of ``size`` and its answer."""
        trips = []
        for pairs in rounds:
            own = next((pair for pair in pairs if self.transport.rank in pair), None)

            def run(count: int, own: tuple[int, int] | None = own) -> None:
                assert own is not None
                self.transport.messages(*own, size, count)

            times = self._median_s(run if own else None, slice_s)
            trips += [times[source] for source, _ in pairs]
        return statistics.median(trips)

    def _collective(self, level: Level, operation: Collective, groups: Sequence[tuple[int, ...]]) -> None:
        self.report(f"{operation}, level {level}")
        slice_s = COLLECTIVE_SHARE * self.budget_s / (len(self.levels) * len(COLLECTIVES) * len(COLLECTIVE_BYTES))
        own = next((group for group in groups if self.transport.rank in group), None)

        def slowest_s(size: int) -> float:
            def run(count: int) -> None:
                assert own is not None
                self.transport.collective(operation, own, size, count)

            times = self._median_s(run if own else None, slice_s)
            return statistics.median(max(times[rank] for rank in group) for group in groups)

        sizes, times = self._growing(COLLECTIVE_BYTES, slice_s, slowest_s)
        self._add(level, operation, "both", len(groups[0]), sizes, times)

    def _add(
        self,
        level: Level,
        what: What,
        direction: Direction,
        n: int,
        sizes: tuple[int, ...],
        times: tuple[float, ...],
    ) -> None:
        samples = [line(what, n, size, seconds) for size, seconds in zip(sizes, times, strict=True)]
        self.series.append(Series(level, what, direction, n, sizes, times, fit(samples)))

    def _overlap(self, level: Level, what: What, groups: Sequence[tuple[int, ...]]) -> None:
        """Time a computation by itself and during communication that takes half as long, at both sizes."""
        shares = len(self.levels) * (1 + len(COLLECTIVES)) * OVERLAP_ROUNDS * len(OVERLAP_BYTES)
        length_s = min(OVERLAP_S, OVERLAP_SHARE * self.budget_s / shares / 6)
        self.report(f"computing during {what}, level {level}")
        for size in reversed(OVERLAP_BYTES):  # what is left out for lack of time shall be that of latency
            payload_bytes = size
            while payload_bytes > LEAST_OVERLAP_BYTES and self._predicted_s(level, what, payload_bytes) > length_s:
                payload_bytes //= 2
            if not self._overlap_at(level, what, groups, payload_bytes, length_s):
                sizes = "" if size == OVERLAP_BYTES[-1] else " at the smaller size"
                self.unmeasured.append(f"contention of {what} on level {level}{sizes}: the budget is spent")
                return

    def _overlap_at(
        self, level: Level, what: What, groups: Sequence[tuple[int, ...]], payload_bytes: int, length_s: float
    ) -> bool:
        """Measure an overlap at one size; returns whether there was time for it."""
        own = next((group for group in groups if self.transport.rank in group), None)
        one_s = self._predicted_s(level, what, payload_bytes)
        count = max(1, min(MOST_IN_BLOCK, round(length_s / one_s)))
        if self._left_s() < 6 * OVERLAP_ROUNDS * count * one_s:
            return False
        iterations = max(1, round(2 * count * one_s / self.unit_s))
        figures = [self._lost_s(what, own, payload_bytes, count, iterations) for _ in range(OVERLAP_ROUNDS)]
        everyone = self.transport.gather(
            None if own is None else tuple(statistics.median(column) for column in zip(*figures, strict=True))
        )
        parts = [part for part in everyone if part is not None]
        lost_s, communication_s = (statistics.fmean(part[i] for part in parts) for i in (0, 1))
        self.overlaps.append(Overlap(level, what, payload_bytes, lost_s * self._rate(groups), communication_s))
        return True

    def _lost_s(
        self, what: What, own: tuple[int, ...] | None, payload_bytes: int, count: int, iterations: int
    ) -> tuple[float, float]:
        """Return the seconds that a computation lost to communication, and how long that took by itself.

        Both count for the part of the communication that went on during the computation.
        """
        transport = self.transport

        def start() -> Pending:
            return transport.start(what, own or (), payload_bytes, count)

        transport.gather(None)
        if own is None:
            for _ in range(2):
                transport.gather(None)
            return 0.0, 0.0
        communication_s = self._timed(lambda: start().wait())
        transport.gather(None)
        alone_s = self._computed_s(iterations)
        transport.gather(None)
        began = transport.now()
        pending = start()
        transport.compute(iterations)
        both_s = transport.now() - began
        rest_s = self._timed(pending.wait)
        return both_s - alone_s, max(communication_s - rest_s, communication_s / 10)

    def _rate(self, groups: Sequence[tuple[int, ...]]) -> float:
        """Return the share of a core that each rank has when all of ``groups`` compute."""
        computing = Counter(self.cluster.node_of[rank] for group in groups for rank in group)
        return min(min(1.0, (self.cluster.nodes[node].cores or n) / n) for node, n in computing.items())

    # The result

    def _predicted_s(self, level: Level, what: What, payload_bytes: int) -> float:
        """Return the greatest fitted time of one communication of a size."""
        times = []
        for s in self.series:
            if (s.level, s.what) == (level, what):
                sample = line(what, s.ranks, payload_bytes, 1.0)
                times.append(s.fit.seconds(sample.messages, sample.payload_bytes))
        return max(times)

    def _measured(self, speeds: Sequence[float]) -> Cluster:
        kept = {"node", *(["rack"] if len(self.cluster.nodes) > 1 else [])}
        links = {level: link for level, link in self.cluster.links.items() if level in kept}
        collectives = {}
        for level in self.levels:
            links[level] = self._link(level)
            fitted = {}
            for s in self.series:
                if s.level == level and s.what != "message":
                    fitted[str(s.what)] = replace(_link(s.fit), **self._contention(level, s.what))
            collectives[str(level)] = fitted
        nodes, first = [], 0
        for node in self.cluster.nodes:
            own = tuple(speeds[first : first + node.devices])
            nodes.append(replace(node, speed=own[0] if len(set(own)) == 1 else own))
            first += node.devices
        return replace(self.cluster, nodes=tuple(nodes), links=links, collectives=collectives)

    def _contention(self, level: Level, what: What) -> dict[str, float]:
        """Return the link's fields of contention, of latency and of transfer where both were measured.

        Where there was no time for any, the all-reduce's, the messages' or none. A communication of which the
        share a is latency has contention ``a latency_contention + (1 - a) contention``; two sizes tell both.
        """
        known: tuple[What, ...] = (what, "all_reduce", "message")
        own = next((w for w in known if any((o.level, o.what) == (level, w) for o in self.overlaps)), what)
        found = [(o, self._waiting(o)) for o in self.overlaps if (o.level, o.what) == (level, own)]
        if not found:
            return {}
        (small, waiting), (large, less) = found[-1], found[0]
        if waiting - less < APART:
            return {"contention": rounded(large.contention)}
        slope = (small.contention - large.contention) / (waiting - less)
        transfer = limited(large.contention - less * slope)
        return {"contention": rounded(transfer), "latency_contention": rounded(limited(transfer + slope))}

    def _waiting(self, overlap: Overlap) -> float:
        """Return the share of latency in a communication that a computation overlapped."""
        level, what = overlap.level, overlap.what
        whole_s = self._predicted_s(level, what, overlap.payload_bytes)
        return self._predicted_s(level, what, 0) / whole_s if whole_s else 0.0

    def _link(self, level: Level) -> Link:
        """Fit one line to both directions, or one to each where large messages differ by more than noise."""
        forward, reverse = (s for s in self.series if (s.level, s.what) == (level, "message"))
        contention = self._contention(level, "message")
        large = len(forward.seconds) // 2
        ratio = statistics.median(
            a / b for a, b in zip(forward.seconds[large:], reverse.seconds[large:], strict=True)
        )
        if max(ratio, 1 / ratio) - 1 > 2 * UNEQUAL + forward.fit.median_error + reverse.fit.median_error:
            back = _link(reverse.fit)
            return replace(
                _link(forward.fit),
                **contention,
                reverse_latency_s=back.latency_s,
                reverse_bytes_per_s=back.bytes_per_s,
            )
        samples = [
            line("message", 2, size, seconds)
            for s in (forward, reverse)
            for size, seconds in zip(s.payload_bytes, s.seconds, strict=True)
        ]
        return replace(_link(fit(samples)), **contention)


def _link(line: Fit) -> Link:
    return Link(rounded(line.latency_s), rounded(line.bytes_per_s))


def _spread(values: Sequence[float]) -> float:
    """Return the interquartile range, relative to the median."""
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
