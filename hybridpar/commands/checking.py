"""What there is before anything runs: ``doctor`` and ``config``."""

from __future__ import annotations

import json
import os
import sys

from hybridpar.commands.output import console
from hybridpar.config import Config


def doctor(config: Config) -> int:
    """Tell what is installed and what a job of this configuration would run on; return 1 if anything is wrong."""
    from hybridpar.doctor.diagnose import diagnose  # noqa: PLC0415
    from hybridpar.report import doctor as report  # noqa: PLC0415

    found = diagnose(config)
    if os.environ.get("RANK", "0") == "0":
        if config.format == "json":
            sys.stdout.write(json.dumps(report.as_data(found), indent=2) + "\n")
        else:
            report.show(found, console())
    return 1 if found.wrong else 0


def show_config(config: Config) -> None:
    """Print the resolved configuration as YAML."""
    sys.stdout.write(config.resolved)
