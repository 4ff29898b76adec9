"""The benchmark: a study's file, its intervals and tables, its picture, the ablation, the probe."""

import csv
import hashlib
import io
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from PIL import Image

import benchmark
import helpers
from benchmark import COLUMNS, CONTRASTS, VARIANTS, Pairs, Variant, find_interval
from conftest import ROOT
from helpers import Difference

STUDIES = ROOT / "tests"


def make_right(n_wrong, first_wrong=0):
    """Right answers for the 3,000 test images, all but some that follow each other."""
    right = np.ones(3000, dtype=bool)
    right[first_wrong:first_wrong + n_wrong] = False
    return right


def make_row(swap, seed, n_wrong=150, first_wrong=0, **changes):
    """A row as the study writes it, with some columns changed."""
    right = make_right(n_wrong, first_wrong)
    row = {
        "swap": swap, "seed": seed, "model": "resnet18", "classes": ["airplane", "cat", "dog"],
        "images": "made up", "weights": "0123456789abcdef", "precision": "float32",
        "batch_size": 128, "epochs": 2, "image_size": 32, "lr": 0.1, "weight_decay": 0.05,
        "label_smoothing": 0.1, "frozen": (), "trainable": 1000, "processor": "made up",
        "threads": 1, "torch": "2.0.1", "torchvision": "0.15.2", "minutes": 0.1,
        "validation": "0.9000 0.9500", "test": f"{right.mean():.4f}",
        "right": benchmark.pack_right(right)}
    return {**row, **changes}


def write_rows(path, rows):
    for row in rows:
        benchmark.append_row(path, row)
    return path


def read_rows(tmp_path, *rows):
    return benchmark.read_study(write_rows(tmp_path / "study.csv", rows))


def assert_refused(tmp_path, rows, sentence):
    with pytest.raises(benchmark.StudyError) as refusal:
        read_rows(tmp_path, *rows)
    assert str(refusal.value) == sentence


# ==== Reading ====================================================================================


def test_a_row_is_read_as_it_was_written(tmp_path):
    written = make_row("SiLU from 7", 3, n_wrong=120)
    (training,) = read_rows(tmp_path, written)
    assert (training.swap, training.seed, training.trainable) == ("SiLU from 7", 3, "1000")
    assert (training.right == make_right(120)).all()
    assert training.row == {name: str(value) for name, value in written.items()}


def test_a_file_without_rows_holds_no_trainings(tmp_path):
    path = tmp_path / "study.csv"
    path.write_text("")
    assert benchmark.read_study(path) == []
    path.write_text(",".join(COLUMNS) + "\n")
    assert benchmark.read_study(path) == []


@pytest.mark.parametrize(
    "name, n_trainings, n_controls", [("pretrained", 63, 17), ("random", 10, 5), ("float32", 8, 4)])
def test_the_committed_studies_are_read_whole(name, n_trainings, n_controls):
    trainings = benchmark.read_study(STUDIES / f"study-{name}.csv")
    pairs = benchmark.pair_up(trainings)
    assert len(trainings) == n_trainings
    assert sum(training.is_control for training in trainings) == n_controls
    assert sum(len(pair.seeds) for pair in pairs.values()) == n_trainings - n_controls
    assert benchmark.list_left_out(trainings, pairs) == []


def test_the_committed_files_have_the_columns_that_a_study_writes():
    for name in ("pretrained", "random", "float32"):
        header = (STUDIES / f"study-{name}.csv").read_text().splitlines()[0]
        assert tuple(header.split(",")) == COLUMNS


def test_a_row_that_is_cut_short_is_refused(tmp_path):
    path = write_rows(tmp_path / "study.csv", [make_row("ReLU from 7", 1), make_row("A from 7", 1)])
    path.write_text(path.read_text()[:-400])
    with pytest.raises(benchmark.StudyError, match=r"^study\.csv, row 2: it is cut short"):
        benchmark.read_study(path)


def test_a_row_that_is_cut_short_before_another_one_is_refused(tmp_path):
    path = write_rows(tmp_path / "study.csv", [make_row("ReLU from 7", 1), make_row("A from 7", 1)])
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, first[:-900], second]) + "\n")
    with pytest.raises(benchmark.StudyError, match=r"^study\.csv, row 1 .*there is no .*right\.$"):
        benchmark.read_study(path)


