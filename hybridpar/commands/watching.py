"""What a run does: ``monitor``."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hybridpar.commands.output import console
from hybridpar.errors import ConfigError, HybridparError

if TYPE_CHECKING:
    from rich.console import Console

    from hybridpar.report.advice import Advised
    from hybridpar.report.live import Watch

TERMINAL_S, PLAIN_S = 1.0, 10.0
"""Seconds from one look to the next, unless ``every`` says."""
LEAST_S = 0.1


def monitor(arguments: Sequence[str]) -> int:
    """Show what a run does until it ends: ``monitor RUN [every=SECONDS] [once=true]``."""
    from hybridpar.report.live import Watch  # noqa: PLC0415

    folder, every_s, once = _asked(arguments)
    watch, shown = Watch(folder), console()
    if every_s is None:
        every_s = TERMINAL_S if shown.is_terminal else PLAIN_S
    adviser = Adviser(folder)
    try:
        if once or watch.look().ended:
            _show_once(watch, adviser, shown)
        elif shown.is_terminal:
            _follow(watch, adviser, shown, every_s)
        else:
            _tell(watch, shown, every_s)
    except KeyboardInterrupt:
        return 0  # the usual way to end it
    return 0


def _asked(arguments: Sequence[str]) -> tuple[Path, float | None, bool]:
    """Return folder, seconds and whether to look once. Raises ConfigError for anything else."""
    options = dict(a.split("=", 1) for a in arguments if a.startswith(("every=", "once=")))
    folders = [a for a in arguments if not a.startswith(("every=", "once="))]
    if len(folders) != 1 or ("=" in folders[0] and not Path(folders[0]).exists()):
        raise ConfigError(
            f"monitor {' '.join(arguments)}: takes one run's folder, every=SECONDS from one look to the next, "
            "and once=true for a single look"
        )
    if options.get("once", "false") not in {"true", "false"}:
        raise ConfigError(f"once: {options['once']} is neither true nor false")
    try:
        every_s = float(options["every"]) if "every" in options else None
    except ValueError as e:
        raise ConfigError(f"every: {options['every']} is no number of seconds, such as every=2") from e
    if every_s is not None and not LEAST_S <= every_s < float("inf"):
        raise ConfigError(
            f"every: {options['every']} is below {LEAST_S} s or without end; give every=2, for instance"
        )
    return Path(folders[0]).expanduser(), every_s, options.get("once") == "true"


def _show_once(watch: Watch, adviser: Adviser, shown: Console) -> None:
    from hybridpar.report.live_text import view  # noqa: PLC0415

    adviser.ask()
    shown.print(view(watch.look(), adviser.wait(), time.time()))


def _follow(watch: Watch, adviser: Adviser, shown: Console, every_s: float) -> None:
    """Keep the view on a terminal up to date until the run ends."""
    from rich.live import Live  # noqa: PLC0415

    from hybridpar.report.live_text import view  # noqa: PLC0415

    moment = watch.look()
    with Live(console=shown, auto_refresh=False) as live:
        while True:
            if moment.recorded:
                adviser.ask()
            live.update(view(moment, adviser.advised, time.time()), refresh=True)
            if moment.ended:
                return
            time.sleep(every_s)
            moment = watch.look()


def _tell(watch: Watch, shown: Console, every_s: float) -> None:
    """Print the view, then a line whenever there are new steps, until the run ends."""
    from hybridpar.report.live_text import line, state, view  # noqa: PLC0415

    moment = watch.look()
    shown.print(view(moment, None, time.time()))
    last, silent = moment.step, False
    while not moment.ended:
        sys.stdout.flush()
        time.sleep(every_s)
        moment = watch.look()
        if moment.step != last:
            shown.print(line(moment), soft_wrap=True)
            last, silent = moment.step, False
        elif not silent and moment.silent_s(time.time()) is not None:
            shown.print(state(moment, time.time()), soft_wrap=True)
            silent = True
    shown.print(state(moment, time.time()))


class Adviser:
    """Asks once for advice on a run, in a thread that gives way to the training."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self.advised: Advised | None = None
        """None until it is there."""

    def ask(self) -> None:
        """Begin, unless that was done."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._advise, daemon=True)
            self._thread.start()

    def wait(self) -> Advised | None:
        """Return the advice once it is there."""
        if self._thread is not None:
            self._thread.join()
        return self.advised

    def _advise(self) -> None:
        from hybridpar.advice.advise import advise  # noqa: PLC0415
        from hybridpar.report.account import Account  # noqa: PLC0415
        from hybridpar.report.advice import Advised  # noqa: PLC0415

        if sys.platform == "linux":
            os.nice(19)  # on Linux of this thread alone (nice(2), "C library/kernel differences")
        try:
            self.advised = advise(Account.load(self._folder))
        except HybridparError as e:
            self.advised = Advised(lacking=(str(e),))
