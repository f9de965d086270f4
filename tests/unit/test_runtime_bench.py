"""The bench of the runtime: its rivals do the same work."""

import pytest

from scripts.bench.runtime.contests import CONTESTS, Setting, rivals
from scripts.bench.runtime.models import CHAIN_OF_LINEARS, work_of


@pytest.mark.parametrize("options", [(), ("foreach optimizer", "recomputation")])
def test_rivals_have_the_same_losses(options: tuple[str, ...]) -> None:
    """Ours once asked the work for a shape that it did not have, and no contest ran."""
    contest = "options" if options else "actions"
    setting = Setting(contest, CHAIN_OF_LINEARS, 4, 2, 8, options=options)
    assert CONTESTS[contest].world == 1
    images, labels = work_of(CHAIN_OF_LINEARS, 4).samples(0)
    own, *others = rivals(setting)
    assert len(others) == max(len(options), 1)
    for _ in range(2):
        loss = own.trains.step(images, labels)
        for rival in others:
            assert rival.trains.step(images, labels) == pytest.approx(loss, rel=rival.agreement)
