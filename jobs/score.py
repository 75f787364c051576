"""Score every photo below a place: one Parquet row per input, exactly once.

    ray job submit --working-dir . -- python -m jobs.score --package s3://fruit/model --images s3://fruit/new \\
        --out s3://fruit/scores

Starting takes some ten seconds; the rest is the model's.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("score"))
