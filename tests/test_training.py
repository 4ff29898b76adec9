"""Training: recipes, the optimiser, the loops, planning, interruption."""

import copy
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import helpers

CPU, BFLOAT16, FLOAT32 = torch.device("cpu"), torch.bfloat16, torch.float32
STOP, DIVERGED = KeyboardInterrupt(), helpers.NonFiniteLoss
RECIPE = helpers.Recipe("test", 4, muon_lr=0.02, adamw_lr=0.01, small_share=0, warmup_share=0.15)


def fit(model, loaders, recipe=RECIPE, image_size=32, dtype=FLOAT32, seed=7, **kwargs):
    return helpers.fit(model, recipe, *loaders, image_size, CPU, dtype, seed, **kwargs)


def state_of(module):
    return torch.cat([value.flatten().double() for value in module.state_dict().values()])


@pytest.fixture
def clock(monkeypatch):
    seconds = []
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: sum(seconds))
    return seconds


@pytest.mark.parametrize("share, epochs, image_size, expected", [
    (0.5, 4, 64, [32, 32, 64, 64]), (0.5, 5, 96, [48, 48, 96, 96, 96]), (0.5, 1, 64, [64]),
    (0.5, 2, 48, [32, 48]), (0.5, 2, 32, [32, 32]), (0.0, 2, 64, [64, 64])])
def test_the_first_epochs_see_images_of_half_the_size(share, epochs, image_size, expected):
    recipe = replace(RECIPE, small_share=share, epochs=epochs)
    assert recipe.image_sizes(image_size, FLOAT32) == expected
    assert recipe.image_sizes(image_size, BFLOAT16) == [image_size] * epochs
    assert all(recipe.image_sizes(64, FLOAT32)[-1] == 64 for recipe in helpers.RECIPES.values())


def test_the_best_epoch_is_the_first_best_one_at_the_last_image_size():
    results = enumerate([(0.99, 32), (0.7, 64), (0.8, 64), (0.8, 64), (0.6, 64)])
    epochs = tuple(helpers.EpochMetrics(i, 1, 0, 1, *result) for i, result in results)
    assert helpers.History(epochs, 1.0).best.epoch == 2


@pytest.mark.parametrize("kind, capability, bfloat16, layout", [
    ("cpu", 0, True, torch.channels_last), ("cuda", 8, True, torch.channels_last),
    ("cuda", 7, False, torch.channels_last), ("mps", 9, False, torch.contiguous_format)])
def test_each_device_has_its_precisions_and_layout(monkeypatch, kind, capability, bfloat16, layout):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    device = torch.device(kind)
    assert (helpers.has_bfloat16(device), helpers.memory_format(device)) == (bfloat16, layout)


@pytest.mark.parametrize("kernel, stride, padding, bias", [
    (3, 1, 1, False), (3, 2, 1, True), (3, 1, 2, True), (1, 2, 0, False), (1, 1, 0, True),
    ((3, 5), (3, 2), (1, 2), True), ((1, 3), (1, 2), (0, 1), False)])
def test_the_product_is_the_same_convolution(kernel, stride, padding, bias, monkeypatch):
    conv, products, linear = nn.Conv2d(4, 6, kernel, stride, padding, bias=bias), [], F.linear
    monkeypatch.setattr(F, "linear", lambda *args: products.append(args) or linear(*args))
    for shape in [(2, 4, n, m) for n in range(1, 8) for m in (n, 2)] + [(4, 3, 2)]:
        x, results = torch.randn(shape, requires_grad=True), []
        products.clear()
        for conv.__class__ in (nn.Conv2d, helpers._SmallMapConv2d):
            y = conv(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, *conv.parameters()))))
        for a, b in zip(*results):
            assert a.shape == b.shape and torch.allclose(a, b, atol=1e-3, rtol=1e-4)
        assert bool(products) == (len(shape) == 4 and y[0, 0].numel() <= 9)


