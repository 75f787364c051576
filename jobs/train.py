"""Train the final model with Ray Train; write the model package.

    ray job submit --working-dir . -- python -m jobs.train --index s3://fruit/index --out s3://fruit/model \\
        --config s3://fruit/tune/best.json

A frozen backbone trains in seconds once it is embedded; a whole one takes its epochs.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("train"))
