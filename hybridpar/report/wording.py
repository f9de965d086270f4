"""Numbers as the pictures write them."""

from __future__ import annotations

from collections.abc import Sequence


def duration(seconds: float) -> str:
    """Return a time with its unit: 12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: float) -> str:
    """Return bytes with their unit: 1.6 GiB."""
    for unit, base in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= base:
            return f"{count / base:.3g} {unit}"
    return f"{count:.0f} B"


def rate(bytes_per_s: float) -> str:
    """Return a bandwidth with its unit: 12.5 GB/s."""
    for unit, base in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if bytes_per_s >= base:
            return f"{bytes_per_s / base:.3g} {unit}"
    return f"{bytes_per_s:.3g} B/s"


def plural(number: int, noun: str) -> str:
    """Return 1 replica, 2 replicas."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def ranges(numbers: Sequence[int], most: int) -> str:
    """Write ascending numbers as ranges, 0-3, 6; after ``most`` ranges, how many numbers are left."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    written = [str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs[:most]]
    rest = sum(map(len, runs[most:]))
    return ", ".join(written) + (f" and {rest} more" if rest else "")
