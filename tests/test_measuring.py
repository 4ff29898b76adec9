"""Measuring and pictures: intervals, paired comparison, activations, figures."""

import dataclasses

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from torch import nn

import helpers

CPU = torch.device("cpu")


def test_the_wilson_interval_gives_newcombes_worked_example():
    # Newcombe 1998, Statistics in Medicine 17:857, table I: 81 of 263.
    assert helpers.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert helpers.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def pair(both, only_a, only_b, neither):
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return np.array(a), np.array(b)


def test_the_exact_mcnemar_p_gives_agrestis_worked_example_and_the_binomial_sum():
    # Approval ratings, Agresti 1990, p. 350 (the example of R's mcnemar.test): 150 against 86.
    comparison = helpers.compare_paired(*pair(794, 150, 86, 570))
    assert comparison.p_value == pytest.approx(3.716e-05, rel=1e-3)
    assert (comparison.n, comparison.only_a, comparison.only_b) == (1600, 150, 86)
    # 2 against 8: twice the sum of the binomial probabilities of 0, 1 and 2 out of 10.
    assert helpers.compare_paired(*pair(5, 2, 8, 5)).p_value == pytest.approx(2 * 56 / 1024)


def test_the_paired_interval_is_the_textbook_one_and_signed():
    a, b = pair(70, 15, 5, 10)
    comparison = helpers.compare_paired(a, b)
    differences = a.astype(float) - b.astype(float)
    half = 1.9842 * differences.std(ddof=1) / 10  # t quantile of 99 degrees of freedom
    assert comparison.difference == pytest.approx(0.10)
    assert (comparison.low, comparison.high) == pytest.approx((0.10 - half, 0.10 + half), abs=1e-4)
    assert (comparison.accuracy_a, comparison.accuracy_b) == (0.85, 0.75)
    turned = helpers.compare_paired(b, a)
    assert (turned.difference, turned.low) == pytest.approx((-0.10, -comparison.high))


def test_equal_predictions_give_no_difference_and_no_warning(recwarn):
    a, _ = pair(5, 5, 0, 0)
    comparison = helpers.compare_paired(a, a)
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0, 0, 0, 1)
    assert not recwarn


@pytest.mark.parametrize("a, b", [([True], [True]), ([True, False], [True]), ([[True, False]], [[True, False]])])
def test_arrays_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="equally long"):
        helpers.compare_paired(a, b)


def test_the_conclusion_says_only_what_the_interval_allows():
    unclear = helpers.conclude(helpers.compare_paired(*pair(80, 6, 4, 10)), "SiLU", "ReLU")
    assert unclear.startswith("SiLU minus ReLU: +2.00 points on 100 test images (95% CI ")
    assert "the interval contains 0" in unclear and "does not show" in unclear
    better = helpers.conclude(helpers.compare_paired(*pair(800, 80, 20, 100)), "SiLU", "ReLU")
    assert "excludes 0" in better and "SiLU is the better one" in better and "one seed" in better
    torn = helpers.compare_paired(*pair(250, 9, 2, 39))
    assert torn.low > 0 and torn.p_value > 0.05  # the interval is approximate, the test exact
    said = helpers.conclude(torn, "SiLU", "ReLU")
    assert "excludes 0 but" in said and "does not show" in said and "better" not in said
    worse = helpers.conclude(helpers.compare_paired(*pair(800, 20, 80, 100)), "SiLU", "ReLU")
    assert "ReLU is the better one" in worse and "-6.00 points" in worse


class Fixed(nn.Module):
    """Calls one activation twice: on its input, and on the negative of its first channel only."""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()
        self.body = nn.Identity()

    def forward(self, x):
        self.act(x)
        return self.act(-x[:, :1])


def test_activation_inputs_are_measured_call_by_call_over_all_batches():
    x = torch.full((4, 3, 2, 2), -1.0)
    x[0, 0, 0, 0] = 1.0  # channel 0 fires once, in the first batch
    x[3, 1] = 2.0  # channel 1 fires in the second batch
    x[:, 2, 0] = 0.0  # zeros neither are negative nor fire
    loader = [(x[:2], torch.zeros(2)), (x[2:], torch.zeros(2))]
    model = Fixed().train()
    first, second = helpers.measure_activations(model, ["act"], loader, CPU)
    assert (first.name, first.call, first.channels) == ("act", 1, 3)
    assert first.negative == (48 - 1 - 4 - 8) / 48 and first.silent == pytest.approx(1 / 3)
    assert (second.call, second.channels, second.negative, second.silent) == (2, 1, 1 / 16, 0)
    assert model.training


