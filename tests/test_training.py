"""Training: recipes, prediction, the loop, its end by accident, measuring and planning."""

import copy
import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import helpers

RECIPE = helpers.Recipe(epochs=4, image_size=32, lr=0.02)


def state_of(model):
    return copy.deepcopy(model.state_dict())


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key


def assert_in_evaluation_mode(model):
    assert [name for name, module in model.named_modules() if module.training] == []


class Clock:
    """Stands in for the module ``time``; each look at it takes ``seconds_per_look``."""

    def __init__(self, seconds_per_look=0.0):
        self.seconds, self.seconds_per_look = 7.0, seconds_per_look

    def perf_counter(self):
        self.seconds += self.seconds_per_look
        return self.seconds

    time = monotonic = perf_counter


@pytest.fixture
def batches(labelled_images):
    """Three batches of 10, 10 and 4 images, the same and in the same order each time."""
    images, labels = labelled_images
    dataset = helpers.ImageDataset(images[:24], labels[:24], train=False, image_size=32)
    all_images = torch.stack([image for image, _ in dataset])
    return list(zip(all_images.split(10), torch.from_numpy(labels[:24]).split(10)))


# ---- Recipes and prediction ----


@pytest.mark.parametrize("start", ["pretrained", "random", "stand-in"])
def test_a_recipe_takes_the_users_epochs_and_image_size_or_its_own(start):
    own = helpers.RECIPES[start]
    assert helpers.pick_recipe(start, None, None) == own
    assert helpers.pick_recipe(start, 7, None) == replace(own, epochs=7)
    assert helpers.pick_recipe(start, None, 40) == replace(own, image_size=40)
    both = helpers.pick_recipe(start, np.int64(7), np.int64(40))
    assert repr(both) == repr(replace(own, epochs=7, image_size=40))  # plain int, as all else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predictions_are_the_evaluation_modes_logits_in_the_loaders_order(
        tiny_net, batches, dtype):
    computed_in = []

    def note_dtype(module, args, output):
        computed_in.append(output.dtype)

    tiny_net.features[1].running_mean += 0.3  # evaluation differs from training
    with torch.no_grad():
        expected = copy.deepcopy(tiny_net).eval()(torch.cat([images for images, _ in batches]))
    tiny_net.fc.register_forward_hook(note_dtype)

    logits, targets = helpers.predict(tiny_net.train(), batches, dtype)

    assert logits.dtype == torch.float32 and targets.dtype == torch.int64
    assert set(computed_in) == {dtype}
    assert torch.allclose(logits, expected, atol=1e-5 if dtype == torch.float32 else 0.05)
    assert torch.equal(targets, torch.cat([targets for _, targets in batches]))
    assert_in_evaluation_mode(tiny_net)


def test_an_evaluation_is_the_mean_over_all_images_not_over_batches(tiny_net, batches):
    logits, targets = helpers.predict(tiny_net, batches)
    loss, accuracy = helpers.evaluate(tiny_net.train(), batches)
    true_probabilities = logits.softmax(1)[torch.arange(24), targets]
    assert loss == pytest.approx(-true_probabilities.log().mean().item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == targets).sum().item() / 24)


def test_a_temperature_can_be_learnt_from_predicted_logits(tiny_net, batches):
    logits, targets = helpers.predict(tiny_net, batches)
    log_temperature = torch.zeros(1, requires_grad=True)
    F.cross_entropy(logits * log_temperature.exp(), targets).backward()
    assert not logits.requires_grad
    assert log_temperature.grad.item() != 0


# ---- The training ----


def train_by_hand(model, batches, dtype, rates):
    """What fit should do, with other means: (last epoch's logits, their targets).

    One parameter group for each parameter, the rates as numbers, and the recipe's as well.
    """
    optimizer = torch.optim.AdamW([{"params": [p]} for p in model.parameters()])
    seen = []
    model.train()
    for rate, (images, targets) in zip(rates, batches * 3):
        for group in optimizer.param_groups:
            (parameter,) = group["params"]
            group["lr"] = rate
            group["weight_decay"] = 0.3 if parameter.ndim > 1 else 0.0
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(images.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits.float(), targets, label_smoothing=0.2).backward()
        optimizer.step()
        seen.append((logits.detach().float(), targets))
    last_epoch = seen[-len(batches):]
    return torch.cat([logits for logits, _ in last_epoch]), torch.cat([t for _, t in last_epoch])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_equals_one_written_by_hand(tiny_net, batches, dtype):
    twin = copy.deepcopy(tiny_net)
    for parameter in tiny_net.eval().parameters():
        parameter.grad = torch.ones_like(parameter)  # left over from before: must not count

    history = helpers.fit(
        tiny_net, batches, batches[:2], dtype=dtype,
        recipe=helpers.Recipe(3, 32, lr=0.02, weight_decay=0.3, label_smoothing=0.2))

    # From a 25th of the peak to the peak in 3 steps, then down, to 0 in the step after the last.
    falling = [0.01 + 0.01 * math.cos(math.pi * i / 7) for i in range(1, 7)]
    logits, targets = train_by_hand(twin, batches, dtype, [0.0008, 0.0104, 0.02, *falling])
    for name, parameter in tiny_net.state_dict().items():
        assert torch.allclose(parameter, twin.state_dict()[name], atol=1e-5), name
    last = history[-1]
    assert last.train_loss == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-4)
    assert last.train_accuracy == (logits.argmax(1) == targets).float().mean().item()
    val_loss, val_accuracy = helpers.evaluate(tiny_net, batches[:2], dtype)
    assert (last.val_loss, last.val_accuracy) == (val_loss, val_accuracy)
    assert [metrics.epoch for metrics in history] == [1, 2, 3]


