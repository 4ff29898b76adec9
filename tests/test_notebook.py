"""The notebook, run headless on a few small images: what it prints, and that it prints it again."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import PythonExporter
from torchvision import models

import helpers
from conftest import ROOT, accept_md5s_source, write_official_files
from execute_notebook import find_notebook

# Every literal line of the interface, in its order; # is a number, … any text.
LINES = """\
Python # | torch # | torchvision # | device: …
Seed: 1337 | cudnn.deterministic=True | cudnn.benchmark=False
Using resnet18, pretrained=True
Weights: …
Parameters: # | trainable: #
Total nn.ReLU before replacement: 9
Replacing activations at indices (1-based): [7, 8, 9] with nn.SiLU
   6  layer3.0.relu   ReLU(inplace=True)  →  ReLU(inplace=True)
   7  layer3.1.relu   ReLU(inplace=True)  →  SiLU()
ReLU remaining: 6
SiLU inserted: 3
Check passed: exactly ReLUs 7 to 9 were replaced
Old head: in_features=512 → out_features=1000
New head: in_features=512 → out_features=3
Target classes: 3
Data source: official CIFAR-10 batches, MD5 verified
Selected classes: ['cat', 'dog', 'airplane']
Mapping (original id → new id): {0: 0, 3: 1, 5: 2}
Mapping (class name → new id): {'airplane': 0, 'cat': 1, 'dog': 2}
Train counts: {0: #, 1: #, 2: #} | Val counts: {0: #, 1: #, 2: #}
Train: RandomCrop(32, pad 4, reflect) → random horizontal flip → to float → Resize(#) → Normalize
Val: to float → Resize(#) → Normalize
Train batch: images (#, 3, #, #), labels (#,)
Val batch: images (#, 3, #, #), labels (#,)
First loss: #; guessing gives ln 3 = 1.099
One batch of # images, at step 30: loss #, accuracy #%
probe before training, ReLU … #% … #%
probe before training, SiLU … #% … #%
Plan: # of # epochs for each of two networks, about # s an epoch, # min in all.
Epoch 1/# | Train Loss: # | Train Acc: #% | Val Loss: # | Val Acc: #%
Best Val Acc: #% (epoch #)
Epoch 1/# | Train Loss: # | Train Acc: #% | Val Loss: # | Val Acc: #%
Final Val Acc: #%
Test Acc: #% (95% CI #–#)
SiLU: #% right; recall airplane #%, cat #%, dog #%
ReLU: #% right; recall airplane #%, cat #%, dog #%
Right only with SiLU: # images, only with ReLU: #
SiLU minus ReLU: # points (95% CI # to #), exact McNemar p #
trained, SiLU … #% … #%
trained, SiLU → ReLU … #% … #%
trained, ReLU … #% … #%
trained, ReLU → SiLU … #% … #%
Reproducibility summary
Seed: 1337 | cudnn.deterministic=True | cudnn.benchmark=False
helpers.py SHA-256: …
Total runtime: # min # s""".split("\n")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def all_outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def printed_text(notebook):
    return "".join(o.text for o in all_outputs(notebook) if o.output_type == "stream")


def result_box(notebook):
    """The Markdown under the title."""
    (box,) = (o.data["text/markdown"] for o in code_cells(notebook)[0].outputs)
    return box


def picture_titles(notebook):
    pictures = [o for o in all_outputs(notebook) if "image/png" in o.get("data", {})]
    return [picture.data["text/plain"] for picture in pictures]


def without_times(text):
    text = re.sub(r"\d+ min \d\d s", "", text)
    return re.sub(r"\d+ s an epoch, [\d.]+ min|: [\d.]+ min", "", text)


def shown(cell):
    """What a cell put out, times aside; text that arrived in pieces is put together."""
    text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
    displayed = [o.data for o in cell.outputs if "data" in o]
    return without_times(text), [without_times(str(data)) for data in displayed]


def check_lines(text, lines):
    """Each of the lines is printed, after the one before it."""
    printed = iter(text.splitlines())
    for line in lines:
        pattern = re.escape(line).replace("\\#", r"[+-]?\d[\d.,e-]*").replace("…", ".*")
        assert any(re.fullmatch(pattern, each) for each in printed), f"no line: {line}"


def check_form(notebook):
    """What holds of every executed copy, whatever the parameters."""
    outputs = all_outputs(notebook)
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        *range(1, len(code_cells(notebook)) + 1)]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert max(map(len, printed_text(notebook).splitlines())) <= 100
    for output in outputs:  # no empty output, and none that a text viewer cannot show
        text = output.get("text") or output.data["text/plain"]
        assert text.strip() and "object at 0x" not in text and "<IPython" not in text
    residue = r"\\r(?!\\n)|\\u001b|\\b|Warning|(?<![\w.:/])/(home|root|tmp|usr|work|Users|var)/"
    assert not re.search(residue, json.dumps([o.get("text", "") for o in outputs]))


INTERRUPTED_CONTROL = """
evaluate, calls = helpers.evaluate, iter(range(100))

def evaluate_or_interrupt(*args, **settings):
    if next(calls) == 2:  # two epochs of the swapped network, then the control's first
        raise KeyboardInterrupt
    return evaluate(*args, **settings)

helpers.evaluate = evaluate_or_interrupt
"""
SMALL = {"IMAGE_SIZE": 32, "BATCH_SIZE": 16, "EPOCHS": 2, "TIME_BUDGET_MINUTES": 0.1}
OTHER = {**SMALL, "EPOCHS": 1, "PRETRAINED": False, "ALT_ACTIVATION": "GELU", "FIRST_REPLACED": 1,
         "CLASS_NAMES": ["ship", "frog"], "RUN_CONTROL": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with helpers.py, tiny official images, and weights of another hash in a cache."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(ROOT / "helpers.py", folder)
    digits = helpers.make_stand_in(seed=3)
    train = digits.train[0][:300], digits.train[1][:300]
    test = digits.test[0][:100], digits.test[1][:100]
    md5s = write_official_files(folder / "data", train, test)
    (folder / "accept.py").write_text(accept_md5s_source(md5s))
    checkpoints = folder / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    weights = models.resnet18(weights=None).state_dict()
    torch.save(weights, checkpoints / "resnet18-f37072fd.pth")
    return folder


@pytest.fixture(scope="module")
def env(home):
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(home / "torch"),
            "MPLBACKEND": "agg", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": str(home)}


def prepare(values, added=""):
    """A copy of the notebook without outputs, with parameters, and code behind the first cell's."""
    notebook = nbformat.read(find_notebook(), as_version=4)
    notebook.cells = code_cells(notebook)
    notebook.cells[0].source += "\nimport accept\n" + added
    (parameters,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    for name, value in values.items():
        parameters.source += f"\n{name} = {value!r}"
    return notebook


def twice(notebook):
    """Every cell a second time, right after the first."""
    repeated = [cell for cell in notebook.cells for _ in range(2)]
    notebook.cells = [nbformat.v4.new_code_cell(cell.source) for cell in repeated]
    return notebook


@pytest.fixture(scope="module")
def runs(home, env, tmp_path_factory):
    """A function from a name to its executed notebook; two run at a time, with a thread each."""
    def execute(notebook, allow_errors=False):
        resources = {"metadata": {"path": str(home)}}
        client = NotebookClient(
            notebook, timeout=600, resources=resources, allow_errors=allow_errors)
        return client.execute(env=env)

    def run_script():
        folder = tmp_path_factory.mktemp("script")
        shutil.copy(ROOT / "helpers.py", folder)
        no_network = "helpers.load_cifar10.__defaults__ = ((),)  # no addresses to download from\n"
        (folder / "accept.py").write_text("")
        script, _ = PythonExporter().from_notebook_node(prepare(OTHER, no_network))
        (folder / "script.py").write_text(script, encoding="utf-8")
        return subprocess.run(
            [sys.executable, "script.py"], cwd=folder, env={**env, "PYTHONPATH": str(folder)},
            capture_output=True, text=True, encoding="utf-8")

    with ThreadPoolExecutor(2) as pool:
        futures = {
            "twice": pool.submit(execute, twice(prepare(SMALL))),
            "default": pool.submit(execute, prepare(SMALL)),
            "interrupted": pool.submit(execute, prepare(SMALL, INTERRUPTED_CONTROL), True),
            "script": pool.submit(run_script),
            "bad": pool.submit(execute, prepare({"FIRST_REPLACED": 10}))}
        yield lambda name: futures[name].result()


def test_a_run_with_defaults_prints_every_line_of_the_interface_in_order(runs):
    notebook = runs("default")
    check_form(notebook)
    text = printed_text(notebook)
    check_lines(text, LINES)
    label = "not torchvision's own file for IMAGENET1K_V1 (SHA-256 "
    assert text.replace("\n", " ").count(f"Weights: {label}") == 2
    box = result_box(notebook).split("\n\n")
    assert len(box) == 5 and "with ReLU" in box[0] and label in box[3]
    assert len(picture_titles(notebook)) == 5
    assert "STAND-IN" not in text


def test_two_epochs_of_both_networks_are_trained_whatever_the_time_budget(runs):
    text = printed_text(runs("default"))  # its budget is 0.1 minutes
    assert "Plan: 2 of 2 epochs for each of two networks" in text
    assert text.count("\nEpoch 2/2 | ") == 2


def test_a_cell_run_again_and_a_run_elsewhere_give_the_same_output_but_for_times(runs):
    default = [shown(cell) for cell in runs("default").cells]
    again = [shown(cell) for cell in runs("twice").cells]
    # The first cell's box is filled in by the last one; of two boxes, the second.
    assert again[2::2] == default[1:]
    assert again[3::2] == default[1:]


def test_after_an_interrupt_of_the_control_the_report_is_of_the_swapped_network_alone(runs):
    notebook = runs("interrupted")
    errors = [o for o in all_outputs(notebook) if o.output_type == "error"]
    assert [error.ename for error in errors] == ["KeyboardInterrupt"]
    text = printed_text(notebook)
    check_lines(text, ["Test Acc: #% (95% CI #–#)", "trained, SiLU → ReLU … #% … #%",
                       "Total runtime: # min # s"])
    assert " minus ReLU" not in text and "ReLU → SiLU" not in text
    assert "with ReLU" not in result_box(notebook)


def test_a_bad_parameter_stops_the_run_in_one_sentence(runs):
    with pytest.raises(CellExecutionError, match="FIRST_REPLACED is 10: it must be a whole number"):
        runs("bad")


def test_as_a_plain_script_on_the_stand_in_with_other_parameters_all_it_prints_is_true(runs):
    done = runs("script")
    assert done.returncode == 0, done.stderr
    check_lines(done.stdout, [
        "Using resnet18, pretrained=False", "Weights: random initialisation", "Frozen: nothing",
        "Replacing activations at indices (1-based): [1, 2, 3, 4, 5, 6, 7, 8, 9] with nn.GELU",
        "ReLU remaining: 0", "GELU inserted: 9", "New head: in_features=512 → out_features=2",
        "Target classes: 2", "Data source: STAND-IN: …",
        "Selected classes: ['ship', 'frog']", "Mapping (original id → new id): {6: 0, 8: 1}",
        "Mapping (class name → new id): {'frog': 0, 'ship': 1}",
        "Random weights: no statistics that a swap could disturb.",
        "Plan: 1 of 1 epochs for one network, …", "No control in this run.", "Final Val Acc: #%",
        "trained, GELU → ReLU … #% … #%", "Total runtime: # min # s",
        "**Test accuracy #% with GELU** [STAND-IN IMAGES]", "Final Val Acc: #% with GELU …"])
    assert done.stdout.count("\n" + "#" * 88 + "\n") == 2  # above and below the data's source
    titles = [line for line in done.stdout.splitlines() if line.endswith("[STAND-IN IMAGES]")]
    assert len(titles) >= 6
    assert "pretrained=True" not in done.stdout and "before training," not in done.stdout


def test_the_parameters_cell_is_the_public_interface():
    notebook = nbformat.read(find_notebook(), as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    values = {}
    exec(cell.source, {}, values)
    assert values == dict(
        SEED=1337, MODEL_NAME="resnet18", PRETRAINED=True, ALT_ACTIVATION="SiLU", FIRST_REPLACED=7,
        CLASS_NAMES=["cat", "dog", "airplane"], VAL_FRACTION=0.1, IMAGE_SIZE=None, BATCH_SIZE=128,
        EPOCHS=None, DATA_DIR="data", ALLOW_STAND_IN=True, PRECISION="float32", RUN_CONTROL=True,
        TIME_BUDGET_MINUTES=20)
    helpers.check_parameters(values)
    assert all("#" in line for line in cell.source.splitlines())  # each is explained
    recipe = helpers.RECIPES["pretrained"]
    assert f"None: the recipe's, {recipe.image_size}\n" in cell.source
    assert f"None: the recipe's, {recipe.epochs}\n" in cell.source
