"""Loaders: transforms and batches."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import helpers


def test_eval_batches_are_resized_and_normalised_in_order_without_anything_random(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images, labels, False, 32, 40, seed=1)
    batches = list(loader)
    assert [tuple(x.shape) for x, _ in batches] == [(n, 3, 32, 32) for n in (40, 40, 10)]
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(batches, loader))
    assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()
    expected = (images[:40] / 255 - np.array(helpers.MEAN)) / np.array(helpers.STD)
    assert np.allclose(batches[0][0].permute(0, 2, 3, 1), expected, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
def test_images_are_resized_by_named_steps_to_a_size_that_can_be_set_again(labelled_images, train):
    loader = helpers.make_loader(*labelled_images, train, 48, 30, seed=1)
    images, targets = next(iter(loader))
    assert images.shape == (30, 3, 48, 48) and images.dtype == torch.float32
    assert targets.shape == (30,) and targets.dtype == torch.int64
    assert ("RandomCrop(size=(32, 32)" in repr(loader.dataset.transform)) == train
    loader.dataset.set_image_size(40)
    assert next(iter(loader))[0].shape == (30, 3, 40, 40) and loader.dataset.image_size == 40


@pytest.mark.parametrize("n, train, sizes", [
    (90, True, [40, 40]), (80, True, [40, 40]), (40, True, [40]), (10, True, [10]), (2, True, [2]),
    (1, False, [1]), (41, False, [40, 1]), (1, True, None), (0, True, None), (0, False, None)])
def test_an_incomplete_last_batch_and_too_few_images(labelled_images, n, train, sizes):
    images, labels = (part[:n] for part in labelled_images)
    refusal = pytest.raises(ValueError, match=f"^{n} images are too few")
    with nullcontext() if sizes else refusal:
        loader = helpers.make_loader(images, labels, train, 32, 40, seed=1)
        assert [len(y) for _, y in loader] == sizes and len(loader) == len(sizes)


def test_training_batches_are_shuffled_by_the_seed(labelled_images):
    images, labels = labelled_images
    one, same, other = (
        torch.cat([y for _, y in helpers.make_loader(images, labels, True, 32, 30, seed)]).tolist()
        for seed in (1, 1, 2))
    assert one == same and sorted(one) == sorted(labels) and labels.tolist() != one != other


def test_each_training_image_is_cropped_and_flipped_on_its_own():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    loader = helpers.make_loader(np.stack([image] * 64), np.zeros(64), True, 32, 64, seed=1)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y:y + 32, x:x + 32][:, ::step].tobytes(): (y, x, step)
             for y in range(9) for x in range(9) for step in (1, -1)}
    drawn = [crops[pixels.tobytes()] for pixels in helpers.to_display(next(iter(loader))[0])]
    ys, xs, steps = map(set, zip(*drawn))  # each is one of the 162 possible ones
    assert ys == xs == set(range(9)) and steps == {1, -1} and len(set(drawn)) > 30
