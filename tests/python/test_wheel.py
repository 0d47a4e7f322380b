"""The wheel: built, installed in a fresh environment that has NumPy alone, imported and used without PyTorch.

The environment stays below target/wheel-test, and serves again as long as the wheel holds the same files.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLACE = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "wheel-test"
DIGITS = ROOT / "demo" / "digits"

USE = """
import sys
import numpy as np
import tilewright
assert "torch" not in sys.modules
model = tilewright.load(sys.argv[1], threads=1)
images = np.load(sys.argv[2])
named = model.run({"image": images})
np.testing.assert_array_equal(model(images), *named.values())
np.testing.assert_array_equal(model(image=images), *named.values())
for wrong in (lambda: model(images, images), lambda: model(images, image=images)):
    try:
        wrong()
    except ValueError:
        pass
    else:
        raise AssertionError("too many inputs were taken")
for name in ("explain", "verify", "compile"):
    try:
        getattr(tilewright, name)(None)
    except ImportError as error:
        assert "PyTorch" in str(error) and "pip install torch" in str(error), error
    else:
        raise AssertionError(f"{name} needs PyTorch")
from importlib.metadata import entry_points
(entry,) = entry_points(group="torch_dynamo_backends")
assert entry.name == "tilewright", entry
print(named["logits"].shape if "logits" in named else "ran")
"""


def installed(wheel: str) -> pathlib.Path:
    """The Python of an environment with the wheel and NumPy."""
    numpy = f"numpy=={__import__('numpy').__version__}"
    files = sorted((i.filename, i.CRC, i.file_size) for i in zipfile.ZipFile(wheel).infolist())
    what = hashlib.sha256(repr((files, numpy, sys.version, wheel)).encode()).hexdigest()
    python, stamp = PLACE / "bin" / "python", PLACE / "installed"
    if stamp.exists() and stamp.read_text() == what:
        print("ok: the environment has these files already")
        return python
    shutil.rmtree(PLACE, ignore_errors=True)
    venv.create(PLACE)
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, numpy, wheel], check=True)
    stamp.write_text(what)
    return python


def main() -> None:
    wheel = subprocess.run([ROOT / "scripts" / "wheel.sh"], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    names = zipfile.ZipFile(wheel).namelist()
    for needed in ("tilewright/py.typed", "tilewright/_native.pyi", "tilewright/pytorch/backend.py"):
        assert needed in names, (needed, names)
    assert any(n.startswith("tilewright/_native") and n.endswith(".so") for n in names), names
    assert "-abi3-" in wheel, wheel
    print(f"ok: built {pathlib.Path(wheel).name}, {os.path.getsize(wheel) / 1e6:.1f} MB")
    python = installed(wheel)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TILEWRIGHT_CACHE": str(pathlib.Path(folder, "cache"))}
        environment.pop("PYTHONPATH", None)
        command = [python, "-c", USE, DIGITS / "digits.onnx", DIGITS / "test_images.npy"]
        subprocess.run(command, check=True, cwd=folder, env=environment)
    print("ok: installed and used without PyTorch")


main()
