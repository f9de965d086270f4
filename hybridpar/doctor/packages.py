"""Installed packages: whether their versions lie in the ranges that hybridpar asks for."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Callable, Collection, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from hybridpar.doctor.finding import Finding, note, ok, wrong
from hybridpar.report.text import plural

_TOPIC = "packages"
_NAMED = ("torch", "torchvision")
"""Packages whose versions are told when all is well."""
_EXTRAS = {"zero": "optimizer.sharding=zero1 and zero2", "pictures": "pictures=FOLDER"}
"""What needs which extra."""
_SELF = "hybridpar"


def installed(name: str) -> str | None:
    """Return the version of an installed package, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(used: Collection[str] = ()) -> list[Finding]:
    """Compare Python and the installed packages with what hybridpar's own metadata asks for.

    ``used`` names the extras that the configuration makes use of; they are wrong where they are missing.
    """
    try:
        about = metadata.metadata(_SELF)
    except metadata.PackageNotFoundError:
        remedy = "install it: pip install -e . in a checkout"
        return [note(_TOPIC, "hybridpar itself is not installed, so that versions cannot be compared", remedy)]
    asked = [Requirement(text) for text in metadata.requires(_SELF) or ()]
    found = [_python(about["Requires-Python"] or "")]
    found += compare([r for r in asked if _needed(r)], installed)
    for extra, use in _EXTRAS.items():
        found += _extra(extra, use, [r for r in asked if not _needed(r) and _needed(r, extra)], extra in used)
    return found


def _needed(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _python(range_: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(range_).contains(version, prereleases=True):
        return ok(_TOPIC, f"Python {version}")
    return wrong(_TOPIC, f"Python {version} lies outside {range_}", f"make an environment of Python {range_}")


def compare(asked: Sequence[Requirement], version_of: Callable[[str], str | None]) -> list[Finding]:
    """Return one finding per package that is missing or out of range, or one for all."""
    found = []
    for requirement in asked:
        version = version_of(requirement.name)
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if version is None:
            found.append(wrong(_TOPIC, f"{requirement.name} is not installed", remedy))
        elif not requirement.specifier.contains(version, prereleases=True):
            outside = f"{requirement.name} {version} lies outside {requirement.specifier}"
            found.append(wrong(_TOPIC, outside, remedy))
    named = ", ".join(f"{r.name} {version_of(r.name)}" for r in asked if r.name in _NAMED)
    return found or [ok(_TOPIC, f"{plural(len(asked), 'package')} in range: {named}, ...")]


def _extra(extra: str, use: str, asked: Sequence[Requirement], used: bool) -> list[Finding]:
    """Compare the packages of an extra; one that nothing uses may be missing."""
    missing = [r.name for r in asked if installed(r.name) is None]
    remedy = f"pip install 'hybridpar[{extra}]'"
    if missing and not used:
        return [note(_TOPIC, f"{', '.join(missing)} not installed, which {use} needs", remedy)]
    compared = compare(asked, installed)
    if all(f.status == "ok" for f in compared):
        return [ok(_TOPIC, ", ".join(f"{r.name} {installed(r.name)}" for r in asked) + f", for {use}")]
    return [wrong(_TOPIC, f.what, remedy) for f in compared]


def check_present(names: Collection[str]) -> list[Finding]:
    """Look for packages that the configuration names."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return [wrong(_TOPIC, f"{name} is not installed", f"pip install {name}") for name in missing]


def check_imports(names: Collection[str] = ("torchvision",)) -> list[Finding]:
    """Import packages that fail where they do not fit the installed torch."""
    found = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError, OSError) as e:
            first = str(e).splitlines()[0]
            remedy = f"install torch and {name} together, from one index: pip install --upgrade torch {name}"
            found.append(wrong(_TOPIC, f"{name} cannot be imported: {first}", remedy))
    return found
