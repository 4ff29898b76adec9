"""Loaders: transforms and batches."""

import numpy as np
import pytest
import torch

import helpers


def test_eval_batches_are_resized_and_normalised_in_order(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images, labels, helpers.eval_transform, 32, 40, seed=1)
    batches = list(loader)
    assert [tuple(x.shape) for x, _ in batches] == [(40, 3, 32, 32), (40, 3, 32, 32), (10, 3, 32, 32)]
    assert torch.cat([y for _, y in batches]).tolist() == labels.tolist()
    expected = (images[0].transpose(2, 0, 1) / 255 - np.array(helpers.MEAN)[:, None, None]) / np.array(
        helpers.STD)[:, None, None]
    assert np.allclose(batches[0][0][0], expected, atol=1e-5)


def test_images_are_resized_to_the_image_size(labelled_images):
    loader = helpers.make_loader(*labelled_images, helpers.train_transform, 48, 30, seed=1)
    images, labels = next(iter(loader))
    assert images.shape == (30, 3, 48, 48) and images.dtype == torch.float32 and labels.shape == (30,)
    loader.dataset.set_image_size(32)
    assert next(iter(loader))[0].shape == (30, 3, 32, 32)


def test_train_batches_are_shuffled_and_drop_an_incomplete_last_one(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images, labels, helpers.train_transform, 32, 40, seed=1)
    batches = [y for _, y in loader]
    assert [len(y) for y in batches] == [40, 40] and len(loader) == 2
    assert torch.cat(batches).tolist() != labels[:80].tolist()


def test_a_training_set_smaller_than_a_batch_is_one_batch(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images[:10], labels[:10], helpers.train_transform, 32, 40, seed=1)
    assert [len(y) for _, y in loader] == [10]


@pytest.mark.parametrize("n, transform", [(1, helpers.train_transform), (0, helpers.eval_transform)])
def test_too_few_images_are_refused(labelled_images, n, transform):
    images, labels = labelled_images
    with pytest.raises(ValueError, match=f"{n} images are too few"):
        helpers.make_loader(images[:n], labels[:n], transform, 32, 40, seed=1)


def test_the_same_seed_gives_the_same_batches(labelled_images):
    def first_batch(seed):
        loader = helpers.make_loader(*labelled_images, helpers.train_transform, 32, 40, seed=seed)
        torch.manual_seed(seed)
        return next(iter(loader))

    (x, y), (same_x, same_y), (_, other_y) = first_batch(1), first_batch(1), first_batch(2)
    assert torch.equal(x, same_x) and torch.equal(y, same_y) and not torch.equal(y, other_y)


def test_each_image_is_cropped_and_flipped_on_its_own():
    image = np.random.default_rng(0).integers(0, 256, size=(32, 32, 3), dtype=np.uint8)
    images = np.repeat(image[None], 64, axis=0)
    loader = helpers.make_loader(images, np.zeros(64), helpers.train_transform, 32, 64, seed=1)
    pixels = helpers.to_display(next(iter(loader))[0])
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {}
    for y in range(9):
        for x in range(9):
            crop = padded[y:y + 32, x:x + 32]
            crops[crop.tobytes()], crops[crop[:, ::-1].tobytes()] = (y, x, False), (y, x, True)
    drawn = [crops[p.tobytes()] for p in pixels]  # each is one of the 162 possible ones
    assert len(set(drawn)) > 30
    assert {flip for _, _, flip in drawn} == {True, False}
    assert {y for y, _, _ in drawn} | {x for _, x, _ in drawn} == set(range(9))


def test_evaluation_has_nothing_random(labelled_images):
    loader = helpers.make_loader(*labelled_images, helpers.eval_transform, 40, 40, seed=1)
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(loader, loader))


def test_the_transform_summaries_name_every_step():
    train = helpers.describe_transform(helpers.train_transform(64))
    val = helpers.describe_transform(helpers.eval_transform(64))
    assert train.startswith("RandomCrop(size=(32, 32)") and "RandomHorizontalFlip(p=0.5)" in train
    assert "Resize(size=(64, 64)" in train and "Normalize(mean=(0.485" in train
    assert "Random" not in val and train.endswith(val) and "\n" not in train


def test_another_transform_is_refused(labelled_images):
    with pytest.raises(ValueError, match="must be train_transform or eval_transform"):
        helpers.make_loader(*labelled_images, lambda size: None, 32, 24, seed=1)
