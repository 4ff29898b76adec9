"""Evaluation and pictures: intervals, paired comparison, judgement, figures."""

import io
from dataclasses import replace

import IPython.display
import matplotlib
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
    comparison, turned = comparison.difference, turned.difference
    half = 1.9842 * (a.astype(float) - b).std(ddof=1) / 10  # t quantile of 99 degrees of freedom
    assert comparison.mean == pytest.approx(0.10)
    assert (comparison.low, comparison.high) == pytest.approx((0.10 - half, 0.10 + half), abs=1e-4)
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-0.10, -comparison.high, -comparison.low))


@pytest.mark.parametrize("counts, difference, p_value", [
    ((5, 0, 0, 5), 0, 1), ((0, 6, 0, 0), 1, 2 / 2**6), ((0, 0, 6, 0), -1, 2 / 2**6)])
def test_without_spread_the_interval_is_a_point(counts, difference, p_value, recwarn):
    result = helpers.compare_paired(*pair(*counts))
    assert result.difference == helpers.Difference(*[difference] * 3) and not recwarn
    assert result.p_value == pytest.approx(p_value)


@pytest.mark.parametrize("a, b", [
    ([True], [True]), ([True, False], [True]), ([[True, False]] * 2, [[True, False]] * 2),
    ([2, 1], [True, False]), ([True, float("nan")], [True, True]), (["True", "False"], [True] * 2)])
def test_arrays_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="two boolean arrays for the same 2 or more"):
        helpers.compare_paired(a, b)


def test_an_accuracy_is_told_with_its_wilson_interval():
    right = np.arange(3000) < 2448  # Wilson 1927: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    assert helpers.accuracy_line(right) == "81.6% (95% CI 80.2–82.9)"


@pytest.mark.parametrize("counts, said", [
    ((900, 40, 20, 40), "SiLU scored 2.0 points higher than ReLU"), ((900, 20, 40, 40), "2.0 points lower than"),
    ((900, 30, 30, 40), "do not differ measurably"), ((90, 0, 5, 5), "do not differ measurably")])
def test_one_pair_says_no_more_than_its_interval_and_its_test(counts, said):
    assert said in helpers.comparison_sentence("SiLU", helpers.compare_paired(*pair(*counts)))


def test_a_comparison_is_told_in_four_lines():
    lines = helpers.comparison_lines("GELU", helpers.compare_paired(*pair(70, 15, 5, 10)), 3)
    assert lines.split("\n") == [
        "Test accuracy: GELU 85.0% | ReLU control 75.0% (epoch 3)",
        "Right only with GELU: 15 images | only with ReLU: 5",
        "Difference: +10.00 points (95% paired CI +1.31 to +18.69)", "Exact McNemar p: 0.0414"]


@pytest.mark.parametrize("interval, claim, verdict", [
    ((0.1, 0.2), (0,), "supported"), ((-0.2, -0.1), (0,), "not supported"),
    ((-0.1, 0.1), (0,), "undecided"), ((0, 0.1), (0,), "undecided"),
    ((-0.1, 0), (0,), "not supported"), ((-0.1, 0.1), (-0.2, 0.2), "supported"),
    ((-0.1, 0.2), (-0.2, 0.2), "undecided"), ((-0.3, 0.3), (-0.2, 0.2), "undecided"),
    ((0.2, 0.3), (-0.2, 0.2), "not supported"), ((0.1, 0.1), (-0.2, 0.2), "undecided"),
    ((-0.2, 0.1), (-0.2, 0.2), "undecided")])
def test_a_claim_is_judged_by_the_whole_interval(interval, claim, verdict):
    assert helpers.judge(helpers.Difference(0.0, *interval), *claim) == verdict


def test_the_image_grid_shows_every_image_with_its_caption():
    figure = helpers.plot_images(np.zeros((10, 32, 32, 3), np.uint8), "abcdefghij", "Title")
    assert [axis.get_title() for axis in figure.axes] == list("abcdefghij") + [""] * 6
    assert [len(axis.images) for axis in figure.axes] == [1] * 10 + [0] * 6
    assert figure._suptitle.get_text() == "Title" and not any(a.axison for a in figure.axes)
    assert len(helpers.plot_images(np.zeros((0, 32, 32, 3), np.uint8), [], "None").axes) == 8


