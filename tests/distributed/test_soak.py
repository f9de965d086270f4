"""A long training gathers nothing: neither memory nor files nor threads."""

import json

import pytest

from tests.support.runs import run
from tests.support.vitals import EVERY

STEPS, SETTLED = 1000, 400
"""By the second number of steps everything has come several times."""
MOST_GROWTH_BYTES = 2 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_steps_gather_nothing(tmp_path):
    """Three stages on four ranks, with last partial batches, evaluations and checkpoints all the way."""
    done = run(
        4,
        "three_stage",
        f"run.dir={tmp_path}/run",
        f"train.steps={STEPS}",
        "train.eval_every=2",
        "checkpoint.every=25",
        "checkpoint.best=accuracy",
        "train.callbacks=[tests.support.vitals:Vitals]",
        "train.mode=quiet",
        timeout_s=500,
        VITALS=f"{tmp_path}/vitals",
    )
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        notes = [json.loads(line) for line in (tmp_path / f"vitals-{rank}.jsonl").read_text().splitlines()]
        assert [n["step"] for n in notes] == list(range(EVERY, STEPS + 1, EVERY))
        settled = [n for n in notes if n["step"] >= SETTLED]
        half = len(settled) // 2
        for what, slack in (("resident_bytes", MOST_GROWTH_BYTES), ("files", 0), ("threads", 0), ("tensors", 0)):
            before, after = (max(n[what] for n in part) for part in (settled[:half], settled[half:]))
            assert after <= before + slack, (rank, what, [n[what] for n in notes])
