"""Loaders: transforms, items and batches."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset, random_split

import helpers
from conftest import to_display


def make_loader(images, labels, train, image_size, batch_size, seed=1):
    return helpers.make_loader(
        images, labels, train=train, image_size=image_size, batch_size=batch_size, seed=seed)


def test_eval_batches_are_resized_and_normalised_in_order_without_anything_random(labelled_images):
    images, labels = labelled_images
    loader = make_loader(images, labels, False, 32, np.int64(40))
    batches = list(loader)
    assert [tuple(x.shape) for x, _ in batches] == [(n, 3, 32, 32) for n in (40, 40, 10)]
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(batches, loader))
    assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()
    mean, std = np.array(helpers.IMAGENET_MEAN), np.array(helpers.IMAGENET_STD)
    expected = (images[:40] / 255 - mean) / std
    assert np.allclose(batches[0][0].permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_images_are_resized_by_named_steps(labelled_images, train):
    loader = make_loader(*labelled_images, train, 48, 30)
    images, targets = next(iter(loader))
    assert images.shape == (30, 3, 48, 48) and images.dtype == torch.float32
    assert targets.shape == (30,) and targets.dtype == torch.int64
    assert ("RandomCrop(size=(32, 32)" in str(loader.dataset.augment)) == train


@pytest.mark.parametrize("n, train, sizes", [
    (90, True, [40, 40]), (80, True, [40, 40]), (40, True, [40]), (10, True, [10]), (2, True, [2]),
    (1, False, [1]), (41, False, [40, 1]), (1, True, None), (0, True, None), (0, False, None)])
def test_an_incomplete_last_batch_and_too_few_images(labelled_images, n, train, sizes):
    images, labels = (part[:n] for part in labelled_images)
    refusal = pytest.raises(ValueError, match=f"^{n} images are too few")
    with nullcontext() if sizes else refusal:
        loader = make_loader(images, labels, train, 32, 40)
        assert [len(y) for _, y in loader] == sizes and len(loader) == len(sizes)


def test_training_batches_are_shuffled_by_the_seed(labelled_images):
    images, labels = labelled_images
    one, same, other = (
        torch.cat([y for _, y in make_loader(images, labels, True, 32, 30, seed)]).tolist()
        for seed in (1, 1, 2))
    assert one == same and sorted(one) == sorted(labels) and labels.tolist() != one != other


def test_each_training_image_is_cropped_and_flipped_on_its_own():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    loader = make_loader(np.stack([image] * 64), [0] * 64, True, 32, 64)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y:y + 32, x:x + 32][:, ::step].tobytes(): (y, x, step)
             for y in range(9) for x in range(9) for step in (1, -1)}
    drawn = [crops[pixels.tobytes()] for pixels in to_display(next(iter(loader))[0])]
    ys, xs, steps = map(set, zip(*drawn))  # each is one of the 162 possible ones
    assert ys == xs == set(range(9)) and steps == {1, -1} and len(set(drawn)) > 30


@pytest.mark.parametrize("train", [True, False])
def test_the_dataset_is_an_ordinary_one_and_grey_images_stay_grey(train):
    grey = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 1), np.uint8).repeat(3, axis=3)
    labels = torch.arange(48, dtype=torch.uint8) % 3
    dataset = helpers.ImageDataset(grey, labels, train=train, image_size=40)
    image, label = dataset[np.int64(3)]
    assert image.shape == (3, 40, 40) and int(label) == 0 and len(dataset) == 48
    loaders = [
        DataLoader(dataset, batch_size=12), DataLoader(dataset, batch_size=12, num_workers=1),
        DataLoader(Subset(dataset, range(24)), 12), DataLoader(random_split(dataset, [24, 24])[0], 12),
        DataLoader(dataset, batch_sampler=BatchSampler(SequentialSampler(dataset), 12, False)),
        DataLoader(dataset, sampler=range(12), batch_size=None)]
    for loader in loaders:
        for x, y in loader:
            pixels = to_display(x if x.ndim == 4 else x[None]).astype(int)
            assert np.ptp(pixels, axis=-1).max() <= 1  # as grey as rounding lets it be
            assert pixels.shape[1:] == (40, 40, 3) and y.dtype == torch.int64


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((2, 96, 96, 3), np.uint8), [0, 1], r"\(2, 96, 96, 3\)"),
    (np.zeros((2, 32, 32, 3)), [0, 1], "float64"), (np.zeros((2, 3, 32, 32), np.uint8), [0, 1], "3, 32"),
    (np.zeros((2, 32, 32, 3), np.uint8), [0], r"\(1,\): .* each of 2 images")])
def test_images_of_another_kind_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        make_loader(images, labels, True, 32, 2)
