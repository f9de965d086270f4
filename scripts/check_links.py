"""Check that every relative link in the Markdown files leads to a file, and every anchor to a heading."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+\s+(.*)$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a file's headings, as GitHub makes them."""
    kept = (re.sub(r"[^\w\- ]", "", h.lower()) for h in HEADING.findall(path.read_text()))
    return {h.strip().replace(" ", "-") for h in kept}


def broken(path: Path) -> list[str]:
    """Return the links of a file that lead nowhere."""
    result = []
    for link in LINK.findall(path.read_text()):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            result.append(f"{path}: {link}")
    return result


def main() -> int:
    """Print broken links; 1 if there are any."""
    pages = [p for p in Path().rglob("*.md") if not any(part.startswith(".") for part in p.parts)]
    found = [line for page in sorted(pages) for line in broken(page)]
    for line in found:
        print(f"broken link: {line}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
