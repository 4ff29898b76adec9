"""Training: recipes, optimisers, the loops, planning, interruption, devices."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import helpers

BFLOAT16, STOP = torch.bfloat16, KeyboardInterrupt
RECIPE = helpers.Recipe(4, 32, lr=0.02)


def flat(state_dict):
    return torch.cat([value.flatten().double() for value in state_dict.values()])


@pytest.fixture
def clock(monkeypatch):
    seconds = []
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: 7 + sum(seconds))
    return seconds


@pytest.mark.parametrize("start", helpers.RECIPES)
def test_a_recipe_takes_the_users_epochs_and_size_or_the_measured_ones(start):
    assert helpers.pick_recipe(start, None, None) == (recipe := helpers.RECIPES[start])
    found = helpers.pick_recipe(start, np.int64(3), np.int64(64))
    assert repr(found) == repr(replace(recipe, epochs=3, image_size=64))


def test_prediction_is_plain_unless_mirrored_and_in_evaluation_mode(tiny_net, loaders):
    tiny_net.features[1].running_mean += 0.3
    images, labels = next(iter(loaders[1]))
    with torch.no_grad():
        plain, mirrored = (copy.deepcopy(tiny_net).eval()(x) for x in (images, images.flip(3)))
    batches = list(zip(images.split(10), labels.split(10)))
    for settings, expected in (({}, plain), ({"mirror": True}, (plain + mirrored) / 2)):
        logits, targets = helpers.predict(tiny_net.train(), batches, **settings)
        assert torch.allclose(logits, expected, atol=1e-5) and torch.equal(targets, labels)
        right = (expected.argmax(1) == labels).numpy()
        loss, found = helpers.evaluate(tiny_net.train(), batches, **settings)
        assert loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-5)
        assert found.dtype == bool and np.array_equal(found, right)
    assert not any(m.training for m in tiny_net.modules())


@pytest.mark.parametrize("epochs, fitting, control, planned, pair", [
    (8, 99, False, 8, False), (8, 7.9, False, 7, False), (8, 0.1, True, 1, False),
    (8, 16, True, 8, True), (8, 15.9, True, 7, True), (8, 4, True, 2, True),
    (8, 3.9, True, 3, False), (1, 2, True, 1, True), (1, 1.9, True, 1, False)])
def test_the_time_is_for_the_pair_or_one_and_planning_leaves_everything_as_it_was(
        tiny_net, loaders, clock, epochs, fitting, control, planned, pair):
    tiny_net.eval().register_forward_pre_hook(  # the first step is slower
        lambda module, args: clock.append(0.3 if clock else 9))
    before = flat(tiny_net.state_dict()), torch.get_rng_state()
    recipe, seconds = replace(RECIPE, epochs=epochs), fitting / 0.85 + 1e-9
    *plan, line = helpers.plan_training(  # an epoch takes 3 steps and one of validation, 1 s
        tiny_net, *loaders, recipe=recipe, dtype=BFLOAT16, seconds=seconds, run_control=control)
    assert plan == [replace(recipe, epochs=planned), pair, 0.92 * seconds / (1 + pair)]
    told = f"{planned} of {epochs} for {'each of two networks' if pair else 'one network'}, "
    assert told + "about 1 s an epoch" in line and ("No control" in line) == (control and not pair)
    assert all(map(torch.equal, before, (flat(tiny_net.state_dict()), torch.get_rng_state())))
    assert not any(m.training for m in tiny_net.modules()) and tiny_net.fc.weight.grad is None


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32])
def test_a_training_equals_a_hand_written_one_and_seeds_nothing(tiny_net, loaders, dtype):
    images, targets = next(iter(loaders[0]))
    batches = list(zip(images.split(10), targets.split(10)))  # any iterable of a length; 10, 10, 4
    torchs = DataLoader(TensorDataset(images, targets), 7, generator=torch.Generator())
    twin, seen, logits, random_state = copy.deepcopy(tiny_net), set(), [], torch.get_rng_state()
    tiny_net.register_forward_hook(lambda model, args, output: seen.add(
        (output.dtype, args[0].is_contiguous(memory_format=torch.channels_last))))
    for p in tiny_net.eval().parameters():  # the training itself switches to training mode
        p.grad = torch.ones_like(p)  # left over from before: must not count
    torch.use_deterministic_algorithms(False)
    history = helpers.fit(tiny_net, batches, torchs, dtype=dtype, early_loader=torchs, n_early=2,
                          recipe=replace(RECIPE, epochs=3, label_smoothing=0.2, weight_decay=0.3))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not torch.are_deterministic_algorithms_enabled()
    optimizer = torch.optim.AdamW([{"params": [p]} for p in twin.parameters()])
    # From a 25th of the peak up to it in 3 of 10 steps, and down to 0 in the step after the last.
    rates = [0.0008, 0.0104, 0.02, *(0.01 + 0.01 * math.cos(math.pi * i / 7) for i in range(1, 7))]
    for rate, (x, y) in zip(rates, batches * 3):
        for group in optimizer.param_groups:
            group.update(lr=rate, weight_decay=0.3 * (group["params"][0].ndim > 1))
        optimizer.zero_grad()
        with torch.autocast("cpu", BFLOAT16, enabled=dtype == BFLOAT16):
            logits.append(twin(x.to(memory_format=torch.channels_last)))
        F.cross_entropy(logits[-1].float(), y, label_smoothing=0.2).backward()
        optimizer.step()
    assert torch.allclose(flat(tiny_net.state_dict()), flat(twin.state_dict()), atol=1e-5)
    last, logits = history.epochs[-1], torch.cat(logits[-3:]).float()
    expected = F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).numpy().mean()
    assert (last.train_loss, last.train_accuracy) == pytest.approx(expected, rel=1e-5)
    val_loss, right = helpers.evaluate(tiny_net, torchs, dtype)
    assert (last.val_loss, last.val_accuracy) == (val_loss, right.mean())
    assert seen == {(dtype, True)} and [n for n, _ in history.early] == [20, 24]


def test_a_seed_trains_alike_whatever_is_evaluated_meanwhile(tiny_net, labelled_images):
    loaders = [helpers.make_loader(*labelled_images, train=train, image_size=32, batch_size=size)
               for train, size in ((True, 4), (False, 90))]

    def train(**settings):
        model = copy.deepcopy(tiny_net)
        helpers.seed_everything(7)
        history = helpers.fit(model, *loaders, recipe=replace(RECIPE, epochs=2), **settings)
        return history, flat(model.state_dict())

    (plain, weights), (same, twins) = train(), train(early_loader=loaders[1])
    assert plain.epochs == same.epochs and torch.equal(weights, twins)
    assert [n // 4 for n, _ in same.early] == [3, 5, 7, 9, 11, 14, 16, 18, 20, 22]  # of 22 steps
    assert plain.early == [] and same.early[-1][1].mean() == same.epochs[0].val_accuracy


@pytest.mark.parametrize("moment, event, settings, outcome, n_complete", [
    (0, None, {"keep_states": True}, "None", 6), (0, None, {"last_epoch": 2}, "None", 2),
    (0, None, {"seconds": 19}, "out of time after epoch 1 of 6", 1),
    (0, None, {"seconds": 20}, "out .* 2 of 6", 2), (0, None, {"seconds": 39}, "out .* 3 of 6", 3),
    (4, STOP, {}, "", 0), (30, STOP, {}, "None", 6),
    (14, STOP, {"keep_states": True}, "interrupted after epoch 2 of 6", 2),
    (15, STOP, {}, "interrupted after .* 3 of 6", 3), (10, STOP, {"last_epoch": 2}, "None", 2),
    *[(moment, math.nan, {}, f"Epoch {n + 1}: the loss is not finite, .* up to 2.00e-02: .*", n)
      for moment, n in ((2, 0), (13, 2), (9, 1))]])
def test_the_last_complete_epochs_weights_stay_however_training_ends(
        tiny_net, loaders, clock, moment, event, settings, outcome, n_complete):
    def happens(what, logits=None):
        done.append(what)
        if len(done) == moment and event is STOP:
            raise STOP
        return logits * event if len(done) == moment else logits

    done, states = [], [flat(tiny_net.state_dict())]
    tiny_net.register_forward_hook(
        lambda model, args, logits: clock.append(2.5) or happens(model.training, logits))
    try:
        history = helpers.fit(
            tiny_net, *loaders, recipe=replace(RECIPE, epochs=6), **settings, on_epoch=lambda line:
            states.append(flat(tiny_net.state_dict())) or happens(None))
        found, since = history.stopped, 1 if "keep_states" in settings else -1
        assert torch.equal(torch.stack([*map(flat, history.states)]), torch.stack(states[since:]))
        assert history.seconds == 10 * len(history.epochs) == 10 * n_complete
    except (KeyboardInterrupt, FloatingPointError) as error:
        found = error
    assert re.fullmatch(outcome, str(found)) and len(states) == n_complete + 1
    assert torch.equal(flat(tiny_net.state_dict()), states[-1])  # the last, not the best
    assert not any(m.training for m in tiny_net.modules()) and tiny_net.fc.weight.grad is None
    end = moment if event is STOP else 5 * n_complete + 4 * bool(event)
    assert done == (([True] * 3 + [False, None]) * 6)[:end]


@pytest.mark.parametrize("kind, present", [
    ("cpu", True), ("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())])
def test_a_device_trains_and_predicts(tiny_net, loaders, kind, present):
    if not present:
        pytest.skip(f"no {kind} device here")
    dtype = torch.float32 if kind == "mps" else BFLOAT16
    history = helpers.fit(tiny_net.to(kind), *loaders, recipe=RECIPE, dtype=dtype)
    logits, targets = helpers.predict(tiny_net, loaders[1], dtype, mirror=True)
    assert history.epochs[-1].val_accuracy >= 0.9
    assert logits.device.type == targets.device.type == "cpu"
