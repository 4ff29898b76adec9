"""The notebook: run headless on a small generated image tree, and as it is committed."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torchvision import models

import helpers
from conftest import ROOT, write_image_tree

NOTEBOOK = ROOT / "ML_Assessment_Candidate.ipynb"

# Every literal line of the interface, in its order.
LINES = [
    r"Python 3\.\d+\.\d+ \| torch \d+\.\d+\.\d+ \| torchvision \d+\.\d+\.\d+ \| device: (cpu|cuda|mps)",
    r"Seed: 1337 \| cudnn\.deterministic=True \| cudnn\.benchmark=False",
    r"Using resnet18, pretrained=(True|False)",
    r"Parameters: 11,689,512 \| trainable: 11,689,512",
    r"Total nn\.ReLU before replacement: 9",
    r"Replacing activations at indices \(1-based\): \[7, 8, 9\] with nn\.SiLU",
    r"ReLU remaining: 6",
    r"SiLU inserted: 3",
    r"Old head: in_features=512 → out_features=1000",
    r"New head: in_features=512 → out_features=3",
    r"Target classes: 3",
    r"Data source: .+",
    r"Selected classes: \['cat', 'dog', 'airplane'\]",
    r"Mapping \(original id → new id\): \{0: 0, 3: 1, 5: 2\}",
    r"Mapping \(class name → new id\): \{'airplane': 0, 'cat': 1, 'dog': 2\}",
    r"Train counts: \{0: \d+, 1: \d+, 2: \d+\} \| Val counts: \{0: \d+, 1: \d+, 2: \d+\}",
    r"Train transform: RandomCrop.+RandomHorizontalFlip.+Resize.+Normalize.+",
    r"Val transform: .+Resize.+Normalize.+",
    r"Train batch: images \(\d+, 3, \d+, \d+\), labels \(\d+,\)",
    r"Val batch: images \(\d+, 3, \d+, \d+\), labels \(\d+,\)",
    r"Epoch 1/\d+ \| Train Loss: \d+\.\d{3} \| Train Acc: \d+\.\d% \| Val Loss: \d+\.\d{3} \| Val Acc: \d+\.\d%",
    r"Best Val Acc: \d+\.\d% \(epoch \d+\)",
    r"Final Val Acc: \d+\.\d%",
    r"Test Acc: \d+\.\d% \(95% CI \d+\.\d–\d+\.\d\)",
    r"Difference: [+-]\d+\.\d\d points \(95% paired CI [+-]\d+\.\d\d to [+-]\d+\.\d\d\)",
    r"Exact McNemar p: \S+",
    r"Reproducibility summary",
    r"Seed: 1337",
    r"helpers\.py SHA-256: [0-9a-f]{64}",
    r"Code cells SHA-256, to this one: [0-9a-f]{64}",
    r"Total runtime: \d+ min \d\d s",
]


def sha256_of_helpers():
    return hashlib.sha256((ROOT / "helpers.py").read_bytes()).hexdigest()


def printed(notebook):
    """All text that the cells printed, in order."""
    return "".join(
        output.text for cell in notebook.cells if cell.cell_type == "code"
        for output in cell.outputs if output.output_type == "stream")


def check_outputs(notebook):
    """What holds of every executed copy of the notebook."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    lines = iter(printed(notebook).splitlines())
    for pattern in LINES:  # each after the one before
        assert any(re.fullmatch(pattern, line) for line in lines), f"no line {pattern}"
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 5
    bullets = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    assert len(bullets) == 1 and 2 <= len(bullets[0].splitlines()) <= 6
    raw = json.dumps(notebook)
    assert "\\r" not in raw and "\\u001b" not in raw and "\\u0008" not in raw
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|work|Users|var)/", raw)
    assert "Warning" not in printed(notebook)


def put_into(folder):
    """Copy notebook and helpers into a folder; returns the notebook and its code cells."""
    for path in (NOTEBOOK, ROOT / "helpers.py"):
        shutil.copy(path, folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


def assignments(parameters):
    return "\n".join(f"{name} = {value!r}" for name, value in parameters.items())


def execute(notebook, folder, **options):
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}, **options).execute()


def run(folder, **parameters):
    """Execute the notebook in ``folder`` with parameters injected the way papermill does."""
    notebook, _ = put_into(folder)
    i = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    notebook.cells.insert(i + 1, nbformat.v4.new_code_cell("# Parameters\n" + assignments(parameters)))
    execute(notebook, folder)
    return notebook


SMALL = dict(PRETRAINED=False, EPOCHS=2, IMAGE_SIZE=32, BATCH_SIZE=16, PRECISION="float32", ALLOW_STAND_IN=False)


