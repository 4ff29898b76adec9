"""Parameters, seeds, device, precision and what is shown: the first section of helpers.py."""

import os
import random
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import IPython
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import helpers

DEFAULTS = {
    "SEED": 1337,
    "MODEL_NAME": "resnet18",
    "PRETRAINED": True,
    "ALT_ACTIVATION": "SiLU",
    "FIRST_REPLACED": 7,
    "CLASS_NAMES": ["cat", "dog", "airplane"],
    "VAL_FRACTION": 0.1,
    "IMAGE_SIZE": None,
    "BATCH_SIZE": 128,
    "EPOCHS": None,
    "DATA_DIR": "data",
    "ALLOW_STAND_IN": True,
    "PRECISION": "float32",
    "RUN_CONTROL": True,
    "TIME_BUDGET_MINUTES": 20,
}

ALLOWED = {
    "SEED": [0, np.int64(7), 2**32 - 1],
    "MODEL_NAME": ["resnet18", "resnet34", "resnet50", np.str_("resnet34")],
    "PRETRAINED": [True, False, np.bool_(True)],
    "ALT_ACTIVATION": ["SiLU", "GELU", "LeakyReLU"],
    "FIRST_REPLACED": [1, np.int64(2), 9],
    "CLASS_NAMES": [["cat", "dog"], ("ship", "truck", "frog")],
    "VAL_FRACTION": [0.01, np.float32(0.1), Fraction(1, 10), 0.5],
    "IMAGE_SIZE": [None, 32, np.int64(64), 256],
    "BATCH_SIZE": [2, np.int64(64), 1024],
    "EPOCHS": [None, 1, np.int64(2), 1000],
    "DATA_DIR": ["elsewhere", Path("a", "b")],
    "ALLOW_STAND_IN": [True, False, np.bool_(False)],
    "PRECISION": ["float32", "bfloat16"],
    "RUN_CONTROL": [True, False, np.bool_(False)],
    "TIME_BUDGET_MINUTES": [0.1, np.float32(20), Fraction(1, 2), 1440],
}

REFUSED = {
    "SEED": [-1, 2**32, 1.0, "1337", True, None],
    "MODEL_NAME": ["resnet101", "ResNet18", ["resnet18"], None],
    "PRETRAINED": [0, 1, "True", None],
    "ALT_ACTIVATION": ["ReLU", "silu", ["SiLU"], None],
    "FIRST_REPLACED": [0, 10, 7.0, "7", True, None],
    "CLASS_NAMES": [
        ["cat"], ["cat", "cat"], ["cat", "fox"], ["cat", "dog", "ship", "frog"], {"cat", "dog"},
        "cat", [["cat"], ["dog"]], None],
    "VAL_FRACTION": [0, 0.009, 0.51, 1, float("nan"), "0.1", True, None],
    "IMAGE_SIZE": [31, 257, 64.0, "64", True],
    "BATCH_SIZE": [1, 1025, 64.0, "64", None],
    "EPOCHS": [0, 1001, 2.0, "5", True],
    "DATA_DIR": ["", "  ", 3, None],
    "ALLOW_STAND_IN": [0, 1, "no", None],
    "PRECISION": ["float16", "auto", torch.float32, None],
    "RUN_CONTROL": [0, 1, "no", None],
    "TIME_BUDGET_MINUTES": [0.09, 1441, float("inf"), "20", True, None],
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_allowed_values_pass(name):
    helpers.check_parameters(DEFAULTS)
    for value in ALLOWED[name]:
        helpers.check_parameters({**DEFAULTS, name: value})


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_parameter_that_is_refused_or_missing_is_named(name):
    for value in REFUSED[name]:
        message = f"^{name} is {re.escape(repr(value))}: it must be .+"
        with pytest.raises(ValueError, match=message):
            helpers.check_parameters({**DEFAULTS, name: value})
    values = dict(DEFAULTS)
    del values[name]
    with pytest.raises(ValueError, match=f"^{name} is missing: the parameters cell must"):
        helpers.check_parameters(values)


def test_the_last_activation_that_can_be_replaced_depends_on_the_model():
    helpers.check_parameters({**DEFAULTS, "MODEL_NAME": "resnet50", "FIRST_REPLACED": 17})
    with pytest.raises(ValueError, match="FIRST_REPLACED is 18: .* from 1 to 17"):
        helpers.check_parameters({**DEFAULTS, "MODEL_NAME": "resnet50", "FIRST_REPLACED": 18})


@pytest.fixture
def restored_flags():
    """Puts back, after the test, the global flags that set_determinism sets."""
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32)
    mode_before = torch.get_deterministic_debug_mode()
    yield
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before
    torch.set_deterministic_debug_mode(mode_before)


def test_the_same_seed_repeats_the_draws_of_random_numpy_and_torch(restored_flags):
    draws = []
    for seed in (5, np.int64(5), 6):
        helpers.set_determinism(seed)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
    for first, other in zip(draws[0], draws[2]):
        assert first != other


def test_determinism_sets_torchs_flags_and_leaves_the_users_cublas_workspace(
        monkeypatch, restored_flags):
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = False, True, True
    torch.use_deterministic_algorithms(False)
    memory = SimpleNamespace(fill_uninitialized_memory=True)  # torch 2.0 has no such flag
    monkeypatch.setattr(torch.utils, "deterministic", memory, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "to be deleted, and restored after the test")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")

    helpers.set_determinism(5)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32) == (True, False, False)
    assert memory.fill_uninitialized_memory is False

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    helpers.set_determinism(5)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_the_environment_is_two_lines(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    versions, seed = helpers.environment_summary(5, torch.device("cpu")).split("\n")
    pattern = r"Python 3\.\d+\.\S+ \| torch 2\.9\.1 \| torchvision [^+ ]+ \| device: cpu"
    assert re.fullmatch(pattern, versions)
    assert seed == "Seed: 5 | cudnn.deterministic=True | cudnn.benchmark=False"


@pytest.mark.parametrize("has_cuda, has_mps, expected", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_cuda_comes_before_mps_and_mps_before_the_cpu(monkeypatch, has_cuda, has_mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)
    assert helpers.pick_device().type == expected


def test_bfloat16_is_picked_only_where_the_device_computes_in_it():
    assert helpers.pick_dtype("float32", torch.device("meta")) == torch.float32
    assert helpers.pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="^PRECISION is 'bfloat16', which the device meta cannot"):
        helpers.pick_dtype("bfloat16", torch.device("meta"))  # torch has no autocast for it


@pytest.mark.parametrize("shell, expected", [
    (SimpleNamespace(kernel=object()), True), (SimpleNamespace(), False), (None, False)],
    ids=["Jupyter", "terminal", "no IPython"])
def test_only_a_shell_with_a_kernel_is_a_notebook(monkeypatch, shell, expected):
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    assert helpers.in_notebook() is expected


def test_outside_a_notebook_text_is_printed_and_progress_is_silent(capsys):
    helpers.live_line()("half done")
    assert capsys.readouterr().out == ""
    helpers.show_markdown("**bold**", display_id="epochs", update=True)
    assert capsys.readouterr().out == "**bold**\n"
    helpers.show(Figure(label="A title"))
    assert capsys.readouterr().out == "A title\n"
    helpers.show_source(helpers.in_notebook, helpers.pick_device)
    printed = capsys.readouterr().out
    assert printed.startswith("def in_notebook() -> bool:\n")
    assert "\n\ndef pick_device() -> torch.device:\n" in printed
