"""How much memory processes hold that no file stands for: mapped files, which the kernel may drop, are left out."""

from __future__ import annotations

import psutil


def own_bytes(pid: int | str = "self") -> int:
    """Bytes of a process's anonymous memory; 0 where it has ended.

    Pages that forked processes still have in common count for each: Python's garbage collector writes to them, and
    after some minutes each has its own, without any having grown.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    except (OSError, StopIteration):
        return 0


def tree(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; none where it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
