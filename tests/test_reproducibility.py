"""The first section of helpers.py: parameters, seeds, device, summaries, progress."""

import os
import random
import re
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import numpy as np
import pytest
import torch

import helpers
from conftest import DEFAULTS

VALUES = {  # name: allowed values, refused values
    "SEED": ([0, np.int64(7), 2**32 - 1], ["1337", 1.0, True, None, -1, 2**32]),
    "MODEL_NAME": ([*helpers.MODELS], ["resnet101", None, ["resnet18"]]),
    **dict.fromkeys(["PRETRAINED", "ALLOW_STAND_IN", "RUN_CONTROL"], (
        [True, False, np.bool_(True)], [0, 1, "no", None])),
    "ALT_ACTIVATION": ([*helpers.ACTIVATIONS], ["ReLU", "silu", None, ["SiLU"]]),
    "FIRST_REPLACED": ([1, 17], [0, 10, 7.0, True, "7", None]),
    "CLASS_NAMES": ([["cat", "dog"], ("ship", "truck", "frog")], [
        ["cat"], ["cat"] * 2, ["cat", "fox"], helpers.CIFAR10_CLASSES[:4], {"cat", "dog"}, [[]]]),
    "VAL_FRACTION": ([0.01, np.float32(0.1), 0.5], [0, 0.009, 0.51, "1", None, float("nan")]),
    "IMAGE_SIZE": ([None, 32, np.int64(256)], [31, 257, 64.0, "64", True]),
    "BATCH_SIZE": ([2, 1024], [1, 1025, 64.0, None]),
    "EPOCHS": ([None, 1, 1000], [0, 1001, 2.0, "5", True]),
    "DATA_DIR": (["elsewhere", Path("a") / "b"], ["", "  ", None, 3]),
    "PRECISION": (["float32", "bfloat16"], ["auto", "float16"]),
    "TIME_BUDGET_MINUTES": ([0.1, np.float32(20), 1440], [0.09, 1441, "20", None, True])}


@pytest.mark.parametrize("name", DEFAULTS)
def test_allowed_values_pass_others_are_refused_with_their_value_and_none_is_missing(name):
    for value in VALUES[name][0]:
        helpers.check_parameters({**DEFAULTS, "MODEL_NAME": "resnet50", name: value, "other": {}})
    for value in VALUES[name][1]:
        with pytest.raises(ValueError, match=f"^{name} is {re.escape(repr(value))}: it must be"):
            helpers.check_parameters({**DEFAULTS, "MODEL_NAME": "resnet18", name: value})
    with pytest.raises(ValueError, match=f"^{name} is missing: set it to "):
        helpers.check_parameters({k: v for k, v in DEFAULTS.items() if k != name})


def test_seeding_repeats_every_draw_and_asks_for_determinism_which_the_summary_tells(monkeypatch):
    memory, cudnn = SimpleNamespace(fill_uninitialized_memory=True), torch.backends.cudnn
    monkeypatch.setattr(torch.utils, "deterministic", memory, raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(False)
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = False, True, True
    draws, workspaces = [], []
    for seed in (5, 6, 5):
        helpers.seed_everything(np.int64(seed))
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
        workspaces.append(os.environ["CUBLAS_WORKSPACE_CONFIG"])
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # the user's own
    assert draws[0] == draws[2] and not set(draws[0]) & set(draws[1])
    assert workspaces == [":4096:8", ":16:8", ":16:8"] and not memory.fill_uninitialized_memory
    assert torch.get_deterministic_debug_mode() == 1 and not cudnn.allow_tf32  # 1: only warn
    versions, told = helpers.environment_summary(5, "cpu").split("\n")
    assert re.fullmatch(r"Python \S+ \| torch [\d.]+ \| torchvision [\d.]+ \| .* cpu", versions)
    assert told == "Seed: 5 | cudnn.deterministic=True | cudnn.benchmark=False"


@pytest.mark.parametrize("shell, expected", [
    (SimpleNamespace(kernel=None), ["1"]), (SimpleNamespace(), []), (None, [])])
def test_a_live_line_updates_its_display_in_a_notebook_only(monkeypatch, shell, expected):
    shown = []
    handle = SimpleNamespace(update=lambda data, raw: shown.append(raw and data["text/plain"]))
    monkeypatch.setattr(IPython, "get_ipython", lambda: shell)
    monkeypatch.setattr(IPython.display, "display", lambda data, **on: all(on.values()) and handle)
    helpers.live_line()("1")
    assert shown == expected
