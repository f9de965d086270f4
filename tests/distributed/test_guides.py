"""The scripts of the guides run as they stand in the pages."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from hybridpar import cli

DOCS = Path(__file__).parents[2] / "docs"


def scripts(page):
    """Code blocks by the file that their first line names."""
    blocks = re.findall(r"```python\n# ([^\n]*)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return dict(blocks)


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    return [block.replace("\\\n", " ").split() for block in blocks]


def ran(tmp_path, code, capsys):
    (tmp_path / "script.py").write_text(code)
    threads = torch.get_num_threads()
    try:
        runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("name", ["before.py", "after.py"])
def test_the_scripts_beside_ddp(tmp_path, capsys, name):
    lines = ran(tmp_path, scripts("from-ddp.md")[name], capsys)
    assert [line.split(":")[0] for line in lines] == ["epoch 0", "epoch 1", "epoch 2"]
    assert float(lines[-1].split()[-1]) > 0.8


def test_the_script_beside_deepspeed(tmp_path, capsys):
    lines = ran(tmp_path, scripts("from-deepspeed.md")["after.py"], capsys)
    assert float(lines[-1].split()[3]) < 0.5


def test_the_command_beside_ddp(tmp_path, monkeypatch):
    """Without torchrun: in one process. Then the export that the page tells of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    found = scripts("from-ddp.md")
    (tmp_path / "after.py").write_text(found["after.py"] + found["more lines of after.py"])
    monkeypatch.delitem(sys.modules, "after", raising=False)
    (command,) = commands("from-ddp.md")
    arguments = command[command.index("hybridpar") + 1 :]
    for given in ([*arguments, "train.epochs=1", "train.mode=quiet"], ["export", "runs/mine", "out=mine.pt"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(given)
        assert ended.value.code == 0
    model = runpy.run_path("after.py")["build"]()
    model.load_state_dict(torch.load("mine.pt"))
    monkeypatch.delitem(sys.modules, "after", raising=False)
