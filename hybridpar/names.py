"""What a mistyped name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return ``; did you mean ...?`` with the known name nearest to ``name``, or nothing where none is near.

    Upper and lower case are alike. Of dotted names the last part alone may match. ``cutoff`` is the least
    similarity of ``difflib`` (0..1).
    """
    names = list(known)
    leaf = _leaf(name)
    same = [k for k in names if _leaf(k) == leaf]
    near = same[:1] or _close(name.casefold(), {k.casefold(): k for k in reversed(names)}, cutoff)
    near = near or _close(leaf, {_leaf(k): k for k in reversed(names)}, cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _leaf(name: str) -> str:
    return name.rsplit(".", maxsplit=1)[-1].casefold()


def _close(name: str, folded: dict[str, str], cutoff: float) -> list[str]:
    return [folded[near] for near in difflib.get_close_matches(name, folded, n=1, cutoff=cutoff)]
