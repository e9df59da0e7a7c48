"""A run's folder: whose it is, which run it holds, and the checkpoint in it to go on from."""

from __future__ import annotations

import atexit
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments

from rows.files import named, write_json

from . import distributed
from .checkpoints import MANIFEST, last_whole, to_go_on_from
from .hub_push import fetch_last_checkpoint
from .replacing import COMMAND_FILE, LOCK, OF_THE_MOMENT, is_a_runs, move_aside, settle, strangers


LOCK_SECONDS = 15  # of waiting for the lock: loader workers of a killed run hold it until they notice
# What a run may find in its folder.
NOTHING, TO_REPLACE, TO_GO_ON, INTERRUPTED, FINISHED = "nothing", "to replace", "to go on", "interrupted", "finished"


def prepare_output_dir(args: TrainingArguments, overwrite: bool, own: Sequence[str] = ()) -> None:
    """Refuses at once a folder in which this run would harm another's files. Of two runs at once the second stops.

    It only finishes what an earlier start left undone, see [`settle`]; [`enter`] moves an old run aside, once all
    input is known to be right.

    Args:
        overwrite: the run that the folder holds is to be replaced.
        own: patterns (relative paths) of the files that a run of this method leaves there beside those of any run.

    Raises:
        ValueError: on every process: the folder cannot be written to, or another run is writing to it; it holds what
            no run leaves, or a run that is neither to be gone on from nor to be replaced.
    """
    if args.do_train:
        distributed.decided_by_first_rank(lambda: _take(args, overwrite, own))


def _take(args: TrainingArguments, overwrite: bool, own: Sequence[str]) -> None:
    folder = Path(args.output_dir)
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ValueError(f"Another run is writing to {folder}: wait for it, or give another --output_dir.") from None
    except OSError as error:
        raise ValueError(f"output_dir {folder} cannot be written to: {error}. Give another --output_dir.") from None
    atexit.register(lock.release)  # held until the program ends
    goes_on = bool(args.resume_from_checkpoint or args.resume_from_hub)
    settle(folder, own, goes_on and overwrite)
    if not _holds_a_run(folder):
        return
    if goes_on:
        if not is_a_runs(folder):
            names = sorted(path.name for path in folder.iterdir() if not OF_THE_MOMENT.fullmatch(path.name))
            raise ValueError(
                f"output_dir {folder} holds {named(names)} and no run of this program: give another --output_dir, "
                "so that nothing is overwritten."
            )
    elif overwrite:
        _check_ours(folder, own)
    elif not (folder / COMMAND_FILE).is_file():
        raise ValueError(_another(folder))


