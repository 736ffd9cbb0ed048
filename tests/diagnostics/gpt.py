"""The paper's small GPT with its norms, and blocks of other shapes, for the tests beside it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = ("pre", "post", "none", "deep")


class Block(nn.Module):
    """``norm``: "pre", "post", "none", or "deep": a pre-norm stream scaled up by alpha at each branch."""

    def __init__(self, width: int, heads: int, norm: str, alpha: float) -> None:
        super().__init__()
        self.heads, self.norm, self.alpha = heads, norm, alpha if norm == "deep" else 1.0
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = (nn.Identity() if norm == "none" else nn.LayerNorm(width) for _ in range(2))

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.mix(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "post":
            x = self.norm1(x + self.attention(x))
            return self.norm2(x + self.feed_forward(x))
        x = self.alpha * x + self.attention(self.norm1(x))
        return self.alpha * x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """All weights and embeddings from N(0, 0.02^2), biases 0."""

    def __init__(
        self,
        norm: str = "pre",
        width: int = 32,
        layers: int = 2,
        heads: int = 4,
        vocabulary: int = 256,
        context: int = 64,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, norm, (2 * layers) ** 0.25) for _ in range(layers))
        self.norm = nn.Identity() if norm == "none" else nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(norm: str = "pre", seed: int = 0, **options: Any) -> GPT:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT(norm, **options)


def ids(*shape: int, vocabulary: int = 256, seed: int = 7) -> Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def loss(model: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch).flatten(0, 1), batch.roll(-1, 1).flatten())
