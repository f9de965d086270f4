"""The command line: ``hybridpar COMMAND [overrides]``. Thin: composes the configuration and calls one function."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from hybridpar import __version__
from hybridpar.commands import checking, measuring, planning, reading, training, watching
from hybridpar.commands.planning import MULTIRUN
from hybridpar.config import Config, compose
from hybridpar.errors import ConfigError, HybridparError
from hybridpar.names import nearest
from hybridpar.usage import USAGE

TELLING_S = 5.0
"""So long the first rank of a node has to tell a mistake that all make."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 with one line for a user's mistake; a bug shows its traceback (1)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in {"-h", "--help", "help"}:
        sys.stdout.write(USAGE)
        raise SystemExit(0 if given else 2)
    if given[0] == "--version":
        sys.stdout.write(f"hybridpar {__version__}\n")
        raise SystemExit(0)
    raise SystemExit(_run(given[0], given[1:]))


def _run(command: str, overrides: Sequence[str]) -> int:
    """Run a command and return its exit code."""
    try:
        function = _command(command)
        if MULTIRUN & set(overrides):
            _check_sweep(command)
        return function(overrides) or 0
    except HybridparError as e:
        _tell(e)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("hybridpar: interrupted\n")
        return 130
    except BrokenPipeError:
        # Whoever read has left: nothing is flushed to them at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _tell(error: HybridparError) -> None:
    """Say what is wrong; a mistake that all ranks of a node make is told once, by the first of them.

    The others wait, as a launcher ends all ranks when one has exited, maybe before the first one has told. Who is
    not ended meanwhile has made a mistake of its own, and tells it.
    """
    rank = ""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(TELLING_S)
        rank = f"rank {os.environ.get('RANK', os.environ['LOCAL_RANK'])}: "
    sys.stderr.write(f"hybridpar: {rank}{error}\n")


def _command(name: str) -> Callable[[Sequence[str]], int | None]:
    if name not in COMMANDS:
        hint = nearest(name, COMMANDS) or f"; there are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name}{hint}")
    return COMMANDS[name]


def _check_sweep(command: str) -> None:
    if command != "plan":
        raise ConfigError(f"{command} -m: only plans are swept; start one {command} per combination")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("plan -m: a sweep needs one process; start it without torchrun")


def _configured(function: Callable[[Config], int | None]) -> Callable[[Sequence[str]], int | None]:
    """Return the command that composes the configuration from its arguments and calls ``function`` with it."""
    return lambda overrides: function(compose(overrides))


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "plan": planning.plan,
    "train": _configured(training.train),
    "verify": _configured(training.verify),
    "profile": measuring.profile,
    "probe": _configured(measuring.probe),
    "export": training.export,
    "report": reading.report,
    "monitor": watching.monitor,
    "doctor": _configured(checking.doctor),
    "config": _configured(checking.show_config),
}
