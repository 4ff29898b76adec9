"""The study's table, on made-up trainings and as the README shows it."""

import csv

import numpy as np

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


def test_the_readme_shows_the_committed_studys_table():
    with (ROOT / "tests" / "study.csv").open(newline="") as file:
        table = benchmark.study_table(list(csv.DictReader(file)))
    assert "\n".join(table) in (ROOT / "README.md").read_text(encoding="utf-8")
