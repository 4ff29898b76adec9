"""The study's table, on made-up trainings and as the README shows it."""

import csv
import json
from argparse import Namespace

import numpy as np
import pytest
import torch

import benchmark
from conftest import ROOT


def test_the_studys_table_is_each_arms_mean_and_students_interval_of_the_paired_differences():
    right = {"ReLU": [2640, 2670, 2610], "SiLU": [2670, 2680, 2650], "GELU": [2700]}
    rows = [dict(weights="random", activation=name, first="" if name == "ReLU" else "7",
                 seed=str(seed), right=str(n), test_images="3000")
            for name, values in right.items() for seed, n in enumerate(values)]
    points = np.array([30, 10, 40]) / 30  # the three differences of SiLU to ReLU
    half = 4.3027 * points.std(ddof=1) / 3**0.5  # t quantile of 2 degrees of freedom
    low, high = points.mean() - half, points.mean() + half
    assert benchmark.study_table(rows)[2:] == [
        "| random | ReLU |  | 3 | 88.00% |  |",
        f"| random | SiLU | 7 | 3 | 88.89% | +0.89 ({low:+.2f} to {high:+.2f}) |",
        "| random | GELU | 7 | 1 | 90.00% | +2.00 |"]
    assert benchmark.study_conclusion(rows) == [
        "From random weights: SiLU (7) not told apart from ReLU."]
    for change, verdict in ((50, "better"), (-150, "worse")):
        for row in rows[3:6]:
            row["right"] = str(int(row["right"]) + change)
        assert benchmark.study_conclusion(rows) == [
            f"From random weights: SiLU (7) {verdict} than ReLU."]
    assert benchmark.study_parts(rows) == [rows]
    deeper = {**rows[4], "first": "1"}  # SiLU, of seed 1
    assert benchmark.study_parts([*rows, deeper]) == [rows, [rows[1], rows[4], deeper]]


def test_a_study_of_another_precision_is_refused_before_it_trains(tmp_path):
    (tmp_path / "study.csv").write_text(
        'weights,recipe,test_images,precision\nrandom,"r, 64 px, batch 128",2,float32\n')
    args = Namespace(study=tmp_path / "study.csv", pretrained=False, image_size=64, batch_size=128)
    with pytest.raises(SystemExit, match="has precision float32, not bfloat16: give another"):
        benchmark.study(None, ([], [0, 1]), "r", args, torch.bfloat16)


def committed_study():
    with (ROOT / "tests" / "study.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_readme_shows_the_committed_studys_table_and_conclusion():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {row["precision"] for row in committed_study()} == {"bfloat16"}  # as the README says
    hours = sum(int(row["seconds"]) for row in committed_study()) / 3600
    assert f"\n{hours:.1f} hours of training in bfloat16" in readme
    where = {(row["weights"], row["activation"], row["first"], row["seed"]):
             row["processor"].split(";")[0] for row in committed_study()}
    apart = [where[weights, "ReLU", "", seed] != processor
             for (weights, name, _, seed), processor in where.items() if name != "ReLU"]
    assert f"; {sum(apart)} of the {len(apart)} differences are between" in readme
    for part in benchmark.study_parts(committed_study()):
        assert "\n".join(benchmark.study_table(part)) in readme
        for sentence in benchmark.study_conclusion(part):
            assert sentence in readme


def test_the_committed_notebook_says_what_the_committed_study_does():
    _, paired, (low, high) = benchmark.study_arms(committed_study())["random", "SiLU", "7"]
    said = (f"SiLU minus ReLU {np.mean(paired):+.2f} points (95% CI {low:+.2f} to {high:+.2f})",
            f"Separate runs, {len(paired)} seeds, ")
    notebook = json.loads((ROOT / "ML_Assessment_Candidate.ipynb").read_text(encoding="utf-8"))
    box = "".join(notebook["cells"][1]["outputs"][0]["data"]["text/markdown"])
    assert all(text in box for text in said)
