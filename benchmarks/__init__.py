"""Programs that the README's and the notes' figures come from."""

import os


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py, and as early: before torch
