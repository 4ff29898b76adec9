"""Model surgery: finding and replacing activations, the head, freezing, weights."""

import copy
import hashlib
import io
import pickle

import pytest
import torch
from torch import nn
from torchvision import models

import helpers
from conftest import TinyNet
from server import serve


class OwnReLU(nn.ReLU):
    """A subclass of nn.ReLU, as somebody may have written it."""


class Nested(nn.Module):
    """Five nn.ReLU in containers within containers, and modules that are none."""

    def __init__(self):
        super().__init__()
        inner = nn.ModuleList([nn.ReLU(), nn.SiLU(), nn.ReLU6(), OwnReLU()])
        self.last = nn.ModuleDict({"b": nn.ReLU(), "a": inner})
        self.first = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())


NESTED_RELUS = ["last.b", "last.a.0", "last.a.3", "first.0.1", "first.1"]


def names_of(model, kind=nn.ReLU):
    return [name for name, _ in helpers.find_modules(model, kind)]


def places_of(model):
    """Each place with the module in it and its mode: what no refusal may change."""
    return [(name, module, module.training)
            for name, module in model.named_modules(remove_duplicate=False)]


# ---- Finding and replacing ----


@pytest.mark.parametrize("model_name", ["resnet18", "resnet34", "resnet50"])
@pytest.mark.parametrize("activation", ["SiLU", "GELU", "LeakyReLU"])
def test_from_the_7th_on_a_resnets_relus_are_replaced_and_the_first_6_stay(
        model_name, activation):
    with torch.device("meta"):
        model = models.get_model(model_name, weights=None)
    before = helpers.find_modules(model, nn.ReLU)
    assert len(before) == helpers.MODELS[model_name]

    replaced = helpers.replace_relu(model, helpers.ACTIVATIONS[activation], 7)

    assert replaced == [name for name, _ in before[6:]]
    assert helpers.find_modules(model, nn.ReLU) == before[:6]  # the same objects
    new = helpers.find_modules(model, getattr(nn, activation))
    assert [name for name, _ in new] == replaced
    assert len({module for _, module in new}) == len(replaced)
    if activation == "LeakyReLU":
        assert [module.negative_slope for _, module in new] == [0.01] * len(replaced)


def test_relus_and_subclasses_are_found_depth_first_in_order_of_registration():
    model = Nested()
    assert names_of(model) == NESTED_RELUS

    replaced = helpers.replace_relu(model, nn.SiLU, 3)

    assert replaced == NESTED_RELUS[2:]
    assert names_of(model) == NESTED_RELUS[:2]
    assert names_of(model, nn.SiLU) == ["last.a.1", "last.a.3", "first.0.1", "first.1"]
    assert names_of(model, nn.ReLU6) == ["last.a.2"]


def test_a_shared_relu_counts_at_each_place_and_each_gets_a_new_module():
    shared = nn.ReLU()
    model = nn.Sequential(shared, shared, nn.Sequential(shared, nn.ReLU()))
    assert names_of(model) == ["0", "1", "2.0", "2.1"]

    assert helpers.replace_relu(model, nn.SiLU, 2) == ["1", "2.0", "2.1"]

    assert model[0] is shared
    assert names_of(model, nn.SiLU) == ["1", "2.0", "2.1"]
    assert len({model[1], model[2][0], model[2][1]}) == 3


def test_a_container_that_is_registered_twice_is_changed_under_both_names():
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model = nn.Sequential(block, block)

    assert helpers.replace_relu(model, nn.SiLU, 1) == ["0.1", "1.1"]

    assert model[0] is block and model[1] is block
    assert names_of(model) == []
    assert names_of(model, nn.SiLU) == ["0.1", "1.1"]


def test_kept_modules_keep_their_hooks_and_each_place_its_mode():
    def answer(module, args, output):
        return "hooked"

    model = Nested().eval()
    model.first[1].train()
    model.last["b"].register_forward_hook(answer)

    helpers.replace_relu(model, nn.SiLU, 4)

    assert model.last["b"](torch.zeros(1)) == "hooked"
    assert isinstance(model.first[0][1], nn.SiLU) and not model.first[0][1].training
    assert isinstance(model.first[1], nn.SiLU) and model.first[1].training


