"""Digests of dataclasses: what changes them, and what does not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hybridpar.schema import digest


@dataclass(frozen=True)
class Part:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Old:
    parts: tuple[Part, ...]
    recipe: Part = field(default_factory=lambda: Part("plain"))


@dataclass(frozen=True)
class New:
    parts: tuple[Part, ...]
    recipe: Part = field(default_factory=lambda: Part("plain"))
    compression: str | None = None


OLD, NEW = Old((Part("a"), Part("b", (1, 2)))), New((Part("a"), Part("b", (1, 2))))


def test_a_new_field_with_its_default_changes_no_digest() -> None:
    """Else a run's timeline, recorded by the version before, would count as that of another plan."""
    assert digest(OLD) == digest(NEW)


def test_every_value_that_is_not_a_default_counts() -> None:
    others = [
        replace(NEW, compression="bfloat16"),
        replace(NEW, recipe=Part("other")),
        replace(NEW, parts=(Part("a"),)),
        replace(NEW, parts=(Part("a"), Part("b", (1,)))),
        replace(NEW, parts=(Part("b", (1, 2)), Part("a"))),
    ]
    assert len({digest(value) for value in [NEW, *others]}) == len(others) + 1
