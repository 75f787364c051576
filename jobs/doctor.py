"""Say what this machine has for the jobs, and whether they reach what they need.

    ray job submit --working-dir . -- python -m jobs.doctor --places s3://fruit/raw

Takes seconds; each line that is no good says what to do next.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("doctor"))
