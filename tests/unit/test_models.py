"""The builders that configuration names."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from omegaconf import OmegaConf
from sklearn.datasets import load_digits
from torch import nn

from hybridpar.config import compose
from hybridpar.errors import ModelError
from hybridpar.model.build import build
from hybridpar.model.deferred import defer
from hybridpar.model.trace import trace
from hybridpar.models.alexnet import alexnet
from hybridpar.models.recognition import recognition
from hybridpar.models.resnet import resnet
from hybridpar.models.vgg import small_vgg, vgg
from hybridpar.planner import load_model
from hybridpar.sections import MarginConfig

CONF = Path(__file__).parents[2] / "conf" / "model"
CONFIGS = sorted(p.stem for p in CONF.glob("*.yaml") if p.stem not in {"custom", "torchvision"})


def shapes(module):
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: vgg(depth=11), torchvision.models.vgg11),
        (lambda: vgg(depth=16, batch_norm=True), torchvision.models.vgg16_bn),
        (lambda: vgg(depth=19), torchvision.models.vgg19),
        (alexnet, torchvision.models.alexnet),
        (lambda: resnet(depth=34), torchvision.models.resnet34),
    ],
)
def test_state_dicts_are_those_of_torchvision(ours, theirs):
    assert shapes(defer(ours).module) == shapes(defer(theirs).module)


def test_vgg_starts_like_torchvision():
    ours, theirs = defer(lambda: vgg(depth=11)), defer(torchvision.models.vgg11)
    for name in ("features.0.weight", "features.3.weight", "features.3.bias", "classifier.6.weight"):
        assert torch.equal(ours.materialize(name, 1), theirs.materialize(name, 1)), name


@pytest.mark.parametrize("name", CONFIGS)
def test_every_configured_model_is_a_chain(name):
    conf = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert set(conf) - {"input_dtype"} == {"name", "builder", "in_shape", "classes", "options"}
    assert conf["name"] == name
    builder = build(conf["builder"], conf["options"], classes=conf["classes"], in_shape=conf["in_shape"])
    chain = trace(defer(builder).module, conf["in_shape"], name, conf.get("input_dtype", "float")).chain
    assert (*chain.label_shape, chain.classes) == chain.out_shape
    assert chain.classes == conf["classes"]
    assert chain.tail_start < len(chain.layers)


def test_vgg_for_small_images():
    model = vgg(depth=11, in_shape=(1, 32, 32), classes=10, classifier_width=64, pool=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in model.classifier.parameters()) < 40_000


def test_small_stem_keeps_the_size():
    model = resnet(depth=18, classes=10, in_shape=(1, 16, 16), stem="small")
    assert model.conv1(torch.randn(1, 1, 16, 16)).shape == (1, 64, 16, 16)
    assert model.eval()(torch.randn(1, 1, 16, 16)).shape == (1, 10)


@pytest.mark.parametrize("make", [lambda: vgg(depth=12), lambda: resnet(depth=20), lambda: resnet(stem="tiny")])
def test_choices_are_checked(make):
    with pytest.raises(ModelError):
        make()


@pytest.mark.parametrize(("make", "shape"), [(vgg, (3, 16, 16)), (alexnet, (3, 32, 32)), (small_vgg, (8, 8))])
def test_images_that_are_too_small(make, shape):
    with pytest.raises(ModelError, match=r"pixels on a side, got in_shape .* set model.in_shape"):
        make(in_shape=shape)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_small_vgg_learns_digits():
    images, labels = load_digits(return_X_y=True)
    x = F.interpolate(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, (16, 16), mode="bilinear")
    x, y = (x - x.mean()) / x.std(), torch.tensor(labels)
    torch.manual_seed(0)
    model = small_vgg()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    order = torch.randperm(len(x))
    train, test = order[360:], order[:360]
    for _ in range(7):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    accuracy = (model.eval()(x[test]).argmax(1) == y[test]).double().mean()
    assert accuracy >= 0.95


def test_builder_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "from torch import nn\n"
        "def net(width, classes):\n    return nn.Linear(width, classes)\n"
        "def everything(**given):\n    net = nn.Identity()\n    net.given = given\n    return net\n"
        "def named(num_classes, in_shape):\n"
        "    net = nn.Identity()\n    net.given = (num_classes, in_shape)\n    return net\n"
        "def nothing():\n    return None\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    model = build("my_models:net", {"width": 3}, classes=2, in_shape=(3,))()
    assert isinstance(model, nn.Linear)
    # What else it takes it hands on, most likely, to something that knows neither classes nor in_shape.
    assert build("my_models:everything", {"a": 1}, classes=2, in_shape=[3])().given == {"a": 1}
    assert build("my_models:named", {}, classes=2, in_shape=[3])().given == (2, (3,))
    with pytest.raises(ModelError, match=r"gave a NoneType; it must return a torch.nn.Module"):
        build("my_models:nothing", {})()


@pytest.mark.parametrize(
    ("builder", "options", "message"),
    [
        ("vgg16", {}, "not of the form module:function"),
        ("vgg:vgg16", {}, "has no builder vgg16; did you mean vgg"),
        ("alexnt:alexnet", {}, "no module alexnt; did you mean alexnet"),
        ("vgg:vgg", {"dept": 16}, "no option dept; did you mean depth.*it accepts depth, batch_norm"),
    ],
)
def test_unknown_builders_and_options(builder, options, message):
    with pytest.raises(ModelError, match=message):
        build(builder, options)


def test_recognition_ends_in_cosines_of_a_normalised_embedding():
    config = compose(["experiment=recognition", "model.classes=1000", "model.options.dropout=0.1"])
    traced, _ = load_model(config)
    norm, head = traced.chain.layers[-2:]
    assert (norm.kind, norm.out_shape, head.name, head.out_shape) == ("BatchNorm1d", (512,), "head", (1000,))
    assert head.linear is not None
    assert head.linear.normalized
    assert config.loss.margin == MarginConfig("arcface", 64.0, 0.5)
    with pytest.raises(ModelError, match="embedding=0"):
        recognition(embedding=0)
