"""Which blocks are found in models as people write them, and what is read from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpt import gpt, ids
from torch import Tensor, nn

from dist_stability.diagnostics.blocks import candidates, channel_dimension
from dist_stability.diagnostics.rksp import NoBlocks, profile
from dist_stability.experiments.text import CharacterTransformer
from dist_stability.experiments.vision import resnet18

pytestmark = pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning")


def names(model: nn.Module, batch: Any, **options: Any) -> list[str]:
    return [each.name for each in profile(model, None, batch, **options).blocks]


def seeded(make: Any, *args: Any, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make(*args, **options)


def test_our_own_transformer() -> None:
    model = seeded(CharacterTransformer, 40, width=16, layers=3)
    assert names(model, ids(8, 32, vocabulary=40)) == ["blocks.0", "blocks.1", "blocks.2"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_encoder_of_torch(norm_first: bool) -> None:
    """Its fused path packs padded sequences; a profile runs the layers as written, and counts what the mask says."""
    layer = seeded(nn.TransformerEncoderLayer, 16, 2, 32, 0.1, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x = torch.randn(8, 30, 16, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(8, 30, dtype=torch.bool)
    padded[4:, 20:] = True
    found = profile(model, None, {"src": x, "src_key_padding_mask": padded}, mask=~padded)
    assert [each.name for each in found.blocks] == ["layers.0", "layers.1"]
    assert [each.tokens for each in found.blocks] == [200, 200]
    assert found.baselines.has_norm


class Layer(nn.Module):
    """As in the transformers library: keywords in, a tuple out, the stream first."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 12))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        return hidden_states + self.mlp(hidden_states), None


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.h = nn.ModuleList(Layer() for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(12, 5) for _ in range(4))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Any]:
        x = self.embed(input_ids)
        mask = torch.zeros(len(x), 1, 1)
        for number, layer in enumerate(self.h):
            x = (layer(x) if number == 0 else layer(attention_mask=mask, hidden_states=x))[0]
        return {"last_hidden_state": x, "logits": [head(x) for head in self.heads]}


def test_lists_as_in_the_transformers_library() -> None:
    model = seeded(nn.ModuleDict, {"transformer": Tower()})

    def loss(model: Any, batch: Any) -> Tensor:
        return model["transformer"](**batch)["logits"][0].square().mean()

    found = profile(model, None, {"input_ids": ids(8, 32, vocabulary=50)}, loss_fn=loss)
    assert [each.name for each in found.blocks] == [f"transformer.h.{number}" for number in range(3)]
    assert not found.baselines.has_norm and found.baselines.gradient_norm is not None


def test_residual_stages_of_a_convolutional_network() -> None:
    """Flattened over positions; blocks that change the width or the resolution are skipped and named."""
    model = seeded(resnet18)
    found = profile(model, None, torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert [each.name for each in found.blocks] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]
    assert [each.width for each in found.blocks] == [64, 64, 128, 256, 512]
    assert [each.tokens for each in found.blocks] == [512, 512, 128, 32, 8]
    assert set(found.skipped) == {"layer2.0", "layer3.0", "layer4.0"}
    assert "its input is [2, 64, 16, 16], its output [2, 128, 8, 8]" in found.skipped["layer2.0"]


class Mixer(nn.Module):
    """Mixes over 10 positions, then over 14 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.positions, self.channels = nn.LayerNorm(14), nn.Linear(10, 10), nn.Linear(14, 14)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x))


class Scan(nn.Module):
    """As a Mamba block: a causal convolution over the positions of a wider inner stream, and a gate."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)
        self.conv = nn.Conv1d(2 * width, 2 * width, 4, groups=2 * width, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        inside, gate = self.inner(x).chunk(2, dim=-1)
        inside = self.conv(inside.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return x + self.outer(torch.nn.functional.silu(inside) * torch.sigmoid(gate))


class Next(nn.Module):
    """As a ConvNeXt block: channels first outside, channels last inside."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("block", "shape", "width", "tokens"),
    [
        (Mixer, (20, 10, 14), 14, 200),
        (Scan, (9, 20, 10), 10, 180),  # 20 positions and 20 inner channels: the linear layers decide
        (Next, (4, 6, 5, 6), 6, 120),
    ],
)
def test_blocks_of_other_kinds(block: Any, shape: tuple[int, ...], width: int, tokens: int) -> None:
    model = seeded(lambda: nn.Sequential(*[block() for _ in range(2)]))
    found = profile(model, None, torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert [(each.name, each.width, each.tokens) for each in found.blocks] == [
        ("0", width, tokens),
        ("1", width, tokens),
    ]


def test_the_width_of_a_sequence_with_channels_first() -> None:
    block = nn.Sequential(nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3))
    assert channel_dimension(block, torch.zeros(2, 8, 50)) == 1
    assert channel_dimension(nn.Linear(50, 8), torch.zeros(2, 8, 50)) == -1


class Stage(nn.Module):
    """As in Swin: blocks of one width, then a layer that changes it (but for the last)."""

    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(InPlace(width) for _ in range(2))
        self.down = nn.Identity() if last else nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.down(x)


class InPlace(nn.Module):
    """Writes into its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x += self.body(x)
        return x


def test_stages_that_change_the_width_give_way_to_their_blocks() -> None:
    """And what a block does to its input in place is its update."""
    model = seeded(lambda: nn.Sequential(Stage(6, False), Stage(12, True)))
    found = profile(model, None, torch.randn(5, 30, 6, generator=torch.Generator().manual_seed(0)))
    assert [each.name for each in found.blocks] == ["0.blocks.0", "0.blocks.1", "1.blocks.0", "1.blocks.1"]
    assert all(each.relative_update > 0.1 for each in found.blocks)


class Shared(nn.Module):
    """One block, used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)[0]
        return x


def test_each_call_of_a_shared_block_is_a_transition() -> None:
    model = seeded(Shared)
    x = torch.randn(5, 30, 12, generator=torch.Generator().manual_seed(0))
    found = profile(model, None, x)
    assert [each.name for each in found.blocks] == ["blocks.0", "blocks.0#1", "blocks.0#2"]
    twice = profile(model, None, x, loss_fn=lambda model, x: (model(x) + model(x)).square().mean())
    assert [each.tokens for each in twice.blocks] == [300, 300, 300]  # two forwards of a loss: the same transitions
    assert twice.blocks[1].radius == pytest.approx(found.blocks[1].radius)


def test_compiled_code_is_run_as_written() -> None:
    """Nothing is compiled again for the sake of hooks, in the profile or afterwards."""
    model = gpt(width=16)
    plain = profile(model, None, ids(8, 32))
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(ids(8, 32))
    once = len(graphs)
    assert profile(compiled, None, ids(8, 32)).score == plain.score
    assert profile(compiled, ["blocks.1"], ids(8, 32)).blocks[0] == plain.blocks[1]
    compiled(ids(8, 32))
    assert len(graphs) == once == 1


def test_what_is_no_block() -> None:
    mlp = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert candidates(mlp) == ()
    assert candidates(nn.MultiheadAttention(8, 2)) == ()
    changing = nn.Sequential(Growing(4), Growing(8))
    with pytest.raises(NoBlocks, match=r"0: its input is \[5, 4\], its output \[5, 8\]; 1: its input"):
        profile(changing, None, torch.randn(5, 4))


class Growing(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
