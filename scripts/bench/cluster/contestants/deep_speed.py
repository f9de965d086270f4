"""DeepSpeed: ZeRO, and its pipeline."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F

from hybridpar.runtime.zero import import_deepspeed
from scripts.bench.cluster.contestants.contestant import Contestant, Options, own_micro_batches, product
from scripts.bench.cluster.contestants.ddp import own
from scripts.bench.cluster.contestants.stages import Balance, Stage, cuts, pipeline_grid
from scripts.bench.cluster.setting import Setting
from scripts.bench.work import Work


def _deepspeed() -> Any:
    """Return DeepSpeed, on the process groups that are there."""
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = import_deepspeed()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    return deepspeed


def _config(micro_batch: int, micro_batches: int, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,  # the default would clip to 1
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **more,
    }


class Zero(Contestant):
    """ZeRO: the optimizer's state is divided among the ranks, from stage 2 on the gradients too.

    Args:
        work: what is trained.
        bucket_mb: MiB of gradients that are reduced together, and of parameters that are gathered together.
        overlap: whether gradients are reduced during the backward.
        micro_batch: samples of a forward on a rank; None: all its own ones.
        update: how the optimizer goes through the parameters.

    """

    zero_stage: ClassVar[int]

    def __init__(
        self,
        work: Work,
        bucket_mb: int = 25,
        micro_batch: int | None = None,
        *,
        overlap: bool = True,
        update: str = "fused",
    ) -> None:
        model, images = work.whole(), work.global_batch // dist.get_world_size()
        self._micro_batch = micro_batch or images
        zero = {
            "stage": self.zero_stage,
            "reduce_bucket_size": bucket_mb * 2**18,
            "allgather_bucket_size": bucket_mb * 2**18,
            "overlap_comm": overlap,
            "contiguous_gradients": overlap,
        }
        self._engine, *_ = _deepspeed().initialize(
            model=model,
            optimizer=work.sgd(model.parameters(), update),
            config=_config(self._micro_batch, images // self._micro_batch, zero_optimization=zero),
            dist_init_required=False,
        )

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return sizes of buckets and micro-batches, with and without overlap, and ways to update."""
        return product(
            bucket_mb=[25, 8, 100],
            micro_batch=own_micro_batches(setting),
            overlap=[True, False],
            update=["fused", "foreach"],
        )

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train."""
        own_x, own_y = own(images).split(self._micro_batch), own(labels).split(self._micro_batch)
        share = 0.0
        for x, y in zip(own_x, own_y, strict=True):
            loss = F.cross_entropy(self._engine(x), y)
            self._engine.backward(loss)
            self._engine.step()
            share += loss.item() * len(y) / len(labels)
        return share


class ZeroOne(Zero):
    """ZeRO-1."""

    zero_stage = 1


class ZeroTwo(Zero):
    """ZeRO-2."""

    zero_stage = 2


class Pipeline(Contestant):
    """PipelineModule, whose engine has one forward and one backward in turns.

    Its stages cannot have their channels last: the engine hands out weights as bytes, which such ones have not in
    one piece.

    Args:
        work: what is trained.
        micro_batch: samples of a forward.
        replicas: pipelines side by side.
        balance: what the cuts make equal.
        update: how the optimizer goes through the parameters.

    """

    def __init__(
        self,
        work: Work,
        micro_batch: int,
        replicas: int = 1,
        *,
        balance: Balance = "measured",
        update: str = "fused",
    ) -> None:
        deepspeed = _deepspeed()
        from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: PLC0415 - seconds, and an optional dependency

        stages, count = dist.get_world_size() // replicas, work.global_batch // replicas // micro_batch
        bounds = cuts(work, stages, micro_batch, count, balance)
        module = PipelineModule(
            [LayerSpec(_Piece, work, own_layers) for own_layers in bounds],
            num_stages=stages,
            loss_fn=F.cross_entropy,
            partition_method="uniform",
        )
        self._micro_batch = micro_batch
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=work.sgd(module.parameters(), update),
            config=_config(micro_batch, count),
            dist_init_required=False,
        )
        self._replicas, self._replica = replicas, self._engine.grid.get_data_parallel_id()

    @classmethod
    def grid(cls, setting: Setting) -> list[Options]:
        """Return micro-batches, replicas, balances of the cuts and ways to update."""
        return pipeline_grid(setting)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """Train; every rank is told the mean loss."""
        x = images.chunk(self._replicas)[self._replica].split(self._micro_batch)
        y = labels.chunk(self._replicas)[self._replica].split(self._micro_batch)
        loss = self._engine.train_batch(iter(list(zip(x, y, strict=True))))
        return float(loss) / dist.get_world_size()


class _Piece(Stage):
    """A stage that only its own rank builds."""

    def __init__(self, work: Work, layers: tuple[int, int]) -> None:
        super().__init__(work.part(*layers), channels_last=False)
