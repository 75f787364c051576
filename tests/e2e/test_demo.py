"""The demo, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.browser import MODEL, PHOTOS, SCORES, TRIALS, WIDTHS, opened, require_readable
from tests.cluster import PATIENCE_S, ROOT


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a small demo leaves; nothing runs any more."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "jobs.demo", "--per-class", "20", "--trials", "2", "--epochs", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    demo = subprocess.run(
        [*command, "--out", str(folder)],
        cwd=ROOT,
        env=environment | {"TMPDIR": "/tmp", "DEMO_TEST": str(folder)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    left = [process for process in psutil.process_iter() if _environment(process).get("DEMO_TEST") == str(folder)]
    assert left == []
    [run] = folder.iterdir()
    return run


def test_the_demo_ends_with_a_row_per_photo(outputs: Path) -> None:
    rows = pq.read_table(outputs / "scores" / "data")
    assert rows.num_rows == len(set(rows["uri"].to_pylist())) == 60
    assert rows["status"].to_pylist().count("error") == 2


def test_its_page_shows_all_of_it(outputs: Path) -> None:
    for output, charts in (("index", PHOTOS), ("tune", PHOTOS | TRIALS), ("scores", PHOTOS | TRIALS | MODEL | SCORES)):
        require_readable(outputs / output / "report.html", charts)
    with opened(outputs / "scores" / "report.html", WIDTHS[-1]) as (page, _):
        text = page.locator("main").inner_text().lower()
    for said in ("the same file", "e_not_image", "layers", "drift", "augmentation", "threshold"):
        assert said in text, said


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
