"""The first room of helpers.py: parameters, seeds, summaries."""

import hashlib
import random
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import helpers

GOOD = dict(
    SEED=1337, MODEL_NAME="resnet18", PRETRAINED=True, ALT_ACTIVATION="SiLU", FIRST_REPLACED=7,
    CLASS_NAMES=["cat", "dog", "airplane"], VAL_FRACTION=0.1, IMAGE_SIZE=64, BATCH_SIZE=64, EPOCHS=None,
    DATA_DIR="data", ALLOW_STAND_IN=True, PRECISION="auto", RUN_CONTROL=True, TIME_BUDGET_MINUTES=20,
)

ALLOWED = {
    "SEED": [0, 2**32 - 1],
    "MODEL_NAME": ["resnet34", "resnet50"],
    "PRETRAINED": [False],
    "ALT_ACTIVATION": ["GELU", "LeakyReLU"],
    "FIRST_REPLACED": [1, 9],
    "CLASS_NAMES": [["cat", "dog"], ("ship", "truck", "frog")],
    "VAL_FRACTION": [0.01, 0.5],
    "IMAGE_SIZE": [32, 256],
    "BATCH_SIZE": [2, 1024],
    "EPOCHS": [1, 1000],
    "DATA_DIR": ["elsewhere"],
    "ALLOW_STAND_IN": [False],
    "PRECISION": ["float32", "bfloat16"],
    "RUN_CONTROL": [False],
    "TIME_BUDGET_MINUTES": [0.5, 1440],
}

REFUSED = {
    "SEED": ["1337", 1.0, True, None, -1, 2**32],
    "MODEL_NAME": ["resnet101", 18, None, ["resnet18"]],
    "PRETRAINED": [1, "yes", None],
    "ALT_ACTIVATION": ["ReLU", "silu", None, ["SiLU"]],
    "FIRST_REPLACED": [0, 10, 7.0, True, "7"],
    "CLASS_NAMES": [
        ["cat"], ["cat", "dog", "ship", "frog"], ["cat", "cat"], ["cat", "unicorn"], "cat", [3, 5], None, []],
    "VAL_FRACTION": [0, 0.009, 0.51, 1, "0.1", True, None, float("nan")],
    "IMAGE_SIZE": [31, 257, 64.0, "64", None],
    "BATCH_SIZE": [1, 1025, 0, 64.0, None],
    "EPOCHS": [0, 1001, 2.0, "5", True],
    "DATA_DIR": ["", "  ", None, 3],
    "ALLOW_STAND_IN": [0, None, "no"],
    "PRECISION": ["float16", None, 32],
    "RUN_CONTROL": [1, None],
    "TIME_BUDGET_MINUTES": [0, -1, 1441, "20", None, True, float("nan"), float("inf")],
}


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_the_default_parameters_pass():
    helpers.check_parameters({**GOOD, "something_else": object()})


@pytest.mark.parametrize("name, value", cases(ALLOWED))
def test_a_boundary_value_passes(name, value):
    helpers.check_parameters({**GOOD, name: value})


@pytest.mark.parametrize("name, value", cases(REFUSED))
def test_a_bad_value_is_refused_with_its_name_its_value_and_what_is_allowed(name, value):
    with pytest.raises(ValueError) as error:
        helpers.check_parameters({**GOOD, name: value})
    message = str(error.value)
    assert message.startswith(f"{name} is {value!r}: it must be ")
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("name", GOOD)
def test_a_missing_parameter_is_named(name):
    with pytest.raises(ValueError, match=f"^{name} is missing"):
        helpers.check_parameters({key: value for key, value in GOOD.items() if key != name})


def test_first_replaced_may_go_as_far_as_the_chosen_model_has_relus():
    helpers.check_parameters({**GOOD, "MODEL_NAME": "resnet34", "FIRST_REPLACED": 17})
    with pytest.raises(ValueError, match="from 1 to 17"):
        helpers.check_parameters({**GOOD, "MODEL_NAME": "resnet34", "FIRST_REPLACED": 18})


def draws(generator):
    return (
        random.random(), np.random.rand(), torch.rand(1).item(), torch.rand(1, generator=generator).item())


def test_the_same_seed_gives_the_same_draws_from_every_generator():
    generator = torch.Generator()
    helpers.seed_everything(5, [generator])
    first = draws(generator)
    helpers.seed_everything(5, [generator])
    assert draws(generator) == first
    helpers.seed_everything(6, [generator])
    assert all(a != b for a, b in zip(draws(generator), first))


def test_seeding_turns_deterministic_algorithms_on():
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True
    helpers.seed_everything(1)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark


def test_the_device_is_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert helpers.pick_device().type == expected


def test_the_summaries_have_their_literal_form():
    helpers.seed_everything(42)
    assert re.fullmatch(
        r"Python 3\.\d+\.\d+ \| torch \d+\.\d+\.\d+ \| torchvision \d+\.\d+\.\d+ \| device: cpu",
        helpers.environment_summary(torch.device("cpu")))
    assert helpers.determinism_summary(42) == "Seed: 42 | cudnn.deterministic=True | cudnn.benchmark=False"


def test_the_determinism_summary_reports_the_flags_as_they_are(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    assert "cudnn.deterministic=False" in helpers.determinism_summary(1)


def test_nondeterminism_left_names_the_threads_and_on_a_gpu_its_kernels():
    on_cpu = helpers.nondeterminism_left(torch.device("cpu"))
    assert str(torch.get_num_threads()) in on_cpu[0]
    assert len(helpers.nondeterminism_left(torch.device("cuda"))) == len(on_cpu) + 1


def test_the_hashes_are_of_the_source_and_of_the_cells_that_are_not_empty():
    assert helpers.SOURCE_SHA256 == hashlib.sha256(Path(helpers.__file__).read_bytes()).hexdigest()
    assert helpers.cells_sha256(["", "a", " b\n", "a", "c", "b"]) == hashlib.sha256(b"a\n\nb").hexdigest()
    assert helpers.cells_sha256(["a", "b"]) != helpers.cells_sha256(["b", "a"])


@pytest.mark.parametrize("seconds, text", [(0, "0 min 00 s"), (59.6, "1 min 00 s"), (754, "12 min 34 s")])
def test_format_duration(seconds, text):
    assert helpers.format_duration(seconds) == text


def test_a_live_line_is_silent_outside_a_notebook(capsys):
    helpers.LiveLine().update("hidden", final=True)
    assert capsys.readouterr() == ("", "")


def test_a_live_line_updates_one_display_and_skips_texts_that_come_too_fast(monkeypatch):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    def display(data, raw, display_id):
        shown.append(data["text/plain"])
        return handle

    import IPython.display

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(helpers, "get_ipython", lambda: types.SimpleNamespace(kernel=object()))
    line = helpers.LiveLine(seconds_between_updates=60)
    for text in ("first", "too soon"):
        line.update(text)
    line.update("last", final=True)
    assert shown == ["first", "last"]