def test_measuring_leaves_no_hook_even_if_it_fails(tiny_net, loaders):
    helpers.measure_activations(tiny_net, ["relu", "features.2"], loaders[1], CPU)
    broken = [(torch.zeros(2, 5, 32, 32), torch.zeros(2))]
    with pytest.raises(RuntimeError):
        helpers.measure_activations(tiny_net, ["relu"], broken, CPU)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in tiny_net.modules())


def test_measurements_come_in_the_order_of_the_names_and_unknown_names_are_refused(tiny_net, loaders):
    names = ["relu", "features.2"]
    assert [m.name for m in helpers.measure_activations(tiny_net, names, loaders[1], CPU)] == names
    with pytest.raises(ValueError, match=r"\['nowhere'\]"):
        helpers.measure_activations(tiny_net, ["nowhere"], loaders[1], CPU)


def test_the_mean_share_is_over_the_calls():
    assert helpers.mean_share(INPUTS, "negative") == pytest.approx(0.6)
    assert helpers.mean_share(INPUTS, "silent") == pytest.approx(0.125)


def test_the_most_confident_mistakes_come_first():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.99, 0.01], [0.3, 0.7]])
    targets = np.array([0, 0, 0, 1, 1])
    assert helpers.most_confident_mistakes(probabilities, targets, 5).tolist() == [3, 1, 2]
    assert helpers.most_confident_mistakes(probabilities, targets, 1).tolist() == [3]
    assert helpers.most_confident_mistakes(probabilities[:1], targets[:1], 5).tolist() == []


def test_the_largest_confusion_adds_both_directions():
    assert helpers.largest_confusion(np.array([[9, 3, 0], [1, 9, 2], [0, 3, 9]])) == (1, 2, 5)
    assert helpers.largest_confusion(np.diag([3, 4, 5])) is None


HISTORY = helpers.History(
    (helpers.EpochMetrics(1, 0.9, 0.60, 0.8, 0.62), helpers.EpochMetrics(2, 0.5, 0.81, 0.6, 0.80)), 10.0)
INPUTS = [helpers.ActivationInputs("a", 1, 8, 0.5, 0.25), helpers.ActivationInputs("a", 2, 8, 0.7, 0.0)]
MATRIX = np.array([[9, 3], [1, 7]])


def analyse(history=HISTORY, control=INPUTS, pretrained=False, stand_in=False, matrix=MATRIX, activation="SiLU", train_accuracy=0.92):
    return helpers.analyse(
        history, matrix, ["cat", "dog"], "The conclusion.", INPUTS, control, activation, train_accuracy, pretrained, stand_in)


def test_the_analysis_is_made_of_the_numbers_of_the_run():
    bullets = analyse()
    text = "\n".join(bullets)
    assert 2 <= len(bullets) <= 6 and all(b.startswith("**") for b in bullets)
    for part in ("The conclusion.", "60% of the inputs", "12.5%", "weights of epoch 2, the best of 2", "92.0%", "80.0%",
                 "gap of 12.0 points: it does not underfit", "; stronger augmentation.", "4 of the 4", "cat and dog", "ImageNet weights"):
        assert part in text, part
    assert "ImageNet" not in "\n".join(analyse(pretrained=True))
    assert "control" not in analyse(control=[])[1]
    alive = [dataclasses.replace(m, silent=0.0) for m in INPUTS]
    assert "none for the swap to keep alive" in analyse(control=alive)[1]
    assert "keep alive" not in analyse()[1] and "keep alive" not in analyse(control=[])[1]
    assert "SiLU passes on some of both, and bends small positive ones" in text
    assert "positive ones as they are" in "\n".join(analyse(activation="LeakyReLU"))
    assert "**Errors.** None on the validation images." in analyse(matrix=np.diag([5, 5]))
    assert len(analyse(stand_in=True)) == 6 and "Stand-in" in analyse(stand_in=True)[0]


