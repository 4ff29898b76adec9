"""The notebook: run headless on a few small images, and as it is committed."""

import hashlib
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
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from torchvision import models

from conftest import DEFAULTS, ROOT, write_image_tree

NOTEBOOK = ROOT / "ML_Assessment_Candidate.ipynb"
SMALL = dict(
    PRETRAINED=False, EPOCHS=2, IMAGE_SIZE=32, BATCH_SIZE=16, ALLOW_STAND_IN=False)

# Every literal line of the interface, in its order.
LINES = [
    r"Python 3\.\d+\.\d+ \| torch \d+\.\d+\.\d+ \| torchvision \d+\.\d+\.\d+ \| device: \w+",
    r"Seed: 1337 \| cudnn\.deterministic=True \| cudnn\.benchmark=False",
    r"Using resnet18, pretrained=(True|False)",
    r"Weights: .+", r"Parameters: 11,689,512 \| trainable: 11,(689,512|532,008)",
    r"Total nn\.ReLU before replacement: 9",
    r"Replacing activations at indices \(1-based\): \[7, 8, 9\] with nn\.SiLU",
    r"   6  layer3\.0\.relu +ReLU\(inplace=True\)  →  ReLU\(inplace=True\)",
    r"   7  layer3\.1\.relu +ReLU\(inplace=True\)  →  SiLU\(\)",
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
    r"Train transform: .+", r" +RandomCrop.+", r" +RandomHorizontalFlip.+", r" +Normalize.+",
    r"Val transform: .+", r" +Resize.+", r" +Normalize.+",
    r"Train batch: images \(\d+, 3, \d+, \d+\), labels \(\d+,\)",
    r"Val batch: images \(\d+, 3, \d+, \d+\), labels \(\d+,\)",
    r"  7  layer3\.1\.relu +\d+ +\d+ px +\d+% +\d+%  replaced",
    r"Predicted: the swapped network starts (behind|level) and ends within 1 point of the control\.",
    r"First loss: \d\.\d{3}; guessing gives ln 3 = 1\.099",
    r"One batch of \d+ learnt by heart: .+", r"Floor: chance 33\.3%, .+",
    r"Epochs: \d+ of \d+ for .+",
    r"Epoch 1/\d+ \| Train Loss: \d+\.\d{3} \| Train Acc: \d+\.\d% "
    r"\| Val Loss: \d+\.\d{3} \| Val Acc: \d+\.\d%",
    r"Best Val Acc: \d+\.\d% \(epoch \d+\)",
    r"Final Val Acc: \d+\.\d%",
    r"Test Acc: \d+\.\d% \(95% CI \d+\.\d–\d+\.\d\)",
    r"Difference: [+-]\d+\.\d\d points \(95% paired CI [+-]\d+\.\d\d to [+-]\d+\.\d\d\)",
    r"Exact McNemar p: \S+",
    r"Reproducibility summary",
    r"Seed: 1337",
    r"helpers\.py SHA-256: [0-9a-f]{64}",
    r"Total runtime: \d+ min \d\d s",
]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(notebook):
    """All text that the cells printed, in order."""
    return "".join(output.text for cell in code_cells(notebook) for output in cell.outputs
                   if output.output_type == "stream")


def shown(notebook, kind):
    """The data of one MIME type that the cells displayed, in order."""
    return [output.data[kind] for cell in code_cells(notebook) for output in cell.outputs
            if kind in output.get("data", {})]


def check_outputs(notebook):
    """What holds of every complete, executed copy of the notebook."""
    code = code_cells(notebook)
    outputs = [output for cell in code for output in cell.outputs]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    lines = iter(printed(notebook).splitlines())
    for pattern in LINES:  # each after the one before
        assert any(re.fullmatch(pattern, line) for line in lines), f"no line {pattern}"
    assert max(map(len, printed(notebook).splitlines())) <= 100
    assert len(shown(notebook, "image/png")) == 6
    assert all(output.metadata["image/png"]["alt"] for output in outputs
               if "image/png" in output.get("data", {}))
    box, bullets = shown(notebook, "text/markdown")
    assert box.startswith("**Final Val Acc: ") and "Difference: " in box and len(box.split("\n\n")) <= 8
    assert 2 <= len(bullets.splitlines()) <= 6
    raw = json.dumps(notebook)
    assert not [s for s in ("\\r", "\\u001b", "\\u0008", "Warning") if s in raw]
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|usr|work|Users|var)/", raw)


def without_times(cells):
    """What each cell put out, times aside; text that arrived in pieces is put together."""
    outputs = []
    for cell in cells:
        text = "".join(o.text for o in cell.outputs if o.output_type == "stream")
        text += str([o.data for o in cell.outputs if "data" in o])
        text = re.sub(r"\d+ min \d\d s|about \d+ s", "TIME", text)
        outputs.append(re.sub(r"Code cells SHA-256: \w+", "", text))
    return outputs


