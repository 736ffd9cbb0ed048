"""What the small models are trained on: every batch is a function of (task, seed, number)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dist_stability.experiments.text import PHRASE, load_text

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, int64 of (examples, context); a target of -100 does not count."""

IGNORED = -100
_RECALL_PAIRS, _RECALL_VALUES = 4, 128
_SYNTHETIC_FIRST = 10


@dataclass(frozen=True)
class Task:
    """One kind of sequences.

    Attributes:
        vocabulary: Number of tokens.
        context: Length of an input.
        draw: Makes so many examples from a generator.
    """

    vocabulary: int
    context: int
    draw: Callable[[torch.Generator, int], Batch]

    def batch(self, seed: int, number: int, size: int) -> Batch:
        """The batch of this number. Numbers below 0 are as good as others: probes take those."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        return self.draw(generator, size)


def loss_fn(model: nn.Module | Any, batch: Batch) -> Tensor:
    """Mean cross-entropy over the positions that count."""
    inputs, targets = batch
    return functional.cross_entropy(model(inputs), targets.flatten(), ignore_index=IGNORED)


@cache
def task(name: str) -> Task:
    """A task by its name.

    "phrase": one phrase of 79 characters, again and again, from random offsets. "recall": [k1 v1 .. k4 v4 padding
    query] of length 64 over 256 tokens, loss on the last position. "synthetic": repetitions, runs and random tokens, as
    in the paper, but 512 tokens for its 10,000 and length 64 for 256. "english": the help topics of Python, by
    character.
    """
    if name == "phrase":
        return _characters(PHRASE * 4, context=32, offsets=len(PHRASE))
    if name == "english":
        return _characters(load_text(), context=32)
    if name == "recall":
        return Task(2 * _RECALL_VALUES, 64, _recall)
    if name == "synthetic":
        return Task(512, 64, _synthetic)
    raise ValueError(f"task {name!r} must be one of {TASKS}")


TASKS = ("phrase", "recall", "synthetic", "english")


def _characters(text: str, context: int, offsets: int | None = None) -> Task:
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    starts = len(tokens) - context if offsets is None else offsets

    def draw(generator: torch.Generator, size: int) -> Batch:
        places = torch.randint(starts, (size, 1), generator=generator) + torch.arange(context + 1)
        windows = tokens[places]
        return windows[:, :-1], windows[:, 1:]

    return Task(len(alphabet), context, draw)


def _recall(generator: torch.Generator, size: int) -> Batch:
    inputs = torch.zeros(size, 64, dtype=torch.int64)
    targets = torch.full((size, 64), IGNORED)
    for row in range(size):
        keys = 1 + torch.randperm(_RECALL_VALUES - 1, generator=generator)[:_RECALL_PAIRS]
        values = _RECALL_VALUES + torch.randint(_RECALL_VALUES, (_RECALL_PAIRS,), generator=generator)
        asked = int(torch.randint(_RECALL_PAIRS, (), generator=generator))
        inputs[row, : 2 * _RECALL_PAIRS] = torch.stack([keys, values], dim=1).flatten()
        inputs[row, -1], targets[row, -1] = keys[asked], values[asked]
    return inputs, targets


def _synthetic(generator: torch.Generator, size: int) -> Batch:
    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = []
    for _ in range(size):
        row: list[int] = []
        while len(row) < 65:
            kind = between(0, 2)
            if kind == 0:
                pattern = [between(_SYNTHETIC_FIRST, 511) for _ in range(between(2, 5))]
                row += pattern * between(2, 4)
            elif kind == 1:
                length = between(5, 15)
                first = between(_SYNTHETIC_FIRST, 511 - length)
                row += range(first, first + length)
            else:
                row += [between(_SYNTHETIC_FIRST, 511) for _ in range(between(5, 15))]
        rows.append(row[:65])
    tokens = torch.tensor(rows)
    return tokens[:, :-1], tokens[:, 1:]
