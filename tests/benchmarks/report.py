"""How large the page of a large run is, how long it takes to draw, and to open in Chromium.

    python -m tests.benchmarks.report

100,000 rows of scores and 200 trials, made up. `opened` is from the command to the end of the page's `load` event, in a
browser that runs already.
"""

import tempfile
import time
from pathlib import Path

from fruitray.report.page import FILE, write_report
from tests.browser import opened
from tests.unit.test_report import write_scores, write_trials

ROWS, TRIALS, ROUNDS = 100_000, 200, 5


def main() -> None:
    """Print it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scores(folder / "scores", ROWS)
        write_trials(folder / "tune", TRIALS)
        start = time.perf_counter()
        page = write_report([name])
        print(
            f"{ROWS:,} rows and {TRIALS} trials: {len(page) / 1e6:.2f} MB, drawn in {time.perf_counter() - start:.1f} s"
        )
        (folder / FILE).write_bytes(page)
        with opened(folder / FILE, 1400) as (shown, _):
            seconds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                shown.goto((folder / FILE).as_uri())
                seconds.append(time.perf_counter() - start)
        print(f"opened in {min(seconds):.2f} to {max(seconds):.2f} s, {ROUNDS} times")


if __name__ == "__main__":
    main()