@pytest.mark.parametrize("kind, dtype, capability, active", [
    ("cpu", BFLOAT16, "AVX512", True), ("cpu", FLOAT32, "AVX512", False),
    ("cpu", FLOAT32, "AVX2", True), ("cpu", FLOAT32, "DEFAULT", False),
    ("cuda", BFLOAT16, "AVX2", False)])
def test_only_plain_convolutions_are_matrix_products_and_only_within(
        kind, dtype, capability, active, monkeypatch):
    monkeypatch.setattr(
        torch.__config__, "show", lambda: f"a\n  - CPU capability usage: {capability}\n")
    options = [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "reflect"}]
    others = [nn.Conv2d(4, 4, 3, **option) for option in options]
    model = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.LazyConv2d(4, 3), *others])
    kinds = [type(m) for m in model]
    with pytest.raises(RuntimeError, match="Kernel size"):
        with helpers.small_maps_as_matmul(model, torch.device(kind), dtype):
            assert [type(m) is not k for m, k in zip(model, kinds)] == [active] + 5 * [False]
            model[0](torch.zeros(1, 4, 2, 2))  # smaller than its kernel
    assert [type(m) for m in model] == kinds


@pytest.mark.parametrize("dtype, atol", [(FLOAT32, 1e-4), (BFLOAT16, 0.08)])
@pytest.mark.parametrize("shape", [(9, 40), (40, 9), (9, 9)])
def test_three_steps_bring_larger_singular_values_near_one_and_smaller_ones_up(shape, dtype, atol):
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 9))[0] for n in shape)
    values = torch.tensor([0.7, 0.5, 0.35, 0.25, 0.2, 0.15, 0.11, 0.01, 0.001])
    values /= values.norm()  # as shares of the Frobenius norm
    result = helpers.orthogonalise(30 * (u * values) @ v.T, dtype)
    after = (u.T @ result.float() @ v).diagonal()
    assert torch.allclose((u * after) @ v.T, result.float(), atol=atol)  # the directions stay
    assert ((after[:7] > 0.66) & (after[:7] < 1.22)).all()
    assert torch.allclose(after[7:], 40.5 * values[7:], rtol=0.02, atol=atol)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert torch.allclose(after, values, atol=atol) and result.dtype == dtype
    assert not helpers.orthogonalise(torch.zeros(shape), dtype).any()


def test_muon_takes_convolutions_and_decay_spares_biases_and_normalisation(tiny_net):
    tiny_net.features[0].bias.requires_grad_(False)
    sides = {7: 0, 8: 1, 15: 1, 16: 2}  # the matrices are 8 x 27 and 16 x 72
    for side, n in sides.items():
        groups = helpers.make_optimizer(tiny_net, replace(RECIPE, muon_side=side)).param_groups
        assert [len(g["params"]) for g in groups] == ([n] if n else []) + [3 - n, 6]
    groups = helpers.make_optimizer(tiny_net, RECIPE).param_groups
    values = [[g[name] for name in ("muon", "lr", "weight_decay")] for g in groups]
    assert values == [[True, 0.02, 0.05], [False, 0.01, 0.05], [False, 0.01, 0.0]]
    assert [[p.ndim for p in g["params"]] for g in groups] == [[4, 4], [2], [1] * 6]


@pytest.mark.parametrize("n_out, layout", [
    (4, torch.channels_last), (4, torch.contiguous_format), (40, torch.channels_last)])
