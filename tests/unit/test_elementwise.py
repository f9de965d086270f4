"""Which optimizers update every element by itself, as sharded state and sampled classes need it."""

from __future__ import annotations

import pytest
import torch

from hybridpar.errors import ConfigError
from hybridpar.optimizer_section import OptimizerConfig
from hybridpar.runtime.elementwise import check_elementwise, check_rowwise, is_elementwise
from hybridpar.runtime.optimizer import make_factory

RATES = [0.0, 1e-6, 1e-2]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "Adamax", "NAdam", "Rprop"]
)
def test_elements_by_themselves(name: str, rate: float) -> None:
    assert is_elementwise(make_factory(OptimizerConfig(name, rate)))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_rows_and_matrices(name: str, rate: float) -> None:
    """However small the job's learning rate is, which once hid the difference; Muon takes matrices only."""
    factory = make_factory(OptimizerConfig(name, rate))
    assert not is_elementwise(factory)
    for check, where in ((check_elementwise, "optimizer.sharding"), (check_rowwise, "loss.sampled")):
        with pytest.raises(ConfigError, match=rf"{where}: {name} updates a parameter by more than its elements"):
            check(factory)


class NormedSGD(torch.optim.SGD):
    """Divides gradients by their norm, which is that of a vector of the same elements, but of no part of it."""

    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= parameter.grad.norm()
        return super().step(closure)


def test_norms() -> None:
    assert not is_elementwise(lambda parameters: NormedSGD(parameters, lr=0.1))
