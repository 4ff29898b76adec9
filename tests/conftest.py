import csv
import sys
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import helpers

CELLS = nbformat.read(ROOT / "ML_Assessment_Candidate.ipynb", as_version=4).cells
(PARAMETERS,) = (c.source for c in CELLS if "parameters" in c.metadata.get("tags", []))
DEFAULTS = {}
exec(PARAMETERS, {}, DEFAULTS)


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
    images, labels = labelled_images
    return (
        helpers.make_loader(images[:72], labels[:72], train=True, image_size=32, batch_size=24),
        helpers.make_loader(images[72:], labels[72:], train=False, image_size=32, batch_size=24))


def to_display(images):
    """Undo the normalisation: float batch (B, 3, H, W) to uint8 array (B, H, W, 3)."""
    mean, std = (np.array(v) for v in (helpers.IMAGENET_MEAN, helpers.IMAGENET_STD))
    pixels = images.permute(0, 2, 3, 1).numpy() * std + mean
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def write_image_tree(data_dir, n_train=24, n_test=8, suffix=".png"):
    """The layout of the image-folder copies of CIFAR-10, filled with the stand-in's digits."""
    digits = helpers.make_stand_in(seed=3)
    for split, n in (("train", n_train), ("test", n_test)):
        images, labels = getattr(digits, split)
        for label, name in enumerate(helpers.CIFAR10_CLASSES):
            folder = Path(data_dir) / helpers.IMAGE_FOLDERS / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(images[labels == label][:n]):
                Image.fromarray(image).save(folder / f"{i:05d}{suffix}")
    return digits


def write_study(path, recipe, rows, **settings):
    """A file as tests/benchmark.py writes it; a row is a swap, seed, trainable, and accuracies."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        fixed = {**asdict(recipe), **settings}
        writer.writerow(["swap", "seed", "trainable", "validation", "test", *fixed])
        for *key, one, two, test in rows:
            writer.writerow([*key, f"{one} {two}", test, *fixed.values()])
