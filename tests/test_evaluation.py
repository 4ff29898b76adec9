"""Evaluation, analysis and pictures: intervals, verdicts, sites, statistics, the study, figures."""

import copy
import io
import re
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import helpers
from conftest import write_study
from helpers import Difference

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
    ((2, 1, 3), 0.049, "more"), ((-2, -3, -1), 0.049, "more"), ((2, 1, 3), 0.05, "no more"),
    ((2, 0, 4), 0.01, "no more"), ((-2, -4, 0), 0.01, "no more")])
def test_one_pair_says_no_more_than_its_interval_and_its_test(interval, p_value, said):
    difference = Difference(*interval)
    told = f"SiLU minus ReLU is {difference} on the test images, McNemar's p {p_value}: {said} than"
    assert told in helpers.comparison_sentence("SiLU", difference, p_value)


@pytest.mark.parametrize("interval, claim, verdict", [
    ((0.1, 0.2), (0,), "supported"), ((0, 0.1), (0,), "undecided"),
    ((-0.1, 0), (0,), "not supported"), ((-0.1, 0.1), (-0.2, 0.2), "supported"),
    ((-0.1, 0.2), (-0.2, 0.2), "undecided"), ((0.2, 0.3), (-0.2, 0.2), "not supported"),
    ((0.1, 0.1), (-0.2, 0.2), "undecided"), ((0.3, 0.3), (-0.2, 0.2), "undecided")])
def test_a_claim_is_judged_by_the_whole_interval(interval, claim, verdict):
    assert helpers.judge(Difference(0.0, *interval), *claim) == verdict


def test_an_accuracy_and_a_difference_are_told_with_their_intervals():
    right = np.arange(3000) < 2448  # Wilson 1927: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    assert helpers.accuracy_line(right) == "81.6% (95% CI 80.2–82.9)"
    assert str(Difference(0, -0.01, 0.005)) == "+0.00 points (95% CI -1.00 to +0.50)"


def test_sites_are_measured_on_the_inputs_even_of_a_relu_that_works_in_place(tiny_net, loaders):
    tiny_net.relu = nn.ReLU(inplace=True)
    tiny_net.features[5] = tiny_net.relu  # one module at two places, called twice in a pass
    batch = next(iter(loaders[1]))
    once = tiny_net.eval().features[:5](batch[0]).detach().flatten()
    x = torch.cat([once, once.relu()])
    sites = helpers.measure_sites(tiny_net.train(), ["features.2", "relu"], nn.SiLU(), batch)
    found = [(site["name"], site["calls"], site["side"]) for site in sites]
    assert found == [("features.2", 1, 16), ("relu", 2, 8)]
    change = (x * x.sigmoid() - x.relu()).norm() / x.relu().norm()
    expected = pytest.approx([(x < 0).float().mean().item(), change.item()], rel=1e-4)
    assert [sites[1]["negative"], sites[1]["change"]] == expected
    assert np.allclose(sites[1]["shares"], np.histogram(x, 80, (-4, 4))[0] / len(x), atol=1e-3)
    assert not tiny_net.relu._forward_pre_hooks and tiny_net.training


def test_statistics_are_compared_as_they_are_and_averaged_anew_over_batches_on_copies():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)).eval()
    batches = [(torch.randn(n, 3, 9, 9) * n, torch.zeros(n)) for n in (4, 2)]
    mean = sum(model[0](x)[:, 0].mean().item() for x, _ in batches) / 2
    changed = copy.deepcopy(model)
    changed[1].running_mean += 100
    found = helpers.compare_statistics(
        lambda network: network[1].running_mean[0].item(), batches, changed, model)
    assert found == {"as they are": [100, 0], "estimated again": [pytest.approx(mean)] * 2}
    assert changed[1].running_mean[0] == 100 and model[1].num_batches_tracked == 0


def test_a_probe_learns_from_one_loaders_images_and_is_scored_on_the_others(tiny_net, loaders):
    right = helpers.linear_probe(tiny_net, *loaders)
    assert right.shape == (18,) and right.mean() > 0.9 and isinstance(tiny_net.fc, nn.Linear)
    turned = [(images, (targets + 1) % 3) for images, targets in loaders[0]]
    assert helpers.linear_probe(tiny_net, turned, loaders[1]).mean() < 0.1


