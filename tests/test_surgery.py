"""Model surgery: traversal, replacement, head, weights."""

import copy
import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import helpers
from conftest import TinyNet
from test_cifar10 import serving


def names_of(model, kind=nn.ReLU):
    return [name for name, _ in helpers.find_modules(model, kind)]


def places_and_modes(model):
    return [(*place, place[1].training) for place in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("name", helpers.MODELS)
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
def test_a_resnet_keeps_its_first_six_relus_and_loses_the_others(name, activation):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    before, total = helpers.find_modules(model, nn.ReLU), helpers.MODELS[name]
    report = helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)
    assert helpers.find_modules(model, nn.ReLU) == before[:6]  # the same objects
    names, new = zip(*helpers.find_modules(model, getattr(nn, activation)))
    assert names == tuple(place for place, _ in before[6:]) and len(set(new)) == total - 6
    indices = tuple(range(7, total + 1))
    assert report == helpers.SurgeryReport(total, indices, names, 6, total - 6)
    assert activation != "LeakyReLU" or {m.negative_slope for m in new} == {0.01}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.ReLU()])
        self.last = nn.ModuleDict({"b": nn.ReLU(), "a": inner})
        self.first = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
        self.register_module("empty", None)


def test_the_traversal_is_depth_first_in_registration_order():
    model, names = Nested(), ["last.b", "last.a.0", "last.a.2", "first.0.1", "first.1"]
    assert names_of(model) == names
    helpers.replace_relu(model, nn.GELU, 4)
    assert names_of(model) == names[:3] and names_of(model, nn.GELU) == names[3:]


def test_a_shared_relu_counts_at_each_place_and_each_place_is_replaced_on_its_own():
    shared = nn.ReLU()
    model = nn.Sequential(shared, shared, nn.Sequential(shared, nn.ReLU()))
    report = helpers.replace_relu(model, nn.SiLU, 2)
    assert report.total == 4 and report.replaced_names == ("1", "2.0", "2.1")
    assert model[0] is shared and len({model[1], model[2][0], model[2][1]}) == 3


def test_a_shared_container_is_replaced_at_both_places_or_refused_and_unchanged():
    container = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(container, container)
    before = places_and_modes(model)
    with pytest.raises(ValueError, match=r"^\[\] would remain and .* both before and after"):
        helpers.replace_relu(model, nn.SiLU, 2)
    assert places_and_modes(model) == before
    assert helpers.replace_relu(model, nn.SiLU, 1).inserted == 2
    assert model[0] is model[1] is container and names_of(model, nn.SiLU) == ["0.1", "1.1"]


@pytest.mark.parametrize("model, first, n", [
    (Nested(), 0, 5), (Nested(), -1, 5), (Nested(), 6, 5), (nn.ReLU(), 1, 0)])
def test_a_request_out_of_range_is_refused_and_the_model_unchanged(model, first, n):
    before = places_and_modes(model)
    with pytest.raises(ValueError, match=f"first_replaced is {first}, .* {n} nn.ReLU"):
        helpers.replace_relu(model, nn.SiLU, first)
    assert places_and_modes(model) == before


def test_subclasses_of_relu_count_but_neither_relu6_nor_activations_that_were_there_before():
    model = nn.Sequential(nn.SiLU(), type("Renamed", (nn.ReLU,), {})(), nn.ReLU6(), nn.ReLU())
    assert helpers.replace_relu(model, nn.SiLU, 1).inserted == 2
    assert names_of(model, nn.SiLU) == ["0", "1", "3"]


def test_hooks_and_modes_are_kept_also_by_an_activation_that_is_a_nest_of_modules():
    model, calls = Nested().eval(), []
    model.first[1].train()
    model.last["b"].register_forward_hook(lambda *args: calls.append("kept"))
    report = helpers.replace_relu(model, lambda: nn.Sequential(nn.Sequential(nn.SiLU())), 4)
    assert report.inserted == 2
    training = [name for name, _, training in places_and_modes(model) if training]
    assert training == ["first.1", "first.1.0", "first.1.0.0"]
    model.last["b"](torch.zeros(1))
    assert calls == ["kept"]


