"""The demo, as a newcomer runs it."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from tests.cluster import PATIENCE_S, ROOT


def test_the_demo_ends_with_a_row_per_photo_and_leaves_nothing_running(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.demo", "--per-class", "20", "--trials", "2", "--epochs", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    demo = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment | {"TMPDIR": "/tmp", "DEMO_TEST": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    [scores] = tmp_path.glob("*/scores/data")
    rows = pq.read_table(scores)
    assert rows.num_rows == len(set(rows["uri"].to_pylist())) == 60
    assert rows["status"].to_pylist().count("error") == 2
    left = [process for process in psutil.process_iter() if _environment(process).get("DEMO_TEST") == str(tmp_path)]
    assert left == []


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
