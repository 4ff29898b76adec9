"""The notebook: run headless on a few small images, and as it is committed."""

import csv
import hashlib
import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from torchvision import models

import helpers
from benchmark import study_table
from conftest import DEFAULTS, ROOT, write_image_tree, write_study

NOTEBOOK = ROOT / "ML_Assessment_Candidate.ipynb"
SHA256 = hashlib.sha256((ROOT / "helpers.py").read_bytes()).hexdigest()
SMALL = dict(PRETRAINED=False, EPOCHS=2, IMAGE_SIZE=32, BATCH_SIZE=16, ALLOW_STAND_IN=False)

# Every literal line of the interface, in its order; # is a number, … any text.
LINES = [
    "Python # | torch # | torchvision # | device: …",
    "Seed: 1337 | cudnn.deterministic=True | cudnn.benchmark=False", "Using resnet18, pretrained=…",
    "Parameters: # | trainable: #", "Total nn.ReLU before replacement: 9",
    "Replacing activations at indices (1-based): [7, 8, 9] with nn.SiLU",
    "   7  layer3.1.relu   ReLU(inplace=True)  →  SiLU()", "ReLU remaining: 6", "SiLU inserted: 3",
    "Old head: in_features=512 → out_features=1000", "New head: in_features=512 → out_features=3",
    "Target classes: 3", "Trainable now: #", "Data source: …",
    "Selected classes: ['cat', 'dog', 'airplane']", "Mapping (original id → new id): {0: 0, 3: …",
    "Mapping (class name → new id): {'airplane': 0, 'cat': 1, 'dog': 2}",
    "Train counts: {0: #, 1: #, 2: #} | Val counts: {0: #, 1: #, 2: #}", "Train transform: …",
    "Val transform: …", "    Resize…", "Train batch: images (#, 3, #, #), labels (#,)",
    "Val batch: images (#, 3, #, #), labels (#,)", "  7  layer3.1.relu … # px … #% … #%  replaced",
    "Predicted: the swapped network starts … and ends within 1 point of the control.",
    "First loss: #; guessing gives ln 3 = 1.099", "One batch of # learnt by heart: #% … loss #",
    "Floor: chance …", "Epochs: # of # for …",
    "Epoch 1/# | Train Loss: # | Train Acc: #% | Val Loss: # | Val Acc: #%",
    "Best Val Acc: #% (epoch #)", "Final Val Acc: #%", "Test Acc: #% (95% CI #–#)",
    "SiLU minus ReLU in epoch 1: … points at first; …", "Test accuracy after epoch #, ReLU: #%",
    "Difference: # points (95% CI # to #)", "Exact McNemar p: #…", "Reproducibility summary",
    "Seed: 1337", f"helpers.py SHA-256: {SHA256}", "Total runtime: # min # s"]


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(notebook):
    """All text that the cells printed, and the box and the bullets that they displayed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    displayed = [o.data["text/markdown"] for o in outputs if "text/markdown" in o.get("data", {})]
    return ("".join(o.get("text", "") for o in outputs), *displayed)


def check_outputs(notebook):
    """What holds of every complete, executed copy of the notebook."""
    code, (text, box, bullets) = code_cells(notebook), texts(notebook)
    outputs, lines = [o for cell in code for o in cell.outputs], text.splitlines()
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert max(map(len, lines)) <= 100 and 2 <= len(bullets.splitlines()) <= 6
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    rest = iter(lines)
    for line in LINES:  # each after the one before
        pattern = re.escape(line).replace("\\#", r"[+-]?\d[\d.,]*").replace("…", ".+")
        assert any(map(re.compile(pattern).fullmatch, rest)), f"no line {line}"
    pictures = [output.metadata for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 7 and all(metadata["image/png"]["alt"] for metadata in pictures)
    assert "**Final Val Acc: " in box and " minus ReLU is " in box and box.count("\n") <= 14
    assert "seeds (separate runs" in text and box.startswith("Over ")
    assert bullets.startswith("- **Effect of the swap.** Over ")
    unwanted = r"\\(r|u001b|u0008)|Warning|(?<![\w.:/])/(home|root|tmp|usr|work|Users|var)/"
    assert not re.search(unwanted, json.dumps(notebook))
    return text


def without_times(cell):
    """What a cell put out, times aside; text that arrived in pieces is put together."""
    text = "".join(o.get("text", "") for o in cell.outputs)
    text += str([o.data for o in cell.outputs if "data" in o])
    return re.sub(r"\d+ min \d\d s|about \d+ s|Code cells SHA-256: \w+", "", text)


INTERRUPT = """
import functools, helpers, signal
interrupt = functools.partial(signal.raise_signal, signal.SIGINT)
evaluate, calls = helpers.evaluate, iter([int] * {} + [interrupt])  # 7 calls a training
helpers.evaluate = lambda *args, **kw: (next(calls, int)(), evaluate(*args, **kw))[1]"""
NO_NETWORK = "\nimport helpers\nhelpers.DOWNLOAD_LIMIT = 0"  # seconds
BACKEND = "\nimport os\nos.environ['MPLBACKEND'] = 'agg'"  # which shows nothing itself
RUNS = {  # name: values of parameters, and what is added to the first cell
    "again": ({"EPOCHS": 1}, ""), "partial": ({}, INTERRUPT.format(6)),  # the longest first
    "stand-in": ({"ALLOW_STAND_IN": True, "BATCH_SIZE": 128, "EPOCHS": 1}, NO_NETWORK),
    "one": ({}, ""), "another place": ({}, BACKEND), "bad": ({"FIRST_REPLACED": 10}, ""),
    "trained": ({"PRETRAINED": True, "ALT_ACTIVATION": "LeakyReLU"}, INTERRUPT.format(13)),
    "other": (dict(PRETRAINED=True, EPOCHS=1, PRECISION="bfloat16", IMAGE_SIZE=40, VAL_FRACTION=0.4,
                   ALT_ACTIVATION="GELU", FIRST_REPLACED=1, CLASS_NAMES=["ship", "frog"],
                   RUN_CONTROL=False), "")}
IMAGES = "image folders 'cifar10-images', not verified against the official MD5"
STUDY = helpers.pick_recipe("random", 2, 32), [
    (f"{swap} from 7", seed, 9, 0.5, 0.6, 0.9 + (seed * factor % 5) / 1e3)
    for swap, factor in (("SiLU", 1), ("ReLU", 3), ("GELU", 7)) for seed in range(4)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from a name to its executed notebook; two run at a time, with a thread each."""
    path = tmp_path_factory.mktemp("home") / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    path.parent.mkdir(parents=True)
    torch.save(models.resnet18(weights=None).state_dict(), path)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_HOME": str(path.parents[2])}

    def run(name):
        folder, (values, added) = tmp_path_factory.mktemp(name), RUNS[name]
        if name != "stand-in":
            write_image_tree(folder / "data", n_train=30, n_test=10)
        (folder / "tests").mkdir()
        write_study(folder / "tests" / "study-random.csv", *STUDY, weights="random", batch_size=16,
                    model="resnet18", classes=["airplane", "cat", "dog"], images=IMAGES,
                    precision="bfloat16")
        shutil.copy(ROOT / "helpers.py", folder)
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        notebook.cells = code = code_cells(notebook)
        code[0].source += f"{added}\nimport helpers\nhelpers.overfit_one_batch.__defaults__ = (2,)"
        tagged = next(c for c in code if "parameters" in c.metadata.get("tags", []))
        tagged.source += "".join(f"\n{k} = {v!r}" for k, v in {**SMALL, **values}.items())
        if name == "again":  # every cell twice in a row, and then, from the surgery on, once more
            surgery = next(i for i, cell in enumerate(code) if "replace_relu" in cell.source)
            order = [cell for cell in code for _ in range(2)] + code[surgery:]
            notebook.cells = [nbformat.v4.new_code_cell(cell.source) for cell in order]
        resources = {"metadata": {"path": str(folder)}}
        return NotebookClient(notebook, timeout=600, resources=resources).execute(env=env)

    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(run, name) for name in RUNS}
        yield lambda name: futures[name].result()


