"""The linear layer that adds up its weight's gradient in place, against torch's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hybridpar.model.linear import GatheringLinear

SIZES = (1, 3, 2)


def pair(*, bias: bool = True) -> tuple[nn.Linear, GatheringLinear]:
    torch.manual_seed(0)
    plain = nn.Linear(6, 5, bias=bias, dtype=torch.float64)
    own = [nn.Parameter(p.detach().clone()) for p in plain.parameters()]
    return plain, GatheringLinear(own[0], own[1] if bias else None)


def train(layer: nn.Module, *, needs_input: bool = True) -> list[torch.Tensor]:
    """Gradients of inputs after a few micro-batches."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for n in SIZES:
        x = torch.rand(n, 6, generator=generator, dtype=torch.float64).requires_grad_(needs_input)
        layer(x).sin().sum().backward()
        found += [x.grad] if x.grad is not None else []
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs_input", [True, False])
def test_gradients_are_those_of_a_linear_layer(*, bias: bool, needs_input: bool) -> None:
    plain, gathering = pair(bias=bias)
    expected, found = train(plain, needs_input=needs_input), train(gathering, needs_input=needs_input)
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
