"""Stopwatches: when the actions of one step ran on this rank, by the host's clock or by the GPU's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from hybridpar.planning.program import Action, Operation, Program
from hybridpar.report.timing import ActionTiming, named


class Stopwatch(Protocol):
    """Times one step. It is made at the step's start, and read once after its end."""

    start_s: float
    """``time.perf_counter`` at the step's start."""

    def note(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        """Note an action that is over on the host; an ``Observer``."""
        ...

    def complete(self, operation: Operation) -> None:
        """Note that an operation is complete; called by any thread, on CUDA with a stream that waits for it."""
        ...

    def read(self) -> tuple[tuple[ActionTiming, ...], tuple[tuple[int, float], ...]]:
        """Return actions and completions, in seconds from the step's start."""
        ...


class HostStopwatch:
    """By the host's clock."""

    def __init__(self) -> None:
        self.actions: list[tuple[Action, float, float]] = []
        self.completions: list[tuple[int, float]] = []
        self.start_s = time.perf_counter()

    def note(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        """Note an action."""
        del program
        self.actions.append((action, start_s, end_s))

    def complete(self, operation: Operation) -> None:
        """Note a completion."""
        self.completions.append((operation.index, time.perf_counter()))

    def read(self) -> tuple[tuple[ActionTiming, ...], tuple[tuple[int, float], ...]]:
        """Return actions and completions."""
        zero = self.start_s
        actions = tuple(
            (*named(a), _rounded(start - zero), _rounded(end - zero)) for a, start, end in self.actions
        )
        return actions, tuple((i, _rounded(at - zero)) for i, at in self.completions)


class CudaStopwatch:
    """By events on the current stream: an action lasts from the end of the one before it to its own.

    The step begins with an idle device, as every step ends by reading its figures, so the first event stands for
    the host's time. ``event`` makes one.
    """

    def __init__(self, event: Callable[[], Any] = lambda: torch.cuda.Event(enable_timing=True)) -> None:  # type: ignore[no-untyped-call]
        self._event = event
        self._actions: list[tuple[Action, Any]] = []
        self._completions: list[tuple[int, Any]] = []
        self.start_s = time.perf_counter()
        self._begin = self._mark()

    def _mark(self) -> Any:
        event = self._event()
        event.record()
        return event

    def note(self, program: Program, action: Action, start_s: float, end_s: float) -> None:
        """Note an action."""
        del program, start_s, end_s
        self._actions.append((action, self._mark()))

    def complete(self, operation: Operation) -> None:
        """Note a completion."""
        self._completions.append((operation.index, self._mark()))

    def read(self) -> tuple[tuple[ActionTiming, ...], tuple[tuple[int, float], ...]]:
        """Return actions and completions; waits for the device."""
        actions: list[ActionTiming] = []
        before_s = 0.0
        for action, event in self._actions:
            end_s = max(self._seconds(event), before_s)
            actions.append((*named(action), before_s, end_s))
            before_s = end_s
        return tuple(actions), tuple((i, self._seconds(event)) for i, event in self._completions)

    def _seconds(self, event: Any) -> float:
        event.synchronize()
        return _rounded(float(self._begin.elapsed_time(event)) / 1e3)


def _rounded(seconds: float) -> float:
    """Round to tenths of a microsecond, which keeps records short."""
    return round(seconds, 7)
