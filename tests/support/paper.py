"""Chains, profiles and clusters whose step times can be computed on paper."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.planning.plan import Segment, Stage
from hybridpar.planning.trial import Trials
from hybridpar.profiling.record import LayerProfile, Profile

FORWARD_S, BACKWARD_S = 1.0, 2.0
"""Per sample and layer."""


def linear(name: str, inputs: int, outputs: int) -> Layer:
    weight = Parameter(f"{name}.weight", (outputs, inputs))
    bias = Parameter(f"{name}.bias", (outputs,))
    flops = 2 * inputs * outputs
    shard = Linear(inputs, outputs, bias=True)
    return Layer(name, "Linear", (inputs,), (outputs,), flops, (weight, bias), saves_input=True, linear=shard)


def relu(name: str, width: int) -> Layer:
    return Layer(name, "ReLU", (width,), (width,), width, saves_output=True, channelwise=True)


def chain_of(*widths: int, name: str = "mlp") -> Chain:
    """Linear layers and nothing between them."""
    return Chain(name, tuple(linear(f"fc{i}", a, b) for i, (a, b) in enumerate(pairwise(widths))))


def profile_of(
    chain: Chain,
    forward_s: Sequence[float] | float = FORWARD_S,
    backward_s: Sequence[float] | float = BACKWARD_S,
    update_s_per_byte: float = 0.0,
    loss_s_per_element: float = 0.0,
) -> Profile:
    """Seconds per sample, for all layers or one by one, proportional to samples and to shares of features."""
    n = len(chain.layers)
    forwards = [forward_s] * n if isinstance(forward_s, float | int) else forward_s
    backwards = [backward_s] * n if isinstance(backward_s, float | int) else backward_s
    layers = tuple(
        LayerProfile(layer.name, ((float(f),),), ((float(b),),))
        for layer, f, b in zip(chain.layers, forwards, backwards, strict=True)
    )
    return Profile(
        chain.fingerprint,
        "estimated",
        "paper",
        "float64",
        (1,),
        (1.0,),
        layers,
        update_s_per_byte,
        loss_s_per_element,
    )


def cluster_of(nodes: int, bytes_per_s: float = 1e15, memory_bytes: float = 1e15, devices: int = 1) -> Cluster:
    """Equal nodes of one device each, joined by links without latency."""
    device = Device("paper", memory_bytes, {"float64": 1.0, "float32": 1.0}, 1e18, 0.0)
    links = {"node": Link(0.0, bytes_per_s), "rack": Link(0.0, bytes_per_s)}
    return Cluster("paper", device, (Node(devices),) * nodes, links)


def trials_of(chain: Chain, cluster: Cluster, update_s_per_byte: float = 0.0) -> Trials:
    """Trials of a chain on a cluster."""
    return Trials(chain, profile_of(chain, update_s_per_byte=update_s_per_byte), cluster)


def front(
    micro_batch: int, *ranks: int, layers: tuple[int, int] = (0, 2), shares: tuple[float, ...] | None = None
):
    return Stage("front", micro_batch, (Segment(layers, ranks, shares),))


SMALL = Chain("small", (linear("a", 3, 5), relu("r", 5), linear("b", 5, 2)))
