"""One small GPT in six normalizations and three initializations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

NORMS = ("pre", "post", "rms", "deep", "sub", "none")
INITS = ("paper", "torch", "xavier")
HEADS = 4


class Block(nn.Module):
    """Causal self-attention and two linear layers on a residual stream.

    Args:
        width: Of the stream, a multiple of the heads.
        layers: Blocks of the model, for "deep".
        norm: "pre" and "rms" normalize what a branch reads, "post" the stream after each branch, "sub" as "pre" and
            once more before the last matrix of each branch, "none" nothing. "deep" is what the paper's Table 1 measures
            under DeepNorm: "pre" with the stream multiplied by (2 layers)^(1/4) before each branch is added, and no
            normalization after that.
    """

    def __init__(self, width: int, layers: int, norm: str) -> None:
        """Build the layers."""
        super().__init__()
        kind: type[nn.Module] = nn.RMSNorm if norm == "rms" else nn.LayerNorm
        self.post, self.scale = norm == "post", (2 * layers) ** 0.25 if norm == "deep" else 1.0
        self.attention_in, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        outer, inner = norm != "none", norm == "sub"
        self.norm1, self.norm2 = (kind(width) if outer else nn.Identity() for _ in range(2))
        self.inner1 = kind(width) if inner else nn.Identity()
        self.inner2 = kind(4 * width) if inner else nn.Identity()

    def forward(self, stream: Tensor) -> Tensor:
        """(examples, context, width) to the same shape."""
        if self.post:
            stream = self.norm1(stream + self._attention(stream))
            normed: Tensor = self.norm2(stream + self._feed_forward(stream))
            return normed
        stream = self.scale * stream + self._attention(self.norm1(stream))
        return self.scale * stream + self._feed_forward(self.norm2(stream))

    def _attention(self, x: Tensor) -> Tensor:
        query, key, value = self.attention_in(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.attention_out(self.inner1(mixed.transpose(1, 2).flatten(2)))
        return out

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.inner2(functional.gelu(self.up(x))))
        return out


class SmallGPT(nn.Module):
    """Embeddings, blocks, a final norm (none for "none") and a head of its own.

    Args:
        vocabulary: Number of tokens.
        context: Longest input.
        width: Of the stream, a multiple of 4.
        layers: Number of blocks.
        norm: One of :data:`NORMS`.
        init: "paper": every matrix and embedding from N(0, (0.32 / sqrt(width))^2), which is 0.02 at width 256;
            "torch": PyTorch's own, embeddings from N(0, 1); "xavier": uniform Xavier, embeddings from N(0, 0.02^2).
            Biases are 0 but for "torch".
        seed: Of the weights; the global random streams are left alone.
    """

    def __init__(
        self, vocabulary: int, context: int, *, width: int, layers: int, norm: str, init: str, seed: int
    ) -> None:
        """Build and initialize."""
        if norm not in NORMS or init not in INITS:
            raise ValueError(f"norm {norm!r} must be one of {NORMS}, init {init!r} one of {INITS}")
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, layers, norm) for _ in range(layers))
            final: type[nn.Module] = nn.RMSNorm if norm == "rms" else nn.LayerNorm
            self.norm = nn.Identity() if norm == "none" else final(width)
            self.head = nn.Linear(width, vocabulary)
            if init != "torch":
                self._initialize(init, 0.32 / math.sqrt(width))

    def _initialize(self, init: str, std: float) -> None:
        for part in self.modules():
            if isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=std if init == "paper" else 0.02)
            elif isinstance(part, nn.Linear):
                nn.init.zeros_(part.bias)
                nn.init.normal_(part.weight, std=std) if init == "paper" else nn.init.xavier_uniform_(part.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(examples, context) int64 to logits (examples * context, vocabulary), one row per position."""
        stream = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream).flatten(0, 1))
        return logits