def test_a_batch_is_learnt_by_heart_on_a_copy(tiny_net, loaders):
    (images, targets), before = next(iter(loaders[0])), copy.deepcopy(tiny_net)
    found = helpers.overfit_one_batch(tiny_net, (images, targets))
    assert all(map(torch.equal, tiny_net.state_dict().values(), before.state_dict().values()))
    assert found[0][0] == pytest.approx(nn.CrossEntropyLoss()(before(images), targets).item())
    assert len(found) == 30 and found[-1][1] == 1 and found[-1][0] < found[0][0] / 1.5


def test_the_healing_is_told_in_images_seen_and_by_the_first_three_measurements():
    def history(*n_right):
        return helpers.History(early=[(n, np.arange(100) < k) for n, k in enumerate(n_right, 1000)])

    swapped, control = history(25, 68, 70, 70), history(50, 70, 70, 70)
    told = "-25.0, -2.0, +0.0 points at first; stays within 1: after 1,002 images"
    assert helpers.images_until_level(swapped, control) == told
    assert helpers.images_until_level(swapped, control, 0.25).endswith("25: after 1,000 images")
    assert helpers.images_until_level(history(50, 90, 70, 68), control).endswith("1: not yet")
    found = helpers.early_difference(history(50, 65, 65, 99), history(70, 70, 70, 0))
    assert found.mean == pytest.approx(-0.1) and found.low < -0.1 < found.high < 0
    with pytest.raises(ValueError, match="give fit an early_loader"):
        helpers.early_difference(history(50), history())


@pytest.mark.parametrize("starts, early, end, again, initials", [
    ("behind", (-0.2, -0.01), (-0.0099, 0.0099), [(-1, -0.02), (-1, -0.0101)], "sss"),
    ("level", (-0.0199, 0.0199), (-0.0101, 0), [(-1, -0.02), (-1, -0.0099)], "suu"),
    ("level", (-0.0201, 0), (0, 0.0101), [(-0.0099, 1), (-1, -0.0099)], "uun"),
    ("behind", (0, 0.1), (0.01, 0.02), [(-1, -0.02), (-0.01, 0)], "nnn"),
    ("level", (0, 0.0201), (0, 0.005), [(-1, -0.02)], "uss")])
def test_each_prediction_gets_one_verdict(starts, early, end, again, initials):
    again = {letter: Difference(0, *d) for letter, d in zip("ab", again)}
    found = helpers.judge_predictions(starts, Difference(0, *early), Difference(0, *end), again)
    assert list(found) == [f"Starts {starts}", "Ends level", "Leans on its own activation"]
    assert "".join(verdict[0] for verdict, _ in found.values()) == initials
    assert found["Ends level"][1] == str(Difference(0, *end))
    assert found["Leans on its own activation"][1].startswith(f"a {again['a']}")


@pytest.mark.parametrize("plain, again, said", [
    (-0.001, (-0.0009, 0.1), "outdated statistics"), (0, (0.06, 0.1), "no clear cause"),
    (-0.001, (0.06, 0.1), "outdated statistics"), (0, (-0.1, 0), "no clear cause"),
    (0, (-0.1, -0.0001), "some rel.*"), (0.05, (0.06, 0.1), "no clear cause"),
    (-0.02, (-0.02, 0), "no clear cause"), (-0.3, (-0.2, -0.1), "out.* and some rel.*")])
def test_mismatch_is_told_from_reliance(plain, again, said):
    text = helpers.describe_change("it", Difference(-0.02, -1, plain), Difference(0.01, *again))
    assert re.fullmatch(rf"it -2[.]0 points, [+]1[.]0 with .* again: {said}", text)


