"""The arrows between the parts: who may import whom, imports inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hybridpar

PACKAGE = Path(hybridpar.__file__).parent
ROOT = PACKAGE.parent

PURE = {
    "__future__",
    "bisect",
    "collections",
    "contextlib",
    "dataclasses",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "numpy",
    "pathlib",
    "typing",
}
"""Modules that touch no device, clock, environment or global. ``pathlib`` and ``json`` write and read a plan."""

PLANNING_MAY = (
    "hybridpar.planning",
    "hybridpar.model.chain",
    "hybridpar.profiling.record",
    "hybridpar.cluster.topology",
    "hybridpar.cluster.collectives",
)
SHARED = ("hybridpar.errors", "hybridpar.schema")
FACES = ("hybridpar.cli", "hybridpar.commands", "hybridpar.api")
SEARCHING = (
    "search",
    "exhaustive",
    "heuristic",
    "pins",
    "scorer",
    "estimate",
    "neighbours",
    "draft",
    "placement",
    "bound",
    "explain",
    "explanation",
    "flips",
    "difference",
    "request",
    "pareto",
)


def modules(part: str = "") -> list[Path]:
    return sorted((PACKAGE / part).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a tree imports, anywhere; of ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and _is_import(node.func) and node.args:
            (first, *_) = node.args
            if isinstance(first, ast.Constant):
                yield str(first.value)


def _is_import(function: ast.expr) -> bool:
    named = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    return named in {"import_module", "__import__"}


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def inside(module: str, *parts: str) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def own(path: Path) -> set[str]:
    """What a module imports of hybridpar."""
    return {m for m in imported(path) if inside(m, "hybridpar")} - {"hybridpar"}


def offenders(part: str, *forbidden: str) -> list[str]:
    return [
        f"{name_of(p)} imports {m}" for p in modules(part) for m in sorted(imported(p)) if inside(m, *forbidden)
    ]


def test_imports_are_found_wherever_they_hide() -> None:
    code = (
        "import a\nfrom b import c\n"
        "def f():\n    import d.e\n    importlib.import_module('g')\n    if x:\n        from h.i import j\n"
    )
    assert set(imports(ast.parse(code))) == {"a", "b", "b.c", "d.e", "g", "h.i", "h.i.j"}


def test_planning_imports_descriptions_only() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in modules("planning")
        for module in sorted(own(path))
        if not inside(module, *PLANNING_MAY, *SHARED)
    ]
    assert not wrong


def test_planning_touches_no_device_clock_or_global() -> None:
    wrong = [
        f"{name_of(path)} imports {module}"
        for path in modules("planning")
        for module in sorted(imported(path))
        if not inside(module, "hybridpar", *PURE)
    ]
    assert not wrong


def test_planning_reads_and_writes_files_in_plan_json_only() -> None:
    assert [name_of(p) for p in modules("planning") if "pathlib" in imported(p)] == ["hybridpar.planning.plan"]


def test_planning_has_no_mutable_globals() -> None:
    """A planner that keeps something between two calls would not be a function of its inputs."""
    wrong = [
        f"{name_of(path)}: {ast.unparse(node)}"
        for path in modules("planning")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Global)
    ]
    assert not wrong


def test_the_runtime_never_searches() -> None:
    searching = [f"hybridpar.planning.{name}" for name in SEARCHING]
    assert not offenders("runtime", *searching, "hybridpar.planner", *FACES)


def test_the_monitor_knows_neither_runtime_nor_torch() -> None:
    assert not offenders("monitor", "torch", "hybridpar.runtime", "hybridpar.planning", "hybridpar.model")


def test_reports_know_neither_runtime_nor_torch() -> None:
    assert not offenders("report", "torch", "hybridpar.runtime", "hybridpar.data")
    records = {"hybridpar.monitor.record", "hybridpar.monitor.summary"}
    of_the_monitor = [f for f in offenders("report", "hybridpar.monitor") if not any(r in f for r in records)]
    assert not of_the_monitor


def test_only_the_configuration_knows_hydra() -> None:
    wrong = [p for p in offenders("", "hydra", "omegaconf") if not p.startswith("hybridpar.config ")]
    assert not wrong


@pytest.mark.parametrize("part", ["model", "profiling", "cluster", "data"])
def test_what_describes_knows_no_planning_and_no_runtime(part: str) -> None:
    assert not offenders(part, "hybridpar.planning", "hybridpar.runtime", "hybridpar.config", *FACES)


def test_nothing_below_imports_the_faces() -> None:
    parts = ("model", "profiling", "cluster", "planning", "runtime", "data", "monitor", "report")
    assert not [found for part in parts for found in offenders(part, *FACES, "hybridpar.planner")]


def test_advice_is_for_the_faces_and_needs_no_torch() -> None:
    parts = ("model", "profiling", "cluster", "planning", "runtime", "data", "monitor", "report", "doctor")
    assert not [found for part in parts for found in offenders(part, "hybridpar.advice")]
    assert not offenders("advice", "torch", "hybridpar.runtime", "hybridpar.data", "hybridpar.planner", *FACES)


def test_the_product_imports_nothing_of_the_tests() -> None:
    assert not offenders("", "tests", "pytest", "hypothesis")


def test_nobody_writes_to_the_private_names_of_others() -> None:
    wrong = [
        f"{name_of(path)}:{target.lineno} {ast.unparse(target)}"
        for path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign)
        for target in _targets(node)
        if isinstance(target, ast.Attribute)
        and target.attr.startswith("_")
        and not target.attr.startswith("__")
        and not (isinstance(target.value, ast.Name) and target.value.id in {"self", "cls"})
    ]
    assert not wrong


def _targets(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> list[ast.expr]:
    found = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t for target in found for t in (target.elts if isinstance(target, ast.Tuple) else [target])]


# What an import brings along, in a fresh interpreter


def brought_along(statements: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after some statements."""
    heavy = "{'torch', 'deepspeed', 'hydra', 'omegaconf', 'sklearn', 'torchvision', 'tensorboard'}"
    code = f"import sys\n{statements}\nprint(*({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    return set(done.stdout.split())


def test_planning_starts_without_anything_heavy() -> None:
    names = [name_of(p) for p in [*modules("planning"), *modules("cluster")]]
    needing_torch = {"hybridpar.cluster.probe", "hybridpar.cluster.measure"}
    light = [
        "hybridpar",
        "hybridpar.advice.advise",
        "hybridpar.cli",
        "hybridpar.config",
        "hybridpar.errors",
        "hybridpar.model.chain",
        "hybridpar.planner",
        "hybridpar.profiling.analytic",
        "hybridpar.profiling.record",
        "hybridpar.report.comparison",
        "hybridpar.report.dry_run",
        "hybridpar.report.run_text",
        "hybridpar.schema",
        *(n for n in names if n not in needing_torch),
    ]
    assert brought_along("\n".join(f"import {name}" for name in light)) == set()


def test_composing_a_configuration_brings_hydra_and_no_torch() -> None:
    assert brought_along("from hybridpar.config import compose; compose()") == {"hydra", "omegaconf"}


def test_the_sampler_of_the_monitor_starts_without_anything_heavy() -> None:
    statements = "\n".join(f"import {name_of(p)}" for p in modules("monitor"))
    assert brought_along(statements) == set()


def test_the_python_api_is_loaded_when_it_is_used() -> None:
    assert brought_along("import hybridpar; hybridpar.__version__") == set()
    with pytest.raises(AttributeError, match="no attribute 'plann'"):
        hybridpar.plann  # noqa: B018