def without_times(notebook):
    """What each cell put out, times aside; text that arrived in several pieces is put together."""
    outputs = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
            data = [o.data for o in cell.outputs if "data" in o]
            outputs.append(re.sub(r"\d+ min \d\d s|\d+ ms", "TIME", text + json.dumps(data)))
    return outputs


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "another place")]
    for folder in folders:
        write_image_tree(folder / "data", n_train=30, n_test=10)
    return [run(folder, **SMALL) for folder in folders]


def test_a_headless_run_prints_every_required_line(executed):
    check_outputs(executed[0])
    text = printed(executed[0])
    assert "Train counts: {0: 27, 1: 27, 2: 27} | Val counts: {0: 3, 1: 3, 2: 3}" in text
    assert "Train batch: images (16, 3, 32, 32), labels (16,)" in text
    assert "image folders 'cifar10-images'" in text and "not verified against the official MD5" in text
    assert f"helpers.py SHA-256: {sha256_of_helpers()}" in text
    assert "400 files, PNG, INCOMPLETE: CIFAR-10 has 60,000" in text
    assert "STAND-IN" not in text and "[?]" not in text and text.count("[x]") >= 8
    assert re.findall(r"\[ \] .*", text) == ["[ ] All of CIFAR-10, and nothing generated"]


def test_two_headless_runs_in_two_places_are_equal_but_for_times(executed):
    one, another = (without_times(notebook) for notebook in executed)
    assert one == another


def test_a_cell_run_again_gives_the_same_output(tmp_path):
    write_image_tree(tmp_path / "data", n_train=20, n_test=6)
    notebook, code = put_into(tmp_path)
    code[0].source += "\n" + assignments({**SMALL, "EPOCHS": 1})
    # Every cell twice in a row, and then, from the surgery on, all once more.
    surgery = next(i for i, cell in enumerate(code) if "replace_relu" in cell.source)
    twice = [nbformat.v4.new_code_cell(cell.source) for cell in code for _ in range(2)]
    again = [nbformat.v4.new_code_cell(cell.source) for cell in code[surgery:]]
    notebook.cells = twice + again
    execute(notebook, tmp_path)
    runs = zip(twice[::2] + twice[2 * surgery::2], twice[1::2] + again)
    for first, second in runs:
        if "checklist" not in first.source:  # which notices that cells ran twice
            assert without_times(nbformat.v4.new_notebook(cells=[first])) == without_times(
                nbformat.v4.new_notebook(cells=[second])), first.source


def test_an_interrupted_training_still_reports_and_is_marked_as_partial(tmp_path):
    write_image_tree(tmp_path / "data", n_train=30, n_test=10)
    interrupting = """
import helpers
plain_evaluate, calls = helpers.evaluate, []

def evaluate(*args):
    calls.append(1)
    if len(calls) == INTERRUPTED_CALL:
        raise KeyboardInterrupt
    return plain_evaluate(*args)

helpers.evaluate = evaluate
"""
    texts = {}
    # Each training has two epochs, and a call in between measures the fit: the second epoch, then the control's first
    # and second.
    for call in (2, 4, 5):
        notebook, code = put_into(tmp_path)
        code[0].source += "\n" + assignments({**SMALL, "INTERRUPTED_CALL": call}) + interrupting
        execute(notebook, tmp_path, allow_errors=True)
        errors = [o.ename for cell in code for o in cell.outputs if o.output_type == "error"]
        assert errors == (["KeyboardInterrupt"] if call == 4 else [])
        texts[call] = printed(notebook)
    assert "PARTIAL RUN: interrupted in epoch 2 of 2" in texts[2]
    assert "No control: the swapped network's training is partial" in texts[2]
    assert "No comparison, for want of a control: its training was interrupted." in texts[4]
    assert "[CONTROL PARTIAL: interrupted in epoch 2 of 2]" in texts[5]
    for text in texts.values():
        assert "Test Acc: " in text and "Total runtime: " in text
        assert "[ ] Analysis tied to a complete control run" in text