def test_a_row_with_an_empty_field_is_refused(tmp_path):
    assert_refused(tmp_path, [make_row("ReLU from 7", 1), make_row("SiLU from 7", 1, processor="")],
                   "study.csv, row 2 (SiLU from 7, seed 1): there is no processor.")


def test_a_row_with_a_field_too_many_is_refused(tmp_path):
    path = write_rows(tmp_path / "study.csv", [make_row("SiLU from 7", 1)])
    path.write_text(path.read_text()[:-1] + ",7\n")
    with pytest.raises(benchmark.StudyError, match="row 1 .*: there are more fields than columns"):
        benchmark.read_study(path)


def test_a_file_without_a_column_is_refused(tmp_path):
    path = write_rows(tmp_path / "study.csv", [make_row("SiLU from 7", 1)])
    path.write_text(path.read_text().replace("trainable", "trained"))
    with pytest.raises(benchmark.StudyError, match=r"^study\.csv: there is no column trainable\.$"):
        benchmark.read_study(path)


def test_a_quotation_mark_that_never_closes_is_refused(tmp_path):
    path = write_rows(tmp_path / "study.csv", [make_row("SiLU from 7", 1)])
    path.write_text(path.read_text() + '"' + 200_000 * "a" + "\n")
    with pytest.raises(benchmark.StudyError, match=r"^study\.csv, line \d+: field larger"):
        benchmark.read_study(path)


def test_validation_of_another_number_of_epochs_is_refused(tmp_path):
    assert_refused(tmp_path, [make_row("SiLU from 7", 1, validation="0.9000")],
                   "study.csv, row 1 (SiLU from 7, seed 1): "
                   "validation has 1 accuracies, epochs is 2.")


def test_right_answers_of_the_wrong_length_are_refused(tmp_path):
    too_short = benchmark.pack_right(make_right(150)[:2992])
    assert_refused(tmp_path, [make_row("SiLU from 7", 1, right=too_short)],
                   "study.csv, row 1 (SiLU from 7, seed 1): "
                   "right has 748 hexadecimal digits, not 750.")


def test_right_answers_that_are_no_hexadecimal_digits_are_refused(tmp_path):
    assert_refused(tmp_path, [make_row("SiLU from 7", 1, right="x" * 750)],
                   "study.csv, row 1 (SiLU from 7, seed 1): "
                   "right holds something else than hexadecimal digits.")


def test_right_answers_whose_mean_is_not_the_test_accuracy_are_refused(tmp_path):
    assert_refused(tmp_path, [make_row("SiLU from 7", 1, test="0.9503")],
                   "study.csv, row 1 (SiLU from 7, seed 1): "
                   "test is 0.9503, but by right it is 0.9500.")


@pytest.mark.parametrize("swap", ["SiLU", "from 7", "SiLU from", "SiLU from 7 on"])
def test_a_swap_that_names_no_occurrence_is_refused(tmp_path, swap):
    assert_refused(tmp_path, [make_row(swap, 1)],
                   f'study.csv, row 1 ({swap}, seed 1): swap must be like "SiLU from 7".')


def test_a_swap_and_seed_that_are_there_twice_are_refused(tmp_path):
    assert_refused(tmp_path, [make_row("SiLU from 7", 1), make_row("SiLU from 7", 1, n_wrong=160)],
                   "study.csv, row 2 (SiLU from 7, seed 1): this swap and seed are there twice.")


@pytest.mark.parametrize("column, value", [
    ("model", "resnet34"), ("classes", "['cat', 'dog']"), ("images", "others"),
    ("weights", "random"), ("precision", "bfloat16"), ("batch_size", "64"), ("image_size", "96"),
    ("lr", "0.2"), ("weight_decay", "0.0"), ("label_smoothing", "0.0"), ("frozen", "('conv1',)")])
def test_rows_of_two_studies_in_one_file_are_refused(tmp_path, column, value):
    rows = [make_row("ReLU from 7", 1), make_row("SiLU from 7", 1, **{column: value})]
    assert_refused(tmp_path, rows,
                   f"study.csv, row 2 (SiLU from 7, seed 1): {column} is {value}, "
                   f"but in the first row {rows[0][column]}.")


# ==== Pairs ======================================================================================


