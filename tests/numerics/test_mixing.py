"""Mixup and CutMix: torchvision's results, whatever the plan, and no gathered logits."""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from hybridpar.data.loader import StepLoader
from hybridpar.data.mixing import Mixing
from hybridpar.data.sampler import EpochOrder
from hybridpar.data.samples import Batch
from hybridpar.errors import ConfigError, DataError
from hybridpar.planner import load_model
from hybridpar.runtime.checks import check
from hybridpar.runtime.cross_entropy import CrossEntropy
from hybridpar.runtime.job import Job
from hybridpar.runtime.own_loss import OwnLoss
from tests.support.parity import near, overlapping_ranks, own_ranks, plan_of, shape, shared_ranks
from tests.support.runs import small, train_here
from tests.support.threads import run_ranks
from tests.support.trainer_worker import make_plan
from tests.support.training import SEED, assemble, make_case, whole_model

SIZE, BATCH, CLASSES, SHAPE = 30, 13, 7, (2, 6, 6)
CASE = make_case(steps=3, samples=(13, 13, 4))
WAYS = {"mixup": (0.4, None), "cutmix": (None, 1.0), "both": (0.8, 0.8)}


class Augmented:
    """Samples that their keys change."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(SIZE, *SHAPE, generator=generator, dtype=torch.float64)
        self.labels = torch.randint(CLASSES, (SIZE,), generator=generator)
        self.labels[::6] = -100

    def __len__(self):
        return SIZE

    def read(self, indices, keys):
        noise = torch.from_numpy((keys % np.uint64(1000)).astype(np.float64) / 1000)
        return Batch(self.images[torch.from_numpy(indices)] + noise[:, None, None, None], self.labels[indices])


def order(seed=SEED):
    return EpochOrder(SIZE, BATCH, seed)


def mixing(way):
    return Mixing(SEED, SHAPE, *WAYS[way])


def steps(mixed, intervals=lambda count: ((0, count),), epoch=0):
    loader = StepLoader(Augmented(), order(), intervals, mixing=mixed)
    loader.set_epoch(epoch)
    return list(loader)


@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_mixed_as_torchvision_does(way):
    """With what was drawn for it; both kinds of step occur where both are asked for."""
    plain, kinds = steps(None, epoch=2), set()
    for step, (inputs, labels) in enumerate(steps(mixing(way), epoch=2)):
        drawn, own = mixing(way).of(2, step), plain[step]
        assert 0 <= drawn.share <= 1
        params = {"labels": own.labels, "batch_size": len(labels)}
        if drawn.box is None:
            params["lam"], transform = drawn.share, v2.MixUp(num_classes=CLASSES)
        else:
            params |= {"box": drawn.box, "lam_adjusted": drawn.share}
            transform = v2.CutMix(num_classes=CLASSES)
        assert inputs.equal(transform.transform(own.inputs, params))
        assert labels.equal(own.labels)
        kinds.add(type(transform).__name__)
    found = {type(mixing(way).of(0, s).box) for s in range(50)}
    assert len(found) == (2 if way == "both" else 1)
    assert kinds


def test_boxes_are_drawn_as_torchvision_draws_them():
    """The box lies in the image, covers about what its share leaves out, and the share is what it leaves."""
    shares, corrected = [], []
    for step in range(400):
        drawn = Mixing(3, (3, 20, 30), None, 1.0).of(1, step)
        left, top, right, bottom = drawn.box
        assert 0 <= left <= right <= 30
        assert 0 <= top <= bottom <= 20
        assert drawn.share == 1 - (right - left) * (bottom - top) / 600
        shares.append(Mixing(3, (3, 20, 30), 1.0).of(1, step).share)
        corrected.append(drawn.share)
    assert abs(np.mean(shares) - 0.5) < 0.05  # Beta(1, 1) is uniform
    assert abs(np.std(shares) - 12**-0.5) < 0.03
    assert np.mean(corrected) > np.mean(shares)  # as what lies outside is cut off
    assert len(set(shares)) == 400


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "intervals",
    [
        lambda count: ((0, count // 2),),
        lambda count: ((count // 3, count), (0, 1)),
        lambda count: tuple((i, i + 1) for i in range(0, count, 2)),
        lambda count: ((0, count),),
    ],
)
def test_any_intervals_are_parts_of_the_whole(way, intervals):
    whole = steps(mixing(way))
    for step, (inputs, labels) in enumerate(steps(mixing(way), intervals)):
        rows = torch.cat([torch.arange(a, b) for a, b in intervals(order().count(step))])
        assert inputs.equal(whole[step].inputs[rows])
        assert labels.equal(whole[step].labels[rows])


WEIGHTS = torch.linspace(0.5, 2.0, CLASSES, dtype=torch.float64)
LOSSES = {
    "plain": (CrossEntropy(), torch.nn.CrossEntropyLoss()),
    "smooth and weighted": (
        CrossEntropy(0.1, WEIGHTS),
        torch.nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.1),
    ),
}


@cache
def reference(way, loss):
    """Of torch in one process, on what the loader gives: both labels' losses by their shares."""
    model, criterion = whole_model(CASE), LOSSES[loss][1]
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), []
    for step, (x, y) in enumerate(steps(mixing(way))):
        optimizer.zero_grad()
        logits, share = model(x), mixing(way).of(0, step).share
        value = share * criterion(logits, y) + (1 - share) * criterion(logits, y.roll(1))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    names = dict.fromkeys(n for layer in CASE.traced.names for n in layer.values())
    return losses, dict(zip(names, (p.detach() for p in model.parameters()), strict=True))