@pytest.mark.parametrize("val_loss, accuracy, end, sign", [
    (0.62, 0.75, "0.020 above its minimum (epoch 2); … +0.0", "no harmful overfitting seen"),
    (0.621, 0.8, "0.021 above its minimum (epoch 2); … +5.0", "overfitting"),
    (0.599, 0.7, "its minimum, so more epochs may help; … -5.0", "perhaps underfitting")])
def test_overfitting_is_a_rise_beyond_two_standard_errors(val_loss, accuracy, end, sign):
    history = helpers.History([*EPOCHS, replace(
        EPOCHS[1], epoch=3, val_loss=val_loss, train_accuracy=accuracy)])
    losses = torch.tensor([0.5, 0.7] * 50)  # the logits' cross-entropies
    logits, labels = F.pad(losses.expm1().log()[:, None], (1, 0)), torch.zeros(100).long()
    end = end.replace("…", "training minus validation accuracy is")
    assert helpers.fit_sentence(history, helpers.Recipe(4, 32, 0.1), logits, labels) == (
        f"3 of 4 epochs: validation loss ended at {val_loss:.3f} ± 0.010, {end} points: {sign}.")


def test_the_most_frequent_confusion_is_named_in_either_direction():
    matrix = np.array([[8, 1, 1], [0, 5, 4], [0, 2, 9]])
    assert helpers.confusion_sentence(matrix, "abc") == "6 of the 8 mistakes are between b and c"
    assert helpers.confusion_sentence(np.eye(2, dtype=int), "ab") == "no mistakes"


RECIPE = helpers.Recipe(2, 32, 0.1)
ROWS = [("ReLU from 7", 1, 9, 0.5, 0.6, 0.9), ("SiLU from 7", 2, 9, 0.4, 0.6, 0.908),
        ("SiLU from 7", 1, 9, 0.3, 0.5, 0.904), ("ReLU from 7", 2, 9, 0.6, 0.7, 0.91),
        ("SiLU from 1", 1, 8, 0.1, 0.2, 0.3), ("GELU from 4", 2, 9, 0.2, 0.3, 0.4)]


def test_a_study_is_paired_by_seed_and_read_only_for_its_own_recipe_and_settings(tmp_path):
    path = tmp_path / "study.csv"
    assert helpers.read_study(path, RECIPE, model="resnet18") == {}
    write_study(path, RECIPE, ROWS, model="resnet18", classes=["a", "b"])
    study = helpers.read_study(path, RECIPE, classes=["a", "b"], model="resnet18")
    relu, silu = [[0.6, 0.7, 0.91], [0.5, 0.6, 0.9]], [[0.4, 0.6, 0.908], [0.3, 0.5, 0.904]]
    assert {swap: [part.tolist() for part in pair] for swap, pair in study.items()} == {
        "SiLU from 7": [silu, relu]}  # no other two pairs
    assert helpers.read_study(str(path), RECIPE, classes=["b", "a"]) == {}
    assert helpers.read_study(path, replace(RECIPE, lr=0.2)) == {}
    assert helpers.study_sentence(study, "SiLU from 7", "float64") == (
        "Over 2 seeds (separate runs in float64, same images and weights) SiLU from ReLU 7 on changes "
        "test accuracy by +0.10 points (95% CI -3.71 to +3.91), not shown to be within ±1 point "
        "(two one-sided t tests, p 0.1).")


@pytest.mark.parametrize("mean, within", [(0, True), (0.007, True), (-0.008, False)])
def test_equivalence_is_a_90_percent_interval_inside_the_margin_and_in_the_title(mean, within):
    gains = mean + np.array([-0.004, 0.004] * 6)
    half = stats.t.ppf(0.95, 11) * stats.sem(gains)
    assert (helpers.equivalence_p(gains) < 0.05) == within == (abs(mean) + half < 0.01)
    figure = helpers.plot_study({"Swish": (np.c_[gains, gains], np.c_[gains + 1, 0 * gains])})
    assert figure.get_label().endswith(": Swish" if within else ": none shown")


