"""The linear layer that adds up its weight's gradient in place, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridpar.model.deferred import defer
from hybridpar.model.linear import GatheringLinear
from hybridpar.model.trace import trace
from hybridpar.planning.blocks import blocks, positions
from hybridpar.planning.plan import Plan, Segment, Stage
from hybridpar.runtime.modules import ModuleFactory
from hybridpar.runtime.update import Updater

SIZES = (1, 3, 2)


def pair(*, bias: bool = True) -> tuple[nn.Linear, GatheringLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    own = [nn.Parameter(p.detach().clone()) for p in plain.parameters()]
    return plain, GatheringLinear(own[0], own[1] if bias else None)


def train(layer: nn.Module, *, needs_input: bool = True, tokens: tuple[int, ...] = ()) -> list[torch.Tensor]:
    """Gradients of inputs after a few micro-batches, of samples of several rows where there are tokens."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in SIZES:
        x = torch.rand(n, *tokens, 6, generator=generator, dtype=torch.float64).requires_grad_(needs_input)
        layer(x).sin().sum().backward()
        found += [x.grad] if x.grad is not None else []
    return found


@pytest.mark.parametrize("tokens", [(), (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_gradients_are_those_of_a_linear_layer(*, bias: bool, needs_input: bool, tokens: tuple[int, ...]) -> None:
    plain, gathering = pair(bias=bias)
    expected, found = (train(layer, needs_input=needs_input, tokens=tokens) for layer in (plain, gathering))
    assert len(found) == len(expected)
    expected += [p.grad for p in plain.parameters()]
    found += [p.grad for p in gathering.parameters()]
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_the_gradient_lies_at_home_and_the_first_backward_overwrites_it() -> None:
    plain, gathering = pair()
    home = gathering.home = torch.full((5, 6), torch.nan, dtype=torch.float64)
    for _ in range(2):
        plain.zero_grad()
        gathering.zero_grad()
        train(plain)
        train(gathering)
        assert gathering.weight.grad is home
        torch.testing.assert_close(home, plain.weight.grad, rtol=1e-14, atol=1e-14)


def test_later_backwards_make_no_gradient_of_the_weight() -> None:
    """The point of it: no tensor of the weight's size is made but the home."""
    _, gathering = pair()
    gathering.home = torch.empty(5, 6, dtype=torch.float64)
    made: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            home = gathering.home
            assert home is not None
            if (
                isinstance(out, torch.Tensor)
                and out.untyped_storage().data_ptr() != home.untyped_storage().data_ptr()
            ):
                made.append(out.shape)
            return out

    with Watch():
        train(gathering)
    assert torch.Size([5]) in made
    assert torch.Size([5, 6]) not in made


def test_a_frozen_weight_keeps_no_input_and_gets_no_gradient() -> None:
    _, gathering = pair()
    gathering.weight.requires_grad_(False)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gathering(torch.rand(2, 6, dtype=torch.float64, requires_grad=True))
    y.sum().backward()
    assert [t.shape for t in kept] == [torch.Size([5, 6])]
    assert gathering.weight.grad is None
    assert gathering.bias is not None
    assert gathering.bias.grad is not None


def test_a_weight_that_other_layers_share_has_no_home() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 3))
    assert trace(model, (4,), "tied").chain.gathered == (0, 0, 0, 0, 12)


def test_a_rank_without_samples_adds_nothing_to_the_sum() -> None:
    """What the bucket holds of the step before must not be summed again."""
    traced = trace(nn.Sequential(nn.Linear(3, 2)), (3,), "one")
    plan = Plan("one", traced.chain.fingerprint, 2, 2, "float64", (Stage("front", 1, (Segment((0, 1), (0, 1)),)),))
    factory = ModuleFactory(
        traced, defer(lambda: nn.Sequential(nn.Linear(3, 2))), 0, torch.float64, torch.device("cpu")
    )
    (position,), (block,) = positions(plan), blocks(plan, traced.chain)
    modules = factory.make(block, position, 0)
    updater = Updater(0, (position,), {0: modules}, lambda p: torch.optim.SGD(p, lr=0.1), None)
    for samples in (1, 0):
        updater.begin()
        if samples:
            modules(torch.rand(samples, 3, dtype=torch.float64), None).sum().backward()
        assert bool(updater.bucket(0).any()) == bool(samples)
        assert all(o.tensor.grad is not None for o in modules.owned)
