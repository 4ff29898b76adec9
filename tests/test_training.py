"""Training: recipes, loops, planning, interruption."""

import copy
import dataclasses
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers

CPU = torch.device("cpu")
RECIPE = helpers.Recipe("test", epochs=4, lr=0.01, small_share=0.0)


def fit(model, loaders, recipe=RECIPE, **kwargs):
    lines = []
    arguments = dict(image_size=32, device=CPU, dtype=torch.float32, seed=7, on_epoch=lines.append)
    history = helpers.fit(model, recipe, *loaders, **{**arguments, **kwargs})
    return history, lines


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


def test_training_learns_and_reports_the_best_epoch(tiny_net, loaders):
    history, lines = fit(tiny_net, loaders, dataclasses.replace(RECIPE, epochs=8))
    assert history.best.val_accuracy >= 0.9 and history.stopped is None
    assert [m.epoch for m in history.epochs] == list(range(1, 9))
    assert history.epochs[-1].train_loss < history.epochs[0].train_loss
    assert not any(module.training for module in tiny_net.modules())
    pattern = r"Epoch \d+/8 \| Train Loss: \d+\.\d{3} \| Train Acc: \d+\.\d% \| Val Loss: \d+\.\d{3} \| Val Acc: \d+\.\d%"
    assert len(lines) == 8 and all(re.fullmatch(pattern, line) for line in lines)


def test_the_weights_of_the_best_epoch_are_left_in_the_model(tiny_net, loaders, monkeypatch):
    states, accuracies = [], iter([0.4, 0.9, 0.9, 0.2])

    def evaluate(model, *args):
        states.append(copy.deepcopy(model.state_dict()))
        return 1.0, next(accuracies)

    monkeypatch.setattr(helpers, "evaluate", evaluate)
    history, _ = fit(tiny_net, loaders)
    assert history.best.epoch == 2  # the first of two equally good ones
    assert all(torch.equal(value, states[1][name]) for name, value in tiny_net.state_dict().items())
    assert not torch.equal(states[1]["fc.weight"], states[3]["fc.weight"])


def test_the_same_seed_trains_to_the_same_bit_and_another_seed_does_not(tiny_net, loaders):
    twins = [copy.deepcopy(tiny_net) for _ in range(3)]
    histories = [fit(twin, loaders, seed=seed)[0].epochs for twin, seed in zip(twins, (7, 7, 8))]
    assert histories[0] == histories[1] and torch.equal(weights_of(twins[0]), weights_of(twins[1]))
    assert histories[0] != histories[2]


def test_a_twin_with_nothing_replaced_has_the_same_history_to_the_bit_and_a_swapped_one_has_not(tiny_net, loaders):
    initial = copy.deepcopy(tiny_net.state_dict())
    swapped = copy.deepcopy(tiny_net)
    helpers.replace_relu(swapped, nn.SiLU, 2)
    swapped.load_state_dict(initial)
    control = copy.deepcopy(tiny_net)
    control.load_state_dict(initial)
    seen = []
    for model in (tiny_net, swapped, control):
        inputs = []
        handle = model.register_forward_pre_hook(lambda m, args: inputs.append(args[0].clone()) if m.training else None)
        seen.append((fit(model, loaders)[0].epochs, inputs))
        handle.remove()
    assert seen[0][0] == seen[2][0] != seen[1][0]
    for original, of_swapped in zip(seen[0][1], seen[1][1]):
        assert torch.equal(original, of_swapped)  # the same batches, augmented in the same way


def test_image_sizes_grow_and_the_loader_gets_its_size_back(tiny_net, loaders):
    recipe = dataclasses.replace(RECIPE, small_share=0.5)
    assert recipe.image_sizes(64) == [32, 32, 64, 64] and recipe.image_sizes(96) == [48, 48, 96, 96]
    assert recipe.image_sizes(32) == [32] * 4
    assert dataclasses.replace(recipe, epochs=1).image_sizes(64) == [64]
    for loader in loaders:
        loader.dataset.set_image_size(64)
    sizes = []
    tiny_net.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-1]) if m.training else None)
    fit(tiny_net, loaders, recipe, image_size=64)
    assert sizes == [32] * 6 + [64] * 6 and loaders[0].dataset.image_size == 64


