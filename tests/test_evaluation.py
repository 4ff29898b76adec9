"""Evaluation and pictures: intervals, paired comparison, judgement, figures."""

import io

import matplotlib
import numpy as np
import pytest
from scipy import stats

import helpers

EPOCHS = [helpers.EpochMetrics(*m) for m in ((1, 0.9, 0.6, 0.8, 0.62), (2, 0.5, 0.8, 0.6, 0.75))]


@pytest.mark.parametrize("counts, p_value", [
    ((794, 150, 86, 570), 3.716e-05),  # Agresti 1990, p. 350, as in R's mcnemar.test
    ((5, 2, 8, 5), 2 * (1 + 10 + 45) / 2**10), ((5, 8, 2, 5), 2 * (1 + 10 + 45) / 2**10),
    ((0, 4, 0, 6), 2 / 2**4), ((3, 1, 1, 3), 1), ((1, 1, 0, 0), 1),
    ((5, 0, 0, 5), 1), ((0, 6, 0, 0), 2 / 2**6), ((0, 0, 6, 0), 2 / 2**6)])  # without spread
def test_a_pair_is_compared_by_the_exact_mcnemar_test_and_the_textbook_interval(
        counts, p_value, recwarn):
    a, b = (np.repeat(right, counts) for right in ([True, True, False, False], [True, False] * 2))
    found, *others = helpers.compare_paired(a, b)
    assert others == [*counts[1:3], pytest.approx(p_value, rel=1e-3)] and not recwarn
    gains = a.astype(int) - b
    mean, half = gains.mean(), stats.t.ppf(0.975, len(a) - 1) * stats.sem(gains)
    assert (found.mean, found.low, found.high) == pytest.approx((mean, mean - half, mean + half))


@pytest.mark.parametrize("a, b", [
    ([True], [True]), ([True, False], [True]), ([[True, False]] * 2, [[True, False]] * 2),
    ([2, 1], [True, False]), ([True, False], [1.0, float("nan")])])
def test_arrays_that_cannot_be_paired_are_refused(a, b):
    with pytest.raises(ValueError, match="two boolean arrays for the same 2 or more"):
        helpers.compare_paired(a, b)


@pytest.mark.parametrize("interval, p_value, said", [
    ((0.02, 0.01, 0.03), 0.049, "In this run SiLU scored 2.0 points higher than ReLU on the same"),
    ((-0.02, -0.03, -0.01), 0.049, "In this run SiLU scored 2.0 points lower than ReLU on the"),
    ((0.02, 0.01, 0.03), 0.05, "do not differ"), ((0.02, 0, 0.04), 0.01, "do not differ"),
    ((-0.02, -0.04, 0), 0.01, "SiLU and ReLU do not differ measurably.")])
def test_one_pair_says_no_more_than_its_interval_and_its_test(interval, p_value, said):
    assert said in helpers.comparison_sentence("SiLU", helpers.Difference(*interval), p_value)


@pytest.mark.parametrize("interval, claim, verdict", [
    ((0.1, 0.2), (0,), "supported"), ((0, 0.1), (0,), "undecided"),
    ((-0.1, 0), (0,), "not supported"), ((-0.1, 0.1), (-0.2, 0.2), "supported"),
    ((-0.1, 0.2), (-0.2, 0.2), "undecided"), ((0.2, 0.3), (-0.2, 0.2), "not supported"),
    ((0.1, 0.1), (-0.2, 0.2), "undecided"), ((0.3, 0.3), (-0.2, 0.2), "undecided")])
def test_a_claim_is_judged_by_the_whole_interval(interval, claim, verdict):
    assert helpers.judge(helpers.Difference(0.0, *interval), *claim) == verdict


def test_an_accuracy_and_a_difference_are_told_with_their_intervals():
    right = np.arange(3000) < 2448  # Wilson 1927: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    assert helpers.accuracy_line(right) == "81.6% (95% CI 80.2–82.9)"
    assert str(helpers.Difference(0, -0.01, 0.005)) == "+0.00 points (95% paired CI -1.00 to +0.50)"


