"""Every classification model of torchvision is a chain and has a plan for two nodes of eight devices."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
import torchvision
from torch import nn

from hybridpar.config import Config, compose
from hybridpar.errors import ModelError
from hybridpar.model.build import build
from hybridpar.model.deferred import Deferred, defer
from hybridpar.model.keyed import KeyedDropout, Keys
from hybridpar.model.trace import Traced, trace
from hybridpar.models.classifiers import classifier, names
from hybridpar.planner import Subject, load_model, make_plan, prepare
from hybridpar.planning.plan import Plan, Segment, Stage, validate
from hybridpar.planning.search import assess

DIVERSE = (
    *("vgg16", "resnet50", "densenet121", "googlenet"),
    *("mobilenet_v3_large", "regnet_y_400mf", "swin_t", "vit_b_16"),
)
SIZES = {
    "inception_v3": 299,
    "efficientnet_b3": 300,
    "efficientnet_b7": 600,
    "regnet_y_128gf": 384,
    "swin_v2_t": 256,
}
"""Pixels on a side where torchvision trained with another number than 224, of some."""
REPEATED = {
    *("convnext_base", "convnext_large", "densenet161", "densenet169", "densenet201"),
    *("efficientnet_b4", "efficientnet_b5", "efficientnet_b6", "efficientnet_v2_m", "efficientnet_v2_l"),
    *("swin_b", "swin_v2_b", "vit_h_14", "vit_l_16", "vit_l_32"),
}
"""More or wider blocks of the same sort as those of a smaller model, which is in every run."""


@cache
def traced(name: str) -> Traced:
    side = SIZES.get(name, 224)
    source = defer(partial(classifier, name=name, in_shape=(3, side, side)))
    assert isinstance(source, Deferred), "no rank needs to build the whole model"
    made = trace(source.module, (3, side, side), name)
    assert {p.name: p.shape for layer in made.chain.layers for p in layer.parameters} == {
        key: tuple(p.shape) for key, p in source.module.named_parameters()
    }
    held = {key for per_layer in made.names for key in per_layer.values()}
    assert held == set(source.module.state_dict())
    return made


def test_there_are_eighty() -> None:
    assert len(names()) == 80
    assert set(DIVERSE) < set(names())
    assert set(names()) > REPEATED


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in REPEATED else n for n in names()]
)
def test_chain(name: str) -> None:
    chain = traced(name).chain
    assert len(chain.layers) > 20
    assert len({layer.name for layer in chain.layers}) == len(chain.layers)
    assert chain.out_shape == (1000,)
    assert chain.tied == ()
    assert all(layer.random != "unkeyed" for layer in chain.layers)
    assert (chain.tail_start < len(chain.layers)) == (
        not name.startswith("squeezenet")
    )  # it ends in a convolution
    assert all(layer.flops_per_sample >= 0 and layer.out_elements > 0 for layer in chain.layers)


def on_two_nodes(name: str) -> tuple[Config, Subject]:
    config = compose(
        [
            "model=torchvision",
            f"model.name={name}",
            "cluster=v100_2x8",
            "profile=analytic",
            "train.global_batch=256",
        ]
    )
    return config, prepare(config, traced(name))


@pytest.mark.parametrize("name", DIVERSE)
def test_pipeline_over_two_nodes(name: str) -> None:
    """A plan that needs no search: every device has a run of layers."""
    _, subject = on_two_nodes(name)
    chain = subject.chain
    cuts = [round(len(chain.layers) * i / 16) for i in range(17)]
    segments = tuple(Segment(span, (rank,), (1.0,)) for rank, span in enumerate(pairwise(cuts)))
    stage = Stage("middle", 4, segments)
    plan = Plan(chain.model, chain.fingerprint, 16, 32, "float32", (stage,))
    assessed = assess(plan, chain, subject.profile, subject.cluster)
    assert assessed.prediction.step_s > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_plan(name: str) -> None:
    config, subject = on_two_nodes(name)
    planned = make_plan(config, subject)
    validate(planned.plan, subject.chain)
    assert planned.plan.world == 16
    assert planned.plan.prediction.step_s > 0


def small_vit(**_: object) -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32)


FAMILIES = {
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 64,
    "inception_v3": 75,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 64,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vit": 32,
}
"""One of each architecture, and the pixels on a side that it is run with. AlexNet and VGG stand in test_trace."""


@cache
def real(name: str, side: int) -> tuple[nn.Module, Traced]:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    if name == "vit":
        model = small_vit().double()
        nn.init.normal_(model.heads.head.weight)
    else:
        model = classifier(name=name, classes=7, in_shape=(3, side, side), **options).double()
    for part in model.modules():
        if isinstance(part, nn.Dropout | torchvision.ops.StochasticDepth):
            part.p = 0.0
    return model, trace(model, (3, side, side), name)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_layers_in_a_row_are_the_model(name: str, training: bool) -> None:
    side = FAMILIES[name]
    model, made = real(name, side)
    x = torch.randn(2, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = x
        for part in made.modules:
            y = part.train(training)(y)
        expected = model.train(training)(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_layers_in_a_row_are_a_large_model(training: bool) -> None:
    """MaxViT's windows fit no smaller images."""
    model, made = real("maxvit_t", 224)
    x = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        y = x
        for part in made.modules:
            y = part.train(training)(y)
        torch.testing.assert_close(y, model.train(training)(x), rtol=1e-12, atol=1e-12)