def digest_of(*parts: dict[str, object]) -> str:
    """A digest of all that a run and its report follow from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def enter(args: TrainingArguments, overwrite: bool, own: Sequence[str], command: str) -> str:
    """Takes the folder for a run, once all its input is known to be right. Called on every process.

    An old run that is to be replaced is moved aside: it is deleted when the new one has a checkpoint or its final
    student, and comes back where the new one ends before.

    Args:
        overwrite, own: see [`prepare_output_dir`].
        command: [`digest_of`] the run.

    Returns:
        What the folder holds, one of the five constants above: INTERRUPTED and FINISHED are said of this very run.

    Raises:
        ValueError: it holds another run.
    """
    folder = Path(args.output_dir)
    found = [_standing(args, overwrite, command) if args.process_index == 0 else None]
    broadcast_object_list(found)  # all processes are here: none reads the old run any more
    if found[0] is None:
        raise ValueError(_another(folder))
    if args.process_index == 0 and found[0] != FINISHED:
        if found[0] == TO_REPLACE:
            _check_ours(folder, own)  # again: reading the input took its time
            move_aside(folder)
            atexit.register(settle, folder, own, False)
        write_json(folder / COMMAND_FILE, {"command": command})
    return found[0]


def note_finished(args: TrainingArguments, command: str) -> None:
    """Notes that the run has come to its end, for [`enter`]. To be called on the process that saves."""
    folder = Path(args.output_dir)
    write_json(folder / COMMAND_FILE, {"command": command, "weights": _weights(folder)})


def last_checkpoint(args: TrainingArguments, interrupted: bool = False) -> str | None:
    """The checkpoint that `--resume_from_hub` or `--resume_from_checkpoint` asks for.

    'last' and 'True' stand for the run's last whole one, which is None where it was stopped before its first.

    Args:
        interrupted: as if 'last' were asked for, see [`enter`].

    Raises:
        ValueError: on every process, see [`seen_by_all`].
    """
    if args.resume_from_hub is not None:
        return seen_by_all(lambda: fetch_last_checkpoint(args.resume_from_hub, args.output_dir))
    asked = "last" if interrupted else args.resume_from_checkpoint
    if asked is None or str(asked).lower() not in ("last", "true"):
        return seen_by_all(lambda: to_go_on_from(asked, args.output_dir))
    checkpoint = seen_by_all(lambda: last_whole(args.output_dir))
    if checkpoint is None and args.process_index == 0:
        print(f"There is no whole checkpoint in {args.output_dir}: the run starts from the beginning.")
    return checkpoint


def seen_by_all(find: Callable[[], Path | str | None]) -> str | None:
    """The checkpoint that the first process finds, once every process has read it; None where it finds none.

    Raises:
        ValueError: on every process, what `find` raises, or one of them does not see that checkpoint.
    """

    def look() -> tuple[str, bytes] | None:
        folder = find()
        return folder and (str(folder), (Path(folder) / MANIFEST).read_bytes())

    found = distributed.decided_by_first_rank(look)
    if found is None:
        return None
    folder, manifest = found
    try:
        sees = (Path(folder) / MANIFEST).read_bytes() == manifest
    except OSError:
        sees = False
    blind = (~distributed.gather_counts([[int(sees)]]).bool()).flatten().nonzero().flatten().tolist()
    if blind:
        raise ValueError(
            f"{folder} is on the disk of process 0, and {len(blind)} of {distributed.world_size()} processes "
            f"({', '.join(map(str, blind[:8]))}) do not see it there: all go on from the files of one folder, so "
            "resume with an --output_dir on a disk that all machines share, or on one machine."
        )
    return folder


def _holds_a_run(folder: Path) -> bool:
    """Whether the folder holds more than the scraps of a run that was killed at its start."""
    is_scrap = (OF_THE_MOMENT.fullmatch(path.name) and path.name != COMMAND_FILE for path in folder.iterdir())
    return not all(is_scrap)


def _standing(args: TrainingArguments, overwrite: bool, command: str) -> str | None:
    """What the run finds in its folder; None for another run."""
    folder = Path(args.output_dir)
    if args.resume_from_checkpoint or args.resume_from_hub:
        return TO_GO_ON
    if not _holds_a_run(folder):
        return NOTHING
    if overwrite:
        return TO_REPLACE
    try:
        noted = json.loads((folder / COMMAND_FILE).read_text())
        if noted["command"] != command:
            return None
        weights = noted.get("weights")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    if weights is None:
        return INTERRUPTED
    # Where files are gone or changed since, and where it shall be pushed, a person must say what is to be done.
    return FINISHED if weights and weights == _weights(folder) and not args.push_to_hub else None


def _weights(folder: Path) -> dict[str, int]:
    """Names and sizes in bytes of what a student is loaded from."""
    return {path.name: path.stat().st_size for path in sorted([folder / "config.json", *folder.glob("*.safetensors")])
            if path.is_file()}  # fmt: skip


def _check_ours(folder: Path, own: Sequence[str]) -> None:
    foreign = strangers(folder, own)
    if foreign or not is_a_runs(folder):
        what = named(foreign) if foreign else "no run of this program"
        raise ValueError(
            f"--overwrite_output_dir replaces a run and nothing else, and {folder} holds {what}: nothing was deleted; "
            "move that away, or give another --output_dir."
        )


def _another(folder: Path) -> str:
    return (
        f"output_dir {folder} is not empty: it holds another run. Give another --output_dir, go on with that run "
        "by --resume_from_checkpoint last, or replace it by --overwrite_output_dir."
    )
