"""Several processes: rows, errors and decisions that all ranks share, and what a launcher changes for a program."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist


Result = TypeVar("Result")


def use_the_cores(device: torch.device, processes: int) -> None:
    """Lets a single process on a CPU use all its cores: `accelerate launch` sets OMP_NUM_THREADS to 1."""
    if device.type == "cpu" and processes == 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(usable_cores())


def usable_cores() -> int:
    """Cores that this process may use; all of the machine's where the system does not say (macOS, Windows)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run_launched(main: Callable[[], None]) -> None:
    """Runs a program; where `accelerate launch` started it, a line after an error's sentence explains the launcher's
    own traceback, which follows and would hide it.

    The launcher prints none with `-q` and one process; the program itself cannot switch it off.
    """
    try:
        main()
    except SystemExit as stop:
        line = _launchers_traceback()
        if line is None or not (isinstance(stop.code, str) or stop.code == 2):  # 2: argparse has printed
            raise
        print(*([stop.code] if isinstance(stop.code, str) else []), line, sep="\n", file=sys.stderr)
        sys.exit(2 if stop.code == 2 else 1)
    if dist.is_available() and dist.is_initialized():
        among_others = dist.get_world_size() > 1
        dist.destroy_process_group()
        if among_others:
            _end_as_a_child()


def _end_as_a_child() -> None:
    """Ends this process as multiprocessing ends its own: with what was registered for the end, without dismantling the
    interpreter.

    Under DDP Gloo's threads outlive their process group, and now and then abort an interpreter that is dismantled
    around them: the launcher then reports a program that is done as one that has failed.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launchers_words() -> list[str] | None:
    """The command line of the `accelerate launch` that started this process; None where none did, or where the system
    does not say (it does on Linux)."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    launched = any(Path(word).name == "accelerate" or word.startswith("accelerate.commands") for word in words[:4])
    return words if launched else None


def _launchers_traceback() -> str | None:
    """What to say of the traceback that the launcher will print; None where it will print none."""
    words = launchers_words()
    if words is None:
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "The traceback that follows is the launcher's, and says no more." if rank_is_first() else None
    quiet = {"-q", "--quiet"} & set(words)
    return None if quiet else "The traceback that follows is the launcher's (`accelerate launch -q` prints none)."


def rank_is_first() -> bool:
    """Whether this is the first process of those that a launcher has started, connected yet or not."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@functools.cache
def _host_group() -> dist.ProcessGroup | None:
    """A group of all processes that talks by gloo, without the GPUs; None where the default group does."""
    return None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")


def gather_counts(counts: list[list[int]]) -> torch.Tensor:
    """The counts `[A, ...]` of all W ranks as `[W, A, ...]`, on the CPU: no GPU is waited for."""
    own = torch.tensor(counts)
    if world_size() == 1:
        return own[None]
    gathered = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(gathered, own, group=_host_group())
    return torch.stack(gathered)


def gather_arrays(own: np.ndarray) -> list[np.ndarray]:
    """The arrays `[n]` of all ranks, of one type and any lengths, on every rank; no device takes part."""
    if world_size() == 1:
        return [own]
    counts = gather_counts([[len(own)]]).flatten().tolist()
    padded = torch.from_numpy(np.pad(own, (0, max(counts) - len(own))))
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded, group=_host_group())
    return [part[:count].numpy() for part, count in zip(gathered, counts)]


def agree(work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank. Where it fails on any rank, it fails on all, with the first such rank's words.

    To be called on every rank.

    Raises:
        ValueError, OSError: as `work` did; an error of another type is a RuntimeError on the other ranks.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # the others must not wait for this rank
        error = raised
    kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
    text = "" if error is None else f"{kind.__name__} {error}"
    texts = [part.tobytes().decode() for part in gather_arrays(np.frombuffer(text.encode(), np.uint8).copy())]
    first = next((text for text in texts if text), None)
    if error is not None and first == text:
        raise error
    if first is not None:
        name, message = first.split(" ", 1)
        raise {"ValueError": ValueError, "OSError": OSError}.get(name, RuntimeError)(message)
    return result


def gather_rows(rows: torch.Tensor, counts: list[int], differentiable: bool = False) -> torch.Tensor:
    """Rows of all ranks.

    Args:
        rows: this rank's, `[n, ...]`.
        counts: how many rows each rank holds.
        differentiable: let gradients flow back to the rank each row came from; constants otherwise.

    Returns:
        `[sum of counts, ...]`, the same on every rank; with one process, `rows` themselves.
    """
    if world_size() == 1 or not max(counts):
        return rows
    padded = torch.cat([rows, rows.new_zeros((max(counts) - len(rows), *rows.shape[1:]))])
    if differentiable:
        from torch.distributed.nn.functional import all_gather

        gathered = all_gather(padded.contiguous())
    else:
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.detach().contiguous())
    return torch.cat([part[:count] for part, count in zip(gathered, counts)])


def in_order_of_batches(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """A step's gathered rows in the order in which one process would have trained on them.

    Args:
        rows: `[sum of counts, ...]`, rank by rank.
        counts: `[W, A]`, rows of each rank's micro-batches; a micro-batch of every rank comes before the next.
    """
    ranks, batches = counts.shape
    parts = rows.split(counts.flatten().tolist())
    return torch.cat([parts[rank * batches + batch] for batch in range(batches) for rank in range(ranks)])


def decided_by_first_rank(decide: Callable[[], Result]) -> Result:
    """What `decide` returns on the first rank, on every rank: ranks on other machines may see another disk.

    Args:
        decide: called on the first rank alone; returns something small.

    Raises:
        ValueError: on every rank, where `decide` raises it or an OSError; the first rank raises the OSError itself.
    """
    if world_size() == 1:
        return decide()
    decided, refusal = None, None
    if rank() == 0:
        try:
            decided = decide()
        except (OSError, ValueError) as error:
            refusal = error
    kind = type(refusal) if isinstance(refusal, ValueError) else ValueError
    said = [decided, refusal and (kind, str(refusal))]
    dist.broadcast_object_list(said, 0, group=_host_group())
    if refusal is not None:
        raise refusal
    if said[1] is not None:
        raise said[1][0](said[1][1])
    return said[0]


def from_first_rank(value: torch.Tensor) -> torch.Tensor:
    """The first rank's tensor, on every rank."""
    value = value.contiguous()
    if world_size() > 1:
        dist.broadcast(value, 0)
    return value


def sum_over_ranks(value: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' tensors, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value
