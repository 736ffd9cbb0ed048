"""A complete example for ``dist-stability diagnose``: a model, its data, and the loss that training would use.

    dist-stability diagnose preflight --model launch.small_gpt:model --data launch.small_gpt:data --lr 0.03

``without_norm`` is the same model without normalization layers, whose largest stable learning rate is some 30 times
lower.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 128, 32, 4, 4, 32, 16


class Block(nn.Module):
    """Attention and MLP: one transition of the residual stream."""

    def __init__(self, norm: bool) -> None:
        """Make the layers; without ``norm`` the branches see the stream as it is."""
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if norm else nn.Identity() for _ in range(2))
        self.mix, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        parts = self.mix(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """Predicts the next token."""

    def __init__(self, norm: bool = True) -> None:
        """Make the layers; all weights from N(0, 0.06^2)."""
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH) if norm else nn.Identity()
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.06)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) to logits, (batch, tokens, vocabulary)."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def model() -> nn.Module:
    """A small pre-norm GPT."""
    return GPT()


def without_norm() -> nn.Module:
    """The same without normalization."""
    return GPT(norm=False)


def data() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (tokens, next tokens), without end: each token follows from the last one, but for some noise."""
    step = torch.randperm(VOCABULARY)
    while True:
        tokens = [torch.randint(VOCABULARY, (BATCH,))]
        for _ in range(CONTEXT):
            noise = torch.randint(VOCABULARY, (BATCH,))
            tokens.append(torch.where(torch.rand(BATCH) < 0.2, noise, step[tokens[-1]]))
        text = torch.stack(tokens, dim=1)
        yield text[:, :-1], text[:, 1:]
