#!/usr/bin/env python3
"""Makes the notebooks of this folder from their sources, and runs them.

    python docs/notebooks/run.py [NAME...]

A source is a Python file whose cells begin with `# %%` (code) or `# %% [markdown]`; the notebook beside it has the outputs of
the last run. Needs nbclient, nbformat and ipykernel, and what the cells import: the wheel, PyTorch, transformers. A cell that
raises fails the run.
"""

import pathlib
import sys

import nbformat
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).resolve().parent


def cells(text):
    """The cells of a source, in order."""
    kind, lines = None, []
    for line in [*text.splitlines(), "# %%"]:
        if line.startswith("# %%"):
            body = "\n".join(lines).strip("\n")
            if kind == "markdown" and body:
                yield nbformat.v4.new_markdown_cell("\n".join(part.removeprefix("#").removeprefix(" ") for part in body.splitlines()))
            elif kind == "code" and body:
                yield nbformat.v4.new_code_cell(body)
            kind, lines = ("markdown" if "[markdown]" in line else "code"), []
        else:
            lines.append(line)


def main() -> None:
    names = sys.argv[1:] or sorted(p.stem for p in HERE.glob("*.py") if p.name != "run.py")
    for name in names:
        book = nbformat.v4.new_notebook(cells=list(cells((HERE / f"{name}.py").read_text())))
        for number, cell in enumerate(book.cells):
            cell.id = f"cell-{number}"
        book.metadata["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
        NotebookClient(book, timeout=600, resources={"metadata": {"path": str(HERE)}}).execute()
        for cell in book.cells:
            cell.metadata = {}
            # Warnings of libraries name paths of the machine.
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
        nbformat.validate(book)
        (HERE / f"{name}.ipynb").write_text(nbformat.writes(book) + "\n")
        print(f"{name}.ipynb: {len(book.cells)} cells")


if __name__ == "__main__":
    main()
