"""From what was timed to a layer's entry in the profile."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hybridpar.profiling.record import LayerProfile, Table, interpolate
from hybridpar.profiling.rounds import Timed
from hybridpar.profiling.strands import Strand
from hybridpar.profiling.workspace import Bytes

Pair = tuple[tuple[float, ...], tuple[float, ...]]
"""Of the forward and of the backward, per size."""


@dataclass(frozen=True)
class Row:
    """One layer at one share of its features."""

    sizes: tuple[int, ...]
    """Micro-batches, ascending."""
    times: Pair
    """Seconds."""
    spreads: Pair
    watched: tuple[tuple[int, Bytes], ...] = ()
    """(micro-batch, bytes), ascending; sizes may be fewer."""

    @staticmethod
    def of(timed: Timed, strand: Strand, index: int) -> Row:
        """Return the row of a strand's layer."""
        entries = [entry for entry in timed.entries if strand in entry.strands]
        samples = [entry.columns(strand)[2 * index : 2 * index + 2] for entry in entries]
        forward, backward = zip(*samples, strict=True)
        watched = itertools.takewhile(lambda e: e.watched, entries)
        return Row(
            tuple(entry.size for entry in entries),
            (tuple(map(statistics.median, forward)), tuple(map(statistics.median, backward))),
            (tuple(map(spread, forward)), tuple(map(spread, backward))),
            tuple((e.size, e.watched[strand][index]) for e in watched),
        )

    def continued(self, single: Row) -> Row:
        """Continue this row, of the layer in the model, to the further sizes of the layer by itself.

        Its times there are multiplied by in_model / by_itself at the last size that both have.
        """
        last = max(set(self.sizes) & set(single.sizes))
        at, other, further = self.sizes.index(last), single.sizes.index(last), range(len(single.sizes))
        beyond = [i for i in further if single.sizes[i] > self.sizes[-1]]

        def longer(k: int) -> tuple[float, ...]:
            scale = self.times[k][at] / single.times[k][other] if single.times[k][other] > 0 else 1.0
            return self.times[k] + tuple(single.times[k][i] * scale for i in beyond)

        return Row(
            self.sizes + tuple(single.sizes[i] for i in beyond),
            (longer(0), longer(1)),
            tuple(
                own + tuple(more[i] for i in beyond)
                for own, more in zip(self.spreads, single.spreads, strict=True)
            ),  # type: ignore[arg-type]
            self.watched,
        )

    def share(self, single: Row, part: Row) -> Row:
        """Return the row of a share of this layer: its times are multiplied by part / single.

        Both are timed by themselves. The quotient is interpolated where this row has more sizes.
        """

        def shared(k: int) -> tuple[float, ...]:
            quotients = [a / b if b > 0 else 1.0 for a, b in zip(part.times[k], single.times[k], strict=True)]
            return tuple(
                t * _between(single.sizes, quotients, s) for s, t in zip(self.sizes, self.times[k], strict=True)
            )

        def spreads(k: int) -> tuple[float, ...]:
            own = dict(zip(part.sizes, part.spreads[k], strict=True))
            return tuple(own.get(s, whole) for s, whole in zip(self.sizes, self.spreads[k], strict=True))

        return Row(self.sizes, (shared(0), shared(1)), (spreads(0), spreads(1)), part.watched)

    def bytes(self, field: str) -> tuple[float, ...]:
        """Return one of the figures of ``Bytes`` per size, up to the greatest that was watched."""
        known = tuple(s for s, _ in self.watched)
        values = tuple(float(getattr(b, field)) for _, b in self.watched)
        return tuple(round(interpolate(known, values, s)) for s in self.sizes if known and s <= known[-1])


def _between(xs: Sequence[int], ys: Sequence[float], x: int) -> float:
    """Interpolate; the first and the last value beyond the ends."""
    inside = min(max(x, xs[0]), xs[-1])
    return ys[0] if len(xs) == 1 else interpolate(tuple(xs), tuple(ys), inside)


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range as a share of the median; 0 for fewer than two values."""
    middle = statistics.median(values)
    if len(values) < 2 or middle <= 0:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def entry(name: str, rows: Sequence[Row], accumulate_s: float) -> LayerProfile:
    """Return a layer's entry from its rows, one per fraction."""
    byte_tables: dict[str, Table] = {}
    if all(row.watched for row in rows):
        byte_tables = {
            field: tuple(row.bytes(field) for row in rows) for field in ("saved", "forward", "backward")
        }

    def table(values: Iterable[tuple[float, ...]], digits: int = 5) -> Table:
        return tuple(tuple(rounded(v, digits) for v in row) for row in values)

    return LayerProfile(
        name,
        forward_s=table(row.times[0] for row in rows),
        backward_s=table(row.times[1] for row in rows),
        forward_spread=table((row.spreads[0] for row in rows), 2),
        backward_spread=table((row.spreads[1] for row in rows), 2),
        accumulate_s=rounded(accumulate_s),
        saved_bytes=byte_tables.get("saved", ()),
        forward_workspace_bytes=byte_tables.get("forward", ()),
        backward_workspace_bytes=byte_tables.get("backward", ()),
    )


def rounded(value: float, digits: int = 5) -> float:
    """Return a value with so many significant digits."""
    return float(f"{value:.{digits}g}")
