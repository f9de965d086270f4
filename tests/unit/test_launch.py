"""Templates for schedulers: syntax, and that what they pass on is what hybridpar knows."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

from hybridpar.config import compose

LAUNCH = Path(__file__).resolve().parents[2] / "scripts" / "launch"


def test_scripts_can_be_read() -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / "slurm.sh")], check=True)
    compile((LAUNCH / "hosts").read_text(), "hosts", "exec")


def overrides(text: str) -> list[str]:
    """The overrides after ``hybridpar train`` in a command."""
    words = text.replace("\\\n", " ").split("-m hybridpar train", maxsplit=1)[1].split()
    return [w.replace('"', "").replace("$SLURM_JOB_ID", "1") for w in words if re.match(r"^[a-z_.]+=", w)]


def test_slurm_passes_overrides_that_there_are() -> None:
    config = compose(overrides((LAUNCH / "slurm.sh").read_text()))
    assert (config.run.dir, config.resume, config.checkpoint.every) == ("runs/slurm-1", "auto", 500)


def test_kubernetes_starts_as_many_pods_as_the_launcher_expects() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (command,) = container["args"]
    assert (
        f"--nnodes={spec['completions']} --nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}"
        in command
    )
    assert spec["completions"] == spec["parallelism"]
    assert service["metadata"]["name"] == pod["subdomain"]
    assert f"--rdzv-endpoint={job['metadata']['name']}-0.{pod['subdomain']}:29400" in command
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    subprocess.run(["bash", "-n", "-c", command], check=True)
    assert compose(overrides(command)).run.dir == "/data/runs/vgg16"
