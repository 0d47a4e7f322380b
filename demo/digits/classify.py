"""Classifies the held-out handwritten digits with `tw run` and counts how many are right.

Usage:  python demo/digits/classify.py TW
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).parent


def main() -> int:
    tw = sys.argv[1]
    labels = np.load(HERE / "test_labels.npy")
    with tempfile.TemporaryDirectory() as folder:
        images = f"image={HERE / 'test_images.npy'}"
        subprocess.run([tw, "run", HERE / "digits.onnx", "--input", images, "--output", folder], check=True)
        probabilities = np.load(pathlib.Path(folder, "probabilities.npy"))
    right = int((probabilities.argmax(1) == labels).sum())
    print(f"{right} of {len(labels)} held-out digits recognised")
    return 0 if right >= 0.95 * len(labels) else 1


if __name__ == "__main__":
    sys.exit(main())
