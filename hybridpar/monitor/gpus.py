"""Reads samples of a node's GPUs, each put together from several origins."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybridpar.monitor.record import Event, Gap, GpuSample, Record
from hybridpar.monitor.source import Figures, Meter, Refused

IDLE_BELOW = 0.01
"""Graphics activity below which a window counts as idle: the quotient with occupancy would be noise."""
REFUSALS = 3
"""Ticks in a row without any figure after which an origin counts as gone."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG slice, and those that measure it; without any, nothing of it is known."""

    index: int | None
    uuid: str | None
    meters: tuple[Meter, ...]
    """What an earlier one knows, a later one is not believed."""

    @property
    def label(self) -> str:
        """What it is called in a sentence."""
        return self.uuid or f"GPU {self.index}"


class Gpus:
    """Some GPUs, read together; ``close`` gives back what their meters hold."""

    name = "GPU"

    def __init__(
        self,
        gpus: Sequence[Gpu],
        gaps: Sequence[str],
        errors: Callable[[], Sequence[tuple[int | None, int]]] = tuple,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        """Put together what was opened.

        Args:
            gpus: in the order of their samples.
            gaps: what will be unknown of them and why, one sentence each.
            errors: gives new Xid errors, with the position of the GPU in ``gpus``.
            release: called at the end, after the meters were closed.

        """
        self.gaps = tuple(gaps)
        self._gpus, self._errors, self._release = tuple(gpus), errors, release
        self._host = socket.gethostname()
        self._refusals: dict[tuple[int, str], int] = {}
        self._known: set[tuple[int, str]] = set()
        self._told: set[tuple[int, str]] = set()

    def read(self, time_s: float) -> Sequence[Record]:
        """Return one sample per GPU, stamped ``time_s``, with errors and, once, what gives nothing more."""
        samples, troubles = list[Record](), dict[tuple[str, str, bool], list[str]]()
        for at, gpu in enumerate(self._gpus):
            known: dict[str, Figures] = {}
            for meter in gpu.meters:
                key = at, meter.source
                try:
                    figures = meter.read(time_s)
                except Refused as e:
                    if self._counts_as_gone(key):
                        troubles.setdefault((meter.source, str(e), key in self._known), []).append(gpu.label)
                    continue
                known[meter.source] = {name: value for name, value in figures.items() if value is not None}
                self._refusals[key] = 0
                if known[meter.source]:
                    self._known.add(key)
            samples.append(_sample(gpu, self._host, time_s, known))
        return [*samples, *self._events(time_s), *self._gone(troubles, time_s)]

    def close(self) -> None:
        """Give everything back."""
        for gpu in self._gpus:
            for meter in gpu.meters:
                meter.close()
        self._release()

    def _counts_as_gone(self, key: tuple[int, str]) -> bool:
        """Count a refusal; True once, where it is one too many."""
        self._refusals[key] = self._refusals.get(key, 0) + 1
        if self._refusals[key] < REFUSALS or key in self._told:
            return False
        self._told.add(key)
        return True

    def _events(self, time_s: float) -> list[Event]:
        events = []
        for at, xid in self._errors():
            gpu = Gpu(None, None, ()) if at is None else self._gpus[at]
            events.append(Event(time_s, self._host, gpu.index, gpu.uuid, xid))
        return events

    def _gone(self, troubles: dict[tuple[str, str, bool], list[str]], time_s: float) -> list[Gap]:
        gaps = []
        for (source, reason, had), labels in troubles.items():
            verb = "gives" if len(labels) == 1 else "give"
            more = " any more" if had else ""
            sentence = f"{', '.join(labels)} {verb} no figures by {source}{more}: {reason}"
            gaps.append(Gap(time_s, self._host, sentence, lost=had))
        return gaps


def _sample(gpu: Gpu, host: str, time_s: float, known: dict[str, Figures]) -> GpuSample:
    figures, sources = dict[str, Any](), dict[str, str]()
    for source, values in known.items():
        for name, value in values.items():
            if name not in figures:
                figures[name], sources[name] = value, source
    _add_while_busy(figures, sources)
    return GpuSample(time_s=time_s, host=host, gpu=gpu.index, uuid=gpu.uuid, sources=sources, **figures)


def _add_while_busy(figures: Figures, sources: dict[str, str]) -> None:
    """Add ``occupancy / graphics_activity`` where both are of one origin and the GPU was not idle."""
    occupancy, busy = figures.get("occupancy"), figures.get("graphics_activity")
    if occupancy is None or busy is None or sources["occupancy"] != sources["graphics_activity"]:
        return
    if busy >= IDLE_BELOW:
        figures["occupancy_while_busy"] = min(occupancy / busy, 1.0)
        sources["occupancy_while_busy"] = sources["occupancy"]