def test_a_swap_is_paired_with_relu_of_its_own_seed_and_trainable_parameters(tmp_path):
    trainings = read_rows(
        tmp_path,
        make_row("ReLU from 7", 1, n_wrong=100), make_row("ReLU from 7", 2, n_wrong=200),
        make_row("ReLU from 1", 1, n_wrong=300, trainable=2000),
        make_row("ReLU from 1", 2, n_wrong=400, trainable=2000),
        make_row("SiLU from 1", 2, n_wrong=450, trainable=2000),
        make_row("SiLU from 1", 1, n_wrong=350, trainable=2000),
        make_row("SiLU from 4", 1, n_wrong=110), make_row("SiLU from 4", 2, n_wrong=220))
    pairs = benchmark.pair_up(trainings)
    assert list(pairs) == ["SiLU from 1", "SiLU from 4"]
    assert pairs["SiLU from 1"].seeds == (2, 1)
    assert (~pairs["SiLU from 1"].right).sum(axis=1).tolist() == [450, 350]
    assert (~pairs["SiLU from 1"].relu_right).sum(axis=1).tolist() == [400, 300]
    assert (~pairs["SiLU from 4"].relu_right).sum(axis=1).tolist() == [100, 200]


def test_of_two_like_controls_the_one_with_the_swaps_own_number_counts(tmp_path):
    trainings = read_rows(
        tmp_path, make_row("ReLU from 7", 1), make_row("ReLU from 4", 1), make_row("A from 4", 1))
    assert benchmark.find_control(trainings[2], trainings) is trainings[1]


def test_a_control_from_another_kind_of_processor_does_not_count(tmp_path):
    trainings = read_rows(
        tmp_path, make_row("ReLU from 7", 1, processor="another"), make_row("SiLU from 7", 1))
    assert benchmark.find_control(trainings[1], trainings) is None


def test_only_relu_itself_is_a_control(tmp_path):
    trainings = read_rows(
        tmp_path,
        make_row("ReLU6 from 7", 1), make_row("LeakyReLU from 7", 1),
        make_row("ReLU from 7", 1), make_row("ReLU from 7", 2), make_row("ReLU6 from 7", 2))
    assert [training.is_control for training in trainings] == [False, False, True, True, False]
    assert list(benchmark.pair_up(trainings)) == ["ReLU6 from 7"]


def test_trainings_without_a_control_or_a_second_pair_are_left_out(tmp_path):
    trainings = read_rows(
        tmp_path,
        make_row("ReLU from 7", 1), make_row("ReLU from 7", 2), make_row("GELU from 7", 1),
        make_row("SiLU from 7", 1), make_row("SiLU from 7", 2), make_row("SiLU from 7", 3))
    pairs = benchmark.pair_up(trainings)
    assert {swap: pair.seeds for swap, pair in pairs.items()} == {"SiLU from 7": (1, 2)}
    assert benchmark.list_left_out(trainings, pairs) == [
        "GELU from 7, seed 1", "SiLU from 7, seed 3"]


# ==== Intervals ==================================================================================


