"""The Python module: the digits model against ONNX Runtime, results that outlive the next run, errors."""

import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import onnxruntime

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIBRARY = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libtilewright_python.so"
DIGITS = ROOT / "demo" / "digits"


def results_are_those_of_onnxruntime(tilewright) -> None:
    images = np.load(DIGITS / "test_images.npy")
    session = onnxruntime.InferenceSession(DIGITS / "digits.onnx", providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"image": images})
    model = tilewright.load(DIGITS / "digits.onnx", threads=2)
    assert model.inputs == ["image"] and len(model.outputs) == 1
    (actual,) = model.run({"image": images}).values()
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
    # Another size through the same plan, from an array that is not contiguous.
    (every_second,) = model.run({"image": images[::2]}).values()
    np.testing.assert_allclose(every_second, expected[::2], rtol=1e-5, atol=1e-6)


def a_result_outlives_the_next_run(tilewright) -> None:
    images = np.load(DIGITS / "test_images.npy")
    model = tilewright.load(DIGITS / "digits.onnx", threads=1)
    (first,) = model.run({"image": images}).values()
    kept = first.copy()
    (second,) = model.run({"image": images[::-1].copy()}).values()
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, kept)
    del model
    np.testing.assert_array_equal(first, kept)


def mistakes_are_python_errors(tilewright) -> None:
    model = tilewright.load(DIGITS / "digits.onnx", threads=1)
    image = np.load(DIGITS / "test_images.npy")[:1]
    for feeds in ({}, {"image": image, "more": image}, {"image": image.astype(np.float64)}, {"image": image[0, :1]}):
        try:
            model.run(feeds)
        except ValueError as error:
            assert "image" in str(error) or "more" in str(error), error
        else:
            raise AssertionError(f"accepted {list(feeds)}")
    try:
        tilewright.load(ROOT / "README.md")
    except ValueError:
        pass
    else:
        raise AssertionError("README.md was loaded as a model")


def devices_are_named_or_refused(tilewright) -> None:
    images = np.load(DIGITS / "test_images.npy")
    for device, precision, error, words in [
        ("gpu", "f32", ValueError, "`gpu` is no device"),
        ("cuda:99", "f32", NotImplementedError, ""),
        ("cpu", "f31", ValueError, "f31"),
    ]:
        try:
            tilewright.load(DIGITS / "digits.onnx", device=device, precision=precision)
        except error as e:
            assert words in str(e), e
        else:
            raise AssertionError(f"{device} {precision} is not refused")
    for path, threads, words in [
        (DIGITS / "digits.onnx", -1, "threads=-1"),
        (DIGITS / "digits.onnx", 1 << 40, "threads="),
        (DIGITS / "digits.onnx", "2", "threads='2'"),
        ("model.pt2", 1, "tilewright.compile('model.pt2')"),
        (b"/nowhere/\xff.onnx", 1, "/nowhere/"),
        ("", 1, ""),
    ]:
        try:
            tilewright.load(path, threads=threads)
        except ValueError as e:
            assert words in str(e), e
        else:
            raise AssertionError(f"{path!r} on {threads} threads is not refused")
    # Where there is a GPU, it gives the same.
    try:
        model = tilewright.load(DIGITS / "digits.onnx", device="cuda")
    except NotImplementedError:
        return
    (there,) = model.run({"image": images[:9]}).values()
    (here,) = tilewright.load(DIGITS / "digits.onnx", threads=1).run({"image": images[:9]}).values()
    np.testing.assert_allclose(there, here, rtol=1e-4, atol=1e-5)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TILEWRIGHT_CACHE"] = str(pathlib.Path(folder, "cache"))
        package = pathlib.Path(folder, "tilewright")
        shutil.copytree(ROOT / "python" / "tilewright", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copy(LIBRARY, package / "_native.abi3.so")
        sys.path.insert(0, folder)
        import tilewright

        tests = (results_are_those_of_onnxruntime, a_result_outlives_the_next_run, mistakes_are_python_errors, devices_are_named_or_refused)
        for test in tests:
            test(tilewright)
            print(f"ok: {test.__name__}")


main()