@pytest.mark.parametrize("n, n_axes, height", [(0, 8, 2), (8, 8, 2), (10, 16, 3.5)])
def test_the_image_grid_is_shown_with_captions_and_alternative_text(n, n_axes, height, monkeypatch):
    shown, captions = [], "abcdefghij"[:n]
    figure = helpers.plot_images(np.ones((n, 32, 32, 3), np.uint8), captions, "Some images")
    assert "".join(a.get_title() for a in figure.axes) == captions
    assert [len(a.images) for a in figure.axes] == [1] * n + [0] * (n_axes - n)
    assert [*figure.get_size_inches(), figure._suptitle.get_text()] == [10, height, "Some images"]
    monkeypatch.setattr(
        "IPython.display.display", lambda image, metadata: shown.append((image.data[:4], metadata)))
    helpers.show(figure)
    assert shown == [(b"\x89PNG", {"image/png": {"alt": "Some images"}})]


def test_the_curves_hold_the_metrics_and_the_steps_of_the_first_epoch():
    early = [(10, np.array([True, False])), (20, np.array([True, True]))]
    history = helpers.History(EPOCHS, early=early)
    axes = helpers.plot_histories({"SiLU": history, "ReLU": history}, "Title").axes
    loss, accuracy, first = ([line.get_xydata().tolist() for line in a.lines] for a in axes)
    assert loss == [[[1, 0.9], [2, 0.5]], [[1, 0.8], [2, 0.6]]] * 2
    assert accuracy == [[[1, 60], [2, 80]], [[1, 62], [2, 75]]] * 2
    assert first == [[[10, 50], [20, 100]]] * 2
    bars = axes[2].containers[0].lines[2][0].get_segments()
    assert [bar[:, 1].tolist() for bar in bars] == [[0, 100], [100, 100]]  # standard error 50 and 0
    legend = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert legend == ["SiLU, train", "SiLU, val", "ReLU, train", "ReLU, val"]


@pytest.mark.filterwarnings("error")
def test_confusions_and_sites_are_drawn_without_a_warning_or_a_grid_in_a_users_own_style():
    matrices = {"SiLU": np.array([[9, 1], [0, 0]]), "ReLU": np.array([[10, 0], [4, 1]])}
    places = [helpers.Site("layer", 2, 3, 0.5, 0.1, np.linspace(0, 0.02, 80))] * 4
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "axes.grid": True}):
        figure = helpers.plot_confusions(matrices, ["cat", "dog"], "Title")
        sites = helpers.plot_sites({"before": places, "after": places}, "GELU", "Title")
        for made in (figure, sites, helpers.plot_confusions({"a": np.eye(2, dtype=int)}, "ab", "")):
            made.savefig(io.BytesIO(), format="png")
    assert [[*made.get_size_inches()] for made in (figure, sites)] == [[8.8, 4], [11, 6]]
    for axis in (*figure.axes, *sites.axes):
        assert not any(line.get_visible() for line in axis.get_xgridlines())
    assert [(text.get_position(), text.get_text()) for text in figure.axes[1].texts] == [
        ((0, 0), "10\n100.0%"), ((1, 0), "0\n0.0%"), ((0, 1), "4\n80.0%"), ((1, 1), "1\n20.0%")]
    pictures = [axis.images[0] for axis in figure.axes]  # only errors are shaded
    assert [p.get_array().tolist() for p in pictures] == [[[0, 0.1], [0, 0]], [[0, 0], [0.8, 0]]]
    assert [p.get_clim() for p in pictures] == [(0, 0.3), (0, pytest.approx(1.2))]
    assert [a.get_title() for a in sites.axes[::2]] == ["layer: 50% → 50% below 0"] * 4
    assert [patch.get_fill() for patch in sites.axes[0].patches] == [True, False]
    assert np.allclose(sites.axes[0].patches[1].get_data().values, np.linspace(0, 2, 80))
    x, ys = helpers.SITE_EDGES, [line.get_ydata() for line in sites.axes[1].lines]
    assert np.allclose(ys, [x.clip(0), x * stats.norm.cdf(x)])
    legend = [text.get_text() for text in sites.axes[1].get_legend().get_texts()]
    assert legend == ["before", "after", "ReLU", "GELU"]
