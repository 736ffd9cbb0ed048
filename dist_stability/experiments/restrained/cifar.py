"""R12: the paper's Table 1 at its own scale, ResNet-56 on CIFAR-10. Needs the data, and a GPU but for a quick run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev

import torch
from torch import Tensor
from torch.nn import functional

from dist_stability.diagnostics.perturbation import KScale
from dist_stability.diagnostics.twins import Twin, TwinRun
from dist_stability.experiments.data import BatchOrder, Images
from dist_stability.experiments.restrained.networks import CifarResNet
from dist_stability.experiments.restrained.parts import Outcome, Part, Result, Settings, within
from dist_stability.experiments.restrained.twins import WEIGHT_DECAY
from dist_stability.experiments.vision import load_cifar10

SEEDS, SCALES = range(3), (1, 3, 5)
DEPTH, WIDTH, BATCH, LR, MOMENTUM = 56, 16, 128, 0.1, 0.9
EPOCHS, DROP_EVERY, LAST = 200, 40, 10
"""The rate drops to a tenth every 40 epochs; an entry is the mean accuracy of the last ten."""


def part(data: Path) -> Part:
    """R12 on the data set in a folder."""

    def settings(quick: bool) -> list[Settings]:
        cells = [(0, 1), (0, 3)] if quick else [(seed, k) for seed in SEEDS for k in SCALES]
        common = {"data": str(data), "depth": 8 if quick else DEPTH, "epochs": EPOCHS, "steps": 2 if quick else None}
        return [{"name": f"s{seed}-k{k}", "seed": seed, "k": k, **common} for seed, k in cells]

    return Part("R12", "Table 1 at full scale, ResNet-56 on CIFAR-10", settings, work, conclude)


def work(settings: Settings) -> Result:
    """Test accuracies, in percent, after each of the last epochs.

    Raises:
        RuntimeError: There is no GPU, and it is no quick run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and settings["steps"] is None:
        raise RuntimeError("R12 trains a ResNet-56 for 200 epochs and needs a CUDA device; --quick runs without one")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    train, test = _images(settings["data"])
    per_epoch = len(train) // BATCH
    steps = settings["steps"] or settings["epochs"] * per_epoch

    def build(seed: int) -> TwinRun:
        model = CifarResNet(settings["depth"], WIDTH, channels=3).to(device)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, DROP_EVERY * per_epoch)
        order = BatchOrder(len(train), BATCH, seed=seed)

        def loss(step: int) -> Tensor:
            inputs, labels = train.batch(order.global_batch(step))
            return functional.cross_entropy(model(augmented(inputs, seed, step).to(device)), labels.to(device))

        def predict() -> Tensor:
            model.eval()
            try:
                pieces = torch.arange(len(test)).split(500)
                return torch.cat([model(test.batch(piece)[0].to(device)).argmax(1) for piece in pieces])
            finally:
                model.train()

        return TwinRun(model, optimizer, loss, lambda _: schedule.step(), predict)

    twin, accuracies = Twin(build, settings["seed"], KScale(settings["k"])), []
    labels = test.labels.to(device)
    for step in range(steps):
        twin.step(step)
        if step + 1 == steps or ((step + 1) % per_epoch == 0 and step >= steps - LAST * per_epoch):
            said = twin.predictions()
            assert said is not None
            accuracies.append(100.0 * float((said == labels).double().mean()))
    return {"accuracies": accuracies}


def conclude(results: Sequence[Result]) -> Outcome:
    """Population standard deviations along rows and columns, as in the paper."""
    entries = {(r["settings"]["seed"], r["settings"]["k"]): fmean(r["accuracies"]) for r in results}
    seeds, scales = (sorted({key[place] for key in entries}) for place in (0, 1))
    rows = [[seed, *(entries.get((seed, k)) for k in scales)] for seed in seeds]
    checks = []
    if len(entries) == len(seeds) * len(scales) and len(seeds) > 1:
        across = fmean(pstdev(entries[seed, k] for k in scales) for seed in seeds)
        between = fmean(pstdev(entries[seed, k] for seed in seeds) for k in scales)
        checks.append(within("std over k / std over seeds", [across / between], 0.3, 1.5))
    return Outcome(checks, ("seed", *(f"k = {k}" for k in scales)), rows, "Mean test accuracy of the last ten epochs.")


def augmented(images: Tensor, seed: int, step: int) -> Tensor:
    """Each image cropped from itself with four pixels of border, and flipped every other time; the same each time."""
    draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
    examples, channels, height, width = images.shape
    down, right = torch.randint(9, (2, examples, 1, 1, 1), generator=draw)
    across = torch.arange(width).expand(examples, 1, 1, width)
    flipped = torch.rand(examples, 1, 1, 1, generator=draw) < 0.5
    across = torch.where(flipped, width - 1 - across, across) + right
    padded = functional.pad(images, (4, 4, 4, 4))
    rows = padded.gather(2, (torch.arange(height).view(1, 1, -1, 1) + down).expand(-1, channels, -1, width + 8))
    return rows.gather(3, across.expand(-1, channels, height, -1))


@cache
def _images(folder: str) -> tuple[Images, Images]:
    return load_cifar10(Path(folder))
