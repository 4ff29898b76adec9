import pickle
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import datasets

import helpers

torch.set_num_threads(1)  # the networks are tiny


def pytest_addoption(parser):
    parser.addoption(
        "--committed", action="store_true",
        help="also hold the committed notebook, README and evidence to each other")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--committed"):
        return
    skip = pytest.mark.skip(reason="only with --committed")
    for item in items:
        if "committed" in item.keywords:
            item.add_marker(skip)


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "committed: holds what is committed to each other; run with --committed")


class TinyNet(nn.Module):
    """A small stand-in for a ResNet: BatchNorm, three nn.ReLU, and a head called fc."""

    def __init__(self, n_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.relu = nn.ReLU()
        self.fc = nn.Linear(16, n_classes)

    def forward(self, x):
        return self.fc(self.relu(self.features(x)).mean((2, 3)))


@pytest.fixture
def tiny_net():
    torch.manual_seed(0)
    return TinyNet(3)


@pytest.fixture
def labelled_images():
    """90 images of 3 classes that differ in brightness, so that little training is needed."""
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    images = rng.integers(0, 60, size=(90, 32, 32, 3)) + 90 * labels[:, None, None, None]
    return images.astype(np.uint8), labels.astype(np.int64)


@pytest.fixture
def loaders(labelled_images):
    """A training loader of 72 images in batches of 24, and one of the other 18."""
    images, labels = labelled_images
    return (
        helpers.make_loader(images[:72], labels[:72], train=True, image_size=32, batch_size=24),
        helpers.make_loader(images[72:], labels[72:], train=False, image_size=32, batch_size=24))


def md5_of(path):
    return datasets.utils.calculate_md5(str(path))


def write_official_files(folder, train, test):
    """Write (images, labels) twice in the official layout: the batches' folder and the archive.

    Returns the MD5s that make torchvision and helpers take them: see ``accept_md5s``.
    """
    batches = Path(folder) / helpers.BATCHES
    batches.mkdir(parents=True)
    for name, (images, labels) in (("data_batch_1", train), ("test_batch", test)):
        content = {"data": images.transpose(0, 3, 1, 2).reshape(len(images), -1),
                   "labels": [int(label) for label in labels]}
        (batches / name).write_bytes(pickle.dumps(content))
    (batches / "batches.meta").write_bytes(
        pickle.dumps({"label_names": list(helpers.CIFAR10_CLASSES)}))
    archive = Path(folder) / helpers.ARCHIVE_NAME
    shutil.make_archive(str(archive)[:-len(".tar.gz")], "gztar", folder, helpers.BATCHES)
    return {"train_list": [["data_batch_1", md5_of(batches / "data_batch_1")]],
            "test_list": [["test_batch", md5_of(batches / "test_batch")]],
            "meta": {"filename": "batches.meta", "key": "label_names",
                     "md5": md5_of(batches / "batches.meta")},
            "tgz_md5": md5_of(archive)}


def accept_md5s_source(md5s):
    """Python source that makes torchvision and helpers take files of these MD5s as official."""
    lines = ["import helpers", "from torchvision.datasets import CIFAR10"]
    lines += [f"CIFAR10.{name} = {value!r}" for name, value in md5s.items()]
    lines += ["helpers.ARCHIVE_MD5 = CIFAR10.tgz_md5"]
    return "\n".join(lines)


@pytest.fixture
def official_files(tmp_path_factory, monkeypatch):
    """A folder with tiny official files, batches and archive; their MD5s are the accepted ones."""
    folder = tmp_path_factory.mktemp("official")
    rng = np.random.default_rng(0)
    train, test = (
        (rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10)
        for n in (100, 20))
    md5s = write_official_files(folder, train, test)
    for name, value in md5s.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    monkeypatch.setattr(helpers, "ARCHIVE_MD5", md5s["tgz_md5"])
    return folder
