"""The repository's own data: benchmark section up to date, demo files that agree with each other."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import onnxruntime

ROOT = pathlib.Path(__file__).resolve().parents[2]


def benchmark_section_is_made_from_the_newest_record() -> None:
    subprocess.run([sys.executable, ROOT / "bench" / "readme.py", "--check"], check=True)
    subprocess.run([sys.executable, ROOT / "bench" / "goals.py", "--check"], check=True)


def recorded_commands_name_no_path_of_one_machine() -> None:
    records = sorted((ROOT / "records").glob("*.json"))
    assert records, "no records"
    for path in records:
        command = json.loads(path.read_text())["command"]
        absolute = [word for word in command.split() if word.startswith(("/", "~"))]
        assert command and not absolute, f"{path.name}: {absolute}"


def demo_sentences_and_topics_agree() -> None:
    topics = json.loads((ROOT / "demo" / "topics.json").read_text())
    sentences = (ROOT / "demo" / "sentences.txt").read_text().splitlines()
    queries = (ROOT / "demo" / "queries.txt").read_text().splitlines()
    assert len(sentences) == topics["lines_per_topic"] * len(topics["topics"]), len(sentences)
    assert len(set(sentences)) == len(sentences), "a sentence stands twice"
    assert all(line.strip() == line and line for line in sentences + queries)
    assert len(queries) == len(topics["queries"])
    assert set(topics["queries"]) <= set(topics["topics"])


def digits_model_knows_its_test_images() -> None:
    folder = ROOT / "demo" / "digits"
    session = onnxruntime.InferenceSession(str(folder / "digits.onnx"), providers=["CPUExecutionProvider"])
    images, labels = np.load(folder / "test_images.npy"), np.load(folder / "test_labels.npy")
    (probabilities,) = session.run(None, {"image": images})
    assert probabilities.shape == (len(labels), 10)
    np.testing.assert_allclose(probabilities.sum(1), 1.0, rtol=1e-5)
    assert (probabilities.argmax(1) == labels).mean() >= 0.95


for test in (
    benchmark_section_is_made_from_the_newest_record,
    recorded_commands_name_no_path_of_one_machine,
    demo_sentences_and_topics_agree,
    digits_model_knows_its_test_images,
):
    test()
    print(f"ok: {test.__name__}")