def test_other_parameters_and_loaded_weights_run_through(tmp_path, monkeypatch):
    write_image_tree(tmp_path / "data", n_train=30, n_test=10)
    model = models.resnet18(weights=None)
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(model.state_dict(), checkpoints / "resnet18-f37072fd.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = printed(run(tmp_path, **{**SMALL, **dict(
        PRETRAINED=True, EPOCHS=1, PRECISION="auto", IMAGE_SIZE=40, ALT_ACTIVATION="GELU", FIRST_REPLACED=1,
        CLASS_NAMES=["ship", "frog"], VAL_FRACTION=0.2, RUN_CONTROL=False)}))
    for line in (
            "Using resnet18, pretrained=True", "Recipe: fine-tuning, 1 epochs", "ReLU remaining: 0", "GELU inserted: 9",
            "New head: in_features=512 → out_features=2", "Mapping (class name → new id): {'frog': 0, 'ship': 1}",
            "Train counts: {0: 24, 1: 24} | Val counts: {0: 6, 1: 6}", "Train batch: images (16, 3, 40, 40)",
            "No control: RUN_CONTROL is False.", "Test Acc: ", "Weights started from: ImageNet",
            "Training: complete | control: RUN_CONTROL is False", "Total runtime: "):
        assert line in text, line


def test_a_control_that_diverges_leaves_the_report_whole(tmp_path):
    write_image_tree(tmp_path / "data", n_train=30, n_test=10)
    notebook, code = put_into(tmp_path)
    code[0].source += "\n" + assignments({**SMALL, "EPOCHS": 1})
    control = next(cell for cell in code if "twin = " in cell.source)
    control.source = control.source.replace(
        "    try:\n", "    twin.fc.bias.data.fill_(float('nan'))\n    try:\n")
    execute(notebook, tmp_path)
    text = printed(notebook)
    assert "No control: its training failed: the loss is nan" in text and "Test Acc: " in text
    assert "[ ] Analysis tied to a complete control run" in text


def test_a_bad_parameter_stops_at_the_second_cell(tmp_path):
    from nbclient.exceptions import CellExecutionError

    with pytest.raises(CellExecutionError, match="FIRST_REPLACED is 10: it must be a whole number from 1 to 9"):
        run(tmp_path, FIRST_REPLACED=10)


def test_the_parameters_cell_holds_the_public_interface_and_nothing_else():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    values = {}
    exec(tagged[0].source, values)
    del values["__builtins__"]
    assert list(values) == [
        "SEED", "MODEL_NAME", "PRETRAINED", "ALT_ACTIVATION", "FIRST_REPLACED", "CLASS_NAMES", "VAL_FRACTION",
        "IMAGE_SIZE", "BATCH_SIZE", "EPOCHS", "DATA_DIR", "ALLOW_STAND_IN", "PRECISION", "RUN_CONTROL",
        "TIME_BUDGET_MINUTES"]
    helpers.check_parameters(values)
    fixed = dict(SEED=1337, MODEL_NAME="resnet18", PRETRAINED=True, ALT_ACTIVATION="SiLU", FIRST_REPLACED=7,
                 CLASS_NAMES=["cat", "dog", "airplane"], VAL_FRACTION=0.1, EPOCHS=None, DATA_DIR="data",
                 ALLOW_STAND_IN=True, PRECISION="auto", RUN_CONTROL=True, TIME_BUDGET_MINUTES=20)
    assert {name: values[name] for name in fixed} == fixed


def test_the_committed_notebook_was_executed_on_real_images_by_the_committed_helpers():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    text = printed(notebook)
    assert f"helpers.py SHA-256: {sha256_of_helpers()}" in text
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    summary = next(i for i, source in enumerate(sources) if "Reproducibility summary" in source)
    assert f"Code cells SHA-256, to this one: {helpers.cells_sha256(sources[:summary + 1])}" in text
    assert "Train counts: {0: 4500, 1: 4500, 2: 4500} | Val counts: {0: 500, 1: 500, 2: 500}" in text
    assert "STAND-IN" not in text and "PARTIAL" not in text
    minutes = int(re.search(r"Total runtime: (\d+) min", text)[1])
    assert minutes < 20
    assert "[ ]" not in text and "[?]" not in text and text.count("[x]") >= 8


def test_the_readme_quotes_the_committed_notebook():
    text, readme = printed(nbformat.read(NOTEBOOK, as_version=4)), (ROOT / "README.md").read_text()
    quoted = readme.split("the committed notebook's own")[1].split("```")[1].strip().splitlines()
    assert not set(quoted) - set(text.splitlines())
    for pattern in (r"Best Val Acc: .*", r"Test Acc: .*", r"Difference: .*", r"Exact McNemar p: .*", r"Total runtime: .*"):
        assert re.search(pattern, text)[0] in quoted
    # The table of several seeds has a row of the notebook's own.
    swapped, control = re.search(r"Test accuracy: SiLU (\S+) \| ReLU control (\S+)", text).groups()
    assert f"| 1337 | {swapped} | {control} |" in readme


def test_helpers_can_be_imported_from_another_folder_and_prints_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import helpers"
    result = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], cwd=tmp_path, capture_output=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")

