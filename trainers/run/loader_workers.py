"""Worker processes of a data loader."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def name_killed_workers() -> Iterator[None]:
    """Says what to do where a process of a data loader was killed: torch says so anywhere, and not why.

    Where it dies while it hands over a batch, torch passes on the broken connection, if the process is not gone yet.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError):
            killed = "DataLoader worker (pid" in str(error)
        else:
            frames = traceback.walk_tb(error.__traceback__)
            killed = any(frame.f_code.co_name == "_try_get_data" for frame, _ in frames)
        if not killed:
            raise
        raise RuntimeError(
            "A worker of the data loader was killed, as a rule because memory ran out: lower "
            "--dataloader_num_workers or --shuffle_buffer_size, and go on by --resume_from_checkpoint last."
        ) from error
