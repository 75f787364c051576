"""Prove a scored output: every planned input has exactly one row, every file is what the manifest says.

ray job submit --working-dir . -- python -m jobs.verify --out s3://fruit/scores

Reads every part once; no cluster is needed.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("verify"))
