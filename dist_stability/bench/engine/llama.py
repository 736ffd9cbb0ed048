"""The parameter shapes of the Llama-3 models, as modules without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

VOCABULARY = 128_256
KEY_VALUE = 1024
"""Width of keys and values: 8 heads of 128 in all three."""


@dataclass(frozen=True)
class Llama:
    """One of them.

    Attributes:
        name: For tables.
        width: Of the residual stream.
        hidden: Of the feed-forward layers.
        layers: Number of blocks.
        shard: Ranks that share one copy under HSDP: enough for the state to fit beside activations.
    """

    name: str
    width: int
    hidden: int
    layers: int
    shard: int


LLAMAS = (Llama("8B", 4096, 14336, 32, 8), Llama("70B", 8192, 28672, 80, 64), Llama("405B", 16384, 53248, 126, 512))
QUICK = (Llama("small", 64, 128, 2, 8),)


class Parts(nn.Module):
    """Modules by name; nothing is ever computed with them: FSDP shards no plain containers."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        """Register the parts."""
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def blocks_and_model(llama: Llama) -> tuple[nn.ModuleList, nn.Module]:
    """The blocks and the model that has them, on the meta device, in float32 as FSDP's mixed precision keeps it."""
    with torch.device("meta"):
        blocks = nn.ModuleList(_block(llama) for _ in range(llama.layers))
        model = Parts(
            {
                "embeddings": nn.Embedding(VOCABULARY, llama.width),
                "blocks": blocks,
                "norm": nn.RMSNorm(llama.width),
                "head": nn.Linear(llama.width, VOCABULARY, bias=False),
            }
        )
    return blocks, model


def _block(llama: Llama) -> nn.Module:
    def linear(inputs: int, outputs: int) -> nn.Module:
        return nn.Linear(inputs, outputs, bias=False)

    return Parts(
        {
            "attention_norm": nn.RMSNorm(llama.width),
            "query": linear(llama.width, llama.width),
            "key": linear(llama.width, KEY_VALUE),
            "value": linear(llama.width, KEY_VALUE),
            "out": linear(llama.width, llama.width),
            "feed_forward_norm": nn.RMSNorm(llama.width),
            "gate": linear(llama.width, llama.hidden),
            "up": linear(llama.width, llama.hidden),
            "down": linear(llama.hidden, llama.width),
        }
    )
