"""Training: recipes, optimisers, the loops, planning, interruption, devices."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import helpers

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
STOP, DIVERGED = KeyboardInterrupt(), helpers.NonFiniteLoss
RECIPE = helpers.Recipe(4, 32, lr=0.02)


def fit(model, loaders, recipe=RECIPE, **settings):
    return helpers.fit(model, *loaders, recipe=recipe, **{"device": "cpu", **settings})


def state_of(module):
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


@pytest.fixture
def clock(monkeypatch):
    seconds = []
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: sum(seconds))
    return seconds


def test_the_best_epoch_is_the_first_best_one():
    epochs = tuple(helpers.EpochMetrics(i, 1, 0, 1, acc) for i, acc in enumerate([0.7, 0.8, 0.8], 1))
    assert helpers.History(epochs, 1.0).best.epoch == 2


def test_batches_are_channels_last_but_on_mps_where_batch_norm_fails():
    layouts = [helpers.memory_format(kind) for kind in ("cpu", "cuda", torch.device("mps"))]
    assert layouts == [torch.channels_last, torch.channels_last, torch.contiguous_format]


def test_the_optimiser_is_adamw_over_what_is_trained_and_decay_spares_vectors(tiny_net):
    tiny_net.features[0].requires_grad_(False)
    optimizer = helpers.make_optimizer(tiny_net, RECIPE)
    assert type(optimizer) is torch.optim.AdamW
    assert [[p.ndim for p in g["params"]] for g in optimizer.param_groups] == [[4, 2], [1] * 6]
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.02, 0.05), (0.02, 0)]


def test_a_recipe_takes_the_users_epochs_and_size_or_keeps_its_own():
    own, recipe = helpers.RECIPES["random"], helpers.pick_recipe("random", np.int64(3), 48)
    assert recipe == replace(own, epochs=3, image_size=48) and type(recipe.epochs) is int
    assert helpers.pick_recipe("random", None, None) == own


def test_frozen_parts_keep_weights_and_statistics_and_get_no_gradient(tiny_net, loaders):
    frozen = nn.ModuleList([tiny_net.features[0], tiny_net.features[1]]).requires_grad_(False)
    before = state_of(frozen)
    fit(tiny_net, loaders, replace(RECIPE, epochs=1))
    assert torch.equal(state_of(frozen), before)
    assert all(p.grad is None for p in frozen.parameters())
    helpers.training_mode(tiny_net)
    modes = [m.training for m in (*tiny_net.features, tiny_net.fc, tiny_net)]
    assert modes == [False, False, True, True, True, True, True, True]


def test_an_epoch_follows_the_criterion_and_reports_plain_means_over_images(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    batches = [(images[i:i + 10], targets[i:i + 10]) for i in (0, 10, 20)]  # of 10, 10 and 4
    twin, criterion = copy.deepcopy(tiny_net), nn.CrossEntropyLoss(label_smoothing=0.3)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (tiny_net, twin))
    scheduler, logits, steps = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), [], []
    for p in tiny_net.eval().parameters():  # the epoch itself switches to training mode
        p.grad = torch.ones_like(p)  # left over from before: must not count
    loss, accuracy = helpers.train_one_epoch(
        tiny_net, criterion, optimizer, scheduler, batches, "cpu", FLOAT32,
        lambda *args: steps.append(args))
    for x, y in batches:
        logits.append(twin(x))
        reference.zero_grad()
        criterion(logits[-1], y).backward()
        reference.step()
        reference.param_groups[0]["lr"] /= 2  # the schedule steps with every batch
    assert torch.allclose(state_of(tiny_net), state_of(twin), atol=1e-5)
    logits = torch.cat(logits)
    assert loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == targets).float().mean().item())
    assert steps == [(1, 10), (2, 20), (3, 24)]


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny_net, loaders):
    before, optimizer = copy.deepcopy(tiny_net), torch.optim.SGD(tiny_net.parameters(), lr=0.5)
    with pytest.raises(DIVERGED, match="-inf in step 1, .*5.00e-01"):
        helpers.train_one_epoch(
            tiny_net, lambda y, _: y.sum() - math.inf, optimizer, None, loaders[0], "cpu")
    assert all(map(torch.equal, tiny_net.parameters(), before.parameters()))


def test_prediction_is_plain_unless_mirrored_and_in_evaluation_mode(tiny_net, loaders):
    tiny_net.train().features[1].running_mean += 0.3
    before = state_of(tiny_net)
    one, targets = helpers.predict(tiny_net, loaders[1], "cpu")
    both, _ = helpers.predict(tiny_net, loaders[1], "cpu", mirror=True)
    assert torch.equal(state_of(tiny_net), before) and not any(m.training for m in tiny_net.modules())
    right = helpers.right_answers(tiny_net, loaders[1], "cpu")
    assert right.dtype == bool and right.tolist() == (one.argmax(1) == targets).tolist()
    images, labels = next(iter(loaders[1]))
    plain, mirrored = (tiny_net.eval()(x).detach() for x in (images, images.flip(3)))
    assert np.allclose(both, ((plain + mirrored) / 2).softmax(1), atol=1e-5)
    assert np.allclose(one, plain.softmax(1), atol=1e-5) and not np.allclose(both, one, atol=1e-4)
    assert one.dtype == np.float32 and targets.tolist() == labels.tolist()
    for probabilities, mirror in ((one, False), (both, True)):
        expected = -np.log(probabilities[range(18), labels]).mean(), (
            probabilities.argmax(1) == targets).mean()
        found = helpers.evaluate(tiny_net, loaders[1], "cpu", mirror=mirror)
        assert found == pytest.approx(expected, rel=1e-5)
    tiny_net.fc.register_forward_hook(lambda m, args, output: torch.tensor([[1e3, 0, 0]] * 18))
    loss, accuracy = helpers.evaluate(tiny_net, loaders[1], "cpu")  # of errors it is certain of
    assert (loss, accuracy) == pytest.approx((87.3 * 2 / 3, 1 / 3), abs=0.1)


@pytest.mark.parametrize("seconds, batch_size, n_steps, step", [
    ([9, 1, 1, 4, 1, 1], 12, 6, 1), ([9, 2, 2], 24, 3, 2), ([9], 72, 1, 9)])
def test_planning_times_a_few_steps_on_a_copy_and_leaves_everything_as_it_was(
        tiny_net, labelled_images, clock, seconds, batch_size, n_steps, step):
    def everything():
        generators = torch.get_rng_state(), loaders[0].generator.get_state()
        return [state_of(tiny_net), torch.tensor([m.training for m in tiny_net.modules()]),
                *generators]

    loaders = [helpers.make_loader(*(x[part] for x in labelled_images), train=train, image_size=32,
                                   batch_size=batch_size, seed=7)
               for train, part in ((True, slice(0, 72)), (False, slice(72, 90)))]
    tiny_net.eval().register_forward_pre_hook(lambda *_: clock.append(seconds[len(clock)]))
    before = everything()
    plan = helpers.plan_training(
        tiny_net, *loaders, recipe=RECIPE, device="cpu", dtype=FLOAT32, seconds=1000,
        run_control=True)
    epoch = (72 // batch_size + len(loaders[1]) / 3) * step
    assert f"about {epoch:.0f} s each" in plan.line and len(clock) == n_steps
    assert all(map(torch.equal, before, everything()))
    assert all(p.grad is None for p in tiny_net.parameters())


@pytest.mark.parametrize("epochs, fitting, control, planned, pair", [
    (8, 99, False, 8, False), (8, 8, False, 8, False), (8, 7.9, False, 7, False),
    (8, 0.9, False, 1, False), (8, 0, True, 1, False), (8, 99, True, 8, True),
    (8, 16, True, 8, True), (8, 15.9, True, 7, True), (8, 4, True, 2, True),
    (8, 3.9, True, 3, False), (1, 2, True, 1, True), (1, 1.9, True, 1, False)])
def test_the_time_is_for_the_pair_or_one(
        tiny_net, loaders, clock, epochs, fitting, control, planned, pair):
    tiny_net.register_forward_pre_hook(lambda module, args: clock.append(0.3))
    seconds = fitting / 0.85 + 1e-9  # an epoch takes 3 steps and one of validation, 1 s
    recipe = replace(RECIPE, epochs=epochs)
    plan = helpers.plan_training(
        tiny_net, *loaders, recipe=recipe, device="cpu", dtype=FLOAT32, seconds=seconds,
        run_control=control)
    assert (plan.recipe, plan.run_control) == (replace(recipe, epochs=planned), pair)
    assert plan.line.startswith(f"Epochs: {planned} of {epochs} for ")
    assert ("No control" in plan.line) == (control and not pair)
    assert max(map(len, plan.line.split("\n"))) <= 100
    assert plan.seconds_each == pytest.approx(fitting / (1 + pair), abs=1e-6)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_training_follows_its_recipe_in_its_precision(tiny_net, loaders, monkeypatch, dtype):
    def hook(model, args, output):
        layouts = [x.is_contiguous(memory_format=torch.channels_last)
                   for x in (args[0], model.features[3].weight)]
        seen.add((model.training, output.dtype, *layouts))
        if model.training:
            rates.append(passed[2].param_groups[1]["lr"])

    rates, seen, passed, train = [], set(), [], helpers.train_one_epoch
    monkeypatch.setattr(helpers, "train_one_epoch", lambda *a: passed.extend(a[:5]) or train(*a))
    tiny_net.register_forward_hook(hook)
    fit(tiny_net, loaders, replace(RECIPE, epochs=3, label_smoothing=0.2), dtype=dtype)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=10)
    expected = [reference.get_last_lr()[0]]
    for _ in range(9):
        optimizer.step(), reference.step()
        expected.append(reference.get_last_lr()[0])
    assert rates == pytest.approx(expected[:9], abs=1e-6)
    assert passed[3].get_last_lr() == [0.0, 0.0] and passed[1].label_smoothing == 0.2
    assert seen == {(training, dtype, True, True) for training in (True, False)}


def test_training_learns_and_only_the_same_network_and_seed_train_alike(tiny_net, loaders, capsys):
    def train(model, seed):
        batches = []
        model.register_forward_pre_hook(lambda m, args: batches.append(args[0].clone()))
        helpers.seed_everything(seed, [loaders[0].generator])
        history = fit(model, loaders, keep_states=True)
        assert torch.equal(history.states[-1]["fc.weight"], model.fc.weight)
        assert len(history.states) == 4 and len({s["fc.bias"][0].item() for s in history.states}) == 4
        return history.epochs, state_of(model), torch.cat(batches)

    models = [copy.deepcopy(tiny_net) for _ in range(4)]
    helpers.replace_relu(models[2], nn.SiLU, 2)
    first, same, swapped, other = map(train, models, (7, 7, 7, 8))
    assert first[0][-1].val_accuracy >= 0.9 and first[0][-1].train_loss < first[0][0].train_loss
    assert first[0] == same[0] and torch.equal(first[1], same[1])
    assert first[0] != swapped[0] and torch.equal(first[2], swapped[2])  # the same batches
    assert not torch.equal(first[2], other[2])
    line = "Epoch {}/4 | Train Loss: # | Train Acc: #% | Val Loss: # | Val Acc: #%\n"
    lines = [text for text in capsys.readouterr().out.splitlines(True) if "|" in text]
    printed = re.sub(r"\d+\.\d+", "#", "".join(lines))
    assert printed == "".join(line.format(epoch) for epoch in [1, 2, 3, 4] * 4)


def test_any_iterable_of_batches_trains_and_flags_and_generators_are_the_callers(tiny_net, loaders):
    batches = list(loaders[1])
    torch.manual_seed(3)
    before, flags = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    history = fit(tiny_net, (batches, batches), replace(RECIPE, epochs=1))
    assert torch.equal(torch.get_rng_state(), before) and len(history.epochs) == 1
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(flags)
    dataset = TensorDataset(*batches[0])
    assert len(fit(tiny_net, [DataLoader(dataset, 6)] * 2, replace(RECIPE, epochs=1)).epochs) == 1


@pytest.mark.parametrize("call, event, settings, kind, words, n_complete", [
    (0, 1, {}, type(None), "None", 6), (0, 1, {"last_epoch": 2}, type(None), "None", 2),
    (0, 1, {"seconds_left": 0}, str, "out of time after epoch 1 of 6", 1),
    (9, STOP, {}, str, "in epoch 3 of 6", 2), (12, STOP, {}, str, "epoch 3 of 6", 2),
    (2, STOP, {}, KeyboardInterrupt, "first epoch", 0),
    (10, math.nan, {}, DIVERGED, r"loss nan in step 2, .*rate \S+, epoch 3: lower", 2),
    (12, math.nan, {}, DIVERGED, r"validation loss nan .*step 3, .*epoch 3: lower", 2)])
def test_the_last_complete_epochs_weights_stay_however_training_ends(
        tiny_net, loaders, monkeypatch, call, event, settings, kind, words, n_complete):
    def hook(module, args, output):
        calls.append(module.training)
        if len(calls) == call and event is STOP:
            raise STOP
        return output * event if len(calls) == call else output

    calls, states, evaluate = [], [state_of(tiny_net)], helpers.evaluate
    monkeypatch.setattr(helpers, "evaluate", lambda *a: (evaluate(*a)[0], 9 - len(states)))
    tiny_net.register_forward_hook(hook)
    try:
        outcome = fit(tiny_net, loaders, replace(RECIPE, epochs=6), **settings, on_epoch=(
            lambda line: states.append(state_of(tiny_net)))).stopped
    except (KeyboardInterrupt, DIVERGED) as error:
        outcome = error
    assert isinstance(outcome, kind) and re.search(words, str(outcome))
    assert len(states) == n_complete + 1 and not any(m.training for m in tiny_net.modules())
    assert torch.equal(state_of(tiny_net), states[-1])  # the last, not the best
    expected = ([True] * 3 + [False]) * 6  # an epoch is 3 training batches, and 1 of validation
    assert calls == expected[:call or 4 * n_complete]


def test_some_images_are_predicted_at_steps_of_the_first_epoch(tiny_net, loaders):
    twin, histories = copy.deepcopy(tiny_net), []
    for model, settings in ((tiny_net, dict(early_loader=loaders[1], n_early=2)), (twin, {})):
        helpers.seed_everything(7, [loaders[0].generator])
        histories.append(fit(model, loaders, replace(RECIPE, epochs=2), **settings))
    assert [n for n, _ in histories[0].early] == [48, 72] and histories[1].early == ()
    assert all(right.dtype == bool and right.shape == (18,) for _, right in histories[0].early)
    assert histories[0].early[-1][1].mean() == histories[0].epochs[0].val_accuracy
    assert torch.equal(state_of(tiny_net), state_of(twin))  # which changes nothing


def test_an_interruption_after_the_last_epoch_leaves_a_complete_training(tiny_net, loaders):
    def on_epoch(line):
        if line.startswith("Epoch 2/2"):
            raise KeyboardInterrupt

    history = fit(tiny_net, loaders, replace(RECIPE, epochs=2), on_epoch=on_epoch)
    assert history.stopped is None and len(history.epochs) == 2


def test_no_epoch_is_begun_that_would_end_too_late(tiny_net, loaders, clock, monkeypatch):
    monkeypatch.setattr(helpers, "train_one_epoch", lambda *args: clock.append(10) or (1.0, 0.5))
    for left, n_epochs in ((19, 1), (20, 2), (39, 3), (40, 4)):
        history = fit(tiny_net, loaders, seconds_left=left)
        assert len(history.epochs) == n_epochs and history.seconds == 10 * n_epochs


@pytest.mark.parametrize("kind, present", [
    ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())])
def test_an_accelerator_trains_and_predicts(tiny_net, loaders, kind, present):
    if not present:
        pytest.skip(f"no {kind} device here")
    dtype = FLOAT32 if kind == "mps" else BFLOAT16
    plan = helpers.plan_training(tiny_net, *loaders, recipe=RECIPE, device=kind, dtype=dtype,
                                 seconds=600, run_control=True)
    history = fit(tiny_net, loaders, plan.recipe, device=kind, dtype=dtype)
    assert history.epochs[-1].val_accuracy >= 0.9
    assert {p.device.type for p in tiny_net.parameters()} == {kind}
