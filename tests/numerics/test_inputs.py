"""Models that take several tensors: where they are cut, that plans train them as one process, what is refused."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hybridpar
from hybridpar.errors import ConfigError, DataError, ModelError
from hybridpar.model.chain import Input
from hybridpar.model.deferred import ready
from hybridpar.model.inputs import pack
from hybridpar.model.trace import trace
from hybridpar.planning.compile import compile as compile_program
from hybridpar.planning.memory import memory
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from hybridpar.runtime import verify
from hybridpar.runtime.job import Job
from tests.support.counting import counting_executor, run_once
from tests.support.runs import by_command, small, train_here
from tests.support.threads import run_ranks
from tests.support.training import SEED, Case, assemble

SHAPES, KINDS = ((2, 6, 6), (3,), (5,), ()), ("float", "int", "bool", "float")
BATCH, CLASSES, SIZE = 13, 7, 30


class Product(nn.Module):
    """An image, three ids, a mask over five values, and a number; all are in the fourth operation's value."""

    def __init__(self, late=False):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.table = nn.Embedding(11, 4)
        self.values = nn.Parameter(torch.linspace(-1, 1, 5))
        self.join = nn.Linear(16 + 12 + 2, 12)
        self.hidden = nn.Sequential(nn.ReLU(), nn.Linear(12, 12), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, CLASSES))
        self.late = late

    def forward(self, image, ids, mask, age):
        known = torch.where(mask, self.values, torch.zeros_like(self.values)).sum(dim=1)
        parts = [self.features(image), self.table(ids).flatten(1), known.unsqueeze(1), age.unsqueeze(1)]
        x = self.hidden(self.join(torch.cat(parts, dim=1)))
        if self.late:
            x = x * age.unsqueeze(1)
        return self.head(x)


class Products:
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image, age = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (SHAPES[0], ()))
        ids, mask = torch.randint(11, (3,), generator=generator), torch.rand(5, generator=generator) < 0.5
        given = {"image": image, "ids": ids, "mask": mask, "age": age}
        return (given if index % 2 else tuple(given.values())), index % CLASSES


def make(late=False):
    torch.manual_seed(3)
    return Product(late)


@functools.cache
def case(late=False):
    model = make(late)
    return model, trace(model, SHAPES, "product", KINDS)


def batch(indices):
    """What one process trains on."""
    samples = [Products()[i] for i in indices]
    rows = [tuple(s.values()) if isinstance(s, dict) else s for s, _ in samples]
    return [torch.stack(column) for column in zip(*rows, strict=True)], torch.tensor(
        [label for _, label in samples]
    )


def test_the_first_layer_ends_where_one_tensor_crosses():
    chain = case()[1].chain
    assert [i.name for i in chain.inputs] == ["image", "ids", "mask", "age"]
    assert chain.in_shape == (2 * 36 + 3 + 5 + 1,)
    assert chain.in_shapes == SHAPES
    assert chain.layers[0].out_shape == (30,)
    assert [layer.kind for layer in chain.layers[1:]] == [
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
        "ReLU",
        "Linear",
    ]


def test_an_input_that_is_needed_later_extends_it():
    """Up to where it has been used; the rest is cut as before."""
    chain = case(late=True)[1].chain
    assert chain.layers[0].out_shape == (12,)
    assert [layer.kind for layer in chain.layers[1:]] == ["Linear", "ReLU", "Linear"]
    assert chain.parameter_count == case()[1].chain.parameter_count


def test_layers_compute_what_the_model_does():
    model, traced = case()
    inputs, _ = batch(range(9))
    floats = [t.float() if t.is_floating_point() else t for t in inputs]
    x = pack(traced.chain.inputs, floats, 1, "the batch")
    assert x.dtype == torch.float32
    for layer in traced.modules:
        x = layer(x)
    assert torch.equal(x, model(*floats))


