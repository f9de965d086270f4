"""The colours of the pictures: stages, updates, communication.

From Okabe and Ito's palette (2008) and Tol's muted one, which colour-blind readers tell apart. A stage's backward
has the full colour, its forward a tint of it, so that the two differ in lightness as well.
"""

from __future__ import annotations

from typing import Literal

from hybridpar.planning.blocks import Position
from hybridpar.planning.program import Content

Phase = Literal["forward", "backward", "update", "other", "communication"]
Lane = Literal["activations", "gradients", "collectives"]

INK, PALE_INK, IDLE, LINE, GRID, PAPER = "#1a1a1a", "#5a5a5a", "#f1f1f1", "#9a9a9a", "#dddddd", "#ffffff"
HEAVY = "#222222"
"""Of what matters most among communication."""
INK_ON_PALE, INK_ON_FULL = "#1a1a1b", "#fffffe"
"""A hair off ``INK`` and ``PAPER``: a page in the dark exchanges those, but not what is written on a colour."""

_FRONT, _TAIL = "#0072b2", "#d55e00"
_MIDDLE = ("#009e73", "#cc79a7", "#999933", "#882255")
"""In turn: neighbouring segments always differ."""
_TINT = 0.58
"""How far a forward's colour is moved towards white."""

UPDATE, OTHER = "#f0e442", "#b8b8b8"
_CONTENT: dict[str, tuple[str, str, Lane]] = {
    "activation": ("activations", "#56b4e9", "activations"),
    "gradient": ("gradients of activations", "#e69f00", "gradients"),
    "bucket": ("gradient buckets", HEAVY, "collectives"),
    **dict.fromkeys(("lowered", "left", "rest", "right"), ("compressed gradients", HEAVY, "collectives")),
    "zero": ("sharded update", HEAVY, "collectives"),
    "sum": ("sums inside the tail", "#44aa99", "collectives"),
    "moments": ("statistics of batch norms", "#aa4499", "collectives"),
}
_CONTROL: tuple[str, str, Lane] = ("control", "#a08070", "collectives")
"""Labels, figures of the loss, norm, metrics: small messages."""


def stage_name(position: Position) -> str:
    """Return ``front``, ``middle 0``, ..., ``tail``."""
    return position.name.replace(".", " ")


def stage_key(position: Position, segments: int) -> tuple[str, int]:
    """Return what a legend calls a position's colour, and the first segment that has it.

    More segments than colours take them in turn: ``middle 0, 4, 8``.
    """
    if position.kind != "middle" or segments <= len(_MIDDLE):
        return stage_name(position), position.segment
    alike = range(position.segment % len(_MIDDLE), segments, len(_MIDDLE))
    return "middle " + ", ".join(map(str, alike[:3])) + (", ..." if len(alike) > 3 else ""), alike[0]


def stage_colour(position: Position, phase: Phase = "backward") -> str:
    """Return the colour of a position's backward, or the lighter one of its forward."""
    if position.kind == "middle":
        full = _MIDDLE[position.segment % len(_MIDDLE)]
    else:
        full = _FRONT if position.kind == "front" else _TAIL
    return tint(full, _TINT) if phase == "forward" else full


def communication(content: Content) -> tuple[str, str, Lane]:
    """Return name, colour and lane of what an operation moves."""
    return _CONTENT.get(content, _CONTROL)


def tint(colour: str, share: float) -> str:
    """Return a colour moved towards white by a share from 0 to 1."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)


def ink_on(colour: str) -> str:
    """Return the text colour, dark or light, that reads better on a background (WCAG 2 relative luminance)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return INK_ON_PALE if (luminance + 0.05) / 0.06 >= 1.05 / (luminance + 0.05) else INK_ON_FULL