def again(notebook, code):
    """Every cell twice in a row, and then, from the surgery on, all once more."""
    surgery = next(i for i, cell in enumerate(code) if "replace_relu" in cell.source)
    order = [cell for cell in code for _ in range(2)] + code[surgery:]
    notebook.cells = [nbformat.v4.new_code_cell(cell.source) for cell in order]


def interrupt(call):
    def change(notebook, code):
        code[0].source += f"""
import functools, helpers, signal
interrupt = functools.partial(signal.raise_signal, signal.SIGINT)
evaluate, calls = helpers.evaluate, iter([int] * {call - 1} + [interrupt] + [int] * 9)
helpers.evaluate = lambda *args, **kw: (next(calls)(), evaluate(*args, **kw))[1]"""
    return change


def without_network(notebook, code):
    code[0].source += """
import functools, helpers
helpers.load_cifar10 = functools.partial(helpers.load_cifar10, urls=())"""


OTHER = dict(PRETRAINED=True, EPOCHS=1, PRECISION="bfloat16", IMAGE_SIZE=40, RUN_CONTROL=False,
             ALT_ACTIVATION="GELU", FIRST_REPLACED=1, CLASS_NAMES=["ship", "frog"], VAL_FRACTION=0.4)
RUNS = {  # name: values of parameters, and what else is changed
    "one": ({}, None), "another place": ({}, None), "again": ({"EPOCHS": 1}, again),
    "partial": ({}, interrupt(2)), "partial control": ({}, interrupt(4)),  # of two epochs each
    "trained weights": ({"PRETRAINED": True, "ALT_ACTIVATION": "LeakyReLU"}, None),
    "stand-in": ({"ALLOW_STAND_IN": True, "BATCH_SIZE": 128}, without_network),
    "other": (OTHER, None), "bad": ({"FIRST_REPLACED": 10}, None)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a name to its executed notebook; two run at a time, with a thread each."""
    hub = tmp_path_factory.mktemp("hub")
    (hub / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(models.resnet18(weights=None).state_dict(),
               hub / "hub" / "checkpoints" / "resnet18-f37072fd.pth")

    def run(name):
        folder, (values, change) = tmp_path_factory.mktemp(name), RUNS[name]
        if name != "stand-in":
            write_image_tree(folder / "data", n_train=30, n_test=10)
        for path in (NOTEBOOK, ROOT / "helpers.py"):
            shutil.copy(path, folder)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        code = code_cells(notebook)
        tagged = next(c for c in code if "parameters" in c.metadata.get("tags", []))
        tagged.source += "".join(f"\n{k} = {v!r}" for k, v in {**SMALL, **values}.items())
        if change:
            change(notebook, code)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(hub)}
        if name == "another place":
            env["MPLBACKEND"] = "agg"  # which shows nothing itself
        resources = {"metadata": {"path": str(folder)}}
        return NotebookClient(notebook, timeout=600, resources=resources).execute(env=env)

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, name) for name in RUNS}
        yield lambda name: futures[name].result()


def test_a_headless_run_prints_every_required_line_and_shows_every_picture(runs):
    for name in ("one", "another place"):
        check_outputs(runs(name))
    text = printed(runs("one"))
    assert "Train counts: {0: 27, 1: 27, 2: 27} | Val counts: {0: 3, 1: 3, 2: 3}" in text
    assert "Train batch: images (16, 3, 32, 32), labels (16,)" in text
    assert "not verified" in text and "STAND-IN" not in text and "PARTIAL" not in text


def test_two_headless_runs_in_two_places_are_equal_but_for_times(runs):
    one, another = (without_times(code_cells(runs(name))) for name in ("one", "another place"))
    assert one == another


def test_a_cell_run_again_gives_the_same_output(runs):
    cells, n = runs("again").cells, len(code_cells(runs("one")))
    twice, once_more = cells[:2 * n], cells[2 * n:]
    pairs = list(zip(twice[::2] + twice[-2 * len(once_more)::2], twice[1::2] + once_more))
    assert all(first.source == second.source for first, second in pairs)
    for first, second in pairs[1:]:  # but for the first cell's, which the last one fills in
        assert without_times([first]) == without_times([second]), first.source


def test_an_interrupted_training_still_reports_says_so_everywhere_and_has_its_control(runs):
    text = printed(runs("partial"))
    box, bullets = shown(runs("partial"), "text/markdown")
    for part in (text, box, bullets):
        assert "[PARTIAL: interrupted in epoch 2 of 2]" in part
    assert "(epoch 1)" in text and "Epoch 2/2" not in text
    assert "Difference: " in text and "Difference" in box
    assert "Only 1 of 2 epochs were trained" in bullets


def test_a_pair_is_compared_after_the_last_epoch_that_both_completed(runs):
    text = printed(runs("partial control"))
    assert text.count("Epoch 2/2") == 1 and "PARTIAL" not in text
    assert re.search(r"Test accuracy: SiLU .* \| ReLU control .* \(epoch 1\)", text)
    assert "SiLU as planned, ReLU interrupted in epoch 2 of 2 | compared after epoch 1 of 2" in text


def test_the_stand_in_is_marked_wherever_its_accuracies_are(runs):
    text, (box, bullets) = printed(runs("stand-in")), shown(runs("stand-in"), "text/markdown")
    assert "###" in text and text.count("STAND-IN") == 2  # banner and summary
    assert "[STAND-IN IMAGES]" in box and "STAND-IN" in bullets
    assert all("say nothing of CIFAR-10" in part for part in (text, box, bullets))
    assert "Ceiling" not in text


def test_trained_weights_are_labelled_and_their_first_layers_frozen(runs):
    notebook = runs("trained weights")
    text, (box, _) = printed(notebook), shown(notebook, "text/markdown")
    label = "ImageNet weights (IMAGENET1K_V1, not torchvision's own file)"
    assert text.count(label) == 2 and label in box and "Using resnet18, pretrained=True" in text
    assert "trainable: 11,532,008" in text and "Frozen: conv1, bn1, layer1\n" in text
    assert "Statistics estimated again: ReLU " in text and "1. Starts " in text
    assert "LeakyReLU(negative_slope=0.01)" in text and "LeakyReLU inserted: 3" in text


def test_other_parameters_and_loaded_weights_run_through(runs):
    text = printed(runs("other"))
    for line in (
            "Using resnet18, pretrained=True", "ReLU remaining: 0", "GELU inserted: 9",
            "Frozen: conv1, bn1\n", "New head: in_features=512 → out_features=2",
            "Mapping (class name → new id): {'frog': 0, 'ship': 1}",
            "Train counts: {0: 18, 1: 18} | Val counts: {0: 12, 1: 12}",
            "Train batch: images (16, 3, 40, 40)", "40 px, bfloat16",
            "No control was trained: nothing is compared.", "Statistics as they are: ReLU "):
        assert line in text, line
    assert "Ceiling" not in text and "2. Ends level" not in text
    box, bullets = shown(runs("other"), "text/markdown")
    assert "resnet18 from ImageNet weights" in box and "No control was trained" in box
    assert "ImageNet" not in bullets and "GELU → ReLU " in bullets


def test_a_bad_parameter_stops_at_the_cell_that_checks_it(runs):
    with pytest.raises(CellExecutionError, match="FIRST_REPLACED is 10: it must be"):
        runs("bad")


def test_the_parameters_cell_holds_the_public_interface_and_nothing_else():
    fixed = dict(SEED=1337, MODEL_NAME="resnet18", PRETRAINED=True, ALT_ACTIVATION="SiLU",
                 FIRST_REPLACED=7, CLASS_NAMES=["cat", "dog", "airplane"], VAL_FRACTION=0.1,
                 IMAGE_SIZE=None, BATCH_SIZE=128, EPOCHS=None,
                 DATA_DIR="data", ALLOW_STAND_IN=True, PRECISION="float32", RUN_CONTROL=True,
                 TIME_BUDGET_MINUTES=20)
    assert DEFAULTS == fixed and list(DEFAULTS) == list(fixed)


def test_the_committed_notebook_was_executed_on_the_official_images_by_the_committed_code():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    check_outputs(notebook)
    text = printed(notebook)
    sha256 = hashlib.sha256((ROOT / "helpers.py").read_bytes()).hexdigest()
    assert f"helpers.py SHA-256: {sha256}" in text
    sources = [cell.source for cell in code_cells(notebook)]
    executed = "".join(TransformerManager().transform_cell(s).strip() for s in sources)
    assert f"Code cells SHA-256: {hashlib.sha256(executed.encode()).hexdigest()}" in text
    counts = "Train counts: {0: 4500, 1: 4500, 2: 4500} | Val counts: {0: 500, 1: 500, 2: 500}"
    assert counts in text and not re.search("STAND-IN|PARTIAL", text)
    assert "Data source: official CIFAR-10 batches, MD5 verified" in text
    assert "Using resnet18, pretrained=True" in text and "Precision: float32" in text
    minutes, seconds = re.search(r"Total runtime: (\d+) min (\d\d) s", text).groups()
    assert int(minutes) * 60 + int(seconds) < 20 * 60


def test_the_readme_quotes_the_committed_notebook():
    text = printed(nbformat.read(NOTEBOOK, as_version=4))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = readme.split("## The committed run")[1].split("```")[1].strip().splitlines()
    assert len(quoted) >= 8 and all(line in text.splitlines() for line in quoted)


def test_helpers_can_be_imported_without_a_notebook_around(tmp_path):
    shutil.copy(ROOT / "helpers.py", tmp_path)
    code = "import sys; sys.modules['IPython'] = None; import helpers; print(helpers.MODELS)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "resnet50" in run.stdout, run.stderr
