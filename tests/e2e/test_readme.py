"""What README tells a person to run on their photos does run, in the order of the text, in a folder with raw/ and new/.

Its commands come from there, made small by options behind theirs. Those that want a bucket run in `test_jobs.py` and
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
from fruitray.synthetic import photo_set
from tests.cluster import PATIENCE_S, ROOT, Cluster

README = (ROOT / "README.md").read_text()
PHOTOS = photo_set(20)
"""60, two of them corrupt."""
SMALL = ("--backbones", "cnn", "--trials", "1", "--image-size", "64", "--epochs", "1")
"""What makes the first search quick, and the training of what it finds."""
ELSEWHERE = ("--out", "runs/elsewhere", "--dry-run")
"""For the others, which would take long."""


def commands() -> list[tuple[str, list[str]]]:
    """(job, arguments) of each that README shows and that stays on this machine."""
    shown = re.findall(r"^    python -m jobs\.(\w+) +(.*)$", README, re.MULTILINE)
    found = [(job, arguments.partition("#")[0].split()) for job, arguments in shown]
    return [(job, arguments) for job, arguments in found if not any(word.startswith("s3://") for word in arguments)]


def snippets() -> list[str]:
    """Each block of Python that README shows and that says where its files are."""
    blocks = re.findall(r"(?:^ {4,}\S.*\n)+", README, re.MULTILINE)
    python = [textwrap.dedent(block) for block in blocks if re.match(r" +(import|from) ", block)]
    return [block for block in python if "<run>" not in block]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> Path:
    """Where all of README's commands have been run."""
    here = tmp_path_factory.mktemp("readme")
    for key, data in PHOTOS.items():
        LocalStorage(str(here / "raw")).write(key, data)
    good = next(data for key, data in PHOTOS.items() if key.startswith("tomato/"))
    LocalStorage(str(here / "new")).write("0001.jpg", good)
    ran = set[str]()
    for job, arguments in commands():
        more = () if job != "tune" else ELSEWHERE if job in ran else SMALL
        code, printed = cluster.run(job, *arguments, *more, folder=here)
        assert code == 0, f"{job} {arguments}: {printed}"
        ran.add(job)
    assert ran == {"prepare", "tune", "train", "score", "verify", "export", "report"}
    return here


def test_each_command_leaves_what_the_text_says(folder: Path) -> None:
    assert pq.read_table(folder / "runs" / "scores" / "data").num_rows == 1
    for name in ("index/augment.png", "tune/best.json", "model/package.json", "onnx/model.onnx", "pt2/model.pt2"):
        assert (folder / "runs" / name).exists(), name
    for name in ("", "index", "tune", "model", "scores", "scores-2"):
        assert (folder / "runs" / name / "report.html").exists(), name


@pytest.mark.parametrize("number", range(len(snippets())))
def test_the_python_that_it_shows_runs(folder: Path, number: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippets()[number]], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs(folder: Path) -> None:
    cells = json.loads((ROOT / "docs" / "example.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "E_NOT_IMAGE" in done.stdout


def test_it_shows_python() -> None:
    assert len(snippets()) == 3
