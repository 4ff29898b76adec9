"""Model surgery: traversal, replacement, head, weights."""

import io
import urllib.error
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import helpers
from conftest import TinyNet


def relu_names(model):
    return [p.name for p in helpers.find_modules(model, nn.ReLU)]


@pytest.mark.parametrize("name", helpers.MODELS)
def test_the_model_table_counts_the_relus_of_torchvision(name):
    assert len(relu_names(models.get_model(name, weights=None))) == helpers.MODELS[name]


@pytest.mark.parametrize("name", helpers.MODELS)
@pytest.mark.parametrize("activation", helpers.ACTIVATIONS)
def test_a_resnet_keeps_its_first_six_relus_and_loses_the_others(name, activation):
    model = models.get_model(name, weights=None)
    before = helpers.find_modules(model, nn.ReLU)
    report = helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)
    after = helpers.find_modules(model, nn.ReLU)
    assert [p.module for p in after] == [p.module for p in before[:6]]  # the same objects
    assert all(a.module is b.module for a, b in zip(after, before))
    inserted = helpers.find_modules(model, type(helpers.ACTIVATIONS[activation]()))
    assert [p.name for p in inserted] == [p.name for p in before[6:]] == list(report.replaced_names)
    assert len({id(p.module) for p in inserted}) == len(inserted)
    assert report.total == helpers.MODELS[name] and report.remaining == 6
    assert report.inserted == report.total - 6 and report.activation == activation
    assert report.replaced_indices == tuple(range(7, report.total + 1))
    assert report.kept_names == tuple(p.name for p in before[:6])


def test_leaky_relu_has_slope_one_hundredth():
    assert helpers.ACTIVATIONS["LeakyReLU"]().negative_slope == 0.01


def test_the_swapped_network_computes_with_the_new_activation():
    model = nn.Sequential(nn.ReLU(), nn.ReLU())
    helpers.replace_relu(model, nn.SiLU, 2)
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(model(x), nn.functional.silu(x.relu()))


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.ModuleDict({"b": nn.ReLU(), "a": nn.ModuleList([nn.ReLU(), nn.Tanh(), nn.ReLU()])})
        self.first = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
        self.nothing = None
        self.register_module("empty", None)


def test_the_traversal_is_depth_first_in_registration_order():
    expected = ["last.b", "last.a.0", "last.a.2", "first.0.1", "first.1"]
    assert relu_names(Nested()) == expected
    model = Nested()
    report = helpers.replace_relu(model, nn.GELU, 4)
    assert report.replaced_names == ("first.0.1", "first.1")
    assert relu_names(model) == expected[:3]


