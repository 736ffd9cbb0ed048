"""Image classification with torchvision's ResNet-18: scikit-learn's digits, and CIFAR-10 from a folder."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional

from dist_stability.experiments.data import Distorted, Images
from dist_stability.report.extras import import_extra

DIGITS_NAME = "handwritten digits of scikit-learn"
DISTORTED_NAME = f"{DIGITS_NAME}, distorted"
CIFAR10_NAME = "CIFAR-10"
CIFAR10_FOLDER = "cifar-10-batches-py"


# Keeps the declarations of `import_torchvision` alive: a Library withdraws its operators when it is collected.
_declared: list[torch.library.Library] = []


class DataMissing(RuntimeError):
    """A data set that must be brought by the user is not where it was looked for."""


def resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 of torchvision, without pretrained weights."""
    model: nn.Module = import_torchvision("ResNet-18").models.resnet18(weights=None, num_classes=classes)
    return model


def resnet_blocks(model: nn.Module) -> list[nn.Module]:
    """The residual blocks: what FSDP shards one by one."""
    return [
        block for stage in ("layer1", "layer2", "layer3", "layer4") for block in model.get_submodule(stage).children()
    ]


def load_digits() -> tuple[Images, Images]:
    """1,797 digits of 8 x 8 pixels, scaled to 32 x 32 with three equal channels; every fifth is held out."""
    digits = import_extra("sklearn.datasets", "the task 'digits'").load_digits()
    small = torch.from_numpy(digits.images).float()[:, None] / 16
    pixels = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4

    def images(mask: torch.Tensor) -> Images:
        return Images(pixels[mask].contiguous(), labels[mask], mean=(0.305,) * 3, std=(0.35,) * 3)

    return images(~held_out), images(held_out)


def load_distorted_digits() -> tuple[Distorted, Distorted]:
    """The digits in as many affine distortions as CIFAR-10 has images: 50,330 to train on, and 10,052 held out.

    As they are, 1,438 images are learnt by heart within sixty steps of 128, and what follows is another kind of
    training than the first steps on CIFAR-10, where hardly an image is seen twice.
    """
    train, held_out = load_digits()
    return Distorted(train, 35, seed=1), Distorted(held_out, 28, seed=2)


def load_cifar10(root: Path | None) -> tuple[Images, Images]:
    """CIFAR-10's training and test images, through torchvision's loader; nothing is ever downloaded.

    Args:
        root: Folder that contains ``cifar-10-batches-py``.

    Raises:
        DataMissing: No folder given, or the data set in it is absent or incomplete.
    """
    remedy = (
        f"Unpack the archive 'cifar-10-python.tar.gz' so that the folder {CIFAR10_FOLDER!r} lies inside DIR, "
        "then pass --data DIR. Nothing is downloaded."
    )
    if root is None:
        raise DataMissing(f"the task 'cifar10' needs --data DIR, a folder that holds {CIFAR10_FOLDER!r}. {remedy}")
    if not (root / CIFAR10_FOLDER).is_dir():
        raise DataMissing(
            f"no CIFAR-10 in {root.absolute()}: looked for {(root / CIFAR10_FOLDER).absolute()}. {remedy}"
        )
    dataset = import_torchvision("the task 'cifar10'").datasets.CIFAR10

    def images(train: bool) -> Images:
        try:
            raw = dataset(str(root), train=train, download=False)
        except RuntimeError as error:  # torchvision's "Dataset not found or corrupted"
            raise DataMissing(
                f"CIFAR-10 in {(root / CIFAR10_FOLDER).absolute()} is incomplete or damaged ({error}). {remedy}"
            ) from error
        pixels = torch.from_numpy(raw.data).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(raw.targets), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))

    return images(True), images(False)


def import_torchvision(needed_for: str = "this task") -> ModuleType:
    """Import torchvision, also where its compiled operators cannot be loaded.

    The wheel on PyPI is built against CUDA. Beside a CPU-only torch its C++ library does not load, and the import then
    fails while it registers the fake kernels of two operators that nobody declared. Their schemas are all it needs:
    models and datasets use neither. With a torchvision that matches torch this is a plain import. No longer needed
    once ``import torchvision`` succeeds by itself beside ``torch+cpu``.

    Raises:
        MissingExtra: torchvision is not installed.
    """
    if "torchvision" not in sys.modules and not _operators_load():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return import_extra("torchvision", needed_for)


def _operators_load() -> bool:
    """Whether torchvision's C++ library loads, or there is no torchvision at all."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    for folder in spec.submodule_search_locations:
        found = importlib.machinery.FileFinder(folder, loader).find_spec("_C")
        if found is not None and found.origin is not None:
            try:
                torch.ops.load_library(found.origin)  # what torchvision does itself; a second load is a no-op
            except OSError:
                return False
            return True
    return False
