"""Score every photo below a place: one Parquet row per input, exactly once.

    ray job submit --working-dir . -- python -m jobs.score --package s3://fruit/model --images s3://fruit/new \\
        --out s3://fruit/scores
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("score"))
