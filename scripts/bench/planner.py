"""How long the search takes, and how far its plans are from those of a far longer search.

``python -m scripts.bench.planner`` prints a table of the cases of docs/planner.md (profile given, imports aside,
one core, each in a process of its own); ``--growth`` times ranks and layers in steps and plots them;
``--regret`` compares ``effort=normal`` with ``effort=long``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from hybridpar.cluster.describe import from_config
from hybridpar.cluster.topology import Cluster, Node
from hybridpar.config import compose
from hybridpar.host import paused_collection
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.planner import load_model
from hybridpar.planning.request import Effort, Request
from hybridpar.planning.search import Planned, search
from hybridpar.profiling.analytic import estimate

PER_RANK = 16
"""Samples of the global batch for each rank."""
PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """A planning problem with the seconds that issue and docs allow for it."""

    model: str
    ranks: int
    limit_s: float | None = None

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.model} on {self.ranks} ranks"


CASES = (
    Case("vgg16", 4, 0.2),
    Case("vgg16", 64, 1.0),
    Case("vgg16", 1024, 5.0),
    Case("vgg16", 4096, 20.0),
    Case("resnet152", 64, 2.0),
    Case("layers1000", 1024, 30.0),
)
GROWTH = (
    *(Case("vgg16", 2**k) for k in range(1, 13)),
    *(Case(f"layers{n}", 64) for n in (10, 30, 100, 300, 1000)),
)
REGRET = (
    *(Case(model, ranks) for model in ("vgg16", "alexnet", "resnet50", "vgg11_bn") for ranks in (2, 4, 8, 16)),
    Case("vgg16", 32),
    Case("resnet152", 16),
    Case("layers100", 8),
)


@dataclass(frozen=True)
class Timing:
    """What one case took."""

    case: str
    seconds: tuple[float, ...]
    """CPU seconds of the search, per repetition."""
    peak_bytes: int
    """Highest resident size of the process, imports included."""
    tried: int
    shape: str
    step_s: float
    limit_s: float | None


def cluster_of(ranks: int) -> Cluster:
    """Nodes of one P100 up to 4 ranks, of eight V100 beyond."""
    if ranks <= 4:
        return replace(_preset("p100_4x1_40g"), nodes=(Node(1),) * ranks)
    return replace(_preset("v100_2x8"), nodes=(Node(min(PER_NODE, ranks)),) * -(-ranks // PER_NODE))


@cache
def _preset(name: str) -> Cluster:
    return from_config(compose([f"cluster={name}"]).cluster)


@cache
def chain_of(model: str) -> Chain:
    """A model of the configuration, or ``layersN``: N linear layers with activations between them."""
    if model.startswith("layers"):
        return _layers(int(model.removeprefix("layers")))
    return load_model(compose([f"model={model}"]))[0].chain


def _layers(count: int) -> Chain:
    width = 1024
    layers = []
    for i in range(count):
        name = f"layer{i}"
        weight, bias = Parameter(f"{name}.weight", (width, width)), Parameter(f"{name}.bias", (width,))
        layers.append(
            Layer(
                name,
                "Linear",
                (width,),
                (width,),
                2 * width * width,
                (weight, bias),
                saves_input=True,
                linear=Linear(width, width, bias=True),
            )
        )
    return Chain(f"layers{count}", tuple(layers))


def plan(case: Case, effort: Effort = "normal") -> Planned:
    """Search for a case."""
    chain, cluster = chain_of(case.model), cluster_of(case.ranks)
    profile = estimate(chain, cluster.device)
    return search(chain, profile, cluster, Request(global_batch=PER_RANK * case.ranks, effort=effort))


def timed(case: Case, repetitions: int) -> Timing:
    """Time a case; the profile is made beforehand."""
    chain, cluster = chain_of(case.model), cluster_of(case.ranks)
    profile = estimate(chain, cluster.device)
    request = Request(global_batch=PER_RANK * case.ranks)
    seconds = []
    for _ in range(repetitions):
        _forget()
        began = time.process_time()
        with paused_collection():
            found = search(chain, profile, cluster, request)
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Timing(
        case.name, tuple(seconds), peak, found.tried, found.shape, found.chosen.prediction.step_s, case.limit_s
    )


def _forget() -> None:
    from hybridpar.planning import compile as compiler  # noqa: PLC0415

    compiler.compile.cache_clear()


def _alone(case: Case, repetitions: int) -> Timing:
    # An executor lets its process end in its own time; a pool kills it, and its semaphores are reported as leaked.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(timed, case, repetitions).result()


def speed(cases: tuple[Case, ...], repetitions: int) -> list[Timing]:
    """Time cases, each in a fresh process, and print them."""
    found = []
    for case in cases:
        timing = _alone(case, repetitions)
        found.append(timing)
        limit = "" if case.limit_s is None else f"  (limit {case.limit_s:g} s)"
        print(
            f"{timing.case:24} {statistics.median(timing.seconds):7.3f} s{limit}  "
            f"{timing.peak_bytes / 2**20:6.0f} MiB  {timing.tried:4} simulated  {timing.shape}",
            flush=True,
        )
    return found


def regret(cases: tuple[Case, ...]) -> list[dict[str, object]]:
    """Compare normal and long searches, and print how much longer the normal one's plan takes."""
    rows: list[dict[str, object]] = []
    for case in cases:
        normal, long = plan(case), plan(case, "long")
        ratio = normal.chosen.prediction.step_s / min(
            long.chosen.prediction.step_s, normal.chosen.prediction.step_s
        )
        rows.append(
            {
                "case": case.name,
                "regret": ratio - 1.0,
                "normal": [normal.shape, normal.tried],
                "long": [long.shape, long.tried],
                "shapes": {
                    a.shape: a.prediction.step_s / b.prediction.step_s - 1.0
                    for a, b in zip(normal.candidates, long.candidates, strict=True)
                    if a.plan is not None and b.plan is not None
                },
            }
        )
        print(f"{case.name:24} {ratio - 1.0:7.2%}  simulated {normal.tried} against {long.tried}", flush=True)
    return rows


def plot(timings: list[Timing], path: Path) -> None:
    """Draw CPU seconds over ranks, and over layers."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional package

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, word, of in zip(figure.subplots(1, 2), ("ranks", "layers"), ("vgg16", "layers"), strict=True):
        own = [t for t in timings if t.case.startswith(of)]
        xs = [int(t.case.split()[2] if of == "vgg16" else t.case.split()[0].removeprefix(of)) for t in own]
        axes.loglog(xs, [statistics.median(t.seconds) for t in own], marker="o")
        axes.set(xlabel=word, ylabel="CPU seconds", title="VGG16" if of == "vgg16" else "64 ranks")
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Run what the options ask for and keep the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--growth", type=Path, metavar="PICTURE")
    parser.add_argument("--regret", action="store_true")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = REGRET if given.regret else GROWTH if given.growth else CASES
    cases = tuple(c for c in cases if given.only is None or given.only in c.name)
    if given.regret:
        rows: list[dict[str, object]] = regret(cases)
    else:
        timings = speed(cases, given.repetitions)
        rows = [asdict(t) for t in timings]
        if given.growth:
            plot(timings, given.growth)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
