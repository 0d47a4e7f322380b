"""The page of `tw explain --html` in Chromium: its script runs, its edges are drawn, sorting sorts."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TW = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "tw"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# Appended to the page: clicks a heading and writes down what it finds.
PROBE = """<script>
addEventListener("load", () => {
  const heading = [...document.querySelectorAll("th")].find((h) => h.textContent === "time");
  heading.click();
  const times = [...document.querySelectorAll("tbody tr")].map((r) => Number(r.cells[heading.cellIndex].dataset.v));
  const sorted = times.every((t, i) => i === 0 || times[i - 1] >= t);
  const width = document.documentElement.scrollWidth <= innerWidth;
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = `edges=${document.querySelectorAll("path.edge").length} rows=${times.length} sorted=${sorted} fits=${width}`;
  document.body.append(note);
});
</script></body>"""


def browser() -> str:
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    sys.exit("no Chromium: scripts/setup.sh browser installs it")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        page = pathlib.Path(folder, "page.html")
        model = ROOT / "demo" / "digits" / "digits.onnx"
        subprocess.run([TW, "explain", model, "--runs", "2", "--html", page], check=True, stdout=subprocess.DEVNULL)
        text = page.read_text()
        page.write_text(text.replace("</body>", PROBE))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
        dom = subprocess.run(
            [browser(), *flags, "--window-size=1200,900", "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
            check=True, capture_output=True, text=True, timeout=120,
        )
    found = re.search(r'id="probe">edges=(\d+) rows=(\d+) sorted=(\w+) fits=(\w+)<', dom.stdout)
    assert found, f"the script of the page did not run:\n{dom.stderr[-2000:]}"
    edges, rows = int(found[1]), int(found[2])
    assert rows == text.count("<tr data-k="), rows
    assert edges >= rows - 2, f"{edges} edges between {rows} kernels"
    assert found[3] == "true", "a click on a heading does not sort"
    assert found[4] == "true", "the page is wider than the window"
    print(f"page of {len(text) >> 10} KiB: {rows} kernels, {edges} edges, sorts by time")


main()
