"""What a plan's prediction rests on, kept in a run's folder: the profile with its chain, and the cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from hybridpar.cluster import describe
from hybridpar.cluster.topology import Cluster
from hybridpar.errors import RecordError
from hybridpar.model.chain import Chain
from hybridpar.profiling.record import Profile

PROFILE, CLUSTER = "profile.json", "cluster.yaml"


@dataclass(frozen=True)
class Basis:
    """Enough to compile, simulate and draw a run's plan, without its model."""

    chain: Chain
    profile: Profile
    cluster: Cluster

    def save(self, run: Path) -> None:
        """Write ``profile.json`` and ``cluster.yaml`` into a run's folder."""
        replace(self.profile, described=self.chain).save(run / PROFILE)
        describe.save(self.cluster, run / CLUSTER)

    @staticmethod
    def load(run: Path) -> Basis | None:
        """Read them back; None where a run has none. Raises HybridparError for a malformed file."""
        if not (run / PROFILE).exists() or not (run / CLUSTER).exists():
            return None
        profile = Profile.load(run / PROFILE)
        if profile.described is None:
            raise RecordError(f"{run / PROFILE} does not describe the chain; it is not the file of the run")
        return Basis(profile.described, profile, describe.load(run / CLUSTER))
