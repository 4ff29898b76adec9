"""Analysis: the sites, the damage, the healing, the exchange, the sentences."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import helpers
from test_evaluation import EPOCHS, pair

NAMES = ["features.2", "features.5", "relu"]


def test_sites_are_measured_on_the_inputs_even_of_a_relu_that_works_in_place(tiny_net, loaders):
    tiny_net.relu = nn.ReLU(inplace=True)
    tiny_net.features[5] = tiny_net.relu  # one module at two places, called twice in a pass
    inputs = []
    tiny_net.relu.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    tiny_net.eval()(torch.cat([x for x, _ in loaders[1]]))
    x = torch.cat([x.flatten() for x in inputs]).detach()
    first, site = helpers.measure_sites(
        tiny_net, ["features.2", "relu"], nn.SiLU(), next(iter(loaders[1])), "cpu")
    assert (first.name, first.calls, first.side) == ("features.2", 1, 16)
    assert (site.name, site.calls, site.side) == ("relu", 2, 8)
    assert site.negative == pytest.approx((x < 0).float().mean().item())
    change = (nn.SiLU()(x) - x.relu()).square().sum() / x.relu().square().sum()
    assert site.change == pytest.approx(change.sqrt().item(), rel=1e-4)
    inside = ((x >= -4) & (x <= 4)).float().mean().item()
    assert site.shares.sum() == pytest.approx(inside) and len(site.shares) == 80
    assert len(tiny_net.relu._forward_pre_hooks) == 1  # the test's own
    assert not any(p.is_inference() for p in tiny_net.parameters())


def test_statistics_are_estimated_again_on_a_copy(tiny_net, loaders):
    before = copy.deepcopy(tiny_net.state_dict())
    copied = helpers.reestimate_statistics(tiny_net.eval(), loaders[1], "cpu")
    images = torch.cat([x for x, _ in loaders[1]])
    features = tiny_net.features[0](images)
    norm = copied.features[1]
    assert torch.allclose(norm.running_mean, features.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(norm.running_var, features.var((0, 2, 3)), rtol=1e-3)
    assert not any(m.training for m in copied.modules())
    single = [(images[:1], torch.zeros(1)), (images, torch.zeros(18))]  # one image is left out
    again = helpers.reestimate_statistics(tiny_net, single, "cpu").features[1]
    assert torch.allclose(again.running_var, norm.running_var)
    assert all(torch.equal(before[k], v) for k, v in tiny_net.state_dict().items())


def test_a_probe_finds_what_features_say_and_not_what_they_do_not(tiny_net, loaders):
    images = torch.cat([x for x, _ in loaders[0]])
    targets = torch.cat([y for _, y in loaders[0]])
    right = helpers.linear_probe(tiny_net, [(images, targets)], loaders[1], "cpu")
    assert right.dtype == bool and right.shape == (18,) and right.mean() > 0.9
    shuffled = [(images, targets[torch.randperm(72, generator=torch.Generator().manual_seed(1))])]
    assert helpers.linear_probe(tiny_net, shuffled, loaders[1], "cpu").mean() < 0.8
    assert isinstance(tiny_net.fc, nn.Linear)


def test_a_batch_is_learnt_by_heart_on_a_copy_or_not_at_all(tiny_net, loaders):
    images, targets = batch = next(iter(loaders[0]))
    before = copy.deepcopy(tiny_net.state_dict())
    losses, n_right = helpers.overfit_one_batch(tiny_net, batch, "cpu", most_steps=400)
    assert n_right == 24 and losses[-1] < losses[0] and len(losses) < 400
    assert all(torch.equal(before[k], v) for k, v in tiny_net.state_dict().items())
    tiny_net.requires_grad_(False).fc.requires_grad_(True)
    same = images[:1].expand(24, -1, -1, -1)  # of which nobody can tell the classes
    losses, n_right = helpers.overfit_one_batch(tiny_net, (same, targets), "cpu", most_steps=5)
    assert n_right < 24 and len(losses) == 5


def history(*accuracies):
    """Of some images, 100 at each step, of which the first are right."""
    early = tuple((10 * i, np.arange(100) < 100 * a) for i, a in enumerate(accuracies, start=1))
    return helpers.History(EPOCHS, 1.0, early=early)


@pytest.mark.parametrize("swapped, control, said", [
    ((0.5, 0.6, 0.8), (0.7, 0.7, 0.8), "after 30 images"), ((0.7, 0.6), (0.7, 0.7), "after 10 images"),
    ((0.5, 0.68), (0.7, 0.7), "not yet in the first epoch"), ((0.5, 0.69), (0.7, 0.7), "after 20 images")])
def test_the_healing_is_told_in_images_seen(swapped, control, said):
    assert helpers.images_until_level(history(*swapped), history(*control)) == said


def test_the_early_difference_is_of_the_first_quarter_and_paired():
    a, b = history(*[0.5] * 3, *[0.9] * 9), history(*[0.7] * 3, *[0.1] * 9)
    found = helpers.early_difference(a, b)
    assert found.mean == pytest.approx(-0.2) and found.low < -0.2 < found.high < 0
    assert found.high - found.low == pytest.approx(2 * 1.984 * (0.2 * 0.8 / 99) ** 0.5, rel=1e-3)
    with pytest.raises(ValueError, match="early_loader"):
        helpers.early_difference(history(), b)


def exchange(plain, again):
    return {"SiLU → ReLU": {"as they are": helpers.compare_paired(*pair(*plain)),
                            "estimated again": helpers.compare_paired(*pair(*again))}}


@pytest.mark.parametrize("plain, again, said", [
    ((900, 20, 21, 59), (900, 20, 21, 59), "-0.1 points, .* by -0.1: no clear cost."),
    ((900, 20, 21, 59), (900, 5, 70, 25), "-0.1 points, .* by -6.5: reliance on its own activation."),
    ((900, 5, 90, 5), (900, 20, 25, 55), "-8.5 points, .* by -0.5: statistics that no longer matched."),
    ((500, 5, 490, 5), (900, 5, 70, 25), ": statistics .* matched and reliance on its own activation.")])
def test_mismatch_is_told_from_reliance(plain, again, said):
    sentence = helpers.exchange_sentence(exchange(plain, again))
    assert re.search(f"^SiLU → ReLU changes accuracy by .*{said}$", sentence)


@pytest.mark.parametrize("again, verdict", [
    ((900, 0, 90, 10), "supported"), ((990, 5, 5, 0), "not supported"),
    ((900, 15, 29, 56), "undecided")])
def test_each_prediction_gets_one_verdict_and_its_numbers(again, verdict):
    early, end = helpers.Difference(-0.1, -0.2, -0.01), helpers.Difference(0.0, -0.005, 0.02)
    both = {"SiLU → ReLU": {"estimated again": helpers.compare_paired(*pair(*again))},
            "ReLU → SiLU": {"estimated again": helpers.compare_paired(*pair(900, 0, 90, 10))}}
    verdicts = helpers.judge_predictions("behind", early, end, both)
    assert {name: v for name, (v, _) in verdicts.items()} == {
        "Starts behind": "supported", "Ends level": "undecided", "Leans on its own activation": verdict}
    assert verdicts["Starts behind"][1] == str(early)
    assert verdicts["Leans on its own activation"][1].count("points") == 2
    assert helpers.judge_predictions("level", early, end, both)["Starts level"][0] == "undecided"


def test_statistics_that_mismatch_are_told_apart_by_estimating_them_again(tiny_net, loaders):
    def score(model):
        return helpers.right_answers(model, loaders[1], "cpu")

    helpers.fit(tiny_net, *loaders, recipe=helpers.Recipe(3, 32, 0.02), device="cpu")
    broken = copy.deepcopy(tiny_net)
    broken.features[1].running_mean += 100
    found = helpers.compare_statistics(score, broken, tiny_net, loaders[0], "cpu")
    assert found["as they are"].accuracy_a < 0.5 < found["as they are"].accuracy_b
    assert found["estimated again"].difference == helpers.Difference(0, 0, 0)


@pytest.mark.parametrize("last_loss, accuracy, said", [
    (0.6, 0.8, "was lowest in the last epoch, .* is +5.0 points .*: no harmful overfitting seen"),
    (0.61, 0.7, "ended 0.010 above .* epoch 2 .* is -5.0 points .*: perhaps underfitting"),
    (0.9, 0.8, "ended 0.300 above .* epoch 2 .* points .*: overfitting")])
def test_overfitting_is_a_rise_beyond_the_standard_error(last_loss, accuracy, said):
    third = replace(EPOCHS[1], epoch=3, val_loss=last_loss, train_accuracy=accuracy)
    probabilities = np.tile([[0.8, 0.2], [0.3, 0.7]], (50, 1)).astype(np.float32)
    sentence = helpers.fit_sentence(
        helpers.History((*EPOCHS, third), 1.0), probabilities, np.zeros(100, dtype=int))
    assert re.search(f"^Validation loss {said.replace('+', '[+]')}[.]$", sentence)


def test_the_most_frequent_confusion_is_named_in_either_direction():
    matrix = np.array([[8, 1, 1], [0, 5, 4], [0, 2, 9]])
    assert helpers.confusion_sentence(matrix, "abc") == "6 of the 8 mistakes are between b and c."
    assert helpers.confusion_sentence(np.eye(2, dtype=int), "ab") == "None."
