"""One configuration trains a language model in three stages, and a plain process goes on with what it learned."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from hybridpar.data.datasets import load
from hybridpar.data.spec import DataSpec
from hybridpar.models.gpt import gpt
from tests.support.command import run
from tests.support.runs import train_by_command

LENGTH, CLASSES = 32, 96
OPTIONS = {"width": 32, "blocks": 2, "heads": 4}


def test_a_language_model_learns_in_three_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loss is far below that of one who knows how often each character comes."""
    overrides = [f"model.in_shape=[{LENGTH}]", *(f"model.options.{name}={size}" for name, size in OPTIONS.items())]
    plan, losses = train_by_command(
        4,
        tmp_path / "run",
        "experiment=language",
        *("model=gpt", "data=text", "train.global_batch=24", "train.steps=120", "train.mode=quiet"),
        *("checkpoint.every=120", *overrides),
    )
    kinds = [(stage["kind"], len(stage["segments"][-1]["ranks"])) for stage in plan["stages"]]
    assert [kind for kind, _ in kinds] == ["front", "middle", "tail"]
    assert kinds[-1] == ("tail", 2)
    assert len({stage["micro_batch"] for stage in plan["stages"]}) == 3
    test = load(DataSpec("text"), (LENGTH,), CLASSES, label_shape=(LENGTH,)).test
    assert test.labels is not None
    counts = Counter(test.labels.flatten().tolist())
    entropy = -sum(n / counts.total() * math.log(n / counts.total()) for n in counts.values())
    evaluation = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert evaluation["samples"] == test.labels.numel()
    assert evaluation["loss"] < 0.9 * entropy
    assert losses[0] > entropy

    out = tmp_path / "model.safetensors"
    run(capsys, "export", str(tmp_path / "run"), f"out={out}")
    model = gpt(classes=CLASSES, in_shape=(LENGTH,), **OPTIONS).eval()
    model.load_state_dict(safetensors.torch.load_file(out), strict=True)
    with torch.no_grad():
        tokens, labels = test.read(np.arange(len(test)), np.zeros(len(test), dtype=np.uint64))
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(evaluation["loss"], rel=1e-4)
