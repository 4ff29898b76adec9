"""Evaluation and analysis: intervals, comparisons, the statistics behind a swap, a probe."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision import models

import helpers
from helpers import Difference


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


# ---- Accuracies and their differences ----


def test_an_accuracy_is_told_with_its_wilson_interval():
    right = np.arange(3000) < 2448
    # Wilson 1927: (p + z²/2n ± z √(pq/n + z²/4n²)) / (1 + z²/n)
    p, n, z = 2448 / 3000, 3000, 1.959964
    middle = p + z**2 / (2 * n)
    half_width = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * half_width) / (1 + z**2 / n) for sign in (-1, 1))
    assert helpers.accuracy_line(right) == "81.6% (95% CI 80.2–82.9)"
    assert (round(100 * low, 1), round(100 * high, 1)) == (80.2, 82.9)


def test_an_accuracy_without_a_mistake_has_an_interval_below_it():
    assert helpers.accuracy_line(np.ones(10, dtype=bool)) == "100.0% (95% CI 72.2–100.0)"


@pytest.mark.parametrize("difference, text", [
    (Difference(-0.003, -0.011, 0.005), "-0.30 points (95% CI -1.10 to +0.50)"),
    (Difference(0.0, -0.25, 0.25), "+0.00 points (95% CI -25.00 to +25.00)"),
])
def test_a_difference_is_told_in_points_with_signs(difference, text):
    assert str(difference) == text


def test_a_paired_difference_has_students_interval():
    found = helpers.paired_difference([5, 4, 3, 2, 9], [4, 3, 3, 3, 8])  # 1, 1, 0, -1, 1
    half_width = 2.776445 * 0.4  # t with 4 degrees of freedom, √0.8 / √5
    assert (found.mean, found.low, found.high) == pytest.approx(
        (0.4, 0.4 - half_width, 0.4 + half_width), rel=1e-5)


def pair_with(both_right, only_a, only_b, both_wrong):
    """Two boolean arrays with so many images of each kind."""
    counts = [both_right, only_a, only_b, both_wrong]
    return np.repeat([True, True, False, False], counts), np.repeat(
        [True, False, True, False], counts)


@pytest.mark.parametrize("counts, p_value", [
    ((794, 150, 86, 570), 3.716e-05),  # Agresti 1990, p. 350, as in R's mcnemar.test
    ((5, 2, 8, 5), 2 * (1 + 10 + 45) / 2**10),
    ((5, 8, 2, 5), 2 * (1 + 10 + 45) / 2**10),
    ((0, 4, 0, 6), 2 / 2**4),
    ((3, 1, 1, 3), 1),
    ((0, 6, 0, 0), 2 / 2**6),
    ((5, 0, 0, 5), 1),
])
def test_a_pair_is_compared_by_the_exact_mcnemar_test(counts, p_value):
    a, b = pair_with(*counts)
    difference, only_a, only_b, p_found = helpers.compare_paired(a, b)
    assert (only_a, only_b) == counts[1:3]
    assert p_found == pytest.approx(p_value, rel=1e-3)
    assert difference.mean == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert difference == helpers.paired_difference(a, b)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("counts, mean", [((5, 0, 0, 5), 0), ((0, 6, 0, 0), 1)])
def test_a_difference_without_spread_is_a_point(counts, mean):
    difference, _, _, _ = helpers.compare_paired(*pair_with(*counts))
    assert difference == Difference(mean, mean, mean)


@pytest.mark.parametrize("a, b", [
    ([True], [True]),
    ([True, False], [True]),
    ([[True, False]] * 2, [[True, False]] * 2),
    ([1, 0], [True, False]),
    ([True, False], [1.0, float("nan")]),
])
def test_what_is_no_pair_of_boolean_arrays_is_not_compared(a, b):
    with pytest.raises(ValueError, match="two boolean arrays for the same 2 or more images"):
        helpers.compare_paired(a, b)


def test_the_most_frequent_confusion_is_named_in_either_direction():
    matrix = np.array([[8, 3, 1], [0, 5, 2], [1, 2, 9]])
    sentence = helpers.confusion_sentence(matrix, ["cat", "dog", "ship"])
    assert sentence == "4 of 9 mistakes are between dog and ship"
    assert helpers.confusion_sentence(np.diag([3, 4]), ["cat", "dog"]) == "no mistakes"


# ---- One batch, and a probe ----


def test_one_batch_is_learnt_by_heart_on_a_copy(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    before = copy.deepcopy(tiny_net)

    found = helpers.overfit_one_batch(tiny_net, (images, targets))

    assert_same_state(tiny_net.state_dict(), before.state_dict())
    assert tiny_net.fc.weight.grad is None
    first_loss = F.cross_entropy(before.train()(images), targets).item()
    assert found[0][0] == pytest.approx(first_loss, rel=1e-4)  # measured before the first step
    assert len(found) == 30
    assert found[-1][1] == 1 and found[-1][0] < first_loss / 1.5


def test_frozen_weights_stay_in_learning_one_batch(tiny_net, loaders):
    tiny_net.requires_grad_(False)
    tiny_net.fc.requires_grad_(True)
    losses = [loss for loss, _ in helpers.overfit_one_batch(tiny_net, next(iter(loaders[0])), 3)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2]


def test_a_probe_learns_on_one_loader_and_is_scored_on_the_other(tiny_net, loaders):
    train_loader, test_loader = loaders
    head = tiny_net.fc
    nn.init.zeros_(head.weight)  # it is what comes before the head that is probed
    assert helpers.linear_probe(tiny_net, train_loader, test_loader) > 0.9
    assert tiny_net.fc is head
    turned = [(images, (targets + 1) % 3) for images, targets in train_loader]
    assert helpers.linear_probe(tiny_net, turned, test_loader) < 0.1


# ---- Batch norms behind a swap ----

# By hand, from torchvision's ResNet. In a basic block ``relu`` is called behind bn1 and again
# behind the sum; in a bottleneck also behind bn2. A shortcut's norm (downsample.1) is fed from
# the block's input, so it is not behind its own block's relu.
RESNET18_LAYER4 = [
    "layer4.0.bn1", "layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn1", "layer4.1.bn2"]
RESNET18_FROM_7 = ["layer3.1.bn2", *RESNET18_LAYER4]
RESNET18_FROM_4 = [
    "layer2.0.bn2", "layer2.1.bn1", "layer2.1.bn2",
    "layer3.0.bn1", "layer3.0.bn2", "layer3.0.downsample.1", "layer3.1.bn1", "layer3.1.bn2",
    *RESNET18_LAYER4]
RESNET50_LAYERS_3_AND_4 = [
    "layer3.0.bn1", "layer3.0.bn2", "layer3.0.bn3", "layer3.0.downsample.1",
    "layer3.1.bn1", "layer3.1.bn2", "layer3.1.bn3",
    "layer3.2.bn1", "layer3.2.bn2", "layer3.2.bn3",
    "layer3.3.bn1", "layer3.3.bn2", "layer3.3.bn3",
    "layer3.4.bn1", "layer3.4.bn2", "layer3.4.bn3",
    "layer3.5.bn1", "layer3.5.bn2", "layer3.5.bn3",
    "layer4.0.bn1", "layer4.0.bn2", "layer4.0.bn3", "layer4.0.downsample.1",
    "layer4.1.bn1", "layer4.1.bn2", "layer4.1.bn3",
    "layer4.2.bn1", "layer4.2.bn2", "layer4.2.bn3"]
RESNET50_FROM_7 = [
    "layer2.2.bn2", "layer2.2.bn3",
    "layer2.3.bn1", "layer2.3.bn2", "layer2.3.bn3",
    *RESNET50_LAYERS_3_AND_4]
RESNET50_FROM_5 = [
    "layer2.0.bn2", "layer2.0.bn3",
    "layer2.1.bn1", "layer2.1.bn2", "layer2.1.bn3",
    "layer2.2.bn1", *RESNET50_FROM_7]


@pytest.mark.parametrize("model_name, position, first, expected", [
    ("resnet18", 7, "layer3.1.relu", RESNET18_FROM_7),
    ("resnet18", 4, "layer2.0.relu", RESNET18_FROM_4),
    ("resnet50", 7, "layer2.2.relu", RESNET50_FROM_7),
    ("resnet50", 5, "layer2.0.relu", RESNET50_FROM_5),
])
def test_the_norms_behind_a_swap_and_no_others_are_estimated_again(
        model_name, position, first, expected):
    torch.manual_seed(0)
    model = models.get_model(model_name, weights=None)
    assert helpers.find_modules(model, nn.ReLU)[position - 1][0] == first
    images = torch.randn(2, 3, 32, 32)

    found = helpers.norms_behind(model, images[:1], first)
    adapted = helpers.estimate_statistics(model, [(images, torch.zeros(2))], first)

    assert found == expected
    changed = [
        name for name, norm in helpers.find_modules(model, nn.BatchNorm2d)
        if not torch.equal(norm.running_mean, adapted.get_submodule(name).running_mean)]
    assert changed == expected
    before, after = model.state_dict(), adapted.state_dict()
    assert {key.rpartition(".")[0] for key in before
            if not torch.equal(before[key], after[key])} == set(expected)


@pytest.fixture
def batches():
    """Three batches of differing images, the last one incomplete; the targets do not matter."""
    torch.manual_seed(1)
    return [(scale * torch.randn(n, 3, 16, 16) + scale, torch.zeros(n))
            for scale, n in ((1.0, 4), (3.0, 4), (0.5, 2))]


def test_the_new_statistics_are_plain_averages_over_the_batches(tiny_net, batches):
    tiny_net.train()(batches[0][0])  # the norms have counted a batch: it must not count now
    inputs = []
    with torch.no_grad():
        for images, _ in batches:  # what the second norm, behind the first nn.ReLU, will see
            inputs.append(tiny_net.eval().features[:4](images))
    means = torch.stack([x.mean(dim=(0, 2, 3)) for x in inputs])
    variances = torch.stack([x.var(dim=(0, 2, 3)) for x in inputs])  # of a sample, as torch's

    norm = helpers.estimate_statistics(tiny_net, batches, "features.2").features[4]

    assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, variances.mean(0), rtol=1e-4, atol=1e-5)


def test_where_all_norms_are_behind_the_statistics_are_those_of_torchs_update_bn(
        tiny_net, batches):
    expected = copy.deepcopy(tiny_net)
    update_bn(batches, expected)
    adapted = helpers.estimate_statistics(tiny_net, batches, "features.0")
    for name in ("features.1", "features.4"):
        norm, expected_norm = adapted.get_submodule(name), expected.get_submodule(name)
        assert torch.allclose(norm.running_mean, expected_norm.running_mean, atol=1e-5)
        assert torch.allclose(norm.running_var, expected_norm.running_var, rtol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_statistics_are_estimated_on_a_copy_that_differs_in_nothing_else(
        tiny_net, batches, training):
    tiny_net.train(training)
    tiny_net.features[4].momentum = 0.3
    before = copy.deepcopy(tiny_net.state_dict())

    adapted = helpers.estimate_statistics(tiny_net, batches, "features.2")

    assert_same_state(tiny_net.state_dict(), before)
    assert {module.training for module in tiny_net.modules()} == {training}
    assert {module.training for module in adapted.modules()} == {False}
    assert (adapted.features[1].momentum, adapted.features[4].momentum) == (0.1, 0.3)
    assert tiny_net.features[4].momentum == 0.3
    changed = [key for key, value in adapted.state_dict().items()
               if not torch.equal(value, before[key])]
    assert changed == ["features.4.running_mean", "features.4.running_var",
                       "features.4.num_batches_tracked"]
    for network in (tiny_net, adapted):  # the NaN of the probing has left no trace
        assert network(batches[0][0]).isfinite().all()


def test_statistics_are_estimated_alike_whatever_the_models_mode(tiny_net, batches):
    in_evaluation = helpers.estimate_statistics(tiny_net.eval(), batches, "features.2")
    in_training = helpers.estimate_statistics(tiny_net.train(), batches, "features.2")
    assert_same_state(in_training.state_dict(), in_evaluation.state_dict())


def test_a_swap_at_a_module_that_is_not_there_is_refused(tiny_net, batches):
    with pytest.raises(AttributeError):
        helpers.estimate_statistics(tiny_net, batches, "features.9")


def test_norms_without_statistics_are_left_alone(tiny_net, batches):
    tiny_net.features[4] = nn.BatchNorm2d(16, track_running_stats=False)
    before = copy.deepcopy(tiny_net.state_dict())
    adapted = helpers.estimate_statistics(tiny_net, batches, "features.2")
    assert_same_state(adapted.state_dict(), before)
    norm = adapted.features[4]
    assert norm.running_mean is None and norm.momentum == 0.1 and not norm.training


def test_each_network_is_scored_with_the_statistics_stored_and_estimated_again(
        tiny_net, batches):
    shifted = copy.deepcopy(tiny_net)
    shifted.features[4].running_mean += 100

    def score(network):
        return network.features[4].running_mean[0].item()

    rows = helpers.compare_statistics(
        {"plain": tiny_net, "shifted": shifted}, batches, "features.2", score)

    assert list(rows) == ["plain", "shifted"]
    assert rows["plain"][0] == 0 and rows["shifted"][0] == 100
    estimated = score(helpers.estimate_statistics(tiny_net, batches, "features.2"))
    assert estimated != 0
    assert rows["plain"][1] == rows["shifted"][1] == estimated


def test_the_table_of_statistics_has_a_column_for_each_score_in_percent():
    table = helpers.statistics_table({"SiLU": (0.5, 1.0), "SiLU → ReLU": (0.082, 0.7)})
    head, first, second = table.split("\n")
    assert head.endswith("as stored   estimated again")
    assert first.split() == ["SiLU", "50.0%", "100.0%"]
    assert second.split() == ["SiLU", "→", "ReLU", "8.2%", "70.0%"]
    assert len(head) == len(first) == len(second)
    end_of_stored = head.index("as stored") + len("as stored")
    assert first[:end_of_stored].endswith("50.0%") and second[:end_of_stored].endswith("8.2%")


def test_a_last_batch_of_one_image_does_not_count_for_the_statistics():
    torch.manual_seed(0)
    model = models.resnet18(weights=None)
    images = torch.randn(5, 3, 32, 32)  # at 32 px layer4's maps are single pixels
    batches = [(images[:4], torch.zeros(4)), (images[4:], torch.zeros(1))]
    found = helpers.estimate_statistics(model, batches, "layer3.1.relu")
    expected = helpers.estimate_statistics(model, batches[:1], "layer3.1.relu")
    assert torch.equal(found.layer4[1].bn2.running_var, expected.layer4[1].bn2.running_var)