def test_a_new_activation_has_the_device_and_dtype_of_the_parameters_nearest_to_it():
    first = nn.Linear(2, 2).double()
    block = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to("meta", torch.bfloat16)
    model = nn.Sequential(first, nn.ReLU(), block, nn.Sequential(nn.ReLU()))

    helpers.replace_relu(model, nn.PReLU, 1)

    beside_first, in_block, alone = model[1].weight, model[2][1].weight, model[3][0].weight
    assert (beside_first.device.type, beside_first.dtype) == ("cpu", torch.float64)
    assert (in_block.device.type, in_block.dtype) == ("meta", torch.bfloat16)
    assert (alone.device.type, alone.dtype) == ("cpu", torch.float64)  # the model's first


def test_a_quantised_first_parameter_and_a_lazy_layer_do_not_hinder_a_replacement():
    quantised = nn.Sequential(nn.ReLU())
    quantised.scale = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    lazy = nn.Sequential(nn.LazyLinear(2), nn.ReLU())
    model = nn.Sequential(quantised, lazy)

    assert helpers.replace_relu(model, nn.PReLU, 1) == ["0.0", "1.1"]

    assert quantised[0].weight.dtype == torch.float32 and quantised[0].weight.requires_grad
    assert lazy[1].weight.dtype == torch.float32
    assert lazy(torch.ones(1, 3)).shape == (1, 2)


# ---- Refusals ----

THE_SAME_SILU = nn.SiLU()


def make_relu_inside():
    return nn.Sequential(nn.Sequential(nn.ReLU()))


def make_string():
    return "SiLU"


def make_the_same():
    return THE_SAME_SILU


@pytest.mark.parametrize("first, make_activation, message", [
    (0, nn.SiLU, "first_replaced is 0, but the model has 5 nn.ReLU"),
    (6, nn.SiLU, "first_replaced is 6, but the model has 5 nn.ReLU"),
    (4, make_relu_inside, "the new activation holds an nn.ReLU"),
    (4, make_string, "'SiLU': it must make a new nn.Module"),
    (4, make_the_same, "it must make a new nn.Module at each call"),
])
def test_a_replacement_that_is_refused_leaves_the_model_unchanged(
        first, make_activation, message):
    model = Nested()
    before = places_of(model)
    with pytest.raises(ValueError, match=message):
        helpers.replace_relu(model, make_activation, first)
    assert places_of(model) == before


def test_a_container_with_a_place_both_to_keep_and_to_replace_is_refused():
    block = nn.Sequential(nn.ReLU(), nn.ReLU())
    model = nn.Sequential(block, nn.ReLU(), block)
    before = places_of(model)
    with pytest.raises(ValueError, match="a block that is registered twice holds one to keep"):
        helpers.replace_relu(model, nn.SiLU, 5)
    assert places_of(model) == before


def test_modules_for_places_of_which_one_is_not_there_are_all_refused():
    model = Nested()
    before = places_of(model)
    with pytest.raises(AttributeError):
        helpers.place_modules(model, [("last.b", nn.SiLU()), ("first.2", nn.SiLU())])
    assert places_of(model) == before


# ---- Copies, head, freezing ----


def test_activations_are_exchanged_on_a_copy():
    model = Nested()
    before = places_of(model)

    exchanged = helpers.exchange_activations(model, ["last.a.1", "first.1"], nn.GELU)

    assert names_of(exchanged, nn.GELU) == ["last.a.1", "first.1"]
    assert torch.equal(exchanged.first[0][0].weight, model.first[0][0].weight)
    assert exchanged.first[0][0].weight is not model.first[0][0].weight
    assert places_of(model) == before


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("bias, training, dtype, device", [
    (True, True, torch.float32, "cpu"),
    (False, False, torch.float64, "meta"),
])
def test_a_new_head_differs_from_the_old_one_only_in_its_outputs(
        n_classes, bias, training, dtype, device):
    model = TinyNet(10)
    model.fc = nn.Linear(16, 10, bias=bias, device=device, dtype=dtype).train(training)

    new = helpers.replace_head(model, n_classes)

    assert model.fc is new
    assert (new.in_features, new.out_features) == (16, n_classes)
    assert (new.bias is not None) == bias
    assert new.training == training
    assert (new.weight.dtype, new.weight.device.type) == (dtype, device)