def test_a_step_is_muons_or_adamws_also_after_the_state_was_saved(n_out, layout, tmp_path):
    def as_weight(matrix):
        return matrix.reshape(n_out, 3, 3, 3).permute(0, 3, 1, 2)

    conv, linear = nn.Conv2d(3, n_out, 3, bias=False).to(memory_format=layout), nn.Linear(4, 2)
    model = nn.ModuleList([conv, linear, nn.Conv2d(2, 2, 1)])  # the last one is not used
    twin, unused = copy.deepcopy(linear), state_of(model[2])
    optimizer = helpers.make_optimizer(model, replace(RECIPE, weight_decay=0.5))
    groups = [{"params": [twin.weight], "weight_decay": 0.5}, {"params": [twin.bias]}]
    reference = torch.optim.AdamW(groups, lr=RECIPE.adamw_lr, weight_decay=0.0)
    momentum, expected = torch.zeros(n_out, 27), conv.weight.detach().clone()
    for _ in range(2):
        gradient = torch.randn(n_out, 27)
        conv.weight.grad = as_weight(gradient).clone(memory_format=layout)
        for a, b in zip(linear.parameters(), twin.parameters()):
            a.grad = b.grad = torch.randn_like(a)
        optimizer.step(), reference.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        update = helpers.orthogonalise(0.05 * gradient + 0.95 * momentum, FLOAT32)
        expected = expected * 0.99 - 0.02 * 0.2 * max(n_out, 27)**0.5 * as_weight(update)
        assert torch.allclose(conv.weight, expected, atol=1e-5)
        assert torch.allclose(state_of(linear), state_of(twin), atol=1e-7)
        torch.save(optimizer.state_dict(), tmp_path / "state")
        optimizer = helpers.make_optimizer(model, RECIPE)  # the state has its own settings
        optimizer.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(state_of(model[2]), unused)


@pytest.mark.parametrize("steps, warmup_share", [(10, 0.15), (40, 0.15), (40, 0.5), (7, 0.3)])
def test_the_schedule_is_torchs_one_cycle(steps, warmup_share):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, steps, pct_start=warmup_share, div_factor=10, cycle_momentum=False)
    for step in range(steps):
        rate = helpers.one_cycle(step, steps, warmup_share)
        assert rate == pytest.approx(reference.get_last_lr()[0], abs=1e-3)
        optimizer.step(), reference.step()


@pytest.mark.parametrize("share, expected", [
    (0.15, [1]), (1.0, [1]), (0.5, [1, 0]), (0.1, [1, 0.5, 0]), (0.25, [1, 0.75, 0.25, 0])])
def test_the_schedule_of_very_few_steps_has_its_peak_and_ends_at_0(share, expected):
    rates = [helpers.one_cycle(i, len(expected), share) for i in range(len(expected))]
    assert rates == pytest.approx(expected, abs=1e-9)


def test_an_epoch_follows_the_criterion_and_reports_plain_means_over_images(tiny_net, loaders):
    images, targets = next(iter(loaders[0]))
    batches = [(images[i:i + 10], targets[i:i + 10]) for i in (0, 10, 20)]  # of 10, 10 and 4
    twin, criterion = copy.deepcopy(tiny_net), nn.CrossEntropyLoss(label_smoothing=0.3)
    optimizer, reference = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (tiny_net, twin))
    scheduler, logits, steps = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5), [], []
    for p in tiny_net.eval().parameters():  # the epoch itself switches to training mode
        p.grad = torch.ones_like(p)  # left over from before: must not count
    loss, accuracy = helpers.train_one_epoch(
        tiny_net, criterion, optimizer, scheduler, batches, CPU, FLOAT32,
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
            tiny_net, lambda y, _: y.sum() - math.inf, optimizer, None, loaders[0], CPU, FLOAT32)
    assert all(map(torch.equal, tiny_net.parameters(), before.parameters()))