def coverage(n_seeds, of_seeds, of_images, of_rest):
    """The share of 400 made-up studies of 300 images whose interval covers the mean, 0."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        gains = (rng.normal(0, of_seeds ** 0.5, (n_seeds, 1))
                 + rng.normal(0, of_images ** 0.5, (1, 300))
                 + rng.normal(0, of_rest ** 0.5, (n_seeds, 300)))
        interval = find_interval(gains)
        covered += interval.low <= 0 <= interval.high
    return covered / 400


@pytest.mark.parametrize("of_seeds, of_images", [(1, 25), (1, 0), (0.2, 50), (5, 10)])
def test_the_interval_covers_the_mean_in_95_of_100_studies(of_seeds, of_images):
    assert 0.92 <= coverage(12, of_seeds, of_images, of_rest=300) <= 0.98


def test_five_seeds_are_enough_for_the_interval():
    assert 0.92 <= coverage(5, of_seeds=1, of_images=25, of_rest=300) <= 0.98


def test_an_interval_over_seeds_alone_covers_the_mean_too_seldom():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        gains = rng.normal(0, 5, (1, 300)) + rng.normal(0, 300 ** 0.5, (12, 300))
        seeds_alone = helpers.paired_difference(gains.mean(axis=1), np.zeros(12))
        covered += seeds_alone.low <= 0 <= seeds_alone.high
    assert covered / 400 < 0.9


def test_where_only_seeds_differ_the_interval_is_students_over_seeds():
    of_seeds = np.array([0.1, 0.2, 0.4, 0.8])
    interval = find_interval(np.tile(of_seeds[:, None], (1, 50)))
    students = helpers.paired_difference(of_seeds, np.zeros(4))
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (students.mean, students.low, students.high))


def test_where_only_images_differ_the_interval_is_students_over_images():
    of_images = np.random.default_rng(0).normal(size=50)
    interval = find_interval(np.tile(of_images, (4, 1)))
    students = helpers.paired_difference(of_images, np.zeros(50))
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (students.mean, students.low, students.high))


def test_without_any_spread_the_interval_is_a_point():
    assert find_interval(np.zeros((3, 10))) == Difference(0, 0, 0)


@pytest.mark.parametrize("low, high, verdict", [
    (-0.009, 0.009, "yes"), (-0.0099, -0.005, "yes"),
    (-0.011, 0.002, "not shown"), (-0.03, 0.03, "not shown"), (-0.01, 0, "not shown"),
    (-0.03, -0.011, "beyond"), (0.011, 0.02, "beyond")])
def test_the_verdict_goes_by_the_whole_interval(low, high, verdict):
    assert benchmark.judge(Difference((low + high) / 2, low, high)) == verdict


def test_points_have_a_sign_and_no_negative_zero():
    assert benchmark.points(Difference(-0.004, -0.007, -0.001)) == "-0.40 ± 0.30"
    assert benchmark.points(Difference(-0.00001, -0.001, 0.00098)) == "+0.00 ± 0.10"
    assert benchmark.points(Difference(0.0123, 0.01, 0.0146), digits=1) == "+1.2 ± 0.2"


# ==== Tables =====================================================================================


def make_pairs(seeds, n_wrong, n_wrong_relu):
    """Pairs in which the swap gets so many images wrong, and ReLU so many of the same."""
    return Pairs(tuple(seeds), np.array([make_right(n) for n in n_wrong]),
                 np.array([make_right(n) for n in n_wrong_relu]))


def test_the_table_has_a_row_for_each_swap():
    table = benchmark.study_table({
        "SiLU from 7": make_pairs([1, 2, 3], [150, 150, 150], [150, 150, 150]),
        "SiLU from 1": make_pairs([1, 2], [450, 450], [150, 150])})
    assert table.splitlines() == [
        "| swap | seeds | accuracy | ReLU's | difference, points | within 1 point |",
        "| --- | --- | --- | --- | --- | --- |",
        "| SiLU from 7 | 3 | 95.00% | 95.00% | +0.00 ± 0.00 | yes |",
        "| SiLU from 1 | 2 | 85.00% | 95.00% | -10.00 ± 1.07 | beyond |"]


def test_a_contrast_is_paired_by_seed_over_the_seeds_of_both():
    silu = make_pairs([1, 2, 3], [160, 170, 180], [150, 150, 150])
    gelu = make_pairs([4, 3, 2], [999, 175, 165], [150, 150, 150])
    n_seeds, difference = benchmark.find_contrast(gelu, silu)
    assert n_seeds == 2
    assert difference == find_interval(gelu.right[1:].astype(float) - silu.right[[2, 1]])
    assert difference.mean == pytest.approx(5 / 3000)


def test_a_contrast_is_of_the_differences_from_each_swaps_own_control():
    from_1 = make_pairs([1, 2], [190, 190], [140, 140])
    from_7 = make_pairs([1, 2], [170, 170], [150, 150])
    _, difference = benchmark.find_contrast(from_1, from_7)
    assert difference.mean == pytest.approx(-30 / 3000)


def test_contrasts_without_two_seeds_in_common_are_left_out():
    pairs = {"SiLU from 7": make_pairs([1, 2, 3], [160, 170, 180], [150, 150, 150]),
             "GELU from 7": make_pairs([2, 3, 4], [160, 165, 175], [150, 150, 150]),
             "SiLU from 1": make_pairs([3, 4], [200, 210], [150, 150])}
    *_, row = benchmark.contrast_table(pairs).splitlines()
    assert len(benchmark.contrast_table(pairs).splitlines()) == 3
    assert row.startswith("| GELU from 7 minus SiLU from 7 | 2 | +0.42 ± ")
    assert benchmark.contrast_table({"SiLU from 7": pairs["SiLU from 7"]}) == ""


def test_every_contrast_is_of_swaps_in_the_committed_study():
    pairs = benchmark.pair_up(benchmark.read_study(STUDIES / "study-pretrained.csv"))
    assert {*sum(CONTRASTS, ())} <= {*pairs}


def test_recall_is_compared_class_by_class():
    labels = np.repeat([0, 1, 2], 1000)
    relu_right = np.ones((2, 3000), dtype=bool)
    right = relu_right.copy()
    right[:, 1000:1100] = False  # a tenth of the cats
    table = benchmark.recall_table({"SiLU from 7": Pairs((1, 2), right, relu_right)}, labels)
    header, _, row = table.splitlines()
    assert header == "| recall minus ReLU's, points | airplane | cat | dog |"
    assert row == "| SiLU from 7 | +0.00 ± 0.00 | -10.00 ± 1.86 | +0.00 ± 0.00 |"


def made_up_rows():
    rows = []
    for seed in (1, 2, 3):
        rows.append(make_row("ReLU from 7", seed, n_wrong=150))
        rows.append(make_row("SiLU from 7", seed, n_wrong=150 + seed))
        rows.append(make_row("GELU from 7", seed, n_wrong=150 - seed))
    return rows


@pytest.fixture
def no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)


def test_the_report_is_the_tables_and_the_picture(no_data, tmp_path, capsys):
    path = write_rows(tmp_path / "study.csv", [*made_up_rows(), make_row("SiLU from 7", 9)])
    benchmark.report_study(path)
    assert capsys.readouterr().out.splitlines() == [
        "10 trainings of resnet18 on ['airplane', 'cat', 'dog']: 2 epochs at 32 px, float32, "
        "weights 01234567, made up; made up.",
        "Left out, for want of a ReLU network or a second pair: SiLU from 7, seed 9.",
        "± is half of a 95% interval over seeds and images.",
        "",
        "| swap | seeds | accuracy | ReLU's | difference, points | within 1 point |",
        "| --- | --- | --- | --- | --- | --- |",
        "| SiLU from 7 | 3 | 94.93% | 95.00% | -0.07 ± 0.09 | yes |",
        "| GELU from 7 | 3 | 95.07% | 95.00% | +0.07 ± 0.09 | yes |",
        "",
        "| contrast of the differences from ReLU | seeds | points |",
        "| --- | --- | --- |",
        "| GELU from 7 minus SiLU from 7 | 3 | +0.13 ± 0.14 |",
        "",
        "Recall is left out: data/ does not hold the study's images."]
    assert (tmp_path / "study.png").exists()


def test_recall_is_reported_where_the_studys_images_are(tmp_path, capsys, monkeypatch):
    labels = np.arange(3000) % 3
    monkeypatch.setattr(benchmark, "load_data", lambda: (None, (None, labels), "made up"))
    path = write_rows(tmp_path / "study.csv", made_up_rows())
    benchmark.report_study(path)
    assert "| recall minus ReLU's, points | airplane | cat | dog |" in capsys.readouterr().out


def test_a_file_without_two_pairs_is_reported_in_a_sentence(tmp_path, capsys):
    path = write_rows(tmp_path / "study.csv", [make_row("ReLU from 7", 1)])
    benchmark.report_study(path)
    assert capsys.readouterr().out == "study.csv: no swap has two pairs yet.\n"
    assert not (tmp_path / "study.png").exists()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_the_command_prints_the_table_whatever_the_encoding(
        no_data, tmp_path, monkeypatch, encoding):
    path = write_rows(tmp_path / "study.csv", made_up_rows())
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--table", str(path)])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
    benchmark.main()
    sys.stdout.flush()
    assert "| -0.07 ± 0.09 | yes |" in printed.getvalue().decode("utf-8")


def test_the_command_refuses_a_damaged_file_in_one_sentence(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "study.csv", [make_row("SiLU from 7", 1, test="0.1")])
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--table", str(path)])
    with pytest.raises(SystemExit) as end:
        benchmark.main()
    assert end.value.code == (
        "study.csv, row 1 (SiLU from 7, seed 1): test is 0.1, but by right it is 0.9500.")


# ==== Picture ====================================================================================


def test_the_picture_holds_each_seed_the_mean_and_its_interval():
    silu = make_pairs([1, 2, 3], [180, 210, 240], [150, 150, 150])
    figure = benchmark.draw_study({"SiLU from 7": silu}, n_relu=9)
    (axis,) = figure.axes
    interval = find_interval(silu.gains)
    (dots,) = [line for line in axis.lines if line.get_label() == "one seed"]
    ((mean, _, (bar,)),) = axis.containers
    assert dots.get_xdata() == pytest.approx([-1, -2, -3])
    assert mean.get_xdata() == pytest.approx([-2])
    assert bar.get_segments()[0][:, 0] == pytest.approx([100 * interval.low, 100 * interval.high])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["SiLU, ReLUs 7–9 (3 seeds)"]
    assert axis.get_xlabel() == "points of test accuracy: fewer than ReLU ← → more"
    assert [text.get_text() for text in axis.get_legend().texts] == [
        "±1 point", "one seed", "mean, 95% interval over seeds and images"]


def test_the_first_swap_stands_at_the_top_and_its_dots_above_its_mean():
    pair = make_pairs([1, 2], [160, 170], [150, 150])
    (axis,) = benchmark.draw_study({"SiLU from 7": pair, "GELU from 7": pair}, n_relu=9).axes
    bottom, top = axis.get_ylim()
    assert bottom > 1 > 0 > top
    dots = [line for line in axis.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [line.get_ydata()[0] for line in dots] == pytest.approx([-0.17, 0.83])


@pytest.mark.parametrize("swap, label", [
    ("SiLU from 7", "SiLU, ReLUs 7–9 (12 seeds)"), ("GELU from 4", "GELU, ReLUs 4–9 (12 seeds)"),
    ("SiLU from 9", "SiLU, ReLU 9 (12 seeds)")])
def test_a_row_is_named_by_the_relus_that_are_replaced(swap, label):
    assert benchmark.label_swap(swap, 12, n_relu=9) == label


def test_the_title_claims_what_the_intervals_allow():
    within, unclear = Difference(0, -0.005, 0.005), Difference(-0.01, -0.02, 0)
    beyond = Difference(-0.03, -0.04, -0.02)
    assert benchmark.title_study({
        "SiLU from 7": within, "GELU from 7": within, "SiLU from 4": within,
        "SiLU from 1": beyond, "GELU from 1": unclear}) == (
        "Within ±1 point of ReLU: SiLU, GELU from the 7th and SiLU from the 4th\n"
        "Beyond: SiLU from the 1st")
    assert benchmark.title_study({"SiLU from 2": unclear}) == (
        "Within ±1 point of ReLU: none shown")


def test_the_picture_is_the_same_whatever_the_users_style(tmp_path):
    path = write_rows(tmp_path / "study.csv", made_up_rows())
    pairs = benchmark.pair_up(benchmark.read_study(path))
    pictures = []
    for style in ({}, {"axes.facecolor": "black", "savefig.dpi": 30, "font.size": 20}):
        with matplotlib.rc_context(style):
            benchmark.save_picture(benchmark.draw_study(pairs, n_relu=9), path)
        pictures.append(path.with_suffix(".png").read_bytes())
    assert pictures[0] == pictures[1]


def sha256_in_picture(csv_path):
    with Image.open(io.BytesIO(csv_path.with_suffix(".png").read_bytes())) as picture:
        return picture.text["Comment"]


def test_the_picture_names_the_file_that_it_was_drawn_from(tmp_path):
    path = write_rows(tmp_path / "study.csv", made_up_rows())
    pairs = benchmark.pair_up(benchmark.read_study(path))
    benchmark.save_picture(benchmark.draw_study(pairs, n_relu=9), path)
    assert sha256_in_picture(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.committed
def test_the_committed_picture_was_drawn_from_the_committed_file():
    path = STUDIES / "study-pretrained.csv"
    assert sha256_in_picture(path) == hashlib.sha256(path.read_bytes()).hexdigest()


# ==== Study, ablation, probe =====================================================================


@pytest.fixture
def tiny_study(tiny_net, labelled_images, monkeypatch):
    """Makes ``study`` train a tiny network for one epoch on 90 images of three classes."""
    monkeypatch.setattr(benchmark, "make_network", lambda *args: tiny_net)
    monkeypatch.setattr(helpers, "build_model", lambda name, pretrained: (None, "random", ""))
    monkeypatch.setitem(helpers.RECIPES, "random", helpers.Recipe(1, 32, lr=0.01))
    monkeypatch.setattr(benchmark, "N_TEST_IMAGES", 90)
    monkeypatch.setattr(benchmark, "load_data", lambda: (None, labelled_images, "elsewhere"))

    def run(path, seeds, precision="float32"):
        benchmark.study(path, labelled_images, labelled_images, "made up", start="random",
                        precision=precision, seeds=seeds, activations=["ReLU", "SiLU"], first=1)

    return run


def test_a_study_goes_on_where_it_stopped(tiny_study, tmp_path, capsys):
    path = tmp_path / "study.csv"
    tiny_study(path, seeds=[1])
    before = path.read_text()
    tiny_study(path, seeds=[1, 2])
    assert path.read_text().startswith(before)
    trainings = benchmark.read_study(path)
    assert [(training.swap, training.seed) for training in trainings] == [
        ("ReLU from 1", 1), ("SiLU from 1", 1), ("ReLU from 1", 2), ("SiLU from 1", 2)]
    assert "| SiLU from 1 | 2 |" in capsys.readouterr().out


def test_a_training_that_fails_leaves_no_row(tiny_study, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise FloatingPointError("the loss is not finite")

    path = tmp_path / "study.csv"
    monkeypatch.setattr(helpers, "train_one_epoch", fail)
    with pytest.raises(FloatingPointError):
        tiny_study(path, seeds=[1])
    assert not path.exists()


def test_a_study_does_not_go_on_in_the_file_of_another_one(tiny_study, tmp_path):
    all_right = benchmark.pack_right(np.ones(90, dtype=bool))
    other = make_row("ReLU from 1", 1, right=all_right, test="1.0000")
    path = write_rows(tmp_path / "study.csv", [other])
    before = path.read_text()
    with pytest.raises(benchmark.StudyError, match=r"^study\.csv: weights is .*; use another file"):
        tiny_study(path, seeds=[2])
    assert path.read_text() == before


def test_a_study_in_no_folder_is_refused_before_any_training(tiny_study, tmp_path):
    with pytest.raises(benchmark.StudyError, match="nowhere is not a folder"):
        tiny_study(tmp_path / "nowhere" / "study.csv", seeds=[1])


@pytest.mark.parametrize("start", list(VARIANTS))
def test_every_variant_differs_from_the_recipe(start):
    recipe = helpers.RECIPES[start]
    for name, variant in VARIANTS[start].items():
        is_same_recipe = replace(recipe, **variant.changes) == recipe
        is_same_otherwise = replace(variant, changes={}) == Variant()
        assert not (is_same_recipe and is_same_otherwise), name


@pytest.mark.parametrize("start", list(VARIANTS))
def test_a_variant_that_names_its_epochs_and_size_has_them(start):
    for name, variant in VARIANTS[start].items():
        recipe = replace(helpers.RECIPES[start], **variant.changes)
        if "epochs" in name:
            assert f"{recipe.epochs} epochs" in name
        if "px" in name:
            assert f"{recipe.image_size} px" in name


def test_another_augmentation_takes_the_place_of_crop_and_flip(loaders):
    train_loader, _ = loaders
    before = list(train_loader.dataset.transform.transforms)
    benchmark.set_augmentation(train_loader, [benchmark.FLIP])
    assert train_loader.dataset.transform.transforms == [benchmark.FLIP, *before[2:]]


def test_an_ablations_row_has_the_interval_over_images():
    right, right_of_recipe = make_right(180), make_right(150)
    interval = helpers.paired_difference(right, right_of_recipe)
    half_width = 100 * (interval.high - interval.mean)
    assert benchmark.ablation_row("batch 64", 90, right, right_of_recipe) == (
        f"| batch 64 | 1.5 | 94.00% | -1.00 ± {half_width:.2f} |")
    assert benchmark.ablation_row("recipe", 60, right, None) == "| recipe | 1.0 | 94.00% |  |"


def test_the_probes_table_compares_with_relu_of_the_same_norms():
    table = benchmark.probe_table({
        "ReLU from 7": [(0.88, 0.86), (0.86, 0.84)], "SiLU from 7": [(0.84, 0.87), (0.82, 0.85)],
        "ReLU from 1": [(0.88, 0.80), (0.86, 0.78)], "SiLU from 1": [(0.78, 0.81), (0.76, 0.79)]})
    assert table.splitlines()[2:] == [
        "| ReLU, estimated again as from 7 | 87.0% |  | 85.0% |  |",
        "| SiLU from 7 | 83.0% | -4.0 ± 0.0 | 86.0% | +1.0 ± 0.0 |",
        "| ReLU, estimated again as from 1 | 87.0% |  | 79.0% |  |",
        "| SiLU from 1 | 77.0% | -10.0 ± 0.0 | 80.0% | +1.0 ± 0.0 |"]