@pytest.mark.parametrize("head, n_classes, message", [
    (nn.Linear(16, 10), 1, "n_classes is 1"),
    (nn.Linear(16, 10), 4, "n_classes is 4"),
    (nn.Sequential(nn.Linear(16, 10)), 3, "must be an nn.Linear"),
    (None, 3, "fc is None"),
])
def test_a_head_that_cannot_be_replaced_is_refused(head, n_classes, message):
    model = TinyNet(10)
    model.fc = head
    with pytest.raises(ValueError, match=message):
        helpers.replace_head(model, n_classes)
    assert model.fc is head


@pytest.mark.parametrize("first_replaced, frozen", [
    ("relu", ("conv1", "bn1")),
    ("layer1.1.relu", ("conv1", "bn1")),
    ("layer3.1.relu", ("conv1", "bn1", "layer1")),
])
def test_only_what_stands_before_the_first_swap_is_frozen(first_replaced, frozen):
    with torch.device("meta"):
        model = models.get_model("resnet18", weights=None)
    found = helpers.freeze(model, ("conv1", "bn1", "layer1"), first_replaced)
    assert found == frozen
    still = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert still == set(frozen)


def test_parameters_are_counted_in_all_and_those_that_are_trained():
    model = TinyNet(3)
    features = (8 * 27 + 8) + 2 * 8 + (16 * 72 + 16) + 2 * 16  # two convolutions, two norms
    head = 3 * 16 + 3
    assert helpers.count_parameters(model) == (features + head, features + head)
    model.features.requires_grad_(False)
    assert helpers.count_parameters(model) == (features + head, head)


# ---- Weights ----


