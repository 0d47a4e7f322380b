"""The Python code of the README and of the book's pages about PyTorch, as it stands there: each page's blocks run in order, in one namespace.

Lines that name what this machine lacks (a GPU, Triton) are left out; what they say is tested elsewhere. A page's blocks may use the
names of `given`.
"""

import logging
import os
import pathlib
import re
import tempfile

from torch_models import ROOT, backend, run_all, tilewright, torch

# What the wheel's entry point does.
if "tilewright" not in torch._dynamo.list_backends():
    torch._dynamo.register_backend(backend.tilewright_backend, name="tilewright")

BOOK = ROOT / "docs" / "src"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Small(torch.nn.Module):
    """What the pages call `model`."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def given(folder: pathlib.Path) -> dict:
    torch.manual_seed(0)
    names = {"torch": torch, "tilewright": tilewright, "model": Small().eval(), "inputs": (torch.randn(4, 32),)}
    (folder / "model.onnx").symlink_to(ROOT / "demo" / "digits" / "digits.onnx")
    x, r, gate, up, weight = (torch.randn(n, 32) if n else torch.ones(32) for n in (4, 4, 4, 4, 0))
    return {**names, "x": x, "r": r, "gate": gate, "up": up, "weight": weight, "logits": torch.randn(6, 50), "targets": torch.arange(6)}


def runs_here(line: str) -> bool:
    return "triton" not in line and ("cuda" not in line or torch.cuda.is_available())


def page(name: str, least: int):
    """A test: the page has at least so many blocks, and all of them run."""

    def blocks_run():
        blocks = BLOCK.findall((BOOK / name).read_text())
        assert len(blocks) >= least, f"{name} has {len(blocks)} blocks of Python"
        before, handlers = pathlib.Path.cwd(), list(logging.getLogger("tilewright").handlers)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                names = given(pathlib.Path(folder))
                for block in blocks:
                    torch.compiler.reset()
                    text = "\n".join(line if runs_here(line) else "" for line in block.splitlines())
                    exec(compile(text, f"{name}", "exec"), names)  # noqa: S102  (our own pages)
                check(name, names)
            finally:
                os.chdir(before)
                logging.getLogger("tilewright").handlers = handlers
                torch.compiler.reset()

    blocks_run.__name__ = f"blocks_of_{pathlib.Path(name).stem}"
    return blocks_run


def check(name: str, names: dict) -> None:
    """What a page promises of its code, where running it is not enough."""
    if name == "guardrails.md":
        # The handler that it adds makes a group that is left to PyTorch an error.
        kept = tilewright.pytorch.group.Group._program

        def fails(self, builder):
            raise NotImplementedError("for the test")

        tilewright.pytorch.group.Group._program = fails
        try:
            torch.compiler.reset()
            torch.compile(Small().eval(), backend="tilewright", options={"cache": False})(*names["inputs"])
        except Exception as error:  # noqa: BLE001  (as it comes out of Dynamo)
            assert "for the test" in str(error), error
        else:
            raise AssertionError("a group was left to PyTorch, and nothing was raised")
        finally:
            tilewright.pytorch.group.Group._program = kept
    if name == "troubleshooting.md":
        x = names["inputs"][0]
        expected = Small.forward(names["model"], x)
        torch.testing.assert_close(names["model"](x), expected)


if __name__ == "__main__":
    run_all([page("../../README.md", 1), page("quick-start.md", 1), page("pytorch.md", 1), page("operators.md", 2), page("guardrails.md", 4), page("troubleshooting.md", 2)])