def test_the_studys_picture_holds_each_seed_the_mean_and_its_interval(tmp_path):
    write_study(tmp_path / "study.csv", RECIPE, ROWS[:4])
    (axis,) = helpers.plot_study(helpers.read_study(tmp_path / "study.csv", RECIPE)).axes
    zero, dots, mean, *_ = [line.get_xydata() for line in axis.lines]
    assert np.allclose(dots, [[-0.2, -0.2], [0.4, -0.2]]) and np.allclose(mean, [[0.1, 0]])
    ends = axis.containers[0].lines[2][0].get_segments()
    assert np.allclose(ends, [[[-3.71, 0], [3.91, 0]]], atol=0.01)
    band = axis.patches[0].get_extents().transformed(axis.transData.inverted()).intervalx
    assert np.allclose([*band, *zero[:, 0], *axis.get_ylim()], [-1, 1, 0, 0, 0.5, -0.5])
    assert axis.figure.get_figheight() == 1.9 and axis.figure.get_label().endswith("none shown")


def test_the_image_grid_has_captions_and_a_title():
    figure = helpers.plot_images(np.ones((10, 32, 32, 3), np.uint8), "abcdefghij", "Some images")
    assert [(a.get_title(), len(a.images), a.get_subplotspec().num1) for a in figure.axes] == [
        (letter, 1, i) for i, letter in enumerate("abcdefghij")]
    assert figure.get_figheight() == 3.5
    assert figure._suptitle.get_text() == figure.get_label() == "Some images"


def test_the_curves_hold_the_metrics_and_the_steps_of_the_first_epoch():
    early = [(10, np.array([True, False])), (20, np.array([True, True]))]
    histories = dict.fromkeys(["SiLU", "ReLU"], helpers.History(EPOCHS, early=early))
    loss, accuracy, first = ([line.get_xydata().tolist() for line in axis.lines]
                             for axis in helpers.plot_histories(histories, "Title").axes)
    assert loss == [[[1, 0.9], [2, 0.5]], [[1, 0.8], [2, 0.6]]] * 2
    assert accuracy == [[[1, 0.6], [2, 0.8]], [[1, 0.62], [2, 0.75]]] * 2
    assert first == [[[10, 0.5], [20, 1]]] * 2


@pytest.mark.filterwarnings("error")
def test_confusions_and_sites_are_drawn_without_a_warning_or_a_grid_in_a_users_own_style():
    matrices = {"SiLU": np.array([[9, 1], [0, 0]]), "ReLU": np.array([[1, 0], [4, 1]])}
    places = [{"name": "layer", "negative": 0.5, "shares": np.linspace(0, 0.02, 80)}] * 4
    with matplotlib.rc_context({"figure.constrained_layout.use": True, "axes.grid": True}):
        figure = helpers.plot_confusions(matrices, ["cat", "dog"], "Title")
        sites = helpers.plot_sites({"before": places, "after": places}, "GELU", "Title")
        [made.savefig(io.BytesIO(), format="png") for made in (figure, sites)]
    for axis in figure.axes:
        assert not any(line.get_visible() for line in axis.get_xgridlines())
    assert [(text.get_position(), text.get_text()) for text in figure.axes[1].texts] == [
        ((0, 0), "1\n100.0%"), ((1, 0), "0\n0.0%"), ((0, 1), "4\n80.0%"), ((1, 1), "1\n20.0%")]
    pictures = [axis.images[0] for axis in figure.axes]  # only errors are shaded
    assert [p.get_array().tolist() for p in pictures] == [[[0, 0.1], [0, 0]], [[0, 0], [0.8, 0]]]
    assert [p.get_clim() for p in pictures] == [(0, 0.3), (0, pytest.approx(1.2))]
    assert figure.get_figwidth() == 8.8 and figure.axes[1].get_subplotspec().get_geometry()[0] == 1
    assert [patch.get_fill() for patch in sites.axes[0].patches] == [True, False]
    assert np.allclose(sites.axes[0].patches[1].get_data().values, np.linspace(0, 0.02, 80))
    x, ys = helpers.SITE_EDGES, [line.get_ydata() for line in sites.axes[1].lines]
    assert np.allclose(ys, [x.clip(0), x * stats.norm.cdf(x)]) and sites.get_figheight() == 6
