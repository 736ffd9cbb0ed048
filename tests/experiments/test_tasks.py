"""The tasks: what they read, what they hold out, and what they say when something is missing."""

from __future__ import annotations

import importlib.util
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_stability.experiments import text, vision
from dist_stability.experiments.data import Subset, Windows
from dist_stability.experiments.tasks import cross_entropy, make_task
from dist_stability.report.extras import MissingExtra, import_extra


def test_text_is_learned_from_one_part_and_measured_on_two_others() -> None:
    task = make_task("text")
    train, probe, evaluation = task.train, task.probe, task.evaluation
    assert isinstance(train, Windows) and isinstance(probe, Subset) and isinstance(evaluation, Subset)
    assert len(train) > 300_000
    assert task.data == "English text of pydoc_data.topics"
    # Last character of a window of one part comes before the first of the next part.
    held_out = probe.examples
    assert isinstance(held_out, Windows)
    assert train.tokens.numel() + held_out.tokens.numel() == len(text.load_text())
    assert int(probe.indices.max()) + text.CONTEXT < int(evaluation.indices.min()) + 1


def test_the_phrase_is_repeated_and_long_enough_for_the_papers_protocol() -> None:
    task = make_task("phrase")
    assert isinstance(task.train, Windows) and isinstance(task.probe, Subset)
    assert task.data == "one phrase, repeated"
    assert len(task.train) >= 250 * 64  # no window twice in 250 batches of 64
    period = len(text.PHRASE)
    assert period == 79 and text.repeated_phrase()[: 2 * period] == 2 * text.PHRASE
    assert torch.equal(task.train.tokens[:-period], task.train.tokens[period:])
    assert int(task.probe.indices.max()) + text.CONTEXT < int(task.evaluation.indices.min()) + 1
    probe = task.probe_batches(16)[0][0]
    assert len(probe.unique(dim=0)) == 16, "the probe's windows begin at different places of the phrase"
    model = task.build()
    assert model.token.weight.shape == (28, 64) and [b.heads for b in model.blocks] == [4, 4]


def test_the_text_model_cannot_see_the_future() -> None:
    torch.manual_seed(0)
    model = text.CharacterTransformer(11, context=8, width=16)
    tokens = torch.randint(0, 11, (1, 8))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:5], after[:5])
    assert not torch.equal(before[5:], after[5:])


def test_dropout_is_off_by_default_and_acts_in_training_only() -> None:
    tokens = torch.randint(0, 11, (2, 8))
    plain, dropping = (text.CharacterTransformer(11, context=8, dropout=p) for p in (0.0, 0.5))
    assert torch.equal(plain(tokens), plain(tokens))
    assert not torch.equal(dropping(tokens), dropping(tokens))
    assert torch.equal(dropping.eval()(tokens), dropping(tokens))


@pytest.mark.parametrize("name", ["text", "phrase", "digits", "distorted-digits"])
def test_a_task_fits_its_model_and_loss(name: str) -> None:
    task = make_task(name)
    torch.manual_seed(0)
    model = task.build()
    assert len(task.blocks(model)) == (8 if name.endswith("digits") else 2)
    loss = cross_entropy(model, task.train.batch(torch.arange(4)))
    assert loss.ndim == 0 and 1.0 < loss.item() < 8.0
    assert [len(inputs) for inputs, _ in task.probe_batches(8, pieces=2)] == [4, 4]
    assert {len(inputs) for inputs, _ in task.evaluation_batches()} == {64}
    with pytest.raises(ValueError, match="7 examples cannot be cut into 2"):
        task.probe_batches(7, pieces=2)


def test_digits_are_32_by_32_in_three_channels_and_a_fifth_is_held_out() -> None:
    train, held_out = vision.load_digits()
    assert (len(train), len(held_out)) == (1438, 359)
    pixels, _ = train.batch(torch.arange(len(train)))
    assert pixels.shape[1:] == (3, 32, 32)
    assert abs(pixels.mean().item()) < 0.05 and abs(pixels.std().item() - 1) < 0.1


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'imagenet': choose from text, phrase, digits, distorted-digits, cifar10"):
        make_task("imagenet")


def test_cifar10_says_what_it_looked_for_where_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(vision.DataMissing, match=r"needs --data DIR.*cifar-10-batches-py.*Nothing is downloaded"):
        make_task("cifar10")
    with pytest.raises(vision.DataMissing, match=r"no CIFAR-10 in .*: looked for ") as missing:
        make_task("cifar10", data=tmp_path)
    assert str(tmp_path / "cifar-10-batches-py") in str(missing.value)
    assert "cifar-10-python.tar.gz" in str(missing.value)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(vision.DataMissing, match="incomplete or damaged"):
        make_task("cifar10", data=tmp_path)


def test_cifar10_is_read_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = vision.import_torchvision()
    # Only the checksums of the published files are passed over; the files are in the published format.
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        pixels = torch.full((20, 3072), 40 * number, dtype=torch.uint8).numpy()
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [number] * 20}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(number) for number in range(10)]}))
    task = make_task("cifar10", data=tmp_path)
    pixels, labels = task.train.batch(torch.tensor([0, 99]))
    assert len(task.train) == 100 and len(task.probe) == 10
    assert labels.tolist() == [0, 4]
    assert pixels.shape == (2, 3, 32, 32)
    assert pixels[1, 0, 0, 0].item() == pytest.approx((160 / 255 - 0.4914) / 0.2470)


@pytest.mark.parametrize("module", ["torchvision", "sklearn.datasets", "matplotlib.figure", "rich.progress"])
def test_a_missing_package_names_the_extra_to_install(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = module.split(".")[0]
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(MissingExtra, match=rf"a test needs '{package}'.*pip install 'dist-stability\[train\]'"):
        vision.import_torchvision("a test") if package == "torchvision" else import_extra(module, "a test")


def test_text_without_the_standard_librarys_topics_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(text.TextUnavailable, match=r"pydoc_data\.topics.*--task digits"):
        text.load_text()


_IMPORT = """
from dist_stability.experiments import vision
vision._operators_load = {operators_load}
vision.import_torchvision().models.resnet18(num_classes=2)
vision.import_torchvision()
print(len(vision._declared))
"""


def test_torchvision_is_imported_beside_any_torch_and_declared_operators_only_if_needed() -> None:
    def declared(operators_load: str) -> subprocess.CompletedProcess[str]:
        code = _IMPORT.format(operators_load=operators_load)
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)

    here = declared("vision._operators_load")
    assert here.returncode == 0, here.stderr
    matching = vision._operators_load()
    assert here.stdout.strip() == ("0" if matching else "1")
    if not matching:  # without the two declarations the import fails: this is what they are for
        assert "nms" in declared("lambda: True").stderr
