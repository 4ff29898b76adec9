"""Execute the notebook in place, to be committed: python tests/execute_notebook.py

As ``jupyter nbconvert --execute --inplace`` does; besides, text that arrived in pieces is put
together, and the hash of the code cells is noted, so that ``python -m pytest --committed`` can tell
whether the outputs are theirs. The file is written only once every cell has run.
"""

import hashlib
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent


def find_notebook() -> Path:
    """The one notebook of the project, whatever the candidate's name in it."""
    found = sorted(ROOT.glob("ML_Assessment_*.ipynb"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{len(found)} files ML_Assessment_*.ipynb in the project: keep one.")
    return found[0]


def hash_code_cells(notebook) -> str:
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\n".join(sources).encode()).hexdigest()


def main():
    path = find_notebook()
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, coalesce_streams=True,
        resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    notebook.metadata["code_sha256"] = hash_code_cells(notebook)
    written = path.with_suffix(".partial")
    nbformat.write(notebook, written)
    os.replace(written, path)


if __name__ == "__main__":
    main()
