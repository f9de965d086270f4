"""What all contestants have in common: the work, the hosts it is done on, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from hybridpar.errors import ConfigError

ALONE_CORES = 1.0
"""Of a rank that is not held back: one thread cannot use more."""
_UNITS = {
    "gbit_per_s": "g",
    "inside_gbit_per_s": "g_inside",
    "image": "px",
    "classes": "classes",
    "cores": "cores",
    "memory_mb": "mb",
    "seed": "seed",
}
"""Of what a setting's name tells beside model, images and ranks."""


@dataclass(frozen=True)
class Setting:
    """The same for every contestant; its fields are those of a task's JSON."""

    model: str
    """A name of hybridpar's configuration group ``model``."""
    images_per_rank: int = 16
    gbit_per_s: float | None = None
    """Of the link of every host to the others, each way; None: as fast as this machine is."""
    image: int = 64
    """Height and width; images have three channels."""
    classes: int = 1000
    hosts: int = 4
    ranks_per_host: int = 1
    inside_gbit_per_s: float | None = None
    """Of all messages between the ranks of one host together; None: as fast as this machine is."""
    cores: float = 0.45
    """Of each rank: what its cgroup grants it."""
    memory_mb: int | None = None
    """Of each rank, in 10^6 bytes: what stands for its device's memory. None: no limit."""
    seed: int = 0
    """Of weights and samples."""

    def __post_init__(self) -> None:
        for name in ("images_per_rank", "image", "classes", "hosts", "ranks_per_host"):
            if getattr(self, name) < 1:
                raise ConfigError(f"setting.{name}: {getattr(self, name)} is below 1")
        for name in ("gbit_per_s", "inside_gbit_per_s", "cores", "memory_mb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"setting.{name}: {value} is not above 0; leave it out where there is no limit")

    @property
    def world(self) -> int:
        """Ranks."""
        return self.hosts * self.ranks_per_host

    @property
    def global_batch(self) -> int:
        """Images per step."""
        return self.world * self.images_per_rank

    @property
    def name(self) -> str:
        """A word for files and tables, with what is not as usual: ``vgg16-16-4x1-3.3g``."""
        parts = [self.model, str(self.images_per_rank), f"{self.hosts}x{self.ranks_per_host}"]
        usual = {f.name: f.default for f in fields(self)}
        for name, unit in _UNITS.items():
            value = getattr(self, name)
            parts += [f"{value:g}{unit}"] if value != usual[name] else []
        return "-".join(parts)

    @property
    def links_name(self) -> str:
        """A word for the links between the ranks, whatever they compute."""
        return replace(self, model="links", images_per_rank=1, image=64, classes=1000, seed=0).name

    @property
    def devices(self) -> Setting:
        """The setting with all that does not change what a layer takes on a rank left out."""
        return replace(self, images_per_rank=1, gbit_per_s=None, inside_gbit_per_s=None, memory_mb=None, seed=0)

    @property
    def work(self) -> Setting:
        """The setting with links, cores and memory left out: what is the same for the losses."""
        return replace(self, gbit_per_s=None, inside_gbit_per_s=None, memory_mb=None, cores=ALONE_CORES)

    @property
    def overrides(self) -> list[str]:
        """The job, as the command line of hybridpar takes it."""
        return [
            f"model={self.model}",
            f"model.in_shape=[3,{self.image},{self.image}]",
            f"model.classes={self.classes}",
            "data=synthetic",
            "optimizer=sgd",
            "monitor=off",
            "train.device=cpu",
            f"train.global_batch={self.global_batch}",
            f"train.seed={self.seed}",
        ]