def test_prediction_averages_mirror_images_and_gives_each_module_its_mode_back(tiny_net, loaders):
    tiny_net.train().features[1].eval().running_mean += 0.3
    before, modes = state_of(tiny_net), [m.training for m in tiny_net.modules()]
    both, targets = helpers.predict(tiny_net, loaders[1], CPU)
    one, _ = helpers.predict(tiny_net, loaders[1], CPU, with_mirror_image=False)
    assert [m.training for m in tiny_net.modules()] == modes and set(modes) == {True, False}
    assert torch.equal(state_of(tiny_net), before)
    images, labels = next(iter(loaders[1]))
    plain, mirrored = (tiny_net.eval()(x).detach() for x in (images, images.flip(3)))
    assert np.allclose(both, ((plain + mirrored) / 2).softmax(1), atol=1e-5)
    assert np.allclose(one, plain.softmax(1), atol=1e-5) and not np.allclose(both, one, atol=1e-4)
    assert both.dtype == np.float32 and targets.tolist() == labels.tolist()
    expected = -np.log(both[range(18), labels]).mean(), (both.argmax(1) == targets).mean()
    assert helpers.evaluate(tiny_net, loaders[1], CPU) == pytest.approx(expected, rel=1e-5)
    tiny_net.fc.register_forward_hook(lambda m, args, output: torch.tensor([[1e3, 0, 0]] * 18))
    loss, accuracy = helpers.evaluate(tiny_net, loaders[1], CPU)  # of errors it is certain of
    assert (loss, accuracy) == pytest.approx((87.3 * 2 / 3, 1 / 3), abs=0.1)


@pytest.mark.parametrize("seconds, n_steps, batch_size, val_batches", [
    ([1, 0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1], 8, 8, 18 / 8), ([9, 2, 2, 2, 2], 3, 24, 1)])
