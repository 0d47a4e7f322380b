"""The wheel beside PyTorch: the backend is found by its name, without importing the package first."""

import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]

USE = """
import torch
assert "tilewright" in torch._dynamo.list_backends(), torch._dynamo.list_backends()
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU()).eval()
fast = torch.compile(model, backend="tilewright")
x = torch.randn(3, 8)
with torch.no_grad():
    torch.testing.assert_close(fast(x), model(x))
fast(x).sum().backward()
import tilewright
assert tilewright.__file__.startswith({folder!r}), tilewright.__file__
"""


def main() -> None:
    wheel = subprocess.run([ROOT / "scripts" / "wheel.sh"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*install, "--target", folder, wheel], check=True)
        environment = {**os.environ, "PYTHONPATH": folder, "TILEWRIGHT_CACHE": str(pathlib.Path(folder, "cache"))}
        command = [sys.executable, "-c", USE.format(folder=folder)]
        subprocess.run(command, check=True, cwd=folder, env=environment)
    print("ok: the_backend_is_found_by_its_name")


main()
