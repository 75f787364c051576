"""All of it on this machine, nothing needed: drawn photos, a local S3 server, a local Ray.

python -m jobs.demo

Five to eight minutes on two slow cores, once it is installed.
"""

import sys

from fruitray.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("demo"))