def test_measuring_expects_all_steps_and_the_validation_and_changes_nothing(
        tiny_net, labelled_images, clock, seconds, n_steps, batch_size, val_batches):
    def everything():
        others = [m.training for m in tiny_net.modules()] + [x.dataset.image_size for x in loaders]
        generators = torch.get_rng_state(), loaders[0].generator.get_state()
        return [state_of(tiny_net), torch.tensor(others), *generators]

    def forward(module, args):
        shapes[module.training].append(args[0].shape)
        n = len(shapes[module.training])  # the first steps, which set up kernels, do not count
        clock.append(seconds[n - 1] if module.training else 5.0 if n < 3 else 0.5)
        assert type(module.features[0]) is helpers._SmallMapConv2d  # as for bfloat16

    loaders = [
        helpers.make_loader(*(x[part] for x in labelled_images), train, 32, batch_size, seed=7)
        for train, part in ((True, slice(0, 72)), (False, slice(72, 90)))]
    tiny_net.eval().register_forward_pre_hook(forward)
    before, shapes = everything(), {True: [], False: []}
    measured = helpers.measure_epoch(tiny_net, RECIPE, *loaders, 48, CPU, BFLOAT16)
    assert measured == pytest.approx(72 // batch_size * seconds[1] + val_batches * 2 * 0.5)
    assert shapes[True] == [(batch_size, 3, 48, 48)] * n_steps
    assert shapes[False] == [(min(batch_size, 18), 3, 48, 48)] * 4  # with their mirror images
    assert all(map(torch.equal, before, everything()))
    assert all(p.grad is None for p in tiny_net.parameters())


@pytest.mark.parametrize("epochs, left, control, planned, pair", [
    (8, 99, False, 8, False), (8, 8, False, 8, False), (8, 7.9, False, 7, False),
    (8, 1, False, 1, False), (8, 0.9, False, 1, False), (8, -1, True, 1, False),
    (8, 99, True, 8, True), (8, 16, True, 8, True), (8, 15.9, True, 7, True), (8, 8, True, 4, True),
    (8, 7.9, True, 7, False), (2, 4, True, 2, True), (2, 3.9, True, 2, False)])
def test_the_time_is_for_the_pair_or_one(monkeypatch, clock, epochs, left, control, planned, pair):
    recipe, seconds = replace(RECIPE, epochs=epochs), left / 0.85 + 1e-9  # 15% in reserve
    monkeypatch.setattr(helpers, "measure_epoch", lambda *args: 1.0)
    plan = helpers.plan_training(None, recipe, None, None, 64, CPU, "float32", seconds, control)
    assert (plan.recipe, plan.run_control) == (replace(recipe, epochs=planned), pair)
    assert f"0 min 0{planned} s each" in plan.notes[3]
    assert ("may overrun" in "".join(plan.notes)) == (left < 1)
    assert ("No control" in "".join(plan.notes)) == (control and not pair)


@pytest.mark.parametrize("precision, supported, slower, large, measured, expected", [
    ("auto", True, 2, 4.1, [FLOAT32, BFLOAT16], BFLOAT16),
    ("auto", True, 2, 4.2, [FLOAT32, BFLOAT16], FLOAT32),
    ("auto", True, 99, 1, [FLOAT32], FLOAT32), ("float32", True, 1, 1, [FLOAT32], FLOAT32),
    ("bfloat16", True, 99, 9, [BFLOAT16], BFLOAT16), ("auto", False, 1, 1, [FLOAT32], FLOAT32),
    ("bfloat16", False, 1, 1, [FLOAT32], FLOAT32)])
def test_auto_takes_bfloat16_where_it_trains_1_2_times_as_fast_and_the_rest_is_as_asked(
        monkeypatch, clock, precision, supported, slower, large, measured, expected):
    seconds = {(FLOAT32, 32): 1, (FLOAT32, 64): 5, (BFLOAT16, 64): large}

    def measure(model, recipe, train_loader, val_loader, size, device, dtype):
        calls.append((dtype, size))
        clock.append(100)
        return seconds[dtype, size]

    monkeypatch.setattr(helpers, "has_bfloat16", lambda device: supported)
    monkeypatch.setattr(
        helpers, "matmul_seconds", lambda dtype: slower if dtype == BFLOAT16 else 1)
    duration, calls = (11 if expected == FLOAT32 else 3 * large), []  # of 3 epochs
    monkeypatch.setattr(helpers, "measure_epoch", measure)
    left = 100 * (len(measured) + (FLOAT32 in measured)) + duration / 0.85 + 0.01
    recipe = replace(RECIPE, small_share=0.5)
    plan = helpers.plan_training(None, recipe, None, None, 64, CPU, precision, left)
    assert calls == [(d, size) for d in measured for size in ((32, 64) if d == FLOAT32 else (64,))]
    assert (plan.dtype, plan.seconds) == (expected, 100 * len(calls))
    assert plan.recipe == replace(recipe, epochs=3)
    assert helpers.format_duration(duration) in plan.notes[3]
    assert all(words in plan.notes[0] for words in (f": {str(expected)[6:]} ", repr(precision)))
    assert ("no bfloat16" in plan.notes[0]) == (not supported)
    assert ("are 99 times slower" in plan.notes[0]) == ((precision, slower) == ("auto", 99))


def test_a_products_time_is_the_best_of_three(monkeypatch):
    monkeypatch.setattr(helpers.timeit, "repeat", lambda work, number, repeat: (
        [(work().shape, work().dtype, 5 - i) for i in range(repeat)]))
    assert helpers.matmul_seconds(BFLOAT16) == ((512, 512), BFLOAT16, 3)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_a_training_follows_its_recipe_in_its_precision(tiny_net, loaders, monkeypatch, dtype):
    def hook(model, args, output):
        layouts = [x.is_contiguous(memory_format=torch.channels_last)
                   for x in (args[0], model.features[3].weight)]
        seen.add((model.training, type(model.features[0]), output.dtype, *layouts))
        if model.training:
            rates.append([group["lr"] for group in passed[2].param_groups])

    recipe = replace(RECIPE, epochs=1, warmup_share=0.7, weight_decay=0.3, label_smoothing=0.2)
    rates, seen, passed, train = [], set(), [], helpers.train_one_epoch
    monkeypatch.setattr(torch.__config__, "show", lambda: "CPU capability usage: AVX512")
    monkeypatch.setattr(helpers, "train_one_epoch", lambda *a: passed.extend(a) or train(*a))
    tiny_net.register_forward_hook(hook)
    fit(tiny_net, loaders, recipe, dtype=dtype)
    peaks = np.array([recipe.muon_lr, recipe.adamw_lr, recipe.adamw_lr])
    assert np.allclose(rates, [helpers.one_cycle(step, 3, 0.7) * peaks for step in range(3)])
    kind = helpers._SmallMapConv2d if dtype == BFLOAT16 else nn.Conv2d
    assert seen == {(training, kind, dtype, True, True) for training in (True, False)}
    muon, smoothing = passed[2].param_groups[0], passed[1].label_smoothing
    assert (muon["muon_dtype"], muon["weight_decay"], smoothing) == (dtype, 0.3, 0.2)


def test_training_learns_and_only_the_same_network_and_seed_train_alike(tiny_net, loaders, capsys):
    def train(model, seed):
        batches = []
        model.register_forward_pre_hook(lambda m, args: batches.append(args[0].clone()))
        return fit(model, loaders, seed=seed).epochs, state_of(model), torch.cat(batches)

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


@pytest.mark.parametrize("call, event, left, kind, words, n_complete", [
    (0, 1, math.inf, type(None), "None", 6), (0, 1, 0, str, "out of time after epoch 1 of 6", 1),
    (12, STOP, math.inf, str, "in epoch 3 of 6", 2), (14, STOP, math.inf, str, "epoch 3 of 6", 2),
    (2, STOP, math.inf, KeyboardInterrupt, "first epoch", 0),
    (12, math.nan, math.inf, DIVERGED, "loss nan in step 2, .*rate 1.46e-02, epoch 3", 2),
    (15, math.nan, math.inf, DIVERGED, "validation loss nan .*step 3, .*epoch 3", 2)])
def test_the_last_complete_epochs_weights_and_the_image_size_stay_however_training_ends(
        tiny_net, loaders, monkeypatch, call, event, left, kind, words, n_complete):
    def hook(module, args, output):
        calls.append((module.training, args[0].shape[-1]))
        if len(calls) == call and event is STOP:
            raise STOP
        return output * event if len(calls) == call else output

    calls, states, evaluate = [], [state_of(tiny_net)], helpers.evaluate
    monkeypatch.setattr(helpers, "evaluate", lambda *a: (evaluate(*a)[0], 9 - len(states)))
    tiny_net.register_forward_hook(hook)
    recipe = replace(RECIPE, epochs=6, small_share=0.5)
    try:
        outcome = fit(tiny_net, loaders, recipe, 64, seconds_left=left, on_epoch=(
            lambda line: states.append(state_of(tiny_net)))).stopped
    except (KeyboardInterrupt, DIVERGED) as error:
        outcome = error
    assert isinstance(outcome, kind) and re.search(words, str(outcome))
    assert len(states) == n_complete + 1 and not any(m.training for m in tiny_net.modules())
    assert torch.equal(state_of(tiny_net), states[-1])  # the last, not the best
    assert [loader.dataset.image_size for loader in loaders] == [64, 64]
    # an epoch is 3 training batches, and 1 of validation with its mirror image
    expected = list(zip(([True] * 3 + [False] * 2) * 6, [32] * 15 + [64] * 15))
    assert calls == expected[:call or 5 * n_complete]


def test_an_epochs_time_is_expected_to_grow_with_the_area(tiny_net, loaders, clock, monkeypatch):
    monkeypatch.setattr(helpers, "train_one_epoch", lambda *args: clock.append(10) or (1.0, 0.5))
    recipe = replace(RECIPE, small_share=0.5)  # 4 epochs, of 32, 32, 64 and 64 pixels
    for left, n_epochs in ((19, 1), (20, 2), (59, 2), (60, 4)):
        history = fit(tiny_net, loaders, recipe, 64, seconds_left=left)
        assert len(history.epochs) == n_epochs and history.seconds == 10 * n_epochs
