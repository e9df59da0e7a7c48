"""How much anonymous memory processes hold; mapped files, whose pages the kernel may drop, do not count."""

from __future__ import annotations

import psutil


def own_bytes(pid: int | str = "self") -> int:
    """Bytes of a process's anonymous memory; 0 if it has ended.

    Pages that forked processes share count for each of them. Else memory would seem to grow with time, as Python's
    garbage collector writes to shared pages and each process gets its own copy.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))
    except (OSError, StopIteration):
        return 0


def tree(pid: int) -> list[psutil.Process]:
    """A process, its children and theirs; an empty list if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
