"""Whether hosts that are network namespaces, with limits of cores and memory, can be had here."""

from __future__ import annotations

import pytest

from scripts.bench.cgroups import CgroupError, Cgroups
from scripts.launch.namespaces import Hosts, HostsError


def missing() -> str | None:
    """Return why there can be no hosts here, None where there can."""
    try:
        Hosts(1, "1gbit").close()
        Cgroups([0.5], memory_bytes=10**9).close()
    except (HostsError, CgroupError) as e:
        return str(e)
    return None


_MISSING = missing()
needs_hosts = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))
