"""Worker processes of a data loader: they outlive a signal to the whole group, and not their parent."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch.utils.data import DataLoader


LOOK_SECONDS = 1.0  # how often a worker looks whether its parent is there
# Without `sigtimedwait` (macOS) a worker cannot tell its parent's SIGTERM from another's: it obeys both.
HELD_BACK = {signal.SIGINT, signal.SIGTERM} if hasattr(signal, "sigtimedwait") else {signal.SIGINT}


def shielded(loader: DataLoader) -> DataLoader:
    """Makes a loader's worker processes exit with their parent, and at no signal but the parent's.

    A scheduler's SIGTERM and a terminal's Ctrl-C reach the whole process group. The main process decides what to do
    about them: a worker that died of one would end the step, and the run.

    Args:
        loader: one of torch's, or as accelerate has prepared it; it is changed.
    """
    loader_itself = getattr(loader, "base_dataloader", loader)
    if loader_itself.num_workers > 0:
        context = copy.copy(loader_itself.multiprocessing_context or multiprocessing.get_context())
        context.Process = partial(_quiet_process, context.Process)
        loader_itself.multiprocessing_context = context
        loader_itself.worker_init_fn = StayWithParent(loader_itself.worker_init_fn)
    return loader


def _quiet_process(kind: type[multiprocessing.Process], *args, **kwargs) -> multiprocessing.Process:
    """A process that is started with the signals blocked: it inherits that, and is safe from the first instruction."""
    process = kind(*args, **kwargs)
    start = process.start

    def start_quietly() -> None:
        del process.start  # or it would be pickled with the process
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return start()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD_BACK)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    process.start = start_quietly
    return process


class StayWithParent:
    """What a worker does first: from then on it exits when its parent is gone or terminates it, in mid-batch too.

    Args:
        then: called next in the worker, with its number.
    """

    def __init__(self, then: Callable[[int], None] | None):
        self.then = then

    def __call__(self, worker_id: int) -> None:
        if not hasattr(signal, "pthread_sigmask"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        if self.then is not None:
            self.then(worker_id)


def _leave_with_parent() -> None:
    parent, started_by = multiprocessing.parent_process(), os.getppid()  # with a fork server these are two
    while parent.is_alive() and os.getppid() == started_by:
        if signal.SIGTERM not in HELD_BACK:
            time.sleep(LOOK_SECONDS)
            continue
        asked = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
        if asked is not None and asked.si_pid == parent.pid:
            break
    os._exit(0)


@contextmanager
def name_killed_workers() -> Iterator[None]:
    """Gives torch's errors about a killed loader worker one sentence with the cause and what to do.

    Torch raises them at any line, without a cause; a worker killed while it hands over a batch shows as a broken
    connection.
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
