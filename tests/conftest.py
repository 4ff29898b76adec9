import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # here only: a kernel that a test starts shows its figures
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import helpers

torch.set_num_threads(2)


class TinyNet(nn.Module):
    """A small stand-in for a ResNet: BatchNorm, three nn.ReLU, and a head called fc."""

    def __init__(self, n_classes):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        )
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
        helpers.make_loader(images[:72], labels[:72], helpers.train_transform, 32, 24, seed=7),
        helpers.make_loader(images[72:], labels[72:], helpers.eval_transform, 32, 24, seed=7),
    )


def write_image_tree(data_dir, n_train=24, n_test=8, suffix=".png"):
    """The layout of the image-folder copies of CIFAR-10, filled with generated shapes."""
    shapes = helpers.make_stand_in(seed=3, n_train=n_train, n_test=n_test)
    for split in ("train", "test"):
        images, labels = getattr(shapes, f"{split}_images"), getattr(shapes, f"{split}_labels")
        for i, (image, label) in enumerate(zip(images, labels)):
            folder = Path(data_dir) / helpers.IMAGE_FOLDERS / split / helpers.CIFAR10_CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:05d}{suffix}")
    return shapes