def test_headless_runs_show_all_that_is_required_and_are_equal_but_for_times(runs):
    one, another = runs("one"), runs("another place")
    text = check_outputs(one)
    assert [*map(without_times, one.cells)] == [*map(without_times, another.cells)]
    assert "Train counts: {0: 27, 1: 27, 2: 27} | Val counts: {0: 3, 1: 3, 2: 3}" in text
    assert "Train batch: images (16, 3, 32, 32), labels (16,)" in text
    assert "not verified" in text and not re.search("STAND-IN|PARTIAL", text)


def test_a_cell_run_again_gives_the_same_output(runs):
    cells, n = runs("again").cells, len(runs("one").cells)
    twice, once_more = cells[:2 * n], cells[2 * n:]
    pairs = list(zip(twice[::2] + twice[-2 * len(once_more)::2], twice[1::2] + once_more))
    for first, second in pairs[1:]:  # but for the first cell's, which the last one fills in
        assert (first.source, without_times(first)) == (second.source, without_times(second))


def test_an_interrupted_training_still_reports_says_so_everywhere_and_has_its_control(runs):
    text, box, bullets = texts(runs("partial"))
    assert all("[PARTIAL: interrupted after epoch 1 of 2]" in part for part in (text, box, bullets))
    assert "(epoch 1)" in text and "Epoch 2/2" not in text
    assert "Difference: " in text and " minus ReLU is " in box and "1 of 2 epochs: " in bullets


