"""Puts the package with the library of this build first on the path, for the scripts and tests of the PyTorch backend."""

import logging
import os
import pathlib
import shutil
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libtilewright_python.so"


def install() -> None:
    """The package lies in a folder of its own, with a cache of its own; `TILEWRIGHT_TORCH_PACKAGE` names one that is whole."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    # What AOTAutograd keeps for other processes.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="tilewright-torch-")
    if "TILEWRIGHT_TORCH_PACKAGE" in os.environ:
        sys.path.insert(0, os.environ["TILEWRIGHT_TORCH_PACKAGE"])
        return
    folder = tempfile.mkdtemp(prefix="tilewright-torch-")
    package = pathlib.Path(folder, "tilewright")
    shutil.copytree(ROOT / "python" / "tilewright", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(LIBRARY, package / "_native.abi3.so")
    os.environ["TILEWRIGHT_CACHE"] = str(pathlib.Path(folder, "cache"))
    sys.path.insert(0, folder)
