"""How fast counters grow."""

from __future__ import annotations


class Rate:
    """A counter's growth from one look at it to the next."""

    def __init__(self) -> None:
        self._last: float | None = None

    def step(self, count: float | None, window_s: float | None) -> float | None:
        """Return the growth per second since the last call, ``window_s`` ago.

        None where a count is unknown, or went back, as of a counter that wrapped or began again.
        """
        last, self._last = self._last, count
        if last is None or count is None or not window_s or count < last:
            return None
        return (count - last) / window_s