def test_the_stand_in_is_marked_wherever_its_accuracies_are(runs):
    text, box, bullets = texts(runs("stand-in"))
    assert "###" in text and text.count("STAND-IN") == 2  # banner and summary
    assert all("[STAND-IN IMAGES]" in part for part in (box, bullets))
    assert all("say nothing of CIFAR-10" in part for part in (text, box))


@pytest.mark.parametrize("name, lines", [
    ("trained", [
        "Frozen: conv1, bn1, layer1", "LeakyReLU(negative_slope=0.01)", "LeakyReLU inserted: 3",
        "trainable: 11,532,008", "now: 11,020,547", "1. Starts ", "estimated again: ",
        "LeakyReLU as planned, ReLU interrupted after epoch 1 of 2 | compared after epoch 1 of 2"]),
    ("other", [
        "Frozen: conv1, bn1\n", "GELU inserted: 9", "out_features=2", "{'frog': 0, 'ship': 1}",
        "Train counts: {0: 18, 1: 18} | Val counts: {0: 12, 1: 12}", "(16, 3, 40, 40)",
        "ReLU remaining: 0", "GELU → ReLU ", "bfloat16: ", "No control was", "No study of"])])
def test_trained_weights_other_parameters_and_an_interrupted_control_are_told(runs, name, lines):
    text, box, _ = texts(runs(name))
    label = "a file in place of ImageNet weights (IMAGENET1K_V1), not torchvision's own file, "
    assert not [line for line in ["Using resnet18, pretrained=True", *lines] if line not in text]
    assert text.replace("\n", " ").count(label) == 2 and f"resnet18 from {label}" in box
    assert name == "trained" or not re.search("2[.] Ends level|minus ReLU", text + box)


def test_the_parameters_cell_is_the_public_interface_and_a_bad_value_stops_the_run(runs):
    fixed = dict(SEED=1337, MODEL_NAME="resnet18", PRETRAINED=True, ALT_ACTIVATION="SiLU",
                 FIRST_REPLACED=7, CLASS_NAMES=["cat", "dog", "airplane"], VAL_FRACTION=0.1,
                 IMAGE_SIZE=None, BATCH_SIZE=128, EPOCHS=None, DATA_DIR="data",
                 ALLOW_STAND_IN=True, PRECISION="float32", RUN_CONTROL=True, TIME_BUDGET_MINUTES=20)
    assert DEFAULTS == fixed and list(DEFAULTS) == list(fixed)
    with pytest.raises(CellExecutionError, match="FIRST_REPLACED is 10: it must be"):
        runs("bad")


def test_the_committed_notebook_was_executed_on_the_official_images_by_the_committed_code():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    text, transform = check_outputs(notebook), TransformerManager().transform_cell
    executed = "".join(transform(cell.source).strip() for cell in code_cells(notebook))
    for line in (
            f"Code cells SHA-256: {hashlib.sha256(executed.encode()).hexdigest()}",
            "Train counts: {0: 4500, 1: 4500, 2: 4500} | Val counts: {0: 500, 1: 500, 2: 500}",
            "Data source: official CIFAR-10 batches, MD5 verified",
            "Using resnet18, pretrained=True", "Precision: float32"):
        assert line in text, line
    assert re.search(r"Total runtime: 1?\d min", text) and not re.search("STAND-IN|PARTIAL", text)


def test_the_readme_quotes_the_committed_notebook_and_the_study():
    text, *_ = texts(nbformat.read(NOTEBOOK, as_version=4))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    quoted = readme.split("## The committed run")[1].split("```")[1].strip().splitlines()
    assert len(quoted) >= 8 and all(line in text.splitlines() for line in quoted)
    for start, n_pairs in (("pretrained", 46), ("random", 5)):
        path = ROOT / "tests" / f"study-{start}.csv"
        study = helpers.read_study(path, helpers.RECIPES[start])
        assert sum(len(own) for own, _ in study.values()) == n_pairs
        assert study_table(study, 3000) in readme
        drawn_from = Image.open(path.with_suffix(".png")).text["Comment"]
        assert drawn_from == helpers.hash_file(path, "sha256")
        for row in csv.DictReader(path.read_text().splitlines()):
            right = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), dtype=np.uint8))
            assert len(right) == 3000 and f"{right.mean():.4f}" == row["test"]