EPOCHS = (helpers.EpochMetrics(1, 0.9, 0.6, 0.8, 0.62), helpers.EpochMetrics(2, 0.5, 0.8, 0.6, 0.75))
WORSE = tuple(replace(m, val_accuracy=0.5) for m in EPOCHS)


@pytest.mark.parametrize("epochs", [{"SiLU": EPOCHS}, {"SiLU": EPOCHS, "ReLU": WORSE}])
def test_the_curves_hold_the_metrics(epochs):
    figure = helpers.plot_histories({k: helpers.History(v, 1.0) for k, v in epochs.items()}, "Title")
    loss, accuracy = ([list(line.get_ydata()) for line in axis.lines] for axis in figure.axes[:2])
    assert loss[:2] == [[0.9, 0.5], [0.8, 0.6]] and accuracy[:2] == [[60, 80], [62, 75]]
    assert all(list(line.get_xdata()) == [1, 2] for line in figure.axes[0].lines)
    assert accuracy[2:] == ([[60, 80], [50, 50]] if len(epochs) == 2 else [])
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == [f"{name}, {part}" for name in epochs for part in ("train", "val")]


def test_the_first_epoch_has_a_picture_of_its_own():
    early = ((10, np.array([True, False])), (20, np.array([True, True])))
    history = helpers.History(EPOCHS, 1.0, early=early)
    figure = helpers.plot_histories({"SiLU": history, "ReLU": history}, "Title")
    assert [list(line.get_xdata()) for line in figure.axes[2].lines] == [[10, 20]] * 2
    assert list(figure.axes[2].lines[0].get_ydata()) == [50, 100]


def test_confusions_show_every_count_and_shade_only_errors_by_their_rows_share():
    matrices = {"SiLU": np.array([[8, 2], [0, 5]]), "ReLU": np.array([[10, 0], [1, 4]])}
    figure = helpers.plot_confusions(matrices, ["cat", "dog"], "Title")
    for axis, (name, matrix) in zip(figure.axes, matrices.items()):
        texts = [text.get_text().split("\n") for text in axis.texts]
        assert axis.get_title() == name and [int(n) for n, _ in texts] == matrix.ravel().tolist()
        shaded = axis.images[0].get_array()
        assert shaded[0, 0] == shaded[1, 1] == 0
    assert [t.get_text() for t in figure.axes[0].texts] == ["8\n80.0%", "2\n20.0%", "0\n0.0%", "5\n100.0%"]
    assert figure.axes[0].images[0].get_array()[0, 1] == pytest.approx(0.2)


def test_sites_are_drawn_with_both_activations():
    site = helpers.Site("layer", 2, 3, 0.5, 0.1, np.full(80, 0.01))
    for n in (1, 4):
        figure = helpers.plot_sites({"before": [site] * n, "after": [site] * n}, "GELU", "Title")
        assert [a.get_title() for a in figure.axes if a.get_title()] == ["layer"] * n
        legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
        assert legend == ["before", "after", "ReLU", "GELU"]


@pytest.mark.filterwarnings("error")
def test_a_users_own_style_brings_no_warning_and_no_line_through_a_matrix(capsys):
    style = {"figure.constrained_layout.use": True, "axes.grid": True, "figure.autolayout": False}
    with matplotlib.rc_context(style):
        figure = helpers.plot_confusions({"a": np.eye(2, dtype=int)}, ["cat", "dog"], "Title")
        histories = helpers.plot_histories({"a": helpers.History(EPOCHS, 1.0)}, "Title")
        site = helpers.Site("layer", 2, 3, 0.5, 0.1, np.full(80, 0.01))
        for made in (figure, histories, helpers.plot_sites({"before": [site]}, "SiLU", "Title")):
            made.savefig(io.BytesIO(), format="png")
    assert not any(line.get_visible() for line in figure.axes[0].get_xgridlines())


def test_a_figure_is_shown_as_a_picture_with_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda *args, **kw: shown.append((args, kw)))
    helpers.show(helpers.plot_images(np.zeros((1, 32, 32, 3), np.uint8), "a", "One image"))
    ((image,), settings), = shown
    assert image.data.startswith(b"\x89PNG") and settings["metadata"]["image/png"]["alt"] == "One image"
