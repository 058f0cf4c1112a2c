"""Before any test imports torch."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # workers that each took all cores would wait for each other's threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # and what they start with more threads would wait spinning
