"""Figures and tables as text, alike in every report."""

from __future__ import annotations

from rich.table import Table


def titled(title: str) -> Table:
    """Return an empty table without lines, under its title."""
    return Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")


def in_ms(*seconds: float) -> str:
    """Write a sum of times in milliseconds: ``70.5 + 138 ms``."""
    return " + ".join(f"{s * 1e3:.3g}" for s in seconds) + " ms"


def in_time(seconds: float) -> str:
    """Write a time in milliseconds, or in seconds from one on."""
    return f"{seconds * 1e3:.4g} ms" if seconds < 1 else f"{seconds:.4g} s"


def in_bytes(count: float) -> str:
    """Write a size in MiB, or in GiB from one on."""
    return f"{count / 2**20:.4g} MiB" if count < 2**30 else f"{count / 2**30:.4g} GiB"


def in_thousands(number: int) -> str:
    """Write a number with the prefix of its thousands: ``138.4 M``."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: ``2 ranks``."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def spans(numbers: tuple[int, ...]) -> str:
    """Write consecutive numbers as a range: ``0-3,6``."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ",".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
