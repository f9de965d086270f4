"""What a mistyped name may have meant."""

import pytest

from hybridpar.names import nearest

KNOWN = ["train.epochs", "train.global_batch", "model", "V100", "H100"]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.epoch", "train.epochs"),
        ("epochs", "train.epochs"),
        ("global_bach", "train.global_batch"),
        ("Modle", "model"),
        ("v100", "V100"),
    ],
)
def test_the_nearest_name_is_proposed(name, meant):
    assert nearest(name, KNOWN) == f"; did you mean {meant}?"


def test_nothing_is_proposed_where_nothing_is_near():
    assert nearest("zebra", KNOWN) == ""
    assert nearest("P10", ["A100", "P100"], cutoff=0.9) == ""