def trained(plan, way, loss):
    mixup, cutmix = WAYS[way]

    def body(rank, groups):
        job = Job(
            plan,
            CASE.traced,
            CASE.source,
            lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
            groups,
            rank=rank,
            seed=SEED,
            loss=loss,
        )
        feed = job.loader(Augmented() if job.reads else SIZE, mixup=mixup, cutmix=cutmix)
        return [job.step(batch) for batch in feed], list(job.parameters.values())

    return run_ranks(plan, body)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("way", "degrees", "place", "replicas"),
    [
        ("both", (1, 0, 0), own_ranks, 1),
        ("mixup", (3, 0, 0), own_ranks, 1),
        ("cutmix", (0, 2, 1), own_ranks, 1),
        ("mixup", (2, 1, 3), overlapping_ranks, 1),
        ("both", (2, 0, 2), shared_ranks, 2),
        ("cutmix", (0, 1, 2), shared_ranks, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_plan_trains_as_one_process_does(way, degrees, place, replicas, loss):
    plan = plan_of(*shape(*degrees, place), replicas=replicas)
    losses, parameters = reference(way, loss)
    results = trained(plan, way, LOSSES[loss][0])
    for own, _ in results:
        assert own == pytest.approx(losses, rel=1e-10)
    found = assemble([owned for _, owned in results[: plan.replica_world]])
    for name, expected in parameters.items():
        assert near(found[name], expected), name


def test_shares_of_two_labels_are_torchs_soft_labels():
    """Where no label is ignored, as torchvision's transforms are used."""
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(4, (9,))
    soft = 0.3 * F.one_hot(y, 4).double() + 0.7 * F.one_hot(y.roll(1), 4).double()
    for smoothing in (0.0, 0.2):
        both = [F.cross_entropy(x, labels, label_smoothing=smoothing) for labels in (y, y.roll(1))]
        expected = F.cross_entropy(x, soft, label_smoothing=smoothing)
        assert 0.3 * both[0] + 0.7 * both[1] == pytest.approx(expected.item(), rel=1e-12)


def test_an_own_loss_is_called_with_both_labels():
    def summed(logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum")

    plan = plan_of(*shape(2, 0, 1, own_ranks))
    losses, _ = reference("mixup", "plain")
    for own, _ in trained(plan, "mixup", OwnLoss(summed)):
        assert own == pytest.approx(losses, rel=1e-10)


def test_a_configured_training_goes_on_bit_for_bit(tmp_path):
    settings = ("data.mixup=0.4", "data.cutmix=1.0", "checkpoint.every=1", "train.epochs=2")
    train_here(tmp_path / "whole", *settings)
    train_here(tmp_path / "parts", *settings, "train.steps=3")
    train_here(tmp_path / "parts", *settings, "train.steps=4", "resume=auto")
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[line.split('"loss": ')[1].split(",")[0] for line in own] for own in lines]
    assert losses[0] == losses[1]
    train_here(tmp_path / "plain", "train.epochs=2")
    plain = (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()
    assert all(a.split(",")[2] != b.split(",")[2] for a, b in zip(lines[0], plain, strict=True))


def test_what_cannot_be_mixed_is_refused():
    with pytest.raises(DataError, match=r"data.cutmix: the model's inputs are \[64\], in which no box can be cut"):
        Mixing(0, (64,), None, 1.0)
    with pytest.raises(ConfigError, match=r"data.mixup: 0.0 must be above 0"):
        small("data.mixup=0.0")
    config = small("data.cutmix=1.0")
    traced, _ = load_model(config)
    check(config, make_plan("single", config, traced.chain), traced.chain)