def test_stochastic_depth_drops_the_same_samples_in_any_micro_batches() -> None:
    made = trace(
        classifier(name="convnext_tiny", classes=7, stochastic_depth_prob=0.9), (3, 32, 32), "convnext_tiny"
    )
    assert {layer.random for layer in made.chain.layers} == {"none", "keyed"}
    x = torch.randn(4, 3, 32, 32)

    def run(ids: list[int]) -> torch.Tensor:
        y = x[ids]
        for part in made.modules:
            for inner in part.modules():
                if isinstance(inner, KeyedDropout):
                    inner.keys = Keys(3, 5, torch.tensor(ids))
            y = part(y)
        return y

    with torch.no_grad():
        whole = run([0, 1, 2, 3])
        torch.testing.assert_close(torch.cat((run([0]), run([1, 2, 3]))), whole, rtol=1e-3, atol=1e-4)
        other = run([2, 0, 1, 3])
    torch.testing.assert_close(other[1], whole[0], rtol=1e-3, atol=1e-4)


def test_any_model_is_configured_by_its_name() -> None:
    config = compose(["model=torchvision", "model.name=mobilenet_v3_small", "model.classes=5"])
    made, source = load_model(config)
    assert made.chain.out_shape == (5,)
    assert source.module.classifier[3].out_features == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "resnet5"}, r"no classification model resnet5; did you mean resnet50\?"),
        ({"name": "zzz"}, r"no classification model zzz; it has alexnet, .*wide_resnet50_2"),
        ({"name": "vgg11", "in_shape": (1, 32, 32)}, r"takes color images.*model.in_shape=\[3,height,width\]"),
        ({"name": "vit_b_16", "in_shape": (3, 224, 192)}, "takes square images"),
    ],
)
def test_what_torchvision_does_not_build(given: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        classifier(**given)


def test_builder_of_torchvision_itself() -> None:
    """Any package's function will do, without a word about it in hybridpar."""
    builder = build("torchvision.models:resnet18", {"num_classes": 4}, classes=4, in_shape=(3, 32, 32))
    assert defer(builder).module.fc.out_features == 4


def test_auxiliary_outputs_are_refused_with_what_they_are() -> None:
    model = defer(partial(torchvision.models.googlenet, init_weights=True)).module
    with pytest.raises(ModelError, match=r"for 2 samples it gives .*\(2, 1000\) and .*no auxiliary outputs"):
        trace(model, (3, 224, 224), "googlenet")


def test_the_name_is_missing() -> None:
    with pytest.raises(Exception, match=r"model.name: missing; give it as model.name="):
        compose(["model=torchvision"])


def test_profile_of_an_input_of_integers_stays_with_the_model() -> None:
    chain = replace(traced("resnet18").chain, input_dtype="int")
    assert chain.fingerprint != traced("resnet18").chain.fingerprint
