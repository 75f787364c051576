"""Write a model package as ONNX or torch.export, checked on photos.

    ray job submit --working-dir . -- python -m jobs.export --package s3://fruit/model --out s3://fruit/onnx \\
        --images s3://fruit/raw

Some ten seconds; no cluster is needed.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("export"))
