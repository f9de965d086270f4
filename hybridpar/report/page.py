"""A report of runs as one HTML page that needs nothing else: no network, no script, light and dark."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from string import Template
from typing import TYPE_CHECKING

from hybridpar.report.account import Account
from hybridpar.report.curves import accuracy_figure, loss_figure, memory_figure, time_figure
from hybridpar.report.devices import gpu_figures, host_figures, kernel_figure
from hybridpar.report.figure import svg_text
from hybridpar.report.findings import Finding, beside
from hybridpar.report.kernel_findings import TITLE
from hybridpar.report.overlay import placement, timelines
from hybridpar.report.palette import GRID, HEAVY, IDLE, INK, LINE, PALE_INK, PAPER
from hybridpar.report.run import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {
    INK: "ink",
    PALE_INK: "pale",
    IDLE: "idle",
    LINE: "line",
    GRID: "grid",
    PAPER: "paper",
    HEAVY: "heavy",
}
"""What a page in the dark draws in another colour."""
_DARK = {
    "ink": "#ececec",
    "pale": "#a8a8a8",
    "idle": "#2b2d31",
    "line": "#7d7d7d",
    "grid": "#3a3c41",
    "paper": "#1b1c1f",
    "heavy": "#d6d6d6",
}

SENTENCE = 30
"""Characters from which on a text is one."""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<link rel="icon" href="data:,">
<style>
:root { $light }
@media (prefers-color-scheme: dark) { :root { $dark } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 0.4rem; }
p { margin: 0.3rem 0; max-width: 60rem; }
.pale { color: var(--pale); font-size: 0.88rem; }
.wide { overflow-x: auto; }
.wide svg { display: block; width: 100%; min-width: 58rem; height: auto; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
.small svg { display: block; width: 100%; max-width: 36rem; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; text-align: right; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--line); }
td { border-bottom: 1px solid var(--grid); }
.text { text-align: left; white-space: normal; min-width: 5.5rem; }
.long { min-width: 12rem; }
section { margin-top: 2rem; }
section + section { margin-top: 2.5rem; border-top: 3px solid var(--line); padding-top: 0.5rem; }
</style>
</head>
<body>
$body
</body>
</html>
""")


def page(accounts: Sequence[Account]) -> str:
    """Return the page of some runs. matplotlib draws its figures.

    The same runs give the same page.
    """
    figures = _Figures()
    runs = [account.run for account in accounts]
    names = ", ".join(run.name for run in runs)
    parts = [f"<h1>{_text(names)}</h1>"] if len(runs) > 1 else []
    if len(runs) > 1:
        parts += [_table(beside([(a.run, a.comparison) for a in accounts])), _curves(runs, figures)]
    parts += [_run(account, figures, alone=len(runs) == 1) for account in accounts]
    light = " ".join(f"--{name}: {colour};" for colour, name in _COLOURS.items())
    dark = " ".join(f"--{name}: {colour};" for name, colour in _DARK.items())
    return _PAGE.substitute(title=_text(f"hybridpar: {names}"), light=light, dark=dark, body="\n".join(parts))


class _Figures:
    """Turns figures into parts of a page: colours by name, ids that no other figure has."""

    def __init__(self) -> None:
        self.count = 0

    def svg(self, figure: Figure, label: str) -> str:
        """Return a figure as an element; ``label`` tells what it shows to those who do not see it."""
        self.count += 1
        text = svg_text(figure)
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = self._named(text)
        for colour, name in _COLOURS.items():
            text = re.sub(rf"{colour}\b", f"var(--{name})", text, flags=re.IGNORECASE)
        text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
        return text.replace("<svg ", f'<svg role="img" aria-label="{_text(label)}" ', 1)

    def _named(self, text: str) -> str:
        """Return an SVG whose ids are its own on the page; those that nothing refers to are left out."""
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda m: f' id="f{self.count}-{m[1]}"' if m[1] in used else "", text)
        return re.sub(r'(url\(#|href="#)', rf"\g<1>f{self.count}-", text)


def _run(account: Account, figures: _Figures, *, alone: bool) -> str:
    overview, *others = account.findings
    parts = [f"<h1>{_text(account.run.name)}</h1>", _table(overview, titled=False)]
    parts += [f'<p class="pale">{_text(text)}</p>' for text in account.lacking]
    if account.advice is not None:
        parts.append(_table(account.advice))
    if alone:
        parts.append(_curves([account.run], figures))
    if account.comparison is not None:
        parts += [
            "<h2>the step, predicted and measured</h2>",
            _wide(figures.svg(timelines(account.comparison), "timelines")),
        ]
    drawn = _drawn(account, figures)
    parts += [_table(finding) + drawn.pop(finding.title, "") for finding in others]
    if account.comparison is not None:
        parts += ["<h2>placement</h2>", _wide(figures.svg(placement(account.comparison), "placement"))]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _drawn(account: Account, figures: _Figures) -> dict[str, str]:
    """Return the small figures that stand below a table, by its title."""
    traced = account.run.traces, account.turns
    drawn: dict[str, list[str]] = {
        "memory": [figures.svg(f, "memory per rank") for f in (memory_figure(account.run),) if f is not None],
        "GPUs": [figures.svg(figure, label) for label, figure in gpu_figures(account.run, account.turns)],
        TITLE: [figures.svg(f, "occupancy kernel by kernel") for f in (kernel_figure(*traced),) if f is not None],
        "hosts": [figures.svg(figure, label) for label, figure in host_figures(account.run, account.turns)],
    }
    return {title: f'\n<div class="small">\n{"".join(own)}\n</div>' for title, own in drawn.items() if own}


def _curves(runs: Sequence[Run], figures: _Figures) -> str:
    known = [(loss_figure(runs), "loss over steps"), (time_figure(runs), "time of the steps")]
    accuracy = accuracy_figure(runs)
    if accuracy is not None:
        known.insert(1, (accuracy, "test accuracy over steps"))
    drawn = "\n".join(figures.svg(figure, label) for figure, label in known)
    return f'<h2>over the steps</h2>\n<div class="small">\n{drawn}\n</div>'


def _wide(drawn: str) -> str:
    """A picture that keeps its size on a narrow screen and can be moved sideways."""
    return f'<div class="wide" tabindex="0">\n{drawn}\n</div>'


def _table(finding: Finding, *, titled: bool = True) -> str:
    head = ""
    if any(finding.columns):
        head = f"<thead><tr>{_cells(finding, finding.columns, 'th')}</tr></thead>"
    rows = "\n".join(f"<tr>{_cells(finding, row, 'td')}</tr>" for row in finding.rows)
    title = f"<h2>{_text(finding.title)}</h2>\n" if titled else ""
    notes = "".join(f'\n<p class="pale">{_text(note)}</p>' for note in finding.notes)
    return f'{title}<div class="wide" tabindex="0"><table>{head}<tbody>\n{rows}\n</tbody></table></div>{notes}'


def _cells(finding: Finding, cells: Iterable[str], tag: str) -> str:
    kinds = [_kind(finding, number) for number in range(finding.texts)] + [""] * len(finding.columns)
    return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=False))


def _kind(finding: Finding, column: int) -> str:
    """A column of sentences keeps more of its width on a narrow screen."""
    return " class=text" if all(len(row[column]) < SENTENCE for row in finding.rows) else ' class="text long"'


def _text(text: str) -> str:
    return html.escape(text)