def test_a_training_seeds_nothing_and_draws_nothing(tiny_net, batches):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    helpers.fit(tiny_net, batches, batches, recipe=RECIPE)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_each_epoch_is_told_in_a_line(tiny_net, batches):
    lines = []
    history = helpers.fit(
        tiny_net, batches, batches, recipe=replace(RECIPE, epochs=2), on_epoch=lines.append)
    assert lines == [metrics.line(2) for metrics in history]
    assert helpers.EpochMetrics(2, 0.5, 0.8, 0.6, 0.755).line(4) == (
        "Epoch 2/4 | Train Loss: 0.500 | Train Acc: 80.0% | Val Loss: 0.600 | Val Acc: 75.5%")


def test_frozen_modules_keep_weights_statistics_and_evaluation_mode_in_training(
        tiny_net, batches):
    modes = []

    def note_modes(module, args):
        modes.append((module.training, module.features.training, module.features[1].training))

    frozen_before = state_of(tiny_net.features)
    head_before = state_of(tiny_net.fc)
    assert helpers.freeze(tiny_net, ("features", "fc"), "relu") == ("features",)
    tiny_net.register_forward_pre_hook(note_modes)

    helpers.fit(tiny_net, batches, batches, recipe=replace(RECIPE, epochs=1))

    in_training, in_validation = modes[:len(batches)], modes[len(batches):]
    assert in_training == [(True, False, False)] * len(batches)
    assert in_validation == [(False, False, False)] * len(batches)
    assert_same_state(tiny_net.features.state_dict(), frozen_before)
    assert not torch.equal(tiny_net.fc.weight, head_before["weight"])


def test_the_same_seed_trains_alike_and_another_one_does_not(tiny_net, loaders):
    def train(seed):
        model = copy.deepcopy(tiny_net)
        torch.manual_seed(seed)
        history = helpers.fit(model, *loaders, recipe=replace(RECIPE, epochs=2))
        return history, model.state_dict()

    history, state = train(7)
    same_history, same_state = train(7)
    other_history, _ = train(8)
    assert same_history == history
    assert_same_state(same_state, state)
    assert other_history != history


def test_all_epochs_are_trained_whatever_the_clock_says(tiny_net, loaders, monkeypatch):
    monkeypatch.setattr(helpers, "time", Clock(seconds_per_look=3600 * 5))
    assert len(helpers.fit(tiny_net, *loaders, recipe=RECIPE)) == RECIPE.epochs


# ---- How a training can end ----


class HappensAtPass:
    """A forward hook that does something at one pass through the model, counted from 1.

    With ``loaders`` an epoch has 3 passes in training and 1 in validation.
    """

    def __init__(self, at):
        self.at, self.n_passes = at, 0

    def __call__(self, module, args, logits):
        self.n_passes += 1
        if self.n_passes == self.at:
            return self.happen(logits)
        return None


class Interrupt(HappensAtPass):
    def happen(self, logits):
        raise KeyboardInterrupt


class Diverge(HappensAtPass):
    """Not a number is what comes out, and soon what all weights are."""

    def happen(self, logits):
        return logits * math.nan


class InfiniteLoss(HappensAtPass):
    """The first class is impossible: only the loss is infinite, and the weights stay finite."""

    def happen(self, logits):
        return logits - torch.tensor([math.inf, 0, 0])


