"""Next-character prediction with a small Transformer: on English that comes with Python itself, and on one phrase.

The model is the same for both: d_model 64, 2 layers of 4 heads each, feed-forward width 256, context 64, no dropout
unless asked for another; about 0.11 million parameters.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.experiments.data import Windows

DATA_NAME = "English text of pydoc_data.topics"
PHRASE_NAME = "one phrase, repeated"
PHRASE = "the quick brown fox jumps over the lazy dog and runs away from the angry bear. "
PHRASE_CHARACTERS = 120_000
CONTEXT = 64
WIDTH, LAYERS, HEADS = 64, 2, 4
HELD_OUT = 0.1


class TextUnavailable(RuntimeError):
    """The text of the standard library is not on this machine."""


def load_text() -> str:
    """The help topics of this Python, one after the other: about 465,000 characters of English.

    The text differs a little between Python versions.

    Raises:
        TextUnavailable: The interpreter was installed without ``pydoc_data`` (some slimmed-down distributions).
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextUnavailable(
            "the text task reads the standard library's module 'pydoc_data.topics', which this Python lacks: "
            "install the complete standard library, or use --task digits"
        ) from error
    return "\n\n".join(topics[name] for name in sorted(topics))


def repeated_phrase() -> str:
    """The controller paper's synthetic corpus: one phrase of 79 characters again and again, 120,000 characters in all.

    Phrase and length are not published; with this length an epoch is 1,686 batches of 64 windows. What is held out has
    the same 79 different windows as what is trained on: its loss says how far training got, and nothing about
    generalization.
    """
    return (PHRASE * (PHRASE_CHARACTERS // len(PHRASE) + 1))[:PHRASE_CHARACTERS]


def load_windows(text: str | None = None) -> tuple[Windows, Windows, int]:
    """Training windows, held-out windows and the size of the alphabet.

    The last tenth of the text is held out, as one piece: no window of it overlaps a training window.

    Args:
        text: The corpus; by default that of :func:`load_text`.

    Raises:
        TextUnavailable: See :func:`load_text`.
    """
    text = load_text() if text is None else text
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    split = round(len(text) * (1 - HELD_OUT))
    return Windows(tokens[:split], CONTEXT), Windows(tokens[split:], CONTEXT), len(alphabet)


class Block(nn.Module):
    """Causal self-attention, then two linear layers, each on a normalized residual stream."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Build the layers; ``width`` must be a multiple of ``heads``."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, stream: Tensor) -> Tensor:
        """(examples, context, width) to the same shape."""
        examples, context, width = stream.shape
        heads = self.query_key_value(self.attention_norm(stream)).view(examples, context, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        stream = stream + self.attention_out(mixed.transpose(1, 2).reshape(examples, context, width))
        return stream + self.feed_forward(self.feed_forward_norm(stream))


class CharacterTransformer(nn.Module):
    """A decoder-only Transformer over characters.

    Args:
        characters: Size of the alphabet.
        context: Longest input.
        width: Size of the residual stream.
        layers: Number of blocks.
        heads: Attention heads per block.
        dropout: Probability, in attention and after the feed-forward layers.
    """

    def __init__(
        self,
        characters: int,
        *,
        context: int = CONTEXT,
        width: int = WIDTH,
        layers: int = LAYERS,
        heads: int = HEADS,
        dropout: float = 0.0,
    ) -> None:
        """Build the layers, initialized from the global random stream."""
        super().__init__()
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """(examples, context) int64 to logits (examples * context, characters), one row per position."""
        stream = self.token(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            stream = block(stream)
        # Flat before the last layer: on three dimensions its output would be a view, which FSDP2 warns about.
        logits: Tensor = self.head(self.norm(stream).flatten(0, 1))
        return logits
