"""Draw what jobs have written as one page: photos, trials, the model, the scores.

    ray job submit --working-dir . -- python -m jobs.report --runs s3://fruit/scores

prepare, tune, train and score do so at their end; this is for what was written before. Takes seconds.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("report"))
