"""Forwards of torch's own blocks as torch.fx can trace them, so that a chain is cut inside these blocks.

torch.fx takes a module of ``torch.nn`` as one node, and the encoder's own forward looks at its input's shape. In
training mode it computes what stands here; the fast path and nested tensors are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def expansion(module: nn.Module) -> Callable[..., Any] | None:
    """Give a traceable forward for ``module``, with the module as its first argument, where there is one."""
    return _FORWARDS.get(type(module))


def _encoder(
    module: Any, src: Any, mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool | None = None
) -> Any:
    # The mask says everything; is_causal only allows a kernel to leave it unread.
    del is_causal
    for layer in module.layers:
        src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
    return src if module.norm is None else module.norm(src)


def _encoder_layer(
    module: Any, src: Any, src_mask: Any = None, src_key_padding_mask: Any = None, is_causal: bool = False
) -> Any:
    def attend(x: Any) -> Any:
        attended, _ = module.self_attn(
            x,
            x,
            x,
            attn_mask=src_mask,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            is_causal=is_causal,
        )
        return module.dropout1(attended)

    def feed(x: Any) -> Any:
        return module.dropout2(module.linear2(module.dropout(module.activation(module.linear1(x)))))

    if module.norm_first:
        x = src + attend(module.norm1(src))
        return x + feed(module.norm2(x))
    x = module.norm1(src + attend(src))
    return module.norm2(x + feed(x))


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.TransformerEncoder: _encoder,
    nn.TransformerEncoderLayer: _encoder_layer,
}
