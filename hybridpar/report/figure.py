"""Figures in inches: the few things that the pictures ask of matplotlib, which only drawing needs.

Nothing here uses pyplot: no window, no global state, no display.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from functools import lru_cache
from io import StringIO
from pathlib import Path as FilePath
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Literal

from hybridpar.errors import ConfigError
from hybridpar.report.palette import INK, PALE_INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Across = Literal["left", "center", "right"]
Box = tuple[float, float, float, float]
"""Left, bottom, width, height."""

WIDTH, MARGIN, NOTE_LINE = 14.0, 0.2, 0.19
"""Of a page, in inches."""
HEAD, TEXT, SMALL = 10.0, 8.0, 7.0
"""Font sizes in points."""
DOTS_PER_INCH = 120
FONT = "DejaVu Sans"
"""Comes with matplotlib, so that a PNG is the same everywhere; an SVG names it and falls back to sans-serif."""
SAFETY = 1.02


def require_matplotlib(key: str = "pictures") -> None:
    """Raise ConfigError with the remedy where matplotlib is missing; ``key`` asked for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{key}: drawing needs matplotlib; pip install 'hybridpar[pictures]'")


def prepare_folder(folder: FilePath) -> None:
    """Make the pictures' folder and try it. Raises ConfigError if it cannot be written, or without matplotlib."""
    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as e:
        remedy = "name a folder, new or not, where you may write"
        raise ConfigError(f"pictures: cannot write to {folder}: {e.strerror}; {remedy}") from e


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a white figure and axes over all of it whose units are inches, counted from the lower left."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and an optional dependency

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.axis("off")
    return figure, axes


def page(height: float, title: str, notes: Iterable[str]) -> tuple[Figure, Axes]:
    """Return a figure ``WIDTH`` inches wide with its title and a line per note below it."""
    figure, axes = blank(WIDTH, height)
    y, room = height - MARGIN - 0.1, WIDTH - 2 * MARGIN
    points = HEAD if text_width(title, HEAD, bold=True) <= room else TEXT
    write(axes, MARGIN, y, fitted(title, room, points, bold=True), points, INK, bold=True)
    for note in notes:
        y -= NOTE_LINE
        write(axes, MARGIN, y, fitted(note, room, TEXT), TEXT, PALE_INK)
    return figure, axes


def boxes(
    axes: Axes, at: Iterable[Box], colour: str, *, edge: str = "none", line: float = 0.0, name: str | None = None
) -> None:
    """Draw many boxes of one colour as a single path, which keeps an SVG small."""
    from matplotlib.patches import PathPatch  # noqa: PLC0415
    from matplotlib.path import Path  # noqa: PLC0415

    vertices: list[tuple[float, float]] = []
    codes: list[Any] = []
    for left, bottom, width, height in at:
        right, top = left + width, bottom + height
        vertices += [(left, bottom), (right, bottom), (right, top), (left, top), (left, bottom)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    if vertices:
        patch = PathPatch(Path(vertices, codes), facecolor=colour, edgecolor=edge, linewidth=line)
        patch.set_gid(name)
        axes.add_patch(patch)


@lru_cache(maxsize=10_000)
def text_width(text: str, points: float, *, bold: bool = False) -> float:
    """Return a text's width in inches, a little on the safe side: viewers of an SVG may have another font."""
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415
    from matplotlib.textpath import TextToPath  # noqa: PLC0415

    font = FontProperties(family=FONT, size=points, weight="bold" if bold else "normal")
    return SAFETY * TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def fitted(text: str, width: float, points: float, *, bold: bool = False) -> str:
    """Return the text, its middle left out where it is wider than ``width`` inches."""
    kept, shorter = len(text), text
    while kept > 2 and text_width(shorter, points, bold=bold) > width:
        kept -= 1
        shorter = f"{text[: -(-kept // 2)]}…{text[len(text) - kept // 2 :]}"
    return shorter


def write(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    points: float,
    colour: str,
    *,
    across: Across = "left",
    bold: bool = False,
) -> None:
    """Write a line of text, its middle at the height ``y``. A dollar sign is a dollar sign."""
    axes.text(
        x,
        y,
        text,
        fontsize=points,
        color=colour,
        ha=across,
        va="center_baseline",
        family=[FONT, "sans-serif"],
        weight="bold" if bold else "normal",
        parse_math=False,
    )


def save(figure: Figure, path: FilePath) -> None:
    """Write a figure as .svg, with its text as text, or .png; the same figure gives the same bytes.

    Raises OSError where the file cannot be written.
    """
    _save(figure, path, path.suffix[1:])


def write_files(folder: FilePath, contents: Mapping[str, Figure | str]) -> tuple[FilePath, ...]:
    """Write figures and texts by their file names into a prepared folder, and return the paths.

    Raises ConfigError where one cannot be written.
    """
    paths = tuple(folder / name for name in contents)
    for path, content in zip(paths, contents.values(), strict=True):
        try:
            if isinstance(content, str):
                path.write_text(content)
            else:
                save(content, path)
        except OSError as e:
            raise ConfigError(f"pictures: cannot write {path}: {e.strerror}; make room or remove it") from e
    return paths


def svg_text(figure: Figure) -> str:
    """Return a figure as SVG without a background, alike for the same figure."""
    text = StringIO()
    _save(figure, text, "svg", facecolor="none")
    return text.getvalue()


def _save(figure: Figure, to: FilePath | StringIO, kind: str, **options: Any) -> None:
    from matplotlib import rc_context  # noqa: PLC0415

    metadata = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybridpar"}):
        figure.savefig(to, format=kind, metadata=metadata, **options)