def train_until_it_ends(model, loaders, hook, error, interrupt_after_epoch=None):
    """Train; returns (the states at the start and after each epoch, the error it ended with)."""
    states = [state_of(model)]

    def on_epoch(line):
        states.append(state_of(model))
        if len(states) - 1 == interrupt_after_epoch:
            raise KeyboardInterrupt

    model.register_forward_hook(hook)
    with pytest.raises(error) as raised:
        helpers.fit(model, *loaders, recipe=RECIPE, on_epoch=on_epoch)
    return states, str(raised.value)


def assert_is_as_after_the_last_epoch(model, states):
    assert_same_state(model.state_dict(), states[-1])
    assert_in_evaluation_mode(model)
    assert [name for name, p in model.named_parameters() if p.grad is not None] == []


@pytest.mark.parametrize("at_pass, n_complete", [
    (1, 0),  # the first step
    (4, 0),  # the first validation
    (6, 1),  # the middle of epoch 2
    (12, 2),  # the validation of epoch 3
])
def test_an_interrupted_training_leaves_the_last_complete_epoch(
        tiny_net, loaders, at_pass, n_complete):
    states, _ = train_until_it_ends(tiny_net, loaders, Interrupt(at_pass), KeyboardInterrupt)
    assert len(states) == 1 + n_complete
    assert_is_as_after_the_last_epoch(tiny_net, states)


def test_an_interrupt_while_an_epoch_is_told_keeps_that_epoch(tiny_net, loaders):
    states, _ = train_until_it_ends(
        tiny_net, loaders, Interrupt(99), KeyboardInterrupt, interrupt_after_epoch=2)
    assert len(states) == 1 + 2
    assert_is_as_after_the_last_epoch(tiny_net, states)


@pytest.mark.parametrize("make_hook, at_pass, n_complete", [
    (Diverge, 2, 0),  # in training
    (InfiniteLoss, 6, 1),  # only in training
    (Diverge, 8, 1),  # only in the validation of epoch 2
])
def test_a_loss_that_is_not_finite_ends_the_training_and_is_told(
        tiny_net, loaders, make_hook, at_pass, n_complete):
    states, told = train_until_it_ends(
        tiny_net, loaders, make_hook(at_pass), FloatingPointError)
    assert told.startswith(f"Epoch {n_complete + 1}: the loss is not finite")
    assert "0.02" in told  # the recipe's rate
    assert len(states) == 1 + n_complete
    assert_is_as_after_the_last_epoch(tiny_net, states)


def test_a_complete_training_ends_in_evaluation_mode_without_gradients(tiny_net, loaders):
    states = []

    def on_epoch(line):
        states.append(state_of(tiny_net))

    helpers.fit(tiny_net, *loaders, recipe=RECIPE, on_epoch=on_epoch)
    assert len(states) == RECIPE.epochs
    assert_is_as_after_the_last_epoch(tiny_net, states)  # the last, not the best


# ---- Measuring and planning ----