@pytest.mark.parametrize("train_accuracy, words, advice", [
    (0.94, ": it does not underfit (at least 90% on training images) and does not clearly overfit (a gap of at most 5 points).", "a longer schedule"),
    (0.96, "6.0 points: it does not underfit (at least 90% on training images) and overfits (a gap above 5 points).", "stronger augmentation"),
    (0.89, "-1.0 points: it underfits (below 90% on training images) and does not clearly overfit", "a longer schedule"),
    (0.97, "and overfits (a gap above 5 points).", "stronger augmentation")])
def test_the_analysis_judges_the_fit_by_the_best_epoch_on_both_sets(train_accuracy, words, advice):
    history = helpers.History(
        (helpers.EpochMetrics(1, 0.5, 0.7, 0.5, 0.90), helpers.EpochMetrics(2, 0.5, 0.7, 0.5, 0.81)), 1.0)
    text = "\n".join(analyse(history, train_accuracy=train_accuracy))
    assert words in text and advice in text and "epoch 1, the best of 2" in text
    both = "\n".join(analyse(train_accuracy=0.88))
    assert "it underfits (below 90% on training images) and overfits (a gap above 5 points)." in both


def test_cells_executed_in_order_are_told_from_others(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in ("a = 1", "", "b = 2", "c = 3")]
    path = tmp_path / "n.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("text"), *cells]), path)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x")]), tmp_path / "another.ipynb")
    assert helpers.executed_in_order(tmp_path, ["", "a = 1\n", "# Parameters\na = 2", "b = 2"]) is True
    assert helpers.executed_in_order(tmp_path, ["", "b = 2", "a = 1"]) is False
    assert helpers.executed_in_order(tmp_path, ["", "a = 1", "a = 1", "b = 2"]) is False
    assert helpers.executed_in_order(tmp_path / "none", ["a = 1"]) is None
    (tmp_path / "damaged.ipynb").write_text("{")
    assert helpers.executed_in_order(tmp_path, ["a = 1"]) is True


# --- pictures --------------------------------------------------------------------------------


def test_display_undoes_the_normalisation(labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images, labels, helpers.eval_transform, 32, 90, seed=1)
    assert np.array_equal(helpers.to_display(next(iter(loader))[0]), images)


def test_the_image_grid_shows_every_image_with_its_caption():
    figure = helpers.plot_images(np.zeros((10, 32, 32, 3), np.uint8), [str(i) for i in range(10)], "Title")
    assert [axis.get_title() for axis in figure.axes] == [str(i) for i in range(10)] + [""] * 6
    assert figure._suptitle.get_text() == "Title"
    assert helpers.plot_images(np.zeros((0, 32, 32, 3), np.uint8), [], "No mistakes")
    plt.close("all")


def test_the_curves_hold_the_metrics_and_mark_the_best_epoch():
    figure = helpers.plot_history(HISTORY, "Title")
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == [0.9, 0.5] and left.lines[1].get_ydata().tolist() == [0.8, 0.6]
    assert right.lines[0].get_ydata().tolist() == [60, 81] and right.lines[1].get_ydata().tolist() == [62, 80]
    assert list(left.lines[2].get_xdata()) == [2, 2]
    plt.close("all")


def test_the_confusion_matrix_shows_counts_under_class_names():
    axis = helpers.plot_confusion(MATRIX, ["cat", "dog"], "Title").axes[0]
    assert [t.get_text() for t in axis.texts] == ["9", "3", "1", "7"]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["cat", "dog"] and axis.get_title() == "Title"
    plt.close("all")


@pytest.mark.parametrize("control", [INPUTS, []])
def test_the_activation_figure_holds_both_quantities(control):
    left, right = helpers.plot_activations(INPUTS, control, "SiLU", "Title").axes
    networks = 2 if control else 1
    assert [bar.get_width() for bar in left.patches] == pytest.approx([50, 70] * networks)
    assert [bar.get_width() for bar in right.patches] == pytest.approx([25, 0] * networks)
    assert [t.get_text() for t in left.get_yticklabels()] == ["a, call 1", "a, call 2"]
    none_silent = [dataclasses.replace(m, silent=0.0) for m in INPUTS]
    low, high = helpers.plot_activations(none_silent, control, "SiLU", "Title").axes[1].get_xlim()
    assert low == 0 and high >= 1
    plt.close("all")
