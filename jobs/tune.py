"""Search backbones and hyperparameters with Ray Tune; write trials.parquet and best.json.

ray job submit --working-dir . -- python -m jobs.tune --index s3://fruit/index --out s3://fruit/tune

Its time is that of the trials: a frozen backbone is embedded once, at about 110 photos/s on two cores, and then takes
seconds per trial.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("tune"))
