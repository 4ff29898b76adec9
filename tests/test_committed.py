"""With --committed: what is committed, held to each other and to helpers.py.

The notebook's outputs are those of its cells and of helpers.py, and every number that a person
wrote down stands in an output or in a file of evidence.
"""

import contextlib
import hashlib
import inspect
import io
import re

import nbformat
import pytest

import helpers
from benchmark import contrast_table, pair_up, read_study, study_table
from conftest import ROOT
from execute_notebook import find_notebook, hash_code_cells
from test_notebook import LINES, check_form, check_lines, printed_text, result_box

pytestmark = pytest.mark.committed

EXECUTE = "run: python tests/execute_notebook.py"
# A number as a whole, with its unit if that is % or points; not a digit within a name or version.
NUMBER = re.compile(r"(?<![\w.,])(\d[\d,]*(?:\.\d+)?)(?![\w]|[.,]\d)(%| points)?")


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(find_notebook(), as_version=4)


def numbers_in(text):
    """The numbers of a text with their units, signs aside: a loss of 0.7 points is -0.7 points."""
    text = text.replace("\u00a0", " ")
    return {value + unit for value, unit in NUMBER.findall(text)}


def output_text(cell):
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    return "\n".join(parts)


def missing_numbers(text, evidence):
    """The numbers of a text that the evidence lacks; one without a unit may have one there."""
    found = numbers_in(evidence)
    bare = {re.match(r"[\d.,]+", number).group() for number in found}
    return [number for number in sorted(numbers_in(text))
            if number not in found and number not in bare]


def written_lines(notebook):
    """(cell's index, line, the outputs that it speaks of) of what a person wrote of this run.

    A paragraph that begins with "**Committed run" speaks of the outputs between the markdown cell
    before it and itself; a bullet below one, of the sections that it names, such as (3.1). Either
    speaks of the file tests/results.md, too, if it names that.
    """
    section, outputs_of = "", {}
    lines = []
    since_markdown = ""
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            outputs_of[section] = outputs_of.get(section, "") + output_text(cell) + "\n"
            since_markdown += output_text(cell) + "\n"
            continue
        for block in re.split(r"\n\n|\n(?=- )", cell.source):
            heading = re.match(r"#+ (\d(?:\.\d)?)", block)
            if heading:
                section = heading.group(1)
                continue
            if block.startswith("**Committed run"):
                evidence = since_markdown
            elif block.startswith("- ") and "**Committed run" in cell.source:
                named = re.findall(r"\((\d(?:\.\d)?)\)", block)
                evidence = "\n".join(outputs_of.get(name, "") for name in named)
                block = re.sub(r"\(\d(?:\.\d)?\)", "", block)
            else:
                continue
            if "tests/results.md" in block:
                evidence += (ROOT / "tests" / "results.md").read_text(encoding="utf-8")
            lines.append((i, block, evidence))
        since_markdown = ""
    return lines


def test_the_notebook_was_executed_top_to_bottom_by_this_code(notebook):
    nbformat.validate(notebook)
    check_form(notebook)
    sha256 = hashlib.sha256((ROOT / "helpers.py").read_bytes()).hexdigest()
    assert f"helpers.py SHA-256: {sha256}" in printed_text(notebook), (
        f"the outputs are those of another helpers.py; {EXECUTE}")
    assert notebook.metadata.get("code_sha256") == hash_code_cells(notebook), (
        f"the outputs are those of other cells; {EXECUTE}")


def test_it_was_run_whole_on_the_official_images_with_both_networks(notebook):
    text = printed_text(notebook)
    check_lines(text, LINES)
    assert "Train counts: {0: 4500, 1: 4500, 2: 4500} | Val counts: {0: 500," in text
    assert "Precision: float32" in text and "STAND-IN" not in text
    minutes = int(re.search(r"Total runtime: (\d+) min", text).group(1))
    assert minutes < 18  # of 20: room to spare


def test_every_number_that_a_person_wrote_in_the_notebook_is_in_an_output(notebook):
    lines = written_lines(notebook)
    assert len(lines) >= 8
    stale = [f"cell {i}: {', '.join(missing)} in: {line}" for i, line, evidence in lines
             if (missing := missing_numbers(line, evidence))]
    assert not stale, "stale lines, to be rewritten:\n" + "\n".join(stale)


def test_a_changed_digit_or_unit_would_be_found():
    assert missing_numbers("93.7%, 0.70 points, 1,500", "93.7% -0.70 points of 1,500 images") == []
    for text in ("93.6%", "93.7 points", "0.71 points", "1,501", "3.7%", "9 of"):
        assert missing_numbers(text, "93.7% -0.70 points of 1,500 images"), text


def test_the_notebook_fits_a_reader_of_ten_minutes_and_a_page(notebook):
    markdown = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    words = [len(source.split()) for source in markdown]
    assert len(notebook.cells) <= 50 and sum(words) <= 850 and max(words) <= 130
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert max(map(len, cell.source.splitlines())) <= 88
            assert len(cell.source.splitlines()) <= 17
    assert find_notebook().stat().st_size < 600_000


def test_the_readme_quotes_the_notebook_and_the_evidence(notebook):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    results = (ROOT / "tests" / "results.md").read_text(encoding="utf-8")
    quoted = re.search(r"prints[^`]*```\n(.*?)```", readme, re.DOTALL).group(1).splitlines()
    assert len(quoted) >= 5
    lines = printed_text(notebook).splitlines()
    assert [line for line in quoted if line not in lines] == []
    top = readme.split("## Run it")[0]
    evidence = results + printed_text(notebook) + result_box(notebook)
    assert missing_numbers(top, evidence) == []


def test_the_tables_of_results_are_those_that_the_files_give():
    results = (ROOT / "tests" / "results.md").read_text(encoding="utf-8")
    for name in ("study-pretrained.csv", "study-random.csv", "study-float32.csv"):
        pairs = pair_up(read_study(ROOT / "tests" / name))
        assert study_table(pairs) in results, name
        assert contrast_table(pairs) in results, name


def test_what_the_readme_names_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", readme):
        assert (ROOT / target).exists(), target
    assert len(readme.splitlines()) <= 135


def test_no_output_names_a_folder_of_the_machine_that_ran_it(notebook):
    text = "\n".join(output_text(cell) for cell in notebook.cells) + result_box(notebook)
    assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|Users)/", text)


def test_the_readmes_example_prints_what_the_readme_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```\s+prints `(.*?)`", readme, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(example.group(1), {})
    assert printed.getvalue().strip() == example.group(2)


@pytest.mark.parametrize("names", [
    "replace_relu find_modules place_modules",
    "fit with_progress train_one_epoch evaluate predict compute_logits make_optimizer EpochMetrics "
    "Recipe live_line in_notebook",
    "estimate_statistics norms_behind find_modules compute_logits"])
def test_the_readme_counts_the_lines_to_copy(names):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    n_lines = sum(len(inspect.getsource(getattr(helpers, name)).splitlines())
                  for name in names.split())
    assert f"({n_lines} lines)" in readme
