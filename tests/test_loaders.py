"""Data sets and loaders: what is resized, normalised, augmented, shuffled, left out."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, Subset

import helpers


@pytest.fixture
def dataset(labelled_images):
    """90 images for evaluation; the label of image i is i modulo 3."""
    images, labels = labelled_images
    return helpers.ImageDataset(images, labels, train=False, image_size=32)


@pytest.mark.parametrize("image_size", [16, 32, np.int64(48)])
def test_evaluation_images_are_resized_and_normalised_in_order_and_nothing_is_drawn(
        labelled_images, image_size):
    images, labels = labelled_images
    generator_before = torch.get_rng_state()
    loader = helpers.make_loader(
        images, labels, train=False, image_size=image_size, batch_size=np.int64(40))
    batches = list(loader)
    assert torch.equal(torch.get_rng_state(), generator_before)
    assert [len(batch_labels) for _, batch_labels in batches] == [40, 40, 10]

    normalised = (images / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    expected = F.interpolate(
        torch.from_numpy(normalised).permute(0, 3, 1, 2), size=int(image_size), mode="bilinear",
        antialias=True)
    found = torch.cat([batch_images for batch_images, _ in batches])
    found_labels = torch.cat([batch_labels for _, batch_labels in batches])
    assert torch.allclose(found, expected.float(), atol=1e-5)
    assert found_labels.tolist() == labels.tolist()
    assert (found.dtype, found_labels.dtype) == (torch.float32, torch.int64)


def test_pixels_to_look_at_are_those_that_were_given(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images, labels, train=False, image_size=32, batch_size=90)
    normalised, _ = next(iter(loader))
    pixels = helpers.to_pixels(normalised)
    assert np.array_equal(pixels, images) and pixels.dtype == np.uint8
    too_bright_and_too_dark = torch.tensor([9.0, -9.0]).expand(1, 3, 1, 2)
    assert helpers.to_pixels(too_bright_and_too_dark).tolist() == [[[[255] * 3, [0] * 3]]]


def possible_views(image):
    """{bytes of a view: (top, left, is flipped)}: the 81 crops of the padded image, and flipped."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    views = {}
    for top in range(9):
        for left in range(9):
            crop = padded[top:top + 32, left:left + 32]
            views[crop.tobytes()] = (top, left, False)
            views[crop[:, ::-1].tobytes()] = (top, left, True)
    return views


def test_each_training_image_is_a_crop_of_the_padded_image_and_flipped_or_not():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    views = possible_views(image)
    assert len(views) == 162
    loader = helpers.make_loader(
        np.stack([image] * 150), np.zeros(150, dtype=int), train=True, image_size=32,
        batch_size=150)
    torch.manual_seed(1)
    images, _ = next(iter(loader))
    drawn = [views[pixels.tobytes()] for pixels in helpers.to_pixels(images)]
    assert {top for top, _, _ in drawn} == set(range(9))
    assert {left for _, left, _ in drawn} == set(range(9))
    assert 45 < sum(is_flipped for _, _, is_flipped in drawn) < 105
    assert len(set(drawn)) > 81


def test_torchs_generator_draws_the_order_and_the_views_of_training_images(labelled_images):
    images, _ = labelled_images
    loader = helpers.make_loader(
        images[:30], np.arange(30), train=True, image_size=40, batch_size=30)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(next(iter(loader)))
    (first, first_order), (same, same_order), (other, other_order) = drawn
    assert sorted(first_order.tolist()) == list(range(30))
    assert first_order.tolist() != list(range(30))
    assert torch.equal(first_order, same_order) and torch.equal(first, same)
    assert not torch.equal(first_order, other_order)
    assert not torch.equal(first[first_order.argsort()], other[other_order.argsort()])
    assert first.shape == (30, 3, 40, 40)


@pytest.mark.parametrize("n, train, sizes", [
    (11, True, [4, 4]), (8, True, [4, 4]), (4, True, [4]), (3, True, [3]), (2, True, [2]),
    (5, False, [4, 1]), (1, False, [1])])
def test_training_leaves_out_an_incomplete_last_batch_unless_it_is_the_only_one(
        labelled_images, n, train, sizes):
    images, labels = labelled_images
    loader = helpers.make_loader(
        images[:n], labels[:n], train=train, image_size=32, batch_size=4)
    assert [len(batch_labels) for _, batch_labels in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("n, train", [(1, True), (0, True), (0, False)])
def test_too_few_images_are_refused(labelled_images, n, train):
    images, labels = labelled_images
    with pytest.raises(ValueError, match=f"^{n} images are too few for a loader"):
        helpers.make_loader(images[:n], labels[:n], train=train, image_size=32, batch_size=40)


def test_a_dataset_refuses_what_are_not_images_and_labels(labelled_images):
    images, labels = labelled_images
    with pytest.raises(ValueError, match=r"images are float64 \(90, 32, 32, 3\)"):
        helpers.ImageDataset(images / 255, labels, train=False, image_size=32)
    with pytest.raises(ValueError, match=r"labels int64 \(89,\)"):
        helpers.ImageDataset(images, labels[1:], train=False, image_size=32)


@pytest.mark.parametrize("index", [
    [1, 2], (1,), slice(0, 2), torch.tensor([1, 2]), torch.tensor([1]), np.array([1, 2]), 1.0,
    "1", None], ids=repr)
def test_an_index_that_is_not_one_whole_number_is_refused_and_shown(dataset, index):
    with pytest.raises(TypeError, match=f"^index is {re.escape(repr(index))}: give one whole"):
        dataset[index]


def test_a_sampler_of_whole_batches_is_refused(dataset):
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=2, drop_last=False)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None)
    with pytest.raises(TypeError, match=r"^index is \[0, 1\]: give one whole number"):
        next(iter(loader))


@pytest.mark.parametrize("index", [-1, np.int64(89), torch.tensor(89)], ids=repr)
def test_any_whole_number_that_is_in_range_is_an_index(dataset, index):
    image, label = dataset[index]
    last_image, last_label = dataset[89]
    assert torch.equal(image, last_image) and int(label) == int(last_label) == 89 % 3
    assert len(dataset) == 90
    with pytest.raises(IndexError):
        dataset[90]


def test_torchs_subset_batch_sampler_and_workers_take_the_dataset(labelled_images):
    images, labels = labelled_images
    dataset = helpers.ImageDataset(images, labels, train=True, image_size=40)
    every_third = Subset(dataset, range(0, 90, 3))
    sampler = BatchSampler(SequentialSampler(dataset), batch_size=45, drop_last=False)
    for loader, expected in (
            (DataLoader(every_third, batch_size=30), [0] * 30),
            (DataLoader(dataset, batch_sampler=sampler), [0, 1, 2] * 15),
            (DataLoader(dataset, batch_size=45, num_workers=1), [0, 1, 2] * 15)):
        for batch_images, batch_labels in loader:
            assert batch_images.shape == (len(expected), 3, 40, 40)
            assert batch_labels.tolist() == expected
