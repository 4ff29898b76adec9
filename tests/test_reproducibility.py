"""The first section of helpers.py: parameters, seeds, device, summaries, progress."""

import hashlib
import os
import random
import re
import types
from pathlib import Path

import IPython
import IPython.display
import numpy as np
import pytest
import torch

import helpers
from conftest import DEFAULTS

ALLOWED = {
    "SEED": [0, np.int64(7), 2**32 - 1], "MODEL_NAME": list(helpers.MODELS), "PRETRAINED": [True, False],
    "ALT_ACTIVATION": list(helpers.ACTIVATIONS), "FIRST_REPLACED": [1, 9],
    "CLASS_NAMES": [["cat", "dog"], ("ship", "truck", "frog")], "VAL_FRACTION": [0.01, np.float32(0.1), 0.5],
    "IMAGE_SIZE": [None, 32, np.int64(256)], "BATCH_SIZE": [2, 1024], "DATA_DIR": ["elsewhere", Path("a") / "b"],
    "ALLOW_STAND_IN": [True, False], "PRECISION": ["float32", "bfloat16"],
    "RUN_CONTROL": [np.bool_(True), False],
    "TIME_BUDGET_MINUTES": [0.5, np.float32(20), 1440], "EPOCHS": [None, 1, 1000]}
REFUSED = {
    "SEED": ["1337", 1.0, True, None, -1, 2**32], "MODEL_NAME": ["resnet101", None, ["resnet18"]],
    "PRETRAINED": [1, "yes", None], "ALT_ACTIVATION": ["ReLU", "silu", None, ["SiLU"]],
    "FIRST_REPLACED": [0, 10, 7.0, True, "7"], "EPOCHS": [0, 1001, 2.0, "5", True],
    "CLASS_NAMES": [["cat"], ["cat", "dog", "ship", "frog"], ["cat", "cat"], ["cat", "fox"], [["cat"], ["dog"]],
                    {"cat", "dog"}],
    "VAL_FRACTION": [0, 0.009, 0.51, "0.1", True, None, float("nan")], "PRECISION": ["auto", "float16"],
    "IMAGE_SIZE": [31, 257, 64.0, "64", True], "BATCH_SIZE": [1, 1025, 0, 64.0, None],
    "DATA_DIR": ["", "  ", None, 3], "ALLOW_STAND_IN": [0, None, "no"], "RUN_CONTROL": [1, None],
    "TIME_BUDGET_MINUTES": [0, -1, 1441, "20", None, True, float("nan"), float("inf")]}


@pytest.mark.parametrize("name, value", [(name, v) for name in ALLOWED for v in ALLOWED[name]])
def test_an_allowed_value_passes_and_other_names_are_ignored(name, value):
    helpers.check_parameters({**DEFAULTS, "FIRST_REPLACED": 7, name: value, "other": object()})


@pytest.mark.parametrize("name, value", [(name, v) for name in REFUSED for v in REFUSED[name]])
def test_a_bad_value_is_refused_with_its_name_its_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}: it must be .+"):
        helpers.check_parameters({**DEFAULTS, "MODEL_NAME": "resnet18", name: value})


def test_the_default_parameters_pass_and_a_missing_one_is_named():
    helpers.check_parameters(DEFAULTS)
    for missing in DEFAULTS.keys() | ALLOWED.keys() | REFUSED.keys():
        with pytest.raises(ValueError, match=f"^{missing} is missing"):
            helpers.check_parameters({k: v for k, v in DEFAULTS.items() if k != missing})


@pytest.mark.parametrize("model_name, n_relu", helpers.MODELS.items())
def test_first_replaced_goes_as_far_as_the_chosen_model_has_relus(model_name, n_relu):
    values = {**DEFAULTS, "MODEL_NAME": model_name, "FIRST_REPLACED": n_relu}
    helpers.check_parameters(values)
    with pytest.raises(ValueError, match=f"from 1 to {n_relu}[.]"):
        helpers.check_parameters({**values, "FIRST_REPLACED": n_relu + 1})


def test_the_same_seed_gives_the_same_draws_from_every_generator():
    def draws(seed):
        helpers.seed_everything(np.int64(seed), [own])
        return random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=own)

    own = torch.Generator()
    first, other = draws(5), draws(6)
    assert draws(5) == first and all(a != b for a, b in zip(first, other))


def test_seeding_asks_for_determinism_and_the_summary_tells_it(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    memory = types.SimpleNamespace(fill_uninitialized_memory=True)
    monkeypatch.setattr(torch.utils, "deterministic", memory, raising=False)
    summary = "\nSeed: 42 | cudnn.deterministic={} | cudnn.benchmark={}"
    assert helpers.environment_summary(42, "cpu").endswith(summary.format(False, True))
    for workspace in (":4096:8", ":16:8"):  # the default, and the user's own
        helpers.seed_everything(42)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == workspace
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert helpers.environment_summary(42, "cpu").endswith(summary.format(True, False))
    assert torch.are_deterministic_algorithms_enabled() and not memory.fill_uninitialized_memory
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_device_is_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert helpers.pick_device().type == expected


def test_the_environment_is_one_line_of_versions_and_the_source_has_its_hash():
    versions = r"Python {0} \| torch {0} \| torchvision {0} \| device: cpu".format(r"\d+\.\d+\.\d+")
    assert re.fullmatch(versions, helpers.environment_summary(1, torch.device("cpu")).split("\n")[0])
    assert helpers.SOURCE_SHA256 == hashlib.sha256(Path(helpers.__file__).read_bytes()).hexdigest()


@pytest.mark.parametrize("seconds, text", [
    (0, "0 min 00 s"), (59.6, "1 min 00 s"), (754, "12 min 34 s"), (3600, "60 min 00 s")])
def test_a_duration_is_told_in_minutes_and_seconds(seconds, text):
    assert helpers.format_duration(seconds) == text


@pytest.mark.parametrize("in_notebook", [True, False])
def test_a_live_line_updates_one_display_in_notebooks_and_is_silent_elsewhere(
        monkeypatch, in_notebook):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    shell = types.SimpleNamespace(kernel=None) if in_notebook else types.SimpleNamespace()
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", lambda data, raw, display_id: handle)
    show = helpers.live_line()
    show("1"), show("2")
    assert shown == (["1", "2"] if in_notebook else [])
