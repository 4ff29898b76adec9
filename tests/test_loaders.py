"""Loaders: transforms, items and batches."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

import helpers
from conftest import to_display


def make_loader(images, labels, train, size, batch):
    return helpers.make_loader(images, labels, train=train, image_size=size, batch_size=batch)


@pytest.mark.parametrize("size", [16, 32, np.int64(48)])
def test_evaluation_images_are_resized_and_normalised_in_order_and_draw_nothing(
        labelled_images, size):
    images, labels = labelled_images
    before = torch.get_rng_state()
    batches = list(make_loader(images, labels, False, size, np.int64(40)))
    assert torch.equal(torch.get_rng_state(), before)
    normalised = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    expected = F.interpolate(torch.from_numpy(normalised).permute(0, 3, 1, 2), int(size),
                             mode="bilinear", antialias=True).float()
    assert torch.allclose(torch.cat([x for x, _ in batches]), expected, atol=1e-5)
    assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()


@pytest.mark.parametrize("n, train, sizes", [
    (90, True, [40, 40]), (40, True, [40]), (10, True, [10]), (2, True, [2]), (1, True, None),
    (0, True, None), (0, False, None), (1, False, [1]), (41, False, [40, 1])])
def test_an_incomplete_last_batch_and_too_few_images(labelled_images, n, train, sizes):
    images, labels = (part[:n] for part in labelled_images)
    refusal = pytest.raises(ValueError, match=f"^{n} images are too few")
    with nullcontext() if sizes else refusal:
        loader = make_loader(images, labels, train, 32, 40)
        assert [len(y) for _, y in loader] == sizes and len(loader) == len(sizes)


def test_each_training_image_is_drawn_cropped_and_flipped_by_torchs_global_generator():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    loader = make_loader(np.stack([image] * 64), range(64), True, 32, 64)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y:y + 32, x:x + 32][:, ::step].tobytes(): (y, x, step)
             for y in range(9) for x in range(9) for step in (1, -1)}
    seen = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images, labels = next(iter(loader))
        seen.append((labels.tolist(), [crops[x.tobytes()] for x in to_display(images)]))
    order, drawn = seen[0]
    ys, xs, steps = map(set, zip(*drawn))  # each is one of the 162 possible ones
    assert ys == xs == set(range(9)) and steps == {1, -1} and len(set(drawn)) > 30
    assert seen[0] == seen[1] and order != seen[2][0] and drawn != seen[2][1]
    assert order != sorted(order) == list(range(64))


@pytest.mark.parametrize("train", [True, False])
def test_the_dataset_is_an_ordinary_one_and_grey_images_stay_grey(train):
    grey = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 1), np.uint8).repeat(3, axis=3)
    labels = torch.arange(48, dtype=torch.uint8)[:, None] % 3
    dataset = helpers.ImageDataset(grey, labels, train=train, image_size=40)
    image, label = dataset[np.int64(4)]
    assert image.shape == (3, 40, 40) and int(label) == 1 and len(dataset) == 48
    for loader in (
            DataLoader(Subset(dataset, range(24)), 12), DataLoader(dataset, 12, num_workers=1),
            DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 12, False))):
        for x, y in loader:
            assert np.ptp(to_display(x).astype(int), axis=-1).max() <= 1  # but for rounding
            assert (x.shape, y.shape) == ((12, 3, 40, 40), (12,))
            assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
