"""A small language model: tokens in, for every position the logits of the token that follows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from hybridpar.errors import ModelError

_INITIAL_DEVIATION = 0.02
"""Of embeddings and linear weights, as in GPT-2 (Radford et al., 2019)."""


class Embedding(nn.Module):
    """Tokens and their places, learned, with dropout."""

    def __init__(self, vocabulary: int, length: int, width: int, dropout: float) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.positions, std=_INITIAL_DEVIATION)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (samples, length) to (samples, length, width)."""
        x: torch.Tensor = self.dropout(self.tokens(tokens) + self.positions)
        return x


class Attention(nn.Module):
    """Causal self-attention of several heads; no position sees a later one. Attention weights are not dropped."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (samples, length, width) to the like."""
        query, key, value = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self._parts(x))
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: torch.Tensor = self.out(seen.transpose(1, 2).flatten(2))
        return y

    def _parts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value = self.inner(x).chunk(3, 2)
        return query, key, value


class Block(nn.Module):
    """A transformer block that normalises what enters its two branches (Xiong et al., ICML 2020)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropouts = nn.ModuleList([nn.Dropout(dropout), nn.Dropout(dropout)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (samples, length, width) to the like."""
        x = x + self.dropouts[0](self.attention(self.norm(x)))
        y: torch.Tensor = x + self.dropouts[1](self.mlp(x))
        return y


class Gpt(nn.Module):
    """Embedding, blocks, a last normalisation, and a linear head over the vocabulary."""

    def __init__(
        self, vocabulary: int, length: int, width: int, blocks: int, heads: int, dropout: float, *, tied: bool
    ) -> None:
        super().__init__()
        self.embedding = Embedding(vocabulary, length, width, dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, std=_INITIAL_DEVIATION)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)
        if tied:
            self.head.weight = self.embedding.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Token ids (samples, length) to logits (samples, length, vocabulary)."""
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return logits

    def hybridpar_layers(self) -> list[tuple[str, nn.Module]]:
        """Name the layers of the chain: one per block."""
        blocks = ((f"blocks.{name}", block) for name, block in self.blocks.named_children())
        return [("embedding", self.embedding), *blocks, ("norm", self.norm), ("head", self.head)]


def gpt(
    *,
    classes: int = 96,
    in_shape: Sequence[int] = (64,),
    width: int = 128,
    blocks: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    tied: bool = False,
) -> nn.Module:
    """Build a language model over ``classes`` tokens, which reads ``in_shape`` (length,) of them.

    ``width`` features per position are shared out to ``heads``. ``tied``: the head's weight is the embedding's; a
    plan then needs both in one stage on one set of ranks, unsharded. Raises ModelError.
    """
    if len(in_shape) != 1:
        raise ModelError(f"gpt takes rows of tokens, got in_shape {list(in_shape)}; set model.in_shape=[length]")
    if heads < 1 or width % heads:
        raise ModelError(f"gpt cannot share out width={width} to heads={heads}; take a multiple of the heads")
    if blocks < 1:
        raise ModelError(f"gpt needs at least one block, got blocks={blocks}")
    return Gpt(classes, in_shape[0], width, blocks, heads, dropout, tied=tied)
