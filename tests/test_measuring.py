"""Measuring and pictures: paired comparison, judgement, figures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest

import helpers


def pair(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


@pytest.mark.parametrize("counts, p_value", [
    ((794, 150, 86, 570), 3.716e-05),  # Agresti 1990, p. 350, as in R's mcnemar.test
    ((5, 2, 8, 5), 2 * (1 + 10 + 45) / 2**10), ((5, 8, 2, 5), 2 * (1 + 10 + 45) / 2**10),
    ((0, 4, 0, 6), 2 / 2**4), ((3, 1, 1, 3), 1)])
def test_the_exact_mcnemar_p_is_the_binomial_sum(counts, p_value):
    comparison = helpers.compare_paired(*pair(*counts))
    assert comparison.p_value == pytest.approx(p_value, rel=1e-3)
    assert (comparison.only_a, comparison.only_b) == counts[1:3]


def test_the_paired_interval_is_the_textbook_one_and_signed():
    a, b = pair(70, 15, 5, 10)
    comparison, turned = helpers.compare_paired(a, b), helpers.compare_paired(b, a)
    half = 1.9842 * (a.astype(float) - b).std(ddof=1) / 10  # t quantile of 99 degrees of freedom
    assert comparison.difference == pytest.approx(0.10)
    assert (comparison.low, comparison.high) == pytest.approx((0.10 - half, 0.10 + half), abs=1e-4)
    limits = turned.difference, turned.low, turned.high
    assert limits == pytest.approx((-0.10, -comparison.high, -comparison.low))


@pytest.mark.parametrize("counts, difference, p_value", [
    ((5, 0, 0, 5), 0, 1), ((0, 6, 0, 0), 1, 2 / 2**6), ((0, 0, 6, 0), -1, 2 / 2**6)])
def test_without_spread_the_interval_is_a_point(counts, difference, p_value, recwarn):
    result = helpers.compare_paired(*pair(*counts))
    assert (result.difference, result.low, result.high) == (difference,) * 3 and not recwarn
    assert result.p_value == pytest.approx(p_value)


@pytest.mark.parametrize("a, b", [
    ([True], [True]), ([True, False], [True]), ([[True, False]] * 2, [[True, False]] * 2)])
def test_arrays_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="same 2 or more"):
        helpers.compare_paired(a, b)


@pytest.mark.parametrize("interval, claim, verdict", [
    ((0.1, 0.2), (0,), "supported"), ((-0.2, -0.1), (0,), "not supported"),
    ((-0.1, 0.1), (0,), "undecided"), ((0, 0.1), (0,), "undecided"),
    ((-0.1, 0), (0,), "not supported"), ((-0.1, 0.1), (-0.2, 0.2), "supported"),
    ((-0.1, 0.2), (-0.2, 0.2), "undecided"), ((-0.3, 0.3), (-0.2, 0.2), "undecided"),
    ((0.2, 0.3), (-0.2, 0.2), "not supported"), ((0.1, 0.1), (-0.2, 0.2), "undecided"),
    ((-0.2, 0.1), (-0.2, 0.2), "undecided")])
def test_a_claim_is_judged_by_the_whole_interval(interval, claim, verdict):
    assert helpers.judge(*interval, *claim) == verdict


def test_display_undoes_the_normalisation(labelled_images):
    loader = helpers.make_loader(*labelled_images, False, 32, 90, seed=1)
    images, _ = next(iter(loader))
    assert np.array_equal(helpers.to_display(images), labelled_images[0])
    assert (helpers.to_display(images + 9) == 255).all()  # brighter than white


def test_the_image_grid_shows_every_image_with_its_caption():
    figure = helpers.plot_images(np.zeros((10, 32, 32, 3), np.uint8), "abcdefghij", "Title")
    assert [axis.get_title() for axis in figure.axes] == list("abcdefghij") + [""] * 6
    assert [len(axis.images) for axis in figure.axes] == [1] * 10 + [0] * 6
    assert figure.get_suptitle() == "Title" and not any(axis.axison for axis in figure.axes)
    assert len(helpers.plot_images(np.zeros((0, 32, 32, 3), np.uint8), [], "None").axes) == 8
    plt.close("all")


EPOCHS = (helpers.EpochMetrics(1, 0.9, 0.6, 0.8, 0.62, 32),
          helpers.EpochMetrics(2, 0.5, 0.8, 0.6, 0.75, 64))
WORSE = tuple(replace(m, val_accuracy=0.5) for m in (*EPOCHS, replace(EPOCHS[1], epoch=3)))


@pytest.mark.parametrize("epochs", [{"SiLU": EPOCHS}, {"SiLU": EPOCHS, "ReLU": WORSE}])
def test_the_curves_hold_the_metrics_and_the_difference_and_shade_the_small_epochs(epochs):
    figure = helpers.plot_history({k: helpers.History(v, 1.0) for k, v in epochs.items()}, "Title")
    axes = {axis.get_label(): axis for axis in figure.axes}
    values = {k: [list(line.get_ydata()) for line in axes[k].lines] for k in ("loss", "accuracy")}
    assert values["loss"][:2] == [[0.9, 0.5], [0.8, 0.6]]
    assert values["accuracy"][:2] == [[60, 80], [62, 75]]
    assert all(list(line.get_xdata())[:2] == [1, 2] for line in axes["loss"].lines)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[:-1] == [f"{name}, {part}" for name in epochs for part in ("train", "val")]
    assert "32 px" in legend[-1] and figure.get_suptitle() == "Title"
    for axis in axes.values():
        shade = axis.patches[-1].get_extents().transformed(axis.transData.inverted())
        assert (shade.x0, shade.x1) == pytest.approx((0.5, 1.5))
    if len(epochs) == 2:  # of the epochs that both have
        heights = [bar.get_height() for bar in axes["difference"].patches[:-1]]
        assert values["accuracy"][3] == [50, 50, 50] and heights == pytest.approx([12, 25])
    assert ("difference" in axes) == (len(epochs) == 2)
    figure = helpers.plot_history({"ReLU": helpers.History(EPOCHS[1:], 1.0)}, "No small epochs")
    assert not any(axis.patches for axis in figure.axes)
    plt.close("all")