@pytest.mark.parametrize("kind", helpers.RECIPES)
def test_the_recipes_end_at_full_size(kind):
    recipe = helpers.RECIPES[kind]
    assert len(recipe.image_sizes(64)) == recipe.epochs and recipe.image_sizes(64)[-1] == 64


def test_the_whitened_stem_gives_outputs_of_unit_variance_in_pairs_and_changes_nothing_else():
    model = helpers.build_model("resnet18", seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = helpers.make_stand_in(1, n_train=40, n_test=1).train_images
    helpers.whiten_stem(model, images, 64)
    weight = model.conv1.weight.detach()
    assert torch.equal(weight[:32], -weight[32:])
    inputs = helpers.eval_transform(64)(torch.from_numpy(images).permute(0, 3, 1, 2))
    patches = F.unfold(inputs, 7, stride=8).transpose(1, 2).flatten(0, 1)
    responses = patches @ weight[:32].flatten(1).T
    covariance = responses.T @ responses / len(responses)
    assert torch.allclose(covariance, torch.diag(covariance.diagonal()), atol=1e-2)
    assert ((covariance.diagonal() > 0.5) & (covariance.diagonal() < 1.01)).all()
    assert covariance[0, 0] > covariance[31, 31]  # the leading components, in their order
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["conv1.weight"]


def test_weight_decay_spares_biases_and_normalisation_and_muon_takes_the_convolutions(tiny_net):
    tiny_net.features[0].bias.requires_grad_(False)
    optimizer = helpers.make_optimizer(tiny_net, RECIPE, torch.bfloat16)
    convolutions, linear, others = optimizer.param_groups
    assert [g["weight_decay"] for g in optimizer.param_groups] == [RECIPE.weight_decay, RECIPE.weight_decay, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [RECIPE.lr, RECIPE.adamw_lr, RECIPE.adamw_lr]
    assert [g["muon"] for g in optimizer.param_groups] == [True, False, False]
    assert convolutions["muon_dtype"] == torch.bfloat16
    assert [p.ndim for p in convolutions["params"]] == [4, 4] and linear["params"] == [tiny_net.fc.weight]
    assert all(p.ndim == 1 for p in others["params"])
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(tiny_net.parameters())) - 1


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_newton_schulz_steps_bring_singular_values_near_one_and_keep_the_directions(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = helpers.orthogonalise(matrix, torch.float32, steps=5)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert result.shape == matrix.shape
    singular = (u.T @ result @ v.T).diagonal()
    assert ((singular > 0.3) & (singular < 1.3)).all()
    assert torch.allclose(u.T @ result @ v.T, torch.diag(singular), atol=1e-3)
    result, close = (helpers.orthogonalise(matrix, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert close.dtype == torch.bfloat16 and (close.float() - result).norm() < 0.1 * result.norm()


def test_a_newton_schulz_step_is_the_quintic_of_the_singular_values():
    matrix = torch.diag(torch.tensor([0.8, 0.6]))  # of norm 1
    expected = [3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5 for s in (0.8, 0.6)]
    assert torch.allclose(helpers.orthogonalise(matrix, torch.float32, steps=1).diagonal(), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_muon_step_is_momentum_made_orthogonal_and_the_rest_is_adamw(layout):
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 4, 3, bias=False).to(memory_format=layout), nn.Linear(4, 2)
    model = nn.ModuleDict({"conv": conv, "fc": linear})
    twin = copy.deepcopy(linear)
    recipe = dataclasses.replace(RECIPE, lr=0.1, adamw_lr=0.01, weight_decay=0.5)
    optimizer = helpers.make_optimizer(model, recipe)
    reference = torch.optim.AdamW([
        {"params": [twin.weight], "weight_decay": 0.5}, {"params": [twin.bias], "weight_decay": 0.0}], lr=0.01)
    momentum = torch.zeros(4, 27)
    for _ in range(2):
        expected = conv.weight.detach().clone()
        gradient = torch.randn(4, 27)
        conv.weight.grad = gradient.view(4, 3, 3, 3).clone(memory_format=layout)
        for a, b in zip(linear.parameters(), twin.parameters()):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step(), reference.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = helpers.orthogonalise(0.05 * gradient + 0.95 * momentum, torch.float32).view(4, 3, 3, 3)
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(27) * update
        assert torch.allclose(conv.weight, expected, atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(linear.parameters(), twin.parameters()))


@pytest.mark.parametrize("size, kernel, stride, padding", [
    (1, 3, 1, 1), (2, 3, 1, 1), (3, 3, 1, 1), (4, 3, 2, 1), (5, 3, 2, 0), (4, 1, 2, 0), (6, (3, 2), (3, 2), (1, 0)), (4, 3, 1, 1)])
def test_a_small_map_as_matrix_product_is_the_same_convolution(size, kernel, stride, padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, stride, padding)).to(memory_format=torch.channels_last)
    conv, products = model[0], []
    x = torch.randn(5, 4, size, size, requires_grad=True)

    def run():
        output = model(x)
        return (output, *torch.autograd.grad(output.square().sum(), (x, conv.weight, conv.bias)))

    plain = run()
    with helpers.small_maps_as_matmul(model):
        linear = F.linear
        try:
            F.linear = lambda *args: products.append(1) or linear(*args)
            fast = run()
        finally:
            F.linear = linear
    assert bool(products) == (plain[0][0, 0].numel() <= 9)
    for a, b in zip(plain, fast):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-4)


def test_small_maps_as_matmul_leaves_the_model_as_it_was_and_other_convolutions_alone():
    class Own(nn.Conv2d):
        pass

    model = nn.ModuleList([
        nn.Conv2d(4, 4, 3), Own(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")])
    kinds = [type(m) for m in model]
    with pytest.raises(KeyboardInterrupt):
        with helpers.small_maps_as_matmul(model):
            assert [type(m) is kind for m, kind in zip(model, kinds)] == [False] + 5 * [True]
            assert isinstance(model[0], nn.Conv2d)
            raise KeyboardInterrupt
    assert [type(m) for m in model] == kinds


def test_the_optimiser_takes_a_closure_and_its_state_can_be_saved_and_loaded(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    optimizer = helpers.make_optimizer(tiny_net, RECIPE)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(tiny_net(images), targets)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    twin = copy.deepcopy(tiny_net)
    resumed = helpers.make_optimizer(twin, RECIPE)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, opt in ((tiny_net, optimizer), (twin, resumed)):
        opt.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        opt.step()
    assert torch.equal(weights_of(tiny_net), weights_of(twin))


def test_an_epoch_reports_means_over_images_and_steps_the_schedule_with_every_batch(tiny_net, labelled_images):
    images, labels = labelled_images
    loader = helpers.make_loader(images[:70], labels[:70], helpers.train_transform, 32, 24, seed=1)
    loader.sampler.drop_last = False  # batches of 24, 24 and 22
    optimizer = torch.optim.SGD(tiny_net.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    outputs, steps = [], []
    tiny_net.eval()  # the loop itself switches to training mode
    tiny_net.fc.register_forward_hook(lambda m, args, output: outputs.append((m.training, output.detach())))
    targets = []
    plain_getitem = type(loader.dataset).__getitem__

    class Recording(type(loader.dataset)):
        def __getitem__(self, indices):
            batch = plain_getitem(self, indices)
            targets.append(batch[1])
            return batch

    loader.dataset.__class__ = Recording
    loss, accuracy = helpers.train_one_epoch(
        tiny_net, nn.CrossEntropyLoss(label_smoothing=0.3), optimizer, scheduler, loader, CPU, torch.float32,
        lambda step, n: steps.append((step, n)))
    assert all(training for training, _ in outputs) and scheduler.last_epoch == 3
    logits, target = torch.cat([o for _, o in outputs]), torch.cat(targets)
    assert loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)  # without the smoothing
    assert accuracy == pytest.approx((logits.argmax(1) == target).float().mean().item())
    assert steps == [(1, 24), (2, 48), (3, 70)]


def test_a_step_changes_the_weights_by_its_own_gradient_only(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    twin = copy.deepcopy(tiny_net)
    optimizer = torch.optim.SGD(tiny_net.parameters(), lr=0.1)
    for p in tiny_net.parameters():
        p.grad = torch.ones_like(p)  # left over from before: must not count
    criterion = nn.CrossEntropyLoss()
    logits = helpers.train_step(tiny_net, criterion, optimizer, images, targets, CPU, torch.float32)
    loss = criterion(twin(images), targets)
    loss.backward()
    assert logits.shape == (24, 3) and not logits.requires_grad
    for p, q in zip(tiny_net.parameters(), twin.parameters()):
        assert torch.allclose(p, q - 0.1 * q.grad, atol=1e-6)


def test_a_loss_that_is_not_finite_names_epoch_step_and_learning_rate(tiny_net, loaders):
    calls = []

    def poison(module, args, output):
        calls.append(module.training)
        return output * math.nan if sum(calls) == 5 else output  # the fifth training batch

    tiny_net.fc.register_forward_hook(poison)
    with pytest.raises(helpers.NonFiniteLoss) as error:
        fit(tiny_net, loaders)
    message = str(error.value)
    assert "loss is nan" in message and "epoch 2" in message and "step 2" in message
    assert re.search(r"learning rate \d\.\d\de[+-]\d\d", message)
    assert torch.isfinite(weights_of(tiny_net)).all()


def test_a_validation_loss_that_is_not_finite_stops_training_and_the_best_weights_stay(tiny_net, loaders, monkeypatch):
    losses, states = iter([0.5, math.nan]), []

    def evaluate(model, *args):
        states.append(copy.deepcopy(model.state_dict()))
        return next(losses), 0.5

    monkeypatch.setattr(helpers, "evaluate", evaluate)
    recipe = dataclasses.replace(RECIPE, adamw_lr=1e-6)  # the message names Muon's
    with pytest.raises(
            helpers.NonFiniteLoss, match=r"validation loss is nan at learning rate \d\.\d\de-0[1-4], step 3, epoch 2: "):
        fit(tiny_net, loaders, recipe)
    assert all(torch.equal(value, states[0][name]) for name, value in tiny_net.state_dict().items())


def test_an_infinite_loss_stops_before_the_weights_change(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    before = weights_of(tiny_net).clone()
    optimizer = torch.optim.SGD(tiny_net.parameters(), lr=0.5)
    tiny_net.features[1].eval(), tiny_net.features[4].eval()
    with pytest.raises(helpers.NonFiniteLoss, match="loss is inf at learning rate 5.00e-01"):
        helpers.train_step(
            tiny_net, lambda logits, y: logits.sum() * math.inf if logits.sum() > 0 else logits.sum() * -math.inf,
            optimizer, images, targets, CPU, torch.float32)
    assert torch.equal(weights_of(tiny_net), before)


def interrupt_at(model, n):
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(hook)


def test_an_interrupted_training_keeps_its_best_weights_and_says_so(tiny_net, loaders):
    uninterrupted = copy.deepcopy(tiny_net)
    one_epoch, _ = fit(uninterrupted, loaders)
    # 3 training batches and one validation batch, twice for the mirror image, make an epoch of 5 calls
    interrupt_at(tiny_net, 2 * 5 + 2)
    history, lines = fit(tiny_net, loaders)
    assert history.stopped == "interrupted in epoch 3 of 4" and len(history.epochs) == len(lines) == 2
    assert history.epochs == one_epoch.epochs[:2]
    assert helpers.evaluate(tiny_net, loaders[1], CPU)[1] == history.best.val_accuracy


def test_an_interruption_before_the_first_epoch_ends_is_passed_on_with_advice(tiny_net, loaders):
    interrupt_at(tiny_net, 2)
    with pytest.raises(KeyboardInterrupt, match="before its first epoch was complete"):
        fit(tiny_net, loaders)


def test_training_stops_before_it_runs_out_of_time(tiny_net, loaders):
    history, _ = fit(tiny_net, loaders, seconds_left=0)
    assert len(history.epochs) == 1 and history.stopped == "out of time after epoch 1 of 4"


def test_an_epoch_on_larger_images_is_expected_to_take_longer(tiny_net, loaders, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: clock[0])

    def epoch_of_10_seconds(*args):
        clock[0] += 10
        return 1.0, 0.5

    monkeypatch.setattr(helpers, "train_one_epoch", epoch_of_10_seconds)
    recipe = dataclasses.replace(RECIPE, small_share=0.5)
    epochs = {left: len(fit(tiny_net, loaders, recipe, image_size=64, seconds_left=left)[0].epochs) for left in (19, 20, 39, 40)}
    assert epochs == {19: 1, 20: 2, 39: 2, 40: 4}


def test_prediction_averages_each_image_with_its_mirror_image(tiny_net, loaders):
    tiny_net.train()
    tiny_net.features[1].running_mean += 0.3
    probabilities, targets = helpers.predict(tiny_net, loaders[1], CPU)
    assert tiny_net.training
    images, expected_targets = next(iter(loaders[1]))
    tiny_net.eval()
    with torch.no_grad():
        expected = ((tiny_net(images) + tiny_net(images.flip(3))) / 2).softmax(1)
        plain = tiny_net(images).softmax(1)
    assert np.allclose(probabilities, expected, atol=1e-5) and targets.tolist() == expected_targets.tolist()
    assert not np.allclose(plain, expected, atol=1e-4)
    assert np.allclose(helpers.predict(tiny_net, loaders[1], CPU, with_mirror_image=False)[0], plain, atol=1e-5)


def test_evaluation_is_the_cross_entropy_and_accuracy_of_the_prediction(tiny_net, loaders):
    probabilities, targets = helpers.predict(tiny_net, loaders[1], CPU)
    loss, accuracy = helpers.evaluate(tiny_net, loaders[1], CPU)
    assert loss == pytest.approx(-np.mean([math.log(p[t]) for p, t in zip(probabilities, targets)]), rel=1e-5)
    assert accuracy == np.mean([p.argmax() == t for p, t in zip(probabilities, targets)])


def test_evaluation_leaves_weights_and_statistics_alone(tiny_net, loaders):
    before = weights_of(tiny_net).clone()
    helpers.evaluate(tiny_net, loaders[1], CPU)
    assert torch.equal(weights_of(tiny_net), before)


def test_bfloat16_runs_and_float32_is_left_alone(tiny_net, loaders):
    images, _ = next(iter(loaders[1]))
    for dtype in (torch.bfloat16, torch.float32):
        with helpers.autocast(CPU, dtype):
            assert tiny_net(images).dtype == dtype
    assert helpers.describe_dtype(torch.bfloat16) == "bfloat16"
    assert len(fit(tiny_net, loaders, dtype=torch.bfloat16)[0].epochs) == 4


def test_batches_go_to_the_device_in_channels_last(loaders):
    images, targets = helpers.to_device(*next(iter(loaders[1])), CPU)
    assert images.is_contiguous(memory_format=torch.channels_last) and targets.shape == (18,)
    assert helpers.memory_format(torch.device("cuda")) == torch.channels_last
    assert helpers.memory_format(torch.device("mps")) == torch.contiguous_format


@pytest.mark.parametrize("kind, supported, expected", [
    ("cpu", False, True), ("cuda", True, True), ("cuda", False, False), ("mps", True, False)])
def test_bfloat16_is_there_on_cpus_and_newer_cuda_cards(monkeypatch, kind, supported, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if supported else (7, 5))
    assert helpers.has_bfloat16(torch.device(kind)) is expected


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float32"])
def test_without_bfloat16_the_plan_takes_float32_and_says_so(tiny_net, loaders, monkeypatch, precision):
    monkeypatch.setattr(helpers, "has_bfloat16", lambda device: False)
    chosen = plan(tiny_net, loaders, precision=precision)
    assert chosen.dtype == torch.float32
    assert chosen.notes[0] == f"Precision: float32 (PRECISION={precision!r}; this cpu device has no bfloat16 autocast)."


def plan(model, loaders, seconds_left=math.inf, precision="auto", recipe=RECIPE):
    return helpers.plan_training(model, recipe, *loaders, 32, CPU, precision, seconds_left)


def test_measuring_changes_neither_the_model_nor_the_loader_nor_any_generator(tiny_net, loaders):
    before, state = weights_of(tiny_net).clone(), torch.get_rng_state()
    own_state = loaders[0].generator.get_state()
    seconds = helpers.measure_seconds(tiny_net, RECIPE, loaders[0], 48, CPU, torch.float32)
    assert 0 < seconds < 5 and loaders[0].dataset.image_size == 32
    assert torch.equal(weights_of(tiny_net), before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaders[0].generator.get_state(), own_state)
    assert all(p.grad is None for p in tiny_net.parameters())


@pytest.mark.parametrize("fast, expected", [(0.50, torch.bfloat16), (0.83, torch.bfloat16), (0.84, torch.float32), (2, torch.float32)])
def test_auto_takes_bfloat16_only_where_it_is_clearly_faster(tiny_net, loaders, monkeypatch, fast, expected):
    def measure(model, recipe, loader, size, device, dtype):
        return fast if dtype == torch.bfloat16 else 1.0

    monkeypatch.setattr(helpers, "measure_seconds", measure)
    chosen = plan(tiny_net, loaders)
    assert chosen.dtype == expected
    assert chosen.notes[0].startswith(f"Precision: {helpers.describe_dtype(expected)} (")
    assert "1000 ms in float32" in chosen.notes[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_precision_that_was_asked_for_is_taken(tiny_net, loaders, precision):
    chosen = plan(tiny_net, loaders, precision=precision)
    assert helpers.describe_dtype(chosen.dtype) == precision and repr(precision) in chosen.notes[0]


def test_the_epochs_are_cut_until_they_fit_and_the_cut_is_said(tiny_net, loaders, monkeypatch):
    monkeypatch.setattr(helpers, "measure_seconds", lambda *args: 1.0)
    per_epoch = 3 + 18 / 24 * 2 / 3  # 3 steps, and 18 validation images in batches of 24
    report = 3 / 2  # half the steps of an epoch
    whole = plan(tiny_net, loaders, seconds_left=4 * per_epoch / 0.9 + report + 0.1)
    assert whole.recipe == RECIPE and 0 < whole.seconds < 0.1
    assert whole.notes[1:] == ("Epochs: 4, all of the recipe's.", "Estimated training time: 0 min 14 s.")
    cut = plan(tiny_net, loaders, seconds_left=4 * per_epoch / 0.9 + report - 0.01)
    assert cut.recipe.epochs == 3 and cut.notes[1] == "Epochs cut from 4 to 3 to fit the 0 min 14 s left."
    for left in (1, -5):
        late = plan(tiny_net, loaders, seconds_left=left / 0.9 + report + 0.01)
        assert late.recipe.epochs == 1
        assert late.notes[1].startswith(f"Epochs: 1 of 4, and even that is more than the 0 min {max(left, 0):02d} s left")


def test_the_time_that_measuring_took_is_not_planned_twice(tiny_net, loaders, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: clock[0])

    def measure(*args):
        clock[0] += 100
        return 1.0

    monkeypatch.setattr(helpers, "measure_seconds", measure)
    chosen = plan(tiny_net, loaders, seconds_left=200 + 2 * 3.5 / 0.9 + 1.5 + 0.1)  # both precisions are measured
    assert chosen.seconds == 200 and chosen.recipe.epochs == 2


def test_slow_steps_are_measured_fewer_times(tiny_net, loaders, monkeypatch):
    clock, steps = [0.0], []
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: clock[0])

    def slow(*args):
        steps.append(1)
        clock[0] += 6

    monkeypatch.setattr(helpers, "train_step", slow)
    assert helpers.measure_seconds(tiny_net, RECIPE, loaders[0], 32, CPU, torch.float32) == 6
    assert len(steps) == 2


def test_smaller_images_are_planned_as_cheaper(tiny_net, loaders, monkeypatch):
    monkeypatch.setattr(helpers, "measure_seconds", lambda m, r, l, size, *rest: 1.0 if size == 64 else 0.25)
    recipe = dataclasses.replace(RECIPE, small_share=0.5)
    chosen = helpers.plan_training(tiny_net, recipe, *loaders, 64, CPU, "float32", math.inf)
    seconds = 2 * 3 * 1.0 + 2 * 3 * 0.25 + 4 * 18 / 24 * 2 / 3
    assert seconds == 9.5 and chosen.notes[-1] == "Estimated training time: 0 min 10 s."
