"""Model surgery: traversal, replacement, head, weights."""

import hashlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import helpers
from conftest import TinyNet
from test_cifar10 import EVIL, archive, server  # the last two are fixtures


def names_of(model, kind=nn.ReLU):
    return [name for name, _ in helpers.find_modules(model, kind)]


def places_and_modes(model):
    return [(*place, place[1].training) for place in model.named_modules()]


@pytest.mark.parametrize("name", helpers.MODELS)
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
def test_a_resnet_keeps_its_first_six_relus_and_loses_the_others(name, activation):
    with torch.device("meta"):
        model = models.get_model(name, weights=None)
    before, total = helpers.find_modules(model, nn.ReLU), helpers.MODELS[name]
    replaced = helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)
    assert helpers.find_modules(model, nn.ReLU) == before[:6]  # the same objects
    names, new = zip(*helpers.find_modules(model, getattr(nn, activation)))
    assert replaced == [*names] == [place for place, _ in before[6:]]
    assert len(before) == total and len(set(new)) == total - 6
    assert activation != "LeakyReLU" or {m.negative_slope for m in new} == {0.01}


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        inner = nn.ModuleList([nn.ReLU(), nn.SiLU(), nn.ReLU6(), type("Own", (nn.ReLU,), {})()])
        self.last = nn.ModuleDict({"b": nn.ReLU(), "a": inner})
        self.first = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())


def test_relus_and_their_subclasses_count_depth_first_and_hooks_and_modes_are_kept():
    model = Nested().eval()
    model.first[1].train()
    model.last["b"].register_forward_hook(lambda *args: "hooked")
    assert (names := names_of(model)) == ["last.b", "last.a.0", "last.a.3", "first.0.1", "first.1"]
    helpers.replace_relu(model, lambda: nn.Sequential(nn.Sequential(nn.SiLU())), 4)
    assert names_of(model) == names[:3]
    assert names_of(model, nn.SiLU) == ["last.a.1", "first.0.1.0.0", "first.1.0.0"]
    training = [name for name, _, training in places_and_modes(model) if training]
    assert training == ["first.1", "first.1.0", "first.1.0.0"]
    assert model.last["b"](torch.zeros(1)) == "hooked"


def test_a_shared_relu_or_container_is_replaced_at_each_place():
    shared, container = nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(shared, shared, nn.Sequential(shared, nn.ReLU()))
    assert helpers.replace_relu(model, nn.SiLU, 2) == ["1", "2.0", "2.1"]
    assert model[0] is shared and len({model[1], model[2][0], model[2][1]}) == 3
    model = nn.Sequential(container, container)
    assert helpers.replace_relu(model, nn.SiLU, 1) == ["0.1", "1.1"]
    assert model[0] is model[1] is container and names_of(model, nn.SiLU) == ["0.1", "1.1"]


@pytest.mark.parametrize("change, make, first, message", [
    (nn.Module.eval, nn.SiLU, 0, "first_replaced is 0, .* 5 nn.ReLU"),
    (nn.Module.eval, nn.SiLU, 6, "first_replaced is 6, .* 5 nn.ReLU"),
    (nn.Module.eval, lambda: nn.Sequential(nn.Sequential(nn.ReLU())), 5, "without nn.ReLU"),
    (nn.Module.eval, iter([nn.SiLU(), "two"]).__next__, 4, "'str'"),
    (nn.Module.eval, iter([nn.SiLU()]).__next__, 4, "^$"),  # StopIteration
    (nn.Module.eval, iter([nn.SiLU()] * 2).__next__, 4, "a new module"),
    (lambda model: setattr(model, "again", model.first), nn.SiLU, 6, "both before and after"),
    (lambda model: setattr(model, "a.b", nn.ReLU()), nn.SiLU, 1, "no attribute `a`"),
    (lambda model: model.last.update({"top": model}), nn.SiLU, 1, "a module that it is part of"),
    (lambda model: setattr(type(model), "act", nn.ReLU()), nn.SiLU, 1, "of the class Odd is an")])
def test_what_cannot_be_replaced_is_refused_and_unchanged(change, make, first, message):
    model = type("Odd", (Nested,), {})()
    change(model)
    before = places_and_modes(model)
    with pytest.raises((ValueError, AttributeError, StopIteration), match=message):
        helpers.replace_relu(model, make, first)
    assert places_and_modes(model) == before


def test_a_new_activation_with_parameters_has_the_device_and_dtype_around_it():
    near = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).to("meta", torch.float64)
    model = nn.Sequential(nn.Linear(2, 2), near, nn.Sequential(nn.ReLU()))
    helpers.replace_relu(model, nn.PReLU, 1)
    found = [(p.weight.device.type, p.weight.dtype) for p in (model[1][1], model[2][0])]
    assert found == [("meta", torch.float64), ("cpu", torch.float32)]


def test_a_random_model_and_its_new_head_are_made_by_torchs_generator():
    torch.manual_seed(1)
    model, *told = helpers.build_model("resnet18", False)
    assert told == ["random", "random initialisation"] and helpers.replace_head(model, 3)
    torch.manual_seed(1)
    expected = models.get_model("resnet18", weights=None)
    expected.fc = nn.Linear(512, 3)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert helpers.freeze(model, ("conv1", "bn1", "layer1"), "layer1.1.relu") == ("conv1", "bn1")
    assert helpers.count_parameters(model) == (11178051, 11178051 - 64 * 147 - 2 * 64)
    with pytest.raises(ValueError, match="'vgg16': it must be one of"):
        helpers.build_model("vgg16", True)


@pytest.mark.parametrize("n_classes, bias, training, dtype, device", [
    (2, True, True, torch.float32, "cpu"), (3, False, False, torch.float64, "meta")])
def test_a_new_head_is_like_the_old_one_or_refused(n_classes, bias, training, dtype, device):
    model = TinyNet(10).to(device, dtype)
    model.fc = old = nn.Linear(16, 10, bias, device, dtype).train(training)
    new = helpers.replace_head(model, n_classes)
    assert new is model.fc and repr(new) == repr(nn.Linear(16, n_classes, bias))
    assert (new.training, new.weight.dtype, new.weight.device.type) == (training, dtype, device)
    for fc, n, message in ((old, 1, "n_classes is 1"), (old, 4, "n_classes is 4"),
                           (new, n_classes, f"={n_classes}, bias"), (None, 3, "fc is None")):
        model.fc = fc
        with pytest.raises(ValueError, match=message):
            helpers.replace_head(model, n)
        assert model.fc is fc


def saved(state_dict):
    torch.save(state_dict, file := io.BytesIO())
    return file.getvalue()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub" / "checkpoints"


GOOD = saved(TinyNet(3).state_dict())


@pytest.mark.parametrize("fault, content, told", [
    ("good", GOOD, "ImageNet weights .IMAGENET1K_V1."), ("stall", GOOD, "timed out"),
    ("wrong", GOOD, "the file's sha256 is"), ("missing", GOOD, "HTTP Error 404"),
    ("loop", GOOD, "r-18-.* does not load: Too many levels.*"),
    *[("good", spoilt, "r-18-.* does not load: .*, delete it") for spoilt in (
        b"", EVIL, GOOD[:-100], saved([1]), saved(TinyNet(2).state_dict()))]], ids=range(10))
def test_weights_are_verified_loaded_and_kept_or_the_label_says_in_one_line_why_not(
        hub, server, tiny_net, monkeypatch, fault, content, told):
    before, digest = saved(tiny_net.state_dict()), hashlib.sha256(content).hexdigest()
    file, server.body = f"r-18-{digest[:8]}.pth", content
    weights = models.get_model_weights("resnet18").DEFAULT.value
    monkeypatch.setattr(weights, "url", f"{server.url}/{fault}/{file}")
    monkeypatch.setattr(models, "get_model", lambda name, weights: tiny_net)
    if fault == "loop":
        hub.parent.symlink_to("hub")
    (model, sha256, label), again = (helpers.build_model("resnet18", True) for _ in range(2))
    want = rf"random initialisation, for want of ImageNet weights \([^/\n]*{told}[^/\n]*\)"
    assert re.fullmatch(want if sha256 == "random" else told, label)
    assert saved(model.state_dict()) == (before if sha256 == "random" else GOOD)
    assert (sha256, label) == again[1:] and sha256 in ("random", hashlib.sha256(GOOD).hexdigest())
    assert [path.name for path in Path().rglob("*.*")] == [file] * (fault == "good")
    assert len(server.requests) == {"good": 1, "loop": 0}.get(fault, 2)


@pytest.mark.parametrize("name", ["resnet34", "resnet50"])
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
def test_larger_networks_train_from_other_weights_labelled_so(hub, loaders, name, activation):
    cached = models.get_model(name, weights=None).state_dict()
    hub.mkdir(parents=True)
    torch.save(cached, hub / Path(models.get_model_weights(name).DEFAULT.url).name)
    model, _, label = helpers.build_model(name, True)
    assert ", not torchvision's own file, SHA-256 " in label
    recipe = helpers.pick_recipe("pretrained", 1, None)
    helpers.freeze(model, recipe.frozen, helpers.find_modules(model, nn.ReLU)[6][0])
    helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)
    helpers.replace_head(model, 3)
    history = helpers.fit(model, *([next(iter(loader))] for loader in loaders), recipe=recipe)
    assert history.stopped is None and history.epochs[0].train_loss < 2
    same = {key.split(".")[0] for key, now in model.state_dict().items() if key in cached
            and now.shape == cached[key].shape and torch.equal(now, cached[key])}
    assert same == {"conv1", "bn1", "layer1"}
