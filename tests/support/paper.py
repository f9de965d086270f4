"""Chains, profiles and clusters whose step times can be computed on paper."""

from __future__ import annotations

from itertools import pairwise

from hybridpar.cluster.topology import Cluster, Device, Link, Node
from hybridpar.model.chain import Chain, Layer, Linear, Parameter
from hybridpar.planning.trial import Trials
from hybridpar.profiling.record import LayerProfile, Profile

FORWARD_S, BACKWARD_S = 1.0, 2.0
"""Per sample and layer."""


def mlp(*widths: int) -> Chain:
    """Linear layers and nothing between them."""
    return Chain("mlp", tuple(_linear(f"fc{i}", a, b) for i, (a, b) in enumerate(pairwise(widths))))


def _linear(name: str, inputs: int, outputs: int) -> Layer:
    parameters = (Parameter(f"{name}.weight", (outputs, inputs)), Parameter(f"{name}.bias", (outputs,)))
    shard = Linear(inputs, outputs, bias=True)
    flops = 2 * inputs * outputs
    return Layer(name, "Linear", (inputs,), (outputs,), flops, parameters, saves_input=True, linear=shard)


def profile_of(chain: Chain, update_s_per_byte: float = 0.0) -> Profile:
    """:data:`FORWARD_S` and :data:`BACKWARD_S` per sample and layer."""
    layers = tuple(LayerProfile(x.name, ((FORWARD_S,),), ((BACKWARD_S,),)) for x in chain.layers)
    return Profile(
        chain.fingerprint, "estimated", "paper", "float64", (1,), (1.0,), layers, update_s_per_byte, 0.0
    )


def cluster_of(nodes: int, bytes_per_s: float = 1e15, memory_bytes: float = 1e15, devices: int = 1) -> Cluster:
    """Equal nodes of one device each, joined by links without latency."""
    device = Device("paper", memory_bytes, {"float64": 1.0, "float32": 1.0}, 1e18, 0.0)
    links = {"node": Link(0.0, bytes_per_s), "rack": Link(0.0, bytes_per_s)}
    return Cluster("paper", device, (Node(devices),) * nodes, links)


def trials_of(chain: Chain, cluster: Cluster, update_s_per_byte: float = 0.0) -> Trials:
    """Trials of a chain on a cluster."""
    return Trials(chain, profile_of(chain, update_s_per_byte), cluster)