@pytest.mark.parametrize("training", [True, False])
def test_measuring_an_epoch_leaves_everything_as_it_was(tiny_net, loaders, training):
    tiny_net.train(training)
    state, random_state = state_of(tiny_net), torch.get_rng_state()

    seconds = helpers.measure_epoch(tiny_net, *loaders, recipe=RECIPE, dtype=torch.float32)

    assert 0 < seconds < 60
    assert_same_state(tiny_net.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert {module.training for module in tiny_net.modules()} == {training}
    assert tiny_net.fc.weight.grad is None


@pytest.fixture
def timed_net(tiny_net, monkeypatch):
    """A clock, and a network whose first pass takes 9 seconds and each other one 0.3."""
    clock = Clock()
    monkeypatch.setattr(helpers, "time", clock)
    seconds_of_next = [9.0]

    def take_time(module, args):
        clock.seconds += seconds_of_next[0]
        seconds_of_next[0] = 0.3

    tiny_net.register_forward_pre_hook(take_time)
    return tiny_net, clock


@pytest.mark.parametrize("n_train, n_val", [(3, 1), (2, 1), (3, 3)])
def test_an_epoch_is_its_steps_without_the_slow_first_and_a_third_for_validation(
        timed_net, batches, n_train, n_val):
    net, _ = timed_net
    seconds = helpers.measure_epoch(
        net, batches[:n_train], batches[:n_val], recipe=RECIPE, dtype=torch.float32)
    assert seconds == pytest.approx(0.3 * (n_train + n_val / 3))


def test_an_epoch_of_many_steps_is_measured_in_a_few(timed_net, batches):
    net, clock = timed_net
    started = clock.seconds
    seconds = helpers.measure_epoch(
        net, batches[:1] * 100, batches[:1] * 30, recipe=RECIPE, dtype=torch.float32)
    assert seconds == pytest.approx(0.3 * (100 + 30 / 3))
    assert clock.seconds - started < 9 + 0.3 * 20


def test_an_epoch_of_one_step_is_measured_by_it(timed_net, batches):
    net, _ = timed_net
    seconds = helpers.measure_epoch(
        net, batches[:1], batches, recipe=RECIPE, dtype=torch.float32)
    assert seconds == pytest.approx(9 * (1 + 3 / 3))


NINE_EPOCHS = replace(RECIPE, epochs=9)  # of a minute each: the pair takes 18 minutes


@pytest.mark.parametrize("run_control, budget, minutes", [
    (True, 100, "18.0"),
    (True, 20, "18.0"),  # 0.9 of it is just the time of the pair
    (False, 10, "9.0"),  # the same for one network
])
def test_what_fits_into_the_budget_is_planned_whole(run_control, budget, minutes):
    recipe, control, line = helpers.plan_training(
        NINE_EPOCHS, 60, run_control=run_control, budget_minutes=budget)
    assert recipe == NINE_EPOCHS
    assert control == run_control
    who = "each of two networks" if run_control else "one network"
    assert f"9 of 9 epochs for {who}, about 60 s an epoch, {minutes} min in all" in line
    assert "TIME_BUDGET_MINUTES" not in line


@pytest.mark.parametrize("run_control", [True, False])
def test_without_a_budget_all_is_trained_however_long_it_takes(run_control):
    recipe, control, _ = helpers.plan_training(
        NINE_EPOCHS, 1e6, run_control=run_control, budget_minutes=math.inf)
    assert (recipe, control) == (NINE_EPOCHS, run_control)
    assert helpers.plan_training(NINE_EPOCHS, 1e6, run_control=run_control)[0] == NINE_EPOCHS


@pytest.mark.parametrize("run_control, budget, epochs", [
    (True, 19.9, 9),  # the control goes, and no epoch
    (True, 10.1, 9),
    (True, 9.9, 8),
    (False, 9.9, 8),
    (False, 5.6, 5),
    (False, 0.1, 1),
])
def test_what_does_not_fit_loses_the_control_first_then_epochs_but_one(
        run_control, budget, epochs):
    recipe, control, line = helpers.plan_training(
        NINE_EPOCHS, 60, run_control=run_control, budget_minutes=budget)
    assert recipe == replace(NINE_EPOCHS, epochs=epochs)
    assert control is False
    assert f"{epochs} of 9 epochs for one network, about 60 s an epoch, {epochs}.0 min" in line
    assert "would do for 9 epochs for " in line


@pytest.mark.parametrize("epoch_seconds", [0.7, 60, 61.3, 350])
@pytest.mark.parametrize("run_control", [True, False])
def test_the_budget_that_a_plan_asks_for_is_the_one_that_keeps_everything(
        epoch_seconds, run_control):
    _, _, line = helpers.plan_training(
        NINE_EPOCHS, epoch_seconds, run_control=run_control, budget_minutes=0.01)
    asked_for = int(re.search(r"TIME_BUDGET_MINUTES = (\d+) would do", line).group(1))

    def keeps_everything(budget):
        recipe, control, _ = helpers.plan_training(
            NINE_EPOCHS, epoch_seconds, run_control=run_control, budget_minutes=budget)
        return (recipe, control) == (NINE_EPOCHS, run_control)

    assert keeps_everything(asked_for)
    assert not keeps_everything(asked_for - 1)


# ---- Devices ----


@pytest.mark.parametrize("kind, is_present", [
    ("cpu", True),
    ("cuda", torch.cuda.is_available()),
    ("mps", torch.backends.mps.is_available()),
])
def test_a_device_is_measured_trains_and_predicts(tiny_net, loaders, kind, is_present):
    if not is_present:
        pytest.skip(f"no {kind} device here")
    dtype = torch.float32 if kind == "mps" else torch.bfloat16
    model = tiny_net.to(kind)
    assert helpers.measure_epoch(model, *loaders, recipe=RECIPE, dtype=dtype) > 0
    history = helpers.fit(model, *loaders, recipe=RECIPE, dtype=dtype)
    logits, targets = helpers.predict(model, loaders[1], dtype)
    assert history[-1].val_accuracy >= 0.9
    assert logits.device.type == "cpu" and targets.device.type == "cpu"


def test_a_budget_that_is_just_enough_by_rounding_is_enough():
    recipe = helpers.Recipe(epochs=25, image_size=32, lr=0.1)
    planned, train_control, _ = helpers.plan_training(
        recipe, 145.8, run_control=True, budget_minutes=135)
    assert planned == recipe and train_control
    planned, _, _ = helpers.plan_training(recipe, 291.6, run_control=False, budget_minutes=135)
    assert planned == recipe