def test_a_model_without_weights_is_initialised_by_torchs_generator():
    torch.manual_seed(1)
    model, sha256, label = helpers.build_model("resnet18", pretrained=False)
    torch.manual_seed(1)
    expected = models.get_model("resnet18", weights=None)
    assert (sha256, label) == ("random", "random initialisation")
    assert model.fc.out_features == 1000
    for value, expected_value in zip(model.parameters(), expected.parameters()):
        assert torch.equal(value, expected_value)


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_model_of_another_name_is_refused(pretrained):
    with pytest.raises(ValueError, match="model name is 'vgg16': it must be one of"):
        helpers.build_model("vgg16", pretrained)


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def has_weights(model, state):
    """Whether the model's weights are these, to the bit."""
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def files_under(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def trained_state():
    """The weights that a server or the cache offers for the model."""
    torch.manual_seed(1)
    return TinyNet(3).state_dict()


class Hub:
    """torch hub's cache in a scratch folder, for the weights of one small file."""

    def __init__(self, folder, content, monkeypatch):
        self.folder, self.content, self.monkeypatch = folder, content, monkeypatch
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.cached = folder / "checkpoints" / f"resnet18-{self.sha256[:8]}.pth"
        self.set_source("http://127.0.0.1:1")  # a port on which nobody listens

    def set_source(self, folder_url):
        weights = models.get_model_weights("resnet18").DEFAULT.value
        self.monkeypatch.setattr(weights, "url", f"{folder_url}/{self.cached.name}")

    def put(self, content):
        self.cached.parent.mkdir(parents=True)
        self.cached.write_bytes(content)


@pytest.fixture
def hub(tmp_path, monkeypatch, tiny_net, trained_state):
    """An empty Hub; "resnet18" is ``tiny_net``, and the working directory is a scratch one."""
    def get_tiny_net(name, weights):
        assert (name, weights) == ("resnet18", None)
        return tiny_net

    def get_dir():
        return str(tmp_path / "hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", get_dir)
    monkeypatch.setattr(models, "get_model", get_tiny_net)
    return Hub(tmp_path / "hub", saved(trained_state), monkeypatch)


def assert_is_one_line_without_a_path(label):
    assert "\n" not in label
    assert "/" not in label and "\\" not in label


def test_weights_are_downloaded_once_and_kept_in_the_cache(hub, trained_state):
    with serve(hub.content) as server:
        hub.set_source(f"{server.url}/good")
        for _ in range(2):
            model, sha256, label = helpers.build_model("resnet18", pretrained=True)
            assert label == "ImageNet weights (IMAGENET1K_V1)"
            assert sha256 == hub.sha256
            assert has_weights(model, trained_state)
            assert files_under(hub.folder) == {f"checkpoints/{hub.cached.name}": hub.content}
        assert server.requests == [f"/good/{hub.cached.name}"]


@pytest.mark.parametrize("behaviour, reason", [
    ("missing", "HTTP Error 404"),
    ("wrong", "not the right file"),
    ("cut", "127.0.0.1"),  # with one reason or another, by the version of Python
    ("silent", "timed out"),
])
def test_weights_that_do_not_arrive_leave_a_random_model_and_no_file(
        hub, tiny_net, monkeypatch, behaviour, reason):
    monkeypatch.setattr(helpers, "STALL_TIMEOUT", 0.5)
    first_state = copy.deepcopy(tiny_net.state_dict())
    with serve(hub.content) as server:
        hub.set_source(f"{server.url}/{behaviour}")
        model, sha256, label = helpers.build_model("resnet18", pretrained=True)
        assert server.requests == [f"/{behaviour}/{hub.cached.name}"]
    assert sha256 == "random"
    assert label.startswith("random initialisation: no ImageNet weights (")
    assert reason in label
    assert_is_one_line_without_a_path(label)
    assert has_weights(model, first_state)
    assert files_under(hub.folder) == {}


class Evil:
    """Its pickle, where it is believed, makes the file ran.txt."""

    def __reduce__(self):
        return open, ("ran.txt", "w")


def empty_file(state):
    return b""


def evil_pickle(state):
    return pickle.dumps(Evil(), protocol=2)


def evil_weights(state):
    return saved(dict(state, **{"fc.bias": Evil()}))


def truncated_file(state):
    return saved(state)[:-100]


def not_a_dictionary(state):
    return saved(list(state.values()))


def other_keys(state):
    return saved({f"module.{key}": value for key, value in state.items()})


def other_shapes(state):
    return saved(dict(state, **{"fc.bias": torch.zeros(7)}))


def weights_with_a_nan(state):
    bias = state["fc.bias"].clone()
    bias[1] = float("nan")
    return saved(dict(state, **{"fc.bias": bias}))


@pytest.mark.parametrize("make_content", [
    empty_file, evil_pickle, evil_weights, truncated_file, not_a_dictionary, other_keys,
    other_shapes, weights_with_a_nan])
def test_a_cached_file_that_is_not_weights_is_left_alone_and_never_run(
        hub, tiny_net, trained_state, tmp_path, make_content):
    hub.put(make_content(trained_state))
    files_before = files_under(tmp_path)
    first_state = copy.deepcopy(tiny_net.state_dict())

    model, sha256, label = helpers.build_model("resnet18", pretrained=True)

    assert sha256 == "random"
    assert label.startswith(
        f"random initialisation: no ImageNet weights ({hub.cached.name} in torch hub's checkpoints "
        "does not load, ")
    assert label.endswith(": delete it)")
    assert_is_one_line_without_a_path(label)
    assert has_weights(model, first_state)
    assert files_under(tmp_path) == files_before


def test_a_cache_that_cannot_be_written_is_told_without_its_path(hub, tiny_net, tmp_path):
    hub.folder.write_bytes(b"a file in the place of the folder")
    files_before = files_under(tmp_path)
    first_state = copy.deepcopy(tiny_net.state_dict())
    model, sha256, label = helpers.build_model("resnet18", pretrained=True)
    assert sha256 == "random" and has_weights(model, first_state)
    assert hub.cached.name in label and "does not load, " in label and "delete it" not in label
    assert_is_one_line_without_a_path(label)
    assert files_under(tmp_path) == files_before


def test_other_weights_in_the_cache_are_used_and_labelled_as_not_torchvisions(hub):
    other_state = TinyNet(3).state_dict()
    content = saved(other_state)
    hub.put(content)
    model, sha256, label = helpers.build_model("resnet18", pretrained=True)
    assert has_weights(model, other_state)
    assert sha256 == hashlib.sha256(content).hexdigest()
    assert label == f"not torchvision's own file for IMAGENET1K_V1 (SHA-256 {sha256[:8]})"
    assert not label.startswith("ImageNet weights")


def test_the_model_itself_has_no_place_in_which_to_put_another():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(AttributeError, match="cannot be replaced"):
        helpers.place_modules(model, [("", nn.SiLU())])
    assert list(model.named_children()) == [("0", model[0])]
