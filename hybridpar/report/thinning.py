"""Curves that stay small however many points come: of every stretch the lowest and the highest are kept."""

from __future__ import annotations

import math
from typing import NamedTuple

MOST_POINTS = 2000
"""Of a curve."""

Point = tuple[float, float]


class _Stretch(NamedTuple):
    """The lowest and the highest point of neighbours; where none is known, the first of them for both."""

    low: Point
    high: Point

    def joined(self, other: _Stretch) -> _Stretch:
        """Return the stretch of both, this one first."""
        if math.isnan(self.low[1]):
            return self if math.isnan(other.low[1]) else other
        if math.isnan(other.low[1]):
            return self
        return _Stretch(
            other.low if other.low[1] < self.low[1] else self.low,
            other.high if other.high[1] > self.high[1] else self.high,
        )

    def points(self) -> list[Point]:
        """Return one point, or two in their order."""
        if self.low is self.high or self.low == self.high:
            return [self.low]
        return sorted((self.low, self.high))


class Thinned:
    """A curve whose points come one by one, of which at most ``most`` are ever held.

    Stretches hold equally many points. Where there are too many of them, neighbours are put together. The last
    point is kept as well.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._room = most - 4  # two of an open stretch, and the last
        self._width = 1
        self._whole: list[_Stretch] = []
        self._open: _Stretch | None = None
        self._inside = 0
        """Points of the open stretch."""
        self._last: Point | None = None

    def add(self, x: float, y: float | None) -> None:
        """Take the next point; one that is unknown or not finite breaks the curve if all of its stretch are."""
        point = (x, math.nan if y is None or not math.isfinite(y) else y)
        own = _Stretch(point, point)
        self._open = own if self._open is None else self._open.joined(own)
        self._last = point
        self._inside += 1
        if self._inside == self._width:
            self._whole.append(self._open)
            self._open, self._inside = None, 0
            if len(self._whole) > (self._room if self._width == 1 else self._room // 2):
                self._widen()

    @property
    def points(self) -> tuple[Point, ...]:
        """What is kept, in order; a break is a point that is not a number."""
        stretches = [*self._whole, *([self._open] if self._open is not None else [])]
        found = [point for stretch in stretches for point in stretch.points()]
        if self._last is not None and found[-1] != self._last and not math.isnan(self._last[1]):
            found.append(self._last)
        return tuple(found)

    def _widen(self) -> None:
        """Put neighbours together; the last one may have none yet, and goes on."""
        whole = self._whole
        self._whole = [a.joined(b) for a, b in zip(whole[::2], whole[1::2], strict=False)]
        if len(whole) % 2:
            self._open, self._inside = whole[-1], self._width
        self._width *= 2
