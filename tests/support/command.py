"""The command line, called in this process."""

from __future__ import annotations

import pytest

from hybridpar import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command printed to stdout and stderr; it has to end with ``code``."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    return out, err
