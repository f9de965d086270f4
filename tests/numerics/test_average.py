"""The moving average of the weights equals torch's AveragedModel under any plan, and goes on from checkpoints."""

from dataclasses import replace
from functools import cache
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hybridpar.errors import CheckpointError, ConfigError
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Recipe
from hybridpar.runtime.export import export
from hybridpar.runtime.job import Job
from hybridpar.runtime.pieces import Stored, write
from hybridpar.train_section import TrainConfig
from scripts.bench.accuracy.live import LiveBytes
from tests.numerics.test_frozen import case as frozen_case
from tests.numerics.test_frozen import plan_of
from tests.numerics.test_memory import Unseen, lasting
from tests.support.counting import run_once
from tests.support.parity import near, overlapping_ranks, own_ranks, shape, shared_ranks
from tests.support.rendezvous import run_strictly
from tests.support.runs import train_here
from tests.support.threads import run_ranks
from tests.support.training import SEED, assemble, make_executor, whole_model

DECAY, FROZEN = 0.7, "amid"
RECIPE = Recipe(average=True)


def case():
    """Some of its parameters are frozen."""
    return frozen_case(FROZEN)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.3, momentum=0.9)


@cache
def reference():
    """Parameters, averages and the averaged model's loss on the last batch, of a plain loop."""
    model = whole_model(case())
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    own = optimizer([p for p in model.parameters() if p.requires_grad])
    for x, y in case().data:
        own.zero_grad()
        F.cross_entropy(model(x), y).backward()
        own.step()
        averaged.update_parameters(model)
    names = dict.fromkeys(n for layer in case().traced.names for n in layer.values())
    with torch.no_grad():
        x, y = case().data[-1]
        losses = [float(F.cross_entropy(m(x), y)) for m in (averaged, model)]
    found = [dict(zip(names, (p.detach() for p in m.parameters()), strict=True)) for m in (model, averaged.module)]
    return *found, losses


def job_of(plan, rank, groups, decay=DECAY):
    return Job(plan, case().traced, case().source, optimizer, groups, rank=rank, seed=SEED, decay=decay)


def owned(job):
    """Copies of what a rank has at the moment."""
    values = job.parameters.values()
    return [replace(o, tensor=torch.nn.Parameter(o.tensor.detach().clone())) for o in values]


def plans():
    return [
        plan_of(FROZEN, *shape(*degrees, place), replicas=replicas, bucket_bytes=1, recipe=RECIPE)
        for degrees, place, replicas in (
            ((1, 0, 0), own_ranks, 1),
            ((0, 2, 1), own_ranks, 1),
            ((2, 1, 3), overlapping_ranks, 1),
            ((2, 0, 2), shared_ranks, 2),
        )
    ]


@pytest.mark.parametrize("which", range(4))
def test_any_plan_averages_as_torch_does(which):
    plan = plans()[which]
    trained, averages, (averaged_loss, loss) = reference()
    assert abs(averaged_loss - loss) > 1e-3

    def body(rank, groups):
        job = job_of(plan, rank, groups)
        for batch in case().data:
            job.step(batch)
        evaluation = job.evaluate([case().data[-1]])
        with job.averaged():
            inside = owned(job)
        return evaluation.loss, inside, owned(job)

    results = run_ranks(plan, body)
    for found, _, _ in results:
        assert found == pytest.approx(averaged_loss, rel=1e-10)
    for index, expected in ((1, averages), (2, trained)):
        values = assemble([result[index] for result in results[: plan.replica_world]])
        assert values.keys() == expected.keys()
        for name, value in expected.items():
            assert near(values[name], value), name


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 2), (2, 1), (3, 3), (2, 0)])
def test_it_goes_on_from_a_checkpoint_of_any_plan(tmp_path, first, second):
    """Bit for bit under the same plan, to rounding under another one."""
    one, other = plans()[first], plans()[second]

    def saving(rank, groups):
        job = job_of(one, rank, groups)
        for batch in case().data[:2]:
            job.step(batch)
        write(tmp_path, rank, job.state.pieces())
        job.step(case().data[2])
        with job.averaged():
            return owned(job)

    def resuming(rank, groups):
        job = job_of(other, rank, groups)
        job.state.restore(Stored(tmp_path, one.world), same_plan=first == second)
        job.go_on(2, 26)
        job.step(case().data[2])
        with job.averaged():
            return owned(job)

    saved, resumed = (run_ranks(p, b)[: p.replica_world] for p, b in ((one, saving), (other, resuming)))
    before, after = assemble(saved), assemble(resumed)
    for name, value in before.items():
        assert after[name].equal(value) if first == second else near(after[name], value), name
        assert near(after[name], reference()[1][name]), name


def test_an_average_begins_anew_where_the_checkpoint_has_none(tmp_path):
    plan = plans()[0]

    def body(rank, groups):
        without = job_of(plan, rank, groups, decay=None)
        without.step(case().data[0])
        write(tmp_path, rank, without.state.pieces())
        job = job_of(plan, rank, groups)
        job.state.restore(Stored(tmp_path, 1), same_plan=True)
        job.step(case().data[1])
        now = owned(job)
        with job.averaged():
            return now, owned(job)

    ((now, averages),) = run_ranks(plan, body)
    assert all(a.tensor.equal(b.tensor) for a, b in zip(now, averages, strict=True))


def test_its_memory_is_counted():
    plan = plan_of(FROZEN, *shape(2, 1, 2, own_ranks), bucket_bytes=1, recipe=RECIPE)
    program = compile_program(plan, case().traced.chain, 13, "train")

    def body(rank, endpoint):
        executor = make_executor(case(), plan, rank, Unseen(endpoint), decay=DECAY)
        run_once(executor, case(), program, rank)
        endpoint.step, alive = 1, []
        executor.observer = lambda *_: alive.append(live.bytes())
        with LiveBytes(set(), chain(lasting(executor), executor.updater.average.values.values())) as live:
            run_once(executor, case(), program, rank)
        return alive

    for rank, result in enumerate(run_strictly(plan.world, body)):
        assert not isinstance(result, BaseException), result
        assert result == list(memory(program, rank).alive)


def test_a_configured_training_evaluates_and_exports_it(tmp_path):
    settings = ("train.steps=2", "checkpoint.every=1", "checkpoint.keep=5", "optimizer.lr=0.1")
    train_here(tmp_path / "run", *settings, "train.ema=0.75")
    ways = {"last": False, "average": True}
    found = {}
    for name, ema in ways.items():
        export(tmp_path / "run", tmp_path / f"{name}.pt", ema=ema)
        found[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    export(tmp_path / "run" / "checkpoints" / "step-00000001", tmp_path / "first.pt")
    first = torch.load(tmp_path / "first.pt", weights_only=True)
    for name, value in found["average"].items():
        expected = 0.75 * first[name].double() + 0.25 * found["last"][name].double()
        assert torch.allclose(value.double(), expected, rtol=1e-6, atol=1e-8), name
    assert not all(found["last"][name].equal(value) for name, value in found["average"].items())
    train_here(tmp_path / "without", *settings)
    with pytest.raises(CheckpointError, match=r"ema=true: .* holds no average of the weights"):
        export(tmp_path / "without", tmp_path / "x.pt", ema=True)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ConfigError, match=r"train.ema: .* must lie in \[0, 1\)"):
        TrainConfig(ema=decay)
