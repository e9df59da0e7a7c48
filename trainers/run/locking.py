"""A folder that one process at a time writes into."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone(folder: Path, lock_file: Path, wait: bool = False) -> Iterator[None]:
    """Holds a folder's lock, so that no other process writes into it meanwhile.

    Args:
        folder: named where another process holds the lock.
        lock_file: its folder exists; the file is there as long as the lock is held.
        wait: for the other process, in place of an error.

    Raises:
        ValueError: another process holds the lock.
    """
    lock = FileLock(lock_file, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is at work on {folder}: wait for it, or name another --output_dir."
        ) from error
    try:
        yield
    finally:
        os.unlink(lock_file)  # a process that has opened it meanwhile sees that it is gone, and opens it anew
        lock.release()
