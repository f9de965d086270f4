"""The command line: what it prints, and one line with exit code 2 for whatever a user gets wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
import yaml

from hybridpar import __version__, cli
from hybridpar.config import Config, compose
from hybridpar.planner import load_model
from hybridpar.planning.plan import Plan
from tests.support.command import run

SMALL = ("model=small_vgg", "cluster=p100_4x1_40g", "train.global_batch=16")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line in which a command is refused."""
    out, err = run(capsys, *arguments, code=2)
    assert out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith("planning model ")]
    assert len(lines) == 1, err
    assert lines[0].startswith("hybridpar: ")
    return lines[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of the small VGG for four ranks."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    with pytest.raises(SystemExit):
        cli.main(["plan", *SMALL, "plan=three_stage", f"out={path}"])
    return path


# What it prints


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["help"]])
def test_help(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    out, err = run(capsys, *arguments)
    assert err == ""
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


def test_no_command_shows_the_usage_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, code=2)[0].startswith("usage: hybridpar")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[0] == f"hybridpar {__version__}\n"


def test_config_prints_what_it_resolved(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "config", "experiment=demo", "train.seed=7")
    data = yaml.safe_load(out)
    assert (data["model"]["name"], data["train"]["seed"]) == ("small_vgg", 7)


def test_the_dry_run_names_compressed_gradients_and_reckons_with_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Fewer bytes and a shorter step over a slow link."""
    plans = {}
    for name in ("none", "bfloat16", "power_sgd"):
        path = tmp_path / f"{name}.json"
        slow = ("plan=data_parallel", "cluster.links.rack.bytes_per_s=1e7", f"out={path}")
        out, _ = run(capsys, "plan", *SMALL, *slow, f"optimizer.compression={name}")
        assert (f"gradients compressed ({name}" in out) == (name != "none")
        plans[name] = json.loads(path.read_text())["prediction"]
    assert plans["none"]["wire_bytes"] > plans["bfloat16"]["wire_bytes"] > plans["power_sgd"]["wire_bytes"]
    assert plans["none"]["step_s"] > plans["bfloat16"]["step_s"] > plans["power_sgd"]["step_s"]
    assert max(plans["power_sgd"]["memory_bytes"]) > max(plans["none"]["memory_bytes"])


def test_the_dry_run_shows_stages_prediction_and_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "plan", *SMALL, "plan=three_stage")
    assert err == ""
    for word in ("front", "middle 0", "middle 1", "tail", "2 replicas", "2 shards", "(node 0-1)"):
        assert word in out, word
    for column in ("layers", "degree", "ranks", "micro-batch", "params", "memory/rank", "fwd+bwd+update"):
        assert column in out, column
    for figure in (r"step [\d.]+ ms", r"[\d,]+ samples/s", r"bubble \d+%", r"MiB on the wire", r"of 14\.9 GiB"):
        assert re.search(figure, out), figure
    for shape in ("data_parallel", "pipeline", "front_tail", "three_stage"):
        assert re.search(rf"^{shape} .*(chosen|fastest)", out, re.MULTILINE), shape
    assert "estimated from the device's data sheet" in out
    assert "Why: three_stage" in out
    assert max(map(len, out.splitlines())) <= 160


def test_explain_shows_the_stages_of_the_losers(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "plan", *SMALL, "explain=true")
    for shape in ("data_parallel", "pipeline", "front_tail", "three_stage"):
        assert f"plan: {shape}, order" in out


def test_the_short_explanation_is_always_there(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "plan", *SMALL)
    _, _, after = out.partition("Why: ")
    for figure in (
        r"of [\d.]+ ms a rank works [\d.]+ ms \(.*%\), waits [\d.]+ ms for communication and [\d.]+ ms for other",
        r"MiB synchronised \+ .*MiB exchanged, devices \d+% busy, balance \d\.\d\d, one rank 10% slower: \+",
        r"input [\d,]+/s \(.*/s\) to (one rank|each of \d)",
        r"^Flips: .*40 Gbit/s between nodes",
        r"^More: explain=true",
    ):
        assert re.search(figure, after, re.MULTILINE), figure
    assert len(after[after.index(": of ") :].splitlines()) == 6


def test_the_long_explanation_has_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "plan", *SMALL, "explain=true")
    for words in (
        (
            "five axes",
            "synchronised",
            "devices busy",
            "load balance",
            "one rank 10% slower",
            "samples/s",
            "readers",
        ),
        ("time of a step by stage", "compute", "update", "exposed communication", "bubble", "together"),
        ("loses its lead", "bandwidth between nodes", "global batch", "device speed"),
        ("with other micro-batches", "next smaller", "next larger"),
    ):
        for word in words:
            assert word in out, word
    assert max(map(len, out.splitlines())) <= 160


def test_the_long_explanation_names_what_binds(capsys: pytest.CaptureFixture[str]) -> None:
    """Each rank of a data-parallel plan holds all parameters: 1.4 MiB with gradients and momenta."""
    limit = f"cluster.device.memory_bytes={1.3 * 2**20}"
    out, _ = run(capsys, "plan", *SMALL, "explain=true", limit)
    assert "shapes without a plan" in out
    assert re.search(r"^data_parallel +memory +rank \d needs [\d.]+ MiB, [\d.]+ MiB more than", out, re.MULTILINE)


def test_a_diff_compares_with_a_saved_plan(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    out, _ = run(capsys, "plan", *SMALL, "plan=data_parallel", f"diff={saved}")
    assert re.search(r"^stages +front +front \+ middle \+ tail", out, re.MULTILINE)
    assert re.search(r"^plan\.json here: step", out, re.MULTILINE)
    assert "x as fast" in out


def test_json_is_the_plan_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "plan", *SMALL, "format=json")
    assert err == ""
    plan = Plan.from_data(json.loads(out), load_model(compose(SMALL))[0].chain)
    assert (plan.world, plan.global_batch) == (4, 16)
    assert plan.prediction is not None


def test_a_saved_plan_is_the_printed_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    out, err = run(capsys, "plan", *SMALL, "format=json", f"out={path}")
    assert json.loads(path.read_text()) == json.loads(out)
    assert err == f"plan saved to {path}; use it with plan=from_file plan.path={path}\n"


def test_a_saved_plan_is_used_again(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    again = ("plan", *SMALL, "plan=from_file", f"plan.path={saved}")
    out, _ = run(capsys, *again, "format=json")
    assert json.loads(out) == json.loads(saved.read_text())
    out, _ = run(capsys, *again)
    assert "plan: from_file" in out
    assert "shapes compared" not in out


def test_pins_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    pins = ("plan=three_stage", "plan.tail.micro_batch=16", "plan.front.ranks=[0,1]", "plan.middle.micro_batch=4")
    stages = json.loads(run(capsys, "plan", *SMALL, *pins, "format=json")[0])["stages"]
    assert [s["micro_batch"] for s in stages[1:]] == [4, 16]
    assert stages[0]["segments"][0]["ranks"] == [0, 1]


# What it refuses


REFUSED: list[tuple[list[str], str]] = [
    (["paln"], "unknown command paln; did you mean plan?"),
    (
        ["zebra"],
        "zebra; there are plan, train, verify, profile, probe, export, report, monitor, doctor, config",
    ),
    (["plan", "train.global_bach=64"], "unknown override train.global_bach; did you mean train.global_batch?"),
    (["train", "train.epoch=1"], "did you mean train.epochs?"),
    (["plan", "model=vg16"], "unknown model=vg16; did you mean vgg16?"),
    (["plan", "cluster=p100"], "unknown cluster=p100"),
    (["plan", "train.global_batch=0"], "train.global_batch: 0"),
    (["plan", *SMALL, "plan=three_stage", "plan.front.degree=9"], "plan.front.degree: 9 is above the 4 ranks"),
    (["plan", *SMALL, "plan=pipeline", "plan.middle.degree=3"], "plan.middle.degree: 3"),
    (["plan", *SMALL, "plan.tail.micro_batch=0"], "micro_batch: 0 is below 1"),
    (
        ["plan", *SMALL, "plan=three_stage", "plan.tail.micro_batch=17"],
        "plan.tail.micro_batch: 17 is above the 16",
    ),
    (
        ["plan", *SMALL, "plan=data_parallel", "plan.front.micro_batch=5"],
        "plan.front.micro_batch: 5 is above the 4",
    ),
    (["plan", *SMALL, "plan=three_stage", "plan.front.ranks=[0,4]"], "plan.front.ranks: [0, 4] must lie in 0..3"),
    (["plan", *SMALL, "plan=pipeline", "plan.tail.degree=2"], "shape pipeline has no tail"),
    (["plan", *SMALL, "plan=data_parallel", "cluster.device.memory_bytes=1000000"], "rank 0 needs "),
    (["plan", "model=resnet18", "cluster=p100_4x1_40g", "model.options.depth=19"], "19"),
    (["plan", "model=small_vgg", "model.options.colour=red"], "has no option colour"),
    (["plan", "model=small_vgg", "model.in_shape=[1,2,2]"], "in_shape"),
    (["plan", *SMALL, "plan=from_file"], "plan.path: missing"),
    (["plan", *SMALL, "plan=from_file", "plan.path=nothing.json"], "cannot read nothing.json"),
    (["plan", *SMALL, "profile=from_file", "profile.path=nothing.json"], "cannot read nothing.json"),
    (["plan", "model=small_vgg", "cluster=from_file", "cluster.path=nothing.yaml"], "nothing.yaml"),
    (["plan", *SMALL, "cluster.device.flops_per_s.float32=-1"], "cluster.device.flops_per_s.float32"),
    (["train", *SMALL, "data=image_folder", "data.root=/nowhere", "cluster=local"], "/nowhere"),
    (["train", *SMALL, "data=cifar10", "cluster=local"], "data.root"),
    (["train", *SMALL, "optimizer=custom", "optimizer.name=Sgd", "cluster=local"], "did you mean SGD?"),
    (["train", *SMALL], "the plan is for 4 processes, but this job has 1"),
    (["plan", *SMALL, "diff=nothing.json"], "cannot read nothing.json"),
    (["plan", *SMALL, "diff=plan.json", "format=json"], "diff=plan.json: of no effect with format=json"),
    (["train", *SMALL, "diff=plan.json"], "diff=plan.json: of no effect on a training"),
    (["plan", "-m", *SMALL], "-m varies nothing"),
    (["profile", "model=small_vgg", "profile=measured"], "out: missing"),
    (
        ["profile", "profile=analytic", "model=small_vgg", "out=p.json"],
        "profile=analytic cannot be measured; use profile=measured",
    ),
    (["profile", "model=small_vgg", "profile=measured", "out=/nowhere/p.json"], "/nowhere/p.json"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_exceeds_memory_says_where_by_how_much_and_what_would_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    limits = ("cluster.device.memory_bytes=700000", "plan.middle.micro_batch=16")
    line = refused(capsys, "plan", *SMALL, "plan=pipeline", *limits)
    found = re.search(
        r"rank \d needs [\d.]+ MiB, [\d.]+ MiB more than the 0\.7 MiB of P100, at global batch 16", line
    )
    assert found, line
    assert re.search(r"train\.global_batch=\d+.* would fit", line), line


def test_an_edited_plan_is_refused_by_the_field(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    data = json.loads(saved.read_text())
    data["stages"][1]["micro_batch"] = 1000
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(data))
    line = refused(capsys, "plan", *SMALL, "plan=from_file", f"plan.path={path}")
    assert "plan.middle.segments[0].micro_batch: 1000 is above" in line


def test_a_plan_of_another_model_is_refused(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    for again in (("plan=from_file", f"plan.path={saved}"), (f"diff={saved}",)):
        line = refused(capsys, "plan", *SMALL, *again, "model=alexnet")
        assert "belongs to another model or input size than alexnet" in line


def test_a_plan_for_another_world_is_refused(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    again = ("plan=from_file", f"plan.path={saved}", "cluster.nodes=[{devices:1,count:2}]")
    assert "needs 4 ranks but cluster p100_4x1_40g has 2 devices" in refused(capsys, "plan", *SMALL, *again)


def test_a_model_that_cannot_be_traced_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "winding_model.py").write_text(
        "from torch import nn\n"
        "class Winding(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(4, 2)\n"
        "    def forward(self, x):\n"
        "        return self.fc(x) if x.sum() > 0 else -self.fc(x)\n"
        "def build():\n"
        "    return Winding()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ("model=custom", "model.builder=winding_model:build", "model.in_shape=[4]", "model.classes=2")
    line = refused(capsys, "plan", *own, "model.name=winding", "cluster=p100_4x1_40g")
    assert "winding" in line
    assert "gt" in line or "control flow" in line


def test_ranks_of_a_node_tell_a_mistake_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends the second rank while it waits; if it exited at once, the first might be ended untold."""

    def ended(seconds: float) -> NoReturn:
        assert seconds > 1
        raise SystemExit(-15)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("time.sleep", ended)
    assert run(capsys, "plan", "zebra=1", code=-15) == ("", "")


def test_a_rank_tells_a_mistake_that_it_makes_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(cli, "TELLING_S", 0.0)
    assert refused(capsys, "plan", "zebra=1").startswith("hybridpar: rank 5: ")


# What it does not hide


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Config) -> NoReturn:
        raise RuntimeError("a bug of ours")

    monkeypatch.setitem(cli.COMMANDS, "plan", broken)
    with pytest.raises(RuntimeError, match="a bug of ours"):
        cli.main(["plan", *SMALL])


def test_a_bug_ends_the_process_with_code_1() -> None:
    code = (
        "from hybridpar import cli\n"
        "def broken(config): raise RuntimeError('a bug of ours')\n"
        "cli.COMMANDS['config'] = broken\n"
        "cli.main(['config'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("RuntimeError: a bug of ours\n")