@functools.cache
def reference(late):
    model = make(late).double()
    order = hybridpar.data.sampler.EpochOrder(SIZE, BATCH, SEED)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for step in range(order.steps):
        first = order.start(step)
        inputs, labels = batch(order.indices(0, torch.arange(first, first + order.count(step)).numpy()).tolist())
        optimizer.zero_grad()
        loss = F.cross_entropy(model(*inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def plans(chain):
    last, cut = len(chain.layers), chain.tail_start
    linears = sum(layer.linear is not None for layer in chain.layers)
    front, whole = Segment((0, cut), (0, 1)), Segment((0, last), (0, 1, 2))
    tail = Stage("tail", 5, (Segment((cut, last), (1, 2)),), ("row", "column", "row", "column")[:linears])
    yield 3, (Stage("front", 3, (whole,)),), {}
    yield 3, (Stage("front", 4, (front,)), tail), {}
    yield 2, (Stage("middle", 4, (Segment((0, 1), (1,)), Segment((1, last), (0,)))),), {}
    yield 6, (Stage("front", 2, (front,), recompute=True), tail), {"replicas": 2}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("whole", [False, True], ids=["loader", "batches"])
def test_a_plan_trains_as_one_process_does(late, number, whole):
    """From a loader with a partial last step, or on whole batches that every rank gives."""
    model, traced = case(late)
    chain, source = traced.chain, ready(model)
    world, stages, fields = next(itertools.islice(plans(chain), number, None))
    plan = Plan(chain.model, chain.fingerprint, world, BATCH, "float64", stages, **fields)
    validate(plan, chain)

    def body(rank, groups):
        sgd = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
        job = Job(plan, traced, source, sgd, groups, rank=rank, seed=SEED)
        feed = job.loader(Products() if job.reads else SIZE)
        if not whole:
            return [job.step(b) for b in feed], list(job.parameters.values())
        losses = []
        for step in range(feed.order.steps):
            first, count = feed.order.start(step), feed.order.count(step)
            indices = feed.order.indices(0, torch.arange(first, first + count).numpy()).tolist()
            inputs, labels = batch(indices)
            given = dict(zip(("image", "ids", "mask", "age"), inputs, strict=True)) if step % 2 else inputs
            losses.append(job.step((given, labels), samples=count))
        return losses, list(job.parameters.values())

    losses, parameters = reference(late)
    results = run_ranks(plan, body)
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    found = assemble([owned for _, owned in results[: plan.replica_world]])
    assert found.keys() == parameters.keys()
    for name, expected in parameters.items():
        assert (found[name] - expected).abs().max() <= 1e-10 * expected.abs().max(), name


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("named", [False, True])
def test_predictions_take_several_tensors_too(number, named):
    """As a sequence or by their names; they were taken for one tensor."""
    model, traced = case()
    chain, source = traced.chain, ready(model)
    world, stages, fields = next(itertools.islice(plans(chain), number, None))
    plan = Plan(chain.model, chain.fingerprint, world, BATCH, "float64", stages, **fields)
    inputs, _ = batch(range(9))
    with torch.no_grad():
        expected = make().double()(*inputs).topk(3, dim=1)

    def body(rank, groups):
        job = Job(plan, traced, source, functools.partial(torch.optim.SGD, lr=0.05), groups, rank=rank, seed=SEED)
        given = dict(zip(("image", "ids", "mask", "age"), inputs, strict=True)) if named else tuple(inputs)
        return job.predict(given if job.reads or named else None, 3, samples=9)

    for values, classes in run_ranks(plan, body):
        assert torch.equal(classes, expected.indices)
        assert (values - expected.values).abs().max() <= 1e-10 * expected.values.abs().max()


@pytest.mark.parametrize("number", range(4))
def test_bytes_that_are_kept_are_counted(number):
    """After every action of a step, on every rank: what the first layer makes of the row is in the books."""
    model, traced = case()
    chain = traced.chain
    world, stages, fields = next(itertools.islice(plans(chain), number, None))
    plan = Plan(chain.model, chain.fingerprint, world, BATCH, "float64", stages, **fields)
    trained = Case(ready(model), traced, 1, (BATCH,))
    inputs, labels = batch(range(BATCH))
    trained.data = [(pack(chain.inputs, inputs, 1, "the batch"), labels)]

    def body(rank, groups):
        replica, place = plan.locate(rank)
        program = compile_program(plan, chain, BATCH, "train", replica)
        executor = counting_executor(trained, plan, rank, groups)
        run_once(executor, trained, program, place)
        return executor.alive, list(memory(program, place).saved)

    for counted, expected in run_ranks(plan, body):
        assert counted == expected


def build(classes, in_shape):
    assert (len(in_shape), classes) in {(4, CLASSES), (2, CLASSES), (1, CLASSES)}
    return Product()


def load(root, in_shape, classes):  # noqa: ARG001 - as it is called
    assert in_shape == SHAPES
    return Products(), Products()


CUSTOM = (
    "model=custom",
    "model.name=product",
    f"model.builder={__name__}:build",
    "model.in_shape=[[2,6,6],[3],[5],[]]",
    "model.input_dtype=[float,int,bool,float]",
    f"model.classes={CLASSES}",
    "data=custom",
    f"data.function={__name__}:load",
)


def test_a_configured_training(tmp_path):
    summary = train_here(tmp_path, *CUSTOM, "train.epochs=1")
    assert (summary.steps, summary.test_samples) == (4, SIZE)


def test_two_ranks_agree_with_one_process_under_a_plan_on_measured_times():
    """The command measures layers, of which the first one takes a row of several tensors, plans, and verifies."""
    measured = ("profile=measured", "profile.micro_batches=[1,8]", "profile.fractions=[1.0,0.5]")
    brief = ("profile.budget_s=2", "profile.cache=false", f"train.global_batch={BATCH}", "train.device=cpu")
    done = by_command(2, "verify", *CUSTOM, *measured, *brief, "plan=front_tail")
    assert done.returncode == 0, done.stderr
    assert "product on 2 ranks against a single process, float64: 2 steps of 13" in done.stdout
    assert done.stdout.splitlines()[-1] == "all agree"


@pytest.mark.parametrize(
    ("overrides", "error", "said"),
    [
        (
            ("model.input_dtype=[float,int]",),
            ModelError,
            "do not go together; give one shape and one kind per tensor",
        ),
        (
            ("model.in_shape=[[2,6,6],[3]]", "model.input_dtype=float"),
            ModelError,
            "uses 4 inputs .image, ids, mask, age., but",
        ),
        (
            ("model.in_shape=[81]", "model.input_dtype=float"),
            ModelError,
            "uses 4 inputs .* but model.in_shape gives the shape of one",
        ),
        (("model.in_shape=[[2,6,6],[0]]",), ConfigError, "model.in_shape: .* must be positive sizes"),
        (("data.mixup=0.2",), ConfigError, "cannot mix the integers that the model takes"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, overrides, error, said):
    with pytest.raises(error, match=said):
        train_here(tmp_path, *CUSTOM, *overrides)


def test_other_data_sets_have_one_tensor(tmp_path):
    own = [o for o in CUSTOM if not o.startswith("data")]
    with pytest.raises(
        DataError, match="data set synthetic has one tensor per sample, but the model takes 4; take"
    ):
        train_here(tmp_path, *own)
    with pytest.raises(ConfigError, match=r"model.input_dtype: bool is for one of several tensors"):
        small("+model.input_dtype=bool")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((torch.zeros(2),), "x has 1 inputs, but the model takes 2: ids, mask"),
        ({"ids": torch.tensor([1, 2])}, "x has 1 inputs, but the model takes 2"),
        (
            (torch.zeros(2), torch.ones(3) > 0),
            r"x: input ids is \(2,\) of torch.float32, but the model takes \(2,\) of int",
        ),
        ((torch.tensor([1, 2, 3]), torch.ones(3) > 0), r"x: input ids is \(3,\) of torch.int64"),
        ((torch.tensor([1, 2**24 + 1]), torch.ones(3) > 0), "x: input ids has an integer above 16777216"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(given, said):
    with pytest.raises(DataError, match=said):
        pack((Input("ids", (2,), "int"), Input("mask", (3,), "bool")), given, 0, "x")


def test_a_verification_refuses_to_mix_integers_too():
    """It did so only when all ranks were connected."""
    config = small(*CUSTOM, "data.mixup=0.2")
    _, traced = case()
    plan = Plan("product", traced.chain.fingerprint, 1, 8, "float32", next(plans(traced.chain))[1])
    with pytest.raises(ConfigError, match="cannot mix the integers that the model takes"):
        verify.check(config, plan, traced)