class Sharing(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.ReLU()
        self.two = self.one
        self.inner = nn.Sequential(self.one, nn.ReLU())


def test_a_shared_relu_counts_at_each_place_and_each_place_is_replaced_on_its_own():
    model = Sharing()
    shared = model.one
    report = helpers.replace_relu(model, nn.SiLU, 2)
    assert report.total == 4 and report.replaced_names == ("two", "inner.0", "inner.1")
    assert model.one is shared
    new = [model.two, model.inner[0], model.inner[1]]
    assert all(isinstance(m, nn.SiLU) for m in new) and len(set(map(id, new))) == 3


class SharedContainer(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.b = self.a


def test_a_shared_container_that_would_be_kept_and_replaced_is_refused_and_unchanged():
    model = SharedContainer()
    with pytest.raises(ValueError, match=r"b\.1 .*kept and replaced"):
        helpers.replace_relu(model, nn.SiLU, 2)
    assert relu_names(model) == ["a.1", "b.1"]


def test_a_shared_container_that_is_replaced_at_both_places_is_fine():
    model = SharedContainer()
    report = helpers.replace_relu(model, nn.SiLU, 1)
    assert report.inserted == 2 and model.a is model.b and relu_names(model) == []


@pytest.mark.parametrize("first_replaced", [0, -1, 6])
def test_a_request_out_of_range_is_refused_and_the_model_unchanged(first_replaced):
    model = Nested()
    before = [p.module for p in helpers.find_modules(model, nn.ReLU)]
    with pytest.raises(ValueError, match=f"first_replaced is {first_replaced}, but the model has 5 nn.ReLU"):
        helpers.replace_relu(model, nn.SiLU, first_replaced)
    assert all(p.module is m for p, m in zip(helpers.find_modules(model, nn.ReLU), before))


def test_an_activation_that_cannot_be_made_leaves_the_model_unchanged():
    model, made = Nested(), []

    def fails_at_the_second():
        made.append(nn.SiLU())
        if len(made) == 2:
            raise MemoryError("no room")
        return made[-1]

    with pytest.raises(MemoryError):
        helpers.replace_relu(model, fails_at_the_second, 3)
    assert len(relu_names(model)) == 5


def test_a_bare_relu_is_refused():
    with pytest.raises(ValueError, match="no parent"):
        helpers.replace_relu(nn.ReLU(), nn.SiLU, 1)


def test_subclasses_of_relu_count_and_relu6_is_none():
    class Renamed(nn.ReLU):
        pass

    model = nn.Sequential(Renamed(), nn.ReLU6(), nn.ReLU())
    assert relu_names(model) == ["0", "2"]
    assert helpers.replace_relu(model, nn.SiLU, 1).inserted == 2


def test_activations_that_were_there_before_do_not_count_as_inserted():
    model = nn.Sequential(nn.SiLU(), nn.ReLU(), nn.ReLU())
    assert helpers.replace_relu(model, nn.SiLU, 2).inserted == 1


def test_modes_and_hooks_of_everything_else_are_kept():
    model = Nested().eval()
    model.first[0].train()
    calls = []
    model.last["b"].register_forward_hook(lambda *args: calls.append("kept"))
    modes = {name: m.training for name, m in model.named_modules()}
    helpers.replace_relu(model, nn.SiLU, 2)
    assert {name: m.training for name, m in model.named_modules()} == modes
    model.last["b"](torch.zeros(1))
    assert calls == ["kept"]


def alternating(*makers):
    """An activation factory that works through the makers in turn."""
    calls = iter(range(1000))
    return lambda: makers[next(calls) % len(makers)]()


SHARED = nn.SiLU()


@pytest.mark.parametrize("make_activation, made", [
    (alternating(nn.SiLU, nn.GELU), r"\['GELU', 'SiLU'\]"),
    (alternating(nn.SiLU, lambda: None), r"\['NoneType', 'SiLU'\]"),
    (nn.ReLU, r"\['ReLU'\]"),
    (lambda: nn.Sequential(nn.ReLU(), nn.SiLU()), r"\['Sequential'\]"),
    (lambda: SHARED, r"\['SiLU'\]"),
])
def test_a_factory_that_makes_something_else_is_refused_and_the_model_unchanged(make_activation, made):
    model = Nested()
    before = [(p.name, p.module) for p in helpers.find_modules(model, nn.Module)]
    with pytest.raises(ValueError, match=f"make_activation made {made}.*nothing was replaced"):
        helpers.replace_relu(model, make_activation, 4)
    after = [(p.name, p.module) for p in helpers.find_modules(model, nn.Module)]
    assert [name for name, _ in before] == [name for name, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after))


def test_a_wrong_recount_is_noticed(monkeypatch):
    found = helpers.find_modules
    model = Nested()
    n = len(found(model, nn.ReLU))
    monkeypatch.setattr(
        helpers, "find_modules", lambda m, kind: [] if kind is nn.SiLU else found(m, kind))
    with pytest.raises(RuntimeError, match=f"3 nn.ReLU remain and 0 SiLU were inserted, instead of 3 and {n - 3}"):
        helpers.replace_relu(model, nn.SiLU, 4)


def test_parameters_are_counted_all_and_trainable():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[0].bias.requires_grad_(False)
    assert helpers.count_parameters(model) == (11, 9)
    assert helpers.count_parameters(models.resnet18(weights=None)) == (11_689_512, 11_689_512)


def test_the_same_seed_builds_the_same_model_and_another_seed_another():
    one, same, other = (helpers.build_model("resnet18", seed).conv1.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_building_and_a_new_head_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    helpers.replace_head(helpers.build_model("resnet18", 5), 3, 6)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="'vgg16': it must be one of"):
        helpers.build_model("vgg16", 1)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_head_is_replaced(n_classes):
    model = TinyNet(10).eval()
    report = helpers.replace_head(model, n_classes, seed=1)
    assert (report.in_features, report.old_out_features, report.out_features) == (16, 10, n_classes)
    assert model.fc.weight.shape == (n_classes, 16) and not model.fc.training
    assert helpers.check_forward(model, 32, n_classes) == (2, n_classes)


def test_the_same_seed_makes_the_same_head():
    weights = []
    for seed in (1, 1, 2):
        model = TinyNet(10)
        helpers.replace_head(model, 3, seed)
        weights.append(model.fc.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("n_classes, message", [(1, "must be 2 or 3"), (4, "must be 2 or 3"), (3, "3 outputs already")])
def test_a_head_of_another_size_or_a_second_replacement_is_refused(tiny_net, n_classes, message):
    old = tiny_net.fc
    with pytest.raises(ValueError, match=message):
        helpers.replace_head(tiny_net, n_classes, seed=1)
    assert tiny_net.fc is old


def test_a_model_without_a_linear_fc_is_refused():
    with pytest.raises(ValueError, match="model.fc is NoneType"):
        helpers.replace_head(nn.Sequential(nn.ReLU()), 3, seed=1)


def test_the_forward_check_refuses_another_shape_and_leaves_the_model_as_it_was(tiny_net):
    tiny_net.features[1].eval()
    modes = [m.training for m in tiny_net.modules()]
    statistics = tiny_net.features[4].running_mean.clone()
    with pytest.raises(ValueError, match=r"shape \(2, 3\): it should be \(2, 2\)"):
        helpers.check_forward(tiny_net, 32, 2)
    assert [m.training for m in tiny_net.modules()] == modes
    assert torch.equal(tiny_net.features[4].running_mean, statistics)


# --- ImageNet weights ---------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty torch hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


def cached_file(hub):
    hub.mkdir(parents=True, exist_ok=True)
    return hub / Path(models.ResNet18_Weights.DEFAULT.url).name


def test_cached_weights_are_loaded(hub):
    source = helpers.build_model("resnet18", 1)
    torch.save(source.state_dict(), cached_file(hub))
    model = helpers.build_model("resnet18", 2)
    assert helpers.load_imagenet_weights(model, "resnet18") is None
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), source.state_dict().values()))


