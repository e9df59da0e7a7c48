"""The check of a run's rows before its first step: shared by the ranks, and made once for the same rows."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import datasets
import numpy as np

import rows
from rows import checks
from rows.files import write_json

from .run import distributed


def check_together(dataset: datasets.Dataset, split: str, teacher_dim: int | None, remember: bool = True) -> None:
    """[`checks.check_dataset`], of which each rank does its share; all raise the error that one process would.

    To be called on every rank. Rows that were found right are not read again: a file in the datasets cache says so,
    named by the dataset's fingerprint, its files, what was checked, and the code that did.

    Args:
        dataset, split, teacher_dim: as in [`checks.check_dataset`].
        remember: look for such a file, and leave one.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    stamp = _stamp(dataset, split, teacher_dim) if remember else None
    # The first rank decides: a machine's cache is its own.
    if distributed.gather_counts([[int(stamp is not None and stamp.is_file())]])[0].item():
        return
    checks.check_columns(dataset, split, teacher_dim)
    hashes = distributed.agree(lambda: checks.check_share(dataset, split, teacher_dim, rank, ranks))
    hashes = np.concatenate(distributed.gather_arrays(hashes))
    distributed.agree(lambda: rank or checks.check_repeats(dataset, split, teacher_dim, hashes))
    distributed.agree(lambda: checks.check_images(dataset, split, rank, ranks))
    if stamp is not None and rank == 0:
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_json(stamp, {"split": split, "rows": len(dataset), "teacher_dim": teacher_dim})
        except OSError:  # a cache that cannot be written to: the next start checks again
            pass


def _stamp(dataset: datasets.Dataset, split: str, teacher_dim: int | None) -> Path:
    """The file that says that these rows were found right."""
    # A dataset of `save_to_disk` keeps its fingerprint though a file of it is replaced.
    files = [os.stat(file["filename"]) for file in dataset.cache_files]
    facts = [dataset._fingerprint, len(dataset), split, teacher_dim, *([of.st_size, of.st_mtime_ns] for of in files)]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for path in sorted(Path(rows.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return Path(datasets.config.HF_DATASETS_CACHE) / "dsmd_checked" / digest.hexdigest()[:32]
