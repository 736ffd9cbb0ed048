"""The oracle must see every single bit: each kind of state is changed once, and it has to notice."""

from __future__ import annotations

import pickle
import random
import re
from collections.abc import Callable

import harness
import numpy as np
import pytest
import torch
from torch import nn

from dist_stability.testing import NotTheTwin, Outcome, StateImage, assert_golden_twin, capture_state, compare
from dist_stability.verdict import Action, Verdict


class Run:
    """A small run with every kind of state."""

    def __init__(self) -> None:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.model.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.model[0].bias.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=torch.tensor(0.1), foreach=False)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(self) -> None:
        np.random.rand()
        random.random()
        loss = self.model(torch.randn(5, 3)).pow(2).mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def image(self) -> StateImage:
        return capture_state(self.model, self.optimizer, {"scheduler": self.scheduler}, self.scaler)


def flip_low_bit(tensor: torch.Tensor) -> None:
    tensor.detach().view(torch.int32).view(-1)[-1] ^= 1


CHANGES: dict[str, tuple[Callable[[Run], object], str]] = {
    "parameter": (lambda run: flip_low_bit(run.model[3].weight), "parameter 3.weight: 1 of 8 elements"),
    "frozen parameter": (lambda run: flip_low_bit(run.model[0].bias), "parameter 0.bias"),
    "buffer": (lambda run: flip_low_bit(run.model[1].running_var), "buffer 1.running_var"),
    "integer buffer": (lambda run: run.model[1].num_batches_tracked.add_(1), "buffer 1.num_batches_tracked"),
    "non-persistent buffer": (lambda run: run.model.scratch.neg_(), "buffer scratch: 2 of 2 .* 0.0 != -0.0"),
    "moment": (
        lambda run: flip_low_bit(run.optimizer.state[run.model[3].weight]["exp_avg"]),
        "optimizer 0 state 3.weight exp_avg",
    ),
    "step counter": (lambda run: run.optimizer.state[run.model[3].bias]["step"].add_(1), "state 3.bias step"),
    "state key": (lambda run: run.optimizer.state[run.model[3].bias].pop("exp_avg"), "exp_avg: only in the first"),
    "new state key": (
        lambda run: run.optimizer.state[run.model[3].bias].update(extra=1),
        "3.bias extra: only in the second",
    ),
    "lr tensor": (lambda run: flip_low_bit(run.optimizer.param_groups[0]["lr"]), "optimizer 0 group 0 lr"),
    "betas": (lambda run: run.optimizer.param_groups[0].update(betas=(0.9, 0.9)), "group 0 betas 1: 0.999 != 0.9"),
    "scheduler": (lambda run: setattr(run.scheduler, "last_epoch", 9), "extra scheduler last_epoch"),
    "scaler": (lambda run: run.scaler.update(2.0), "scaler scale"),
    "python rng": (lambda run: random.random(), "random python"),
    "numpy rng": (lambda run: np.random.rand(), "random numpy"),
    "torch rng": (lambda run: torch.rand(()), "random torch"),
    "eval flag": (lambda run: run.model[2].eval(), "training 2: True != False"),
    "dtype": (lambda run: run.model[1].double(), "buffer 1.running_mean: torch.float32"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_bit_of_state_is_seen(change: str) -> None:
    run = Run()
    run.step()
    run.step()
    before = run.image()
    assert compare(before, run.image()) == [], "capturing changes nothing"
    do, says = CHANGES[change]
    do(run)
    assert any(re.search(says, line) for line in compare(before, run.image())), compare(before, run.image())


def test_an_image_is_a_copy_and_can_be_pickled() -> None:
    run = Run()
    image = run.image()
    kept = pickle.loads(pickle.dumps(image))
    run.step()
    assert compare(image, kept) == []
    assert compare(image, run.image())
    assert compare(image.without("random"), kept.without("random", "buffer"))[0].startswith("buffer")


def test_bits_decide_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0])
    other = nan.clone()
    other.view(torch.int32)[0] ^= 1  # another NaN
    assert compare(StateImage({"x": nan}), StateImage({"x": nan.clone()})) == []
    assert compare(StateImage({"x": nan}), StateImage({"x": other}))
    assert compare(StateImage({"x": float("nan")}), StateImage({"x": float("nan")})) == []
    assert compare(StateImage({"x": 0.0}), StateImage({"x": -0.0}))
    assert compare(StateImage({"x": 1}), StateImage({"x": 1.0}))
    assert compare(StateImage({"x": 1}), StateImage({"x": True}))
    assert compare(StateImage({"x": torch.zeros(2)}), StateImage({"x": torch.zeros(1, 2)}))


def loop(skip: frozenset[int], guarded: bool, *, refuse: tuple[int, ...] = (2,), leak: bool = False) -> Outcome:
    """Stands in for a guarded loop: refuses by not doing anything (plus a leak, if asked)."""
    run = Run()
    verdicts = []
    for attempt in range(4):
        if attempt in skip:
            continue
        if guarded and attempt in refuse:
            if leak:
                run.model[1].running_mean.add_(1e-3)
            verdicts.append(Verdict(Action.ROLLBACK, attempt))
            continue
        run.step()
        verdicts.append(Verdict(Action.COMMIT, attempt))
    return Outcome(run.image(), verdicts if guarded else ())


def test_a_true_twin_passes() -> None:
    outcome = assert_golden_twin(loop, refused=[2])
    assert outcome.refused == outcome.dropped == {2}


def test_a_leak_is_named() -> None:
    with pytest.raises(NotTheTwin, match=r"rank 0: buffer 1.running_mean: 4 of 4 elements differ"):
        assert_golden_twin(lambda skip, guarded: loop(skip, guarded, leak=True))


def test_a_run_that_refuses_nothing_or_something_else_fails() -> None:
    with pytest.raises(NotTheTwin, match="nothing was refused"):
        assert_golden_twin(lambda skip, guarded: loop(skip, guarded, refuse=()))
    with pytest.raises(NotTheTwin, match=r"refused attempts \[2\] instead of \[1\]"):
        assert_golden_twin(loop, refused=[1])


def test_undone_attempts_are_dropped_too() -> None:
    image = StateImage({})
    outcome = Outcome(image, (Verdict(Action.COMMIT, 0), Verdict(Action.ROLLBACK, 1, undone=(0,))))
    assert outcome.refused == {1} and outcome.dropped == {0, 1}


def on_ranks(rank: int, world: int) -> list[str]:
    """A leak on rank 1 only, and ranks that refuse different batches: both must be told on every rank."""
    said = []
    for leak, refuse in ((rank == 1, (2,)), (False, (1 + rank,))):
        try:
            assert_golden_twin(
                lambda skip, guarded, leak=leak, refuse=refuse: loop(skip, guarded, refuse=refuse, leak=leak)
            )
        except NotTheTwin as error:
            said.append(str(error))
    return said


def test_every_rank_hears_of_a_difference_on_any(two: harness.Pool) -> None:
    for leak, different in two.run(on_ranks):
        assert "rank 1: buffer 1.running_mean" in leak and "rank 0" not in leak
        assert "the ranks dropped different attempts: {0: [1], 1: [2]}" in different