@pytest.mark.parametrize("make_activation, error", [
    (iter(["one", "two"]).__next__, AttributeError), (iter([nn.SiLU()] * 2).__next__, ValueError),
    (iter([nn.SiLU()]).__next__, StopIteration), (nn.ReLU, ValueError),
    (lambda: nn.Sequential(nn.Sequential(nn.ReLU())), ValueError)])
def test_a_factory_of_something_else_changes_nothing(make_activation, error):
    model = Nested()
    before = places_and_modes(model)
    with pytest.raises(error):
        helpers.replace_relu(model, make_activation, 4)
    assert places_and_modes(model) == before


@pytest.mark.parametrize("device, dtype", [("cpu", torch.float64), ("meta", torch.float32)])
def test_a_new_activation_with_parameters_has_the_models_device_and_dtype(device, dtype):
    model = TinyNet(3).to(device, dtype)
    helpers.replace_relu(model, nn.PReLU, 2)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {(device, dtype)}
    assert model(torch.zeros(2, 3, 32, 32, dtype=dtype, device=device)).shape == (2, 3)


def test_odd_trees_are_handled_or_refused_in_one_sentence():
    dotted = nn.Sequential(nn.ReLU(), nn.ReLU())
    setattr(dotted, "a.b", nn.ReLU())
    with pytest.raises(AttributeError, match="no attribute `a`"):
        helpers.replace_relu(dotted, nn.SiLU, 1)
    assert len(names_of(dotted)) == 3
    circular = Nested()
    circular.last["parent"] = circular
    with pytest.raises(ValueError, match="a module holds a module that it is part of"):
        helpers.replace_relu(circular, nn.SiLU, 1)
    hidden = type("Hidden", (Nested,), {"act": nn.ReLU()})()
    with pytest.raises(ValueError, match="attribute of the class Hidden is an nn.ReLU"):
        helpers.replace_relu(hidden, nn.SiLU, 1)
    assert len(names_of(hidden)) == 5


@pytest.mark.parametrize("first_swap, frozen", [
    ("layer3.1.relu", ("conv1", "bn1", "layer1")), ("layer2.0.relu", ("conv1", "bn1", "layer1")),
    ("layer1.1.relu", ("conv1", "bn1")), ("relu", ("conv1", "bn1"))])
def test_what_stands_before_the_swap_is_frozen_and_the_rest_trained(first_swap, frozen):
    with torch.device("meta"):
        model = models.get_model("resnet18", weights=None)
    assert helpers.freeze(model, ("conv1", "bn1", "layer1"), first_swap) == frozen
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == set(
        frozen)


def test_the_same_seed_makes_the_same_model_and_head_and_torchs_generator_is_left_alone():
    state, made = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        model, weights = helpers.build_model("resnet18", False, seed)
        assert weights == helpers.Weights() and not weights.pretrained
        made.append((model.conv1.weight, helpers.replace_head(model, 3, seed).weight))
    for one, same, other in zip(*made):
        assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="'vgg16': it must be one of"):
        helpers.build_model("vgg16", True, 1)


@pytest.mark.parametrize("n_classes, bias, training, dtype, device", [
    (2, True, True, torch.float32, "cpu"), (3, False, False, torch.float64, "meta")])
def test_a_new_head_is_like_the_old_one(n_classes, bias, training, dtype, device):
    model = TinyNet(10)
    model.fc = nn.Linear(16, 10, bias)
    model = model.to(device, dtype).train(training)
    new = helpers.replace_head(model, n_classes, seed=1)
    assert new is model.fc and new.training == training and (new.bias is not None) == bias
    assert new.weight.dtype == dtype and new.weight.device.type == device
    assert model(torch.zeros(2, 3, 32, 32, dtype=dtype, device=device)).shape == (2, n_classes)


@pytest.mark.parametrize("fc, n_classes, message", [
    (nn.Linear(16, 10), 1, "n_classes is 1"), (nn.Linear(16, 10), 4, "n_classes is 4"),
    (nn.Linear(16, 3), 3, "fc has 3 outputs"), (nn.ReLU(), 3, "fc is ReLU")])
