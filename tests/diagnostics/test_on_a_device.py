"""The same numbers from activations on a CUDA device as from those on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpt import GPT, gpt, ids, loss

from dist_stability.diagnostics import rksp
from dist_stability.diagnostics.kss import SpectralShaping
from dist_stability.diagnostics.rksp import Fit, profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::dist_stability.diagnostics.rksp.RkspWarning"),
]


class OnDevice(GPT):
    """Its positions lie where its weights are."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        x = self.token(batch) + self.position.weight[: batch.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pair() -> tuple[OnDevice, OnDevice]:
    weights = gpt("pre", width=16, vocabulary=64, std=0.3).double().state_dict()
    models = OnDevice("pre", width=16, vocabulary=64).double(), OnDevice("pre", width=16, vocabulary=64).double()
    for model in models:
        model.load_state_dict(weights)
    return models[0], models[1].cuda()


BATCH = ids(8, 32, vocabulary=64)


@pytest.mark.parametrize("wide", [False, True])
def test_profiles(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(rksp, "WIDEST_FULL_FIT", 8)
        monkeypatch.setattr(rksp, "_WIDE_RANK", 12)
    host, device = pair()
    fits = [None] if wide else [None, Fit("full"), Fit("pca", 8)]
    for fit in fits:
        ours = profile(device, None, BATCH.cuda(), loss_fn=loss, fit=fit)
        theirs = profile(host, None, BATCH, loss_fn=loss, fit=fit)
        assert ours.score == pytest.approx(theirs.score)
        assert ours.baselines.gradient_norm == pytest.approx(theirs.baselines.gradient_norm, rel=1e-6)
        for a, b in zip(ours.blocks, theirs.blocks, strict=True):
            assert a.radius == pytest.approx(b.radius, rel=1e-6)


@pytest.mark.parametrize("local", [True, False])
def test_shaping(local: bool) -> None:
    found = []
    for model, batch in zip(pair(), (BATCH, BATCH.cuda()), strict=True):
        SpectralShaping(model, local=local)(loss, batch).backward()
        found.append(torch.cat([parameter.grad.flatten().cpu() for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)
