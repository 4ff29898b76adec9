"""Analysis: the sites, the statistics, the probe, the healing, the verdicts, the sentences."""

import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import helpers
from helpers import Difference
from test_evaluation import EPOCHS


def test_sites_are_measured_on_the_inputs_even_of_a_relu_that_works_in_place(tiny_net, loaders):
    tiny_net.relu = nn.ReLU(inplace=True)
    tiny_net.features[5] = tiny_net.relu  # one module at two places, called twice in a pass
    batch = next(iter(loaders[1]))
    once = tiny_net.eval().features[:5](batch[0]).detach().flatten()
    x = torch.cat([once, once.relu()])
    sites = helpers.measure_sites(tiny_net.train(), ["features.2", "relu"], nn.SiLU(), batch)
    assert [(s.name, s.calls, s.side) for s in sites] == [("features.2", 1, 16), ("relu", 2, 8)]
    change = (x * x.sigmoid() - x.relu()).norm() / x.relu().norm()
    expected = pytest.approx([(x < 0).float().mean().item(), change.item()], rel=1e-4)
    assert [sites[1].negative, sites[1].change] == expected
    assert np.allclose(sites[1].shares, np.histogram(x, 80, (-4, 4))[0] / len(x), atol=1e-3)
    assert not tiny_net.relu._forward_pre_hooks and tiny_net.training


def test_statistics_behind_a_place_are_averaged_anew_over_batches_on_a_copy():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)]
    model, before = nn.Sequential(*blocks), copy.deepcopy(nn.Sequential(*blocks))
    batches = [(torch.randn(n, 3, 9, 9) * n, torch.zeros(n)) for n in (4, 2, 1)]
    copied = helpers.reestimate_statistics(model, batches, "1.2")
    assert not any(m.training for m in copied.modules()) and model.training
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    assert [block[1].num_batches_tracked.item() for block in copied] == [0, 2, 2]
    seen = [before[1][0](before.eval()[0](x)) for x, _ in batches[:2]]  # one has no variance
    expected = [sum(f(x, dim=(0, 2, 3)) for x in seen) / 2 for f in (torch.mean, torch.var)]
    assert all(map(torch.allclose, copied[1][1].buffers(), expected))
    before[1][1].running_mean += 100
    found = helpers.compare_statistics(
        lambda m: m[1][1].running_mean[:1].numpy(), before, model, batches, "1.2")
    mean = copied[1][1].running_mean[0].item()
    assert found == {"as they are": (100, 0, Difference(100, 100, 100)),
                     "estimated again": (mean, mean, Difference(0, 0, 0))}


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


def test_the_healing_is_told_in_images_seen_and_by_the_first_quarter_of_the_steps():
    def history(*n_right):
        return helpers.History(early=[(n, np.arange(100) < k) for n, k in enumerate(n_right, 1000)])

    swapped, control = history(25, 68, 70), history(50, 70, 70)
    assert helpers.images_until_level(swapped, control) == "after 1,002 images"
    assert helpers.images_until_level(swapped, control, within=0.25) == "after 1,000 images"
    assert helpers.images_until_level(history(40), control) == "not yet in the first epoch"
    found = helpers.early_difference(history(50, 70, 99, 99, 99), history(70, 70, 0, 0, 0))
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
    found = helpers.judge_predictions(
        starts, Difference(0, *early), Difference(0, *end), [Difference(0, *d) for d in again])
    assert list(found) == [f"Starts {starts}", "Ends level", "Leans on its own activation"]
    assert "".join(verdict[0] for verdict, _ in found.values()) == initials
    assert found["Ends level"][1] == str(Difference(0, *end))


@pytest.mark.parametrize("plain, again, said", [
    (-0.001, (-0.0009, 0.1), "statistics .* matched"), (0, (0.06, 0.1), "no clear cost"),
    (-0.001, (0.06, 0.1), "statistics .* matched"), (0, (-0.1, 0), "no clear cost"),
    (0, (-0.1, -0.0001), "reliance .*"), (0.05, (0.06, 0.1), "no clear cost"),
    (-0.02, (-0.02, 0), "no clear cost"), (-0.3, (-0.2, -0.1), "stat.* matched and reliance .*")])
def test_mismatch_is_told_from_reliance(plain, again, said):
    text = helpers.describe_exchange(Difference(-0.02, -1, plain), Difference(0.01, *again))
    assert re.fullmatch(rf"-2[.]0 points, with .* again [+]1[.]0 \({said}\)", text)


@pytest.mark.parametrize("val_loss, accuracy, gap, sign", [
    (0.62, 0.75, "+0.0", "no harmful overfitting seen"),
    (0.62, 0.7, "-5.0", "perhaps underfitting"), (0.621, 0.8, "+5.0", "overfitting")])
def test_overfitting_is_a_rise_beyond_two_standard_errors(val_loss, accuracy, gap, sign):
    last = replace(EPOCHS[1], epoch=3, val_loss=val_loss, train_accuracy=accuracy)
    assert helpers.fit_sentence(helpers.History([*EPOCHS, last]), np.array([0.5, 0.7] * 50)) == (
        f"Validation loss ended {val_loss - 0.6:.3f} above its minimum (epoch 2; standard error "
        f"0.010); training accuracy minus validation accuracy is {gap} points: {sign}.")


def test_the_most_frequent_confusion_is_named_in_either_direction():
    matrix = np.array([[8, 1, 1], [0, 5, 4], [0, 2, 9]])
    assert helpers.confusion_sentence(matrix, "abc") == "6 of the 8 mistakes are between b and c."
    assert helpers.confusion_sentence(np.eye(2, dtype=int), "ab") == "No mistakes."
