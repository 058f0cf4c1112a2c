"""Before any test imports torch."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each took all cores would wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