def missing_key(path):
    state_dict = helpers.build_model("resnet18", 1).state_dict()
    del state_dict["fc.bias"]
    torch.save(state_dict, path)


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"not weights" * 1000), missing_key])
def test_a_damaged_cached_file_is_one_sentence_and_the_model_is_unchanged(hub, damage):
    damage(cached_file(hub))
    model = helpers.build_model("resnet18", 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reason = helpers.load_imagenet_weights(model, "resnet18")
    assert "cached weights file resnet18" in reason and "delete it" in reason and "\n" not in reason
    assert str(hub) not in reason
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_cached_file_never_runs_code(hub, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"conv1.weight": Evil()}, cached_file(hub))
    assert "cannot be used" in helpers.load_imagenet_weights(helpers.build_model("resnet18", 1), "resnet18")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("error, text", [
    (urllib.error.URLError(TimeoutError("timed out")), "timed out"),
    (urllib.error.URLError(ConnectionRefusedError(111, "Connection refused")), "Connection refused"),
    (urllib.error.HTTPError("http://x", 403, "Forbidden", {}, io.BytesIO()), "HTTP 403 Forbidden"),
    (RuntimeError('invalid hash value (expected "f37072fd", got "00")'), "invalid hash value"),
], ids=["time-out", "refused", "forbidden", "hash"])
def test_a_failed_download_is_one_sentence(hub, monkeypatch, error, text):
    import socket

    seen = []

    def download(*args, **kwargs):
        seen.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    reason = helpers.load_imagenet_weights(helpers.build_model("resnet18", 1), "resnet18", timeout=3)
    assert reason.startswith("ImageNet weights could not be downloaded") and text in reason
    assert seen == [3] and socket.getdefaulttimeout() is None


def test_the_download_asks_for_torchvisions_url_and_hash(hub, monkeypatch):
    asked = []

    def download(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save(helpers.build_model("resnet18", 1).state_dict(), path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    assert helpers.load_imagenet_weights(helpers.build_model("resnet18", 2), "resnet18") is None
    assert asked == [(models.ResNet18_Weights.DEFAULT.url, "f37072fd")]


def test_an_error_is_described_in_one_line_without_paths():
    assert helpers.describe_error(PermissionError(13, "Permission denied", "/secret/path")) == "Permission denied"
    assert helpers.describe_error(ValueError("a\n b")) == "a b"
    assert helpers.describe_error(KeyError()) == "KeyError"
