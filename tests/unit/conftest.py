"""One thread for the small networks of these tests: several would mostly wait for one another on a busy machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported
