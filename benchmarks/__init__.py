"""The programs that measure the figures in the README and in docs/."""

import os


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py; it counts only before torch is imported