def test_an_unfit_head_and_a_second_replacement_are_refused(tiny_net, fc, n_classes, message):
    tiny_net.fc = fc
    with pytest.raises(ValueError, match=message):
        helpers.replace_head(tiny_net, n_classes, seed=1)
    assert tiny_net.fc is fc


def saved(state_dict):
    torch.save(state_dict, file := io.BytesIO())
    return file.getvalue()


WEIGHTS = saved(TinyNet(3).state_dict())
DAMAGED = {
    "empty": b"", "noise": b"not weights" * 999, "cut": WEIGHTS[:-100], "no dict": saved([1]),
    "no keys": saved({}), "other shape": saved(TinyNet(2).state_dict()),
    "evil": b"cbuiltins\nopen\n(Vran\nVw\ntR."}  # a pickle that would make the file "ran"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_cached_file_is_one_sentence_and_runs_no_code(hub, tiny_net, damage):
    path = hub / "checkpoints" / Path(models.ResNet18_Weights.DEFAULT.url).name
    path.parent.mkdir()
    path.write_bytes(DAMAGED[damage])
    before = saved(tiny_net.state_dict())
    weights = helpers.load_imagenet_weights(tiny_net, "resnet18")
    assert (weights.pretrained, weights.label) == (False, "random initialisation")
    assert path.name in weights.note and "delete it" in weights.note and not set("\n/") & set(
        weights.note)
    assert saved(tiny_net.state_dict()) == before and os.listdir(hub) == ["checkpoints"]


@pytest.mark.parametrize("fault, name, part", [
    ("good", "resnet50", None), ("stall", "resnet18", "timed out"),
    ("wrong", "resnet18", "the file's sha256 is"), ("missing", "resnet34", "HTTP Error 404"),
    ("loop", "resnet18", "File exists")])
def test_weights_are_verified_and_kept_or_not(hub, tiny_net, monkeypatch, fault, name, part):
    before, sha256 = saved(tiny_net.state_dict()), hashlib.sha256(WEIGHTS).hexdigest()
    file = f"r-{sha256[:8]}.pth"
    if fault == "loop":
        (hub / "checkpoints").symlink_to("checkpoints")
    with serving(WEIGHTS, monkeypatch) as server:
        weights, url = models.get_model_weights(name).DEFAULT, f"{server.url}/{fault}/{file}"
        monkeypatch.setattr(weights.value, "url", url)
        loaded = [helpers.load_imagenet_weights(tiny_net, name) for _ in range(2)]
    if part is None:
        label = f"ImageNet weights ({weights.name})"
        assert loaded == [helpers.Weights(True, label)] * 2 and len(server.requests) == 1
        assert saved(tiny_net.state_dict()) == WEIGHTS == (hub / "checkpoints" / file).read_bytes()
    else:
        assert all(part in w.note and "\n" not in w.note and not w.pretrained for w in loaded)
        assert saved(tiny_net.state_dict()) == before and not list(hub.rglob("*.*"))


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
def test_the_larger_networks_train_from_cached_weights_labelled_as_not_torchvisions(
        hub, loaders, name, activation):
    cached, _ = helpers.build_model(name, False, seed=2)
    path = hub / "checkpoints" / Path(models.get_model_weights(name).DEFAULT.url).name
    path.parent.mkdir()
    torch.save(cached.state_dict(), path)
    model, weights = helpers.build_model(name, True, seed=1)
    assert torch.equal(model.conv1.weight, cached.conv1.weight)
    assert weights.pretrained and weights.label.endswith(", not torchvision's own file)")
    recipe = replace(helpers.RECIPES["pretrained"], epochs=2)
    helpers.freeze(model, recipe.frozen, helpers.find_modules(model, nn.ReLU)[6][0])
    helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)
    helpers.replace_head(model, 3, seed=1)
    before = copy.deepcopy(model.layer1.state_dict())
    history = helpers.fit(model, *loaders, recipe=recipe, device="cpu")
    assert history.stopped is None and len(history.epochs) == 2
    assert all(torch.equal(before[k], v) for k, v in model.layer1.state_dict().items())
    assert history.epochs[1].train_accuracy > 0.5  # a third of the images have each class
