"""What README and the guides tell a person to run on photos does run, in this order, in a folder with raw/ and new/.

The commands come from there, made small by options behind theirs. Those that want a bucket run in `test_jobs.py` and
`test_local_cluster.py`, `make demo` in `test_demo.py`.
"""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fruitray.storage import LocalStorage
from tests.cluster import DRAWING, PATIENCE_S, ROOT, Cluster
from tests.unit.photos import sixty

GUIDES = ("prepare", "tune", "train", "score", "export")
TEXT = "".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)))
PHOTOS = sixty()
"""60, two of them corrupt."""
SMALL = ("--backbones", "cnn", "--trials", "1", "--image-size", "64", "--epochs", "1")
"""What makes the first search quick, and the training of what it finds."""
LONG = ("--dry-run",)
"""For the others."""
HELD_OUT = ("--test-fraction", "0.2")
"""For each `prepare`, as one of the commands scores the photos of `--split test`."""


def commands() -> list[tuple[str, list[str]]]:
    """(job, arguments) of each that is shown and that stays on this machine, once."""
    shown = re.findall(r"^    python -m jobs\.(\w+) +(.*)$", TEXT, re.MULTILINE)
    once = dict.fromkeys((job, *arguments.partition("#")[0].split()) for job, arguments in shown)
    return [(job, arguments) for job, *arguments in once if not any(word.startswith("s3://") for word in arguments)]


def snippets() -> list[str]:
    """Each block of Python that is shown and that says where its files are."""
    blocks = re.findall(r"(?:^ {4,}\S.*\n)+", TEXT, re.MULTILINE)
    python = [textwrap.dedent(block) for block in blocks if re.match(r" +(import|from) ", block)]
    return [block for block in python if "<run>" not in block]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """Where all of the commands have been run."""
    here = tmp_path_factory.mktemp("readme")
    for key, data in PHOTOS.items():
        LocalStorage(str(here / "raw")).write(key, data)
    good = next(data for key, data in PHOTOS.items() if key.startswith("tomato/"))
    LocalStorage(str(here / "new")).write("0001.jpg", good)
    ran = set[str]()
    for job, arguments in commands():
        more = {"prepare": HELD_OUT, "tune": LONG if job in ran else SMALL}.get(job, ())
        code, printed = cluster.run(job, *arguments, *more, folder=here, page=True)
        assert code == 0, f"{job} {arguments}: {printed}"
        drawn = job in DRAWING and "--dry-run" not in (*arguments, *more)
        assert bool(re.search(r"^see .*report\.html$", printed, re.MULTILINE)) == drawn, f"{job} {arguments}: {printed}"
        ran.add(job)
    assert ran == {"prepare", "tune", "train", "score", "verify", "export", "report"}
    return here


def test_each_command_leaves_what_the_text_says(folder: Path) -> None:
    assert pq.read_table(folder / "runs" / "scores" / "data").num_rows == 1
    index = pq.read_table(folder / "runs" / "index" / "index.parquet", filters=[("split", "==", "test")])
    assert pq.read_table(folder / "runs" / "test" / "data")["uri"].sort() == index["uri"].sort()
    for name in ("index/augment.png", "tune/best.json", "model/package.json", "onnx/model.onnx", "pt2/model.pt2"):
        assert (folder / "runs" / name).exists(), name
    for name in ("", "audit", "index", "tune", "model", "scores", "scores-2"):
        assert 0 < (folder / "runs" / name / "report.html").stat().st_size < 3_000_000, name


@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_python_that_is_shown_runs(folder: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippets()[number]], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr


def test_the_docstrings_examples_run(folder: Path) -> None:
    code = "import doctest, fruitray; print(doctest.testmod(fruitray))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "TestResults(failed=0, attempted=5)\n", done.stdout + done.stderr


def test_the_notebook_runs(folder: Path) -> None:
    cells = json.loads((ROOT / "docs" / "example.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "E_NOT_IMAGE" in done.stdout


def test_python_is_shown() -> None:
    assert len(snippets()) == 3
