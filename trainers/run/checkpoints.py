"""Checkpoints that are whole or absent: sealed beside, flushed, renamed; and which is the last whole one of a run."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from safetensors import SafetensorError

from rows.files import give_rights, write_whole


logger = logging.getLogger(__name__)

NOT_THE_DISKS = (torch.OutOfMemoryError, torch.distributed.DistError)  # RuntimeErrors too, but of memory and network
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)  # torch and safetensors have their own for the disk's
MANIFEST = "_manifest.json"  # sizes and digests; the underscore keeps it out of the model repository's root
BESIDE = "_checkpoint"  # where a checkpoint is written
WRITING = "_writing"  # where the files of a student are written before they are moved into its folder
OLD = "_old-"  # and where the one goes whose name it gets
REPLACED = "_replaced"  # where an old run lies until the one in its place has a checkpoint


class NotResumable(ValueError):
    """What a run is to go on from is damaged, or of another run: the message says which, and what to do."""


def seal(folder: Path) -> None:
    """Writes down the size and digest of every file of a checkpoint, and flushes all to the disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    files = {}
    for path in _files(folder):
        _flush(path)
        files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2))
    _flush(folder / MANIFEST)
    _flush(folder)


def reseal(folder: Path, name: str) -> None:
    """Notes that one file of a sealed checkpoint was written anew. Of a manifest that is a link the original stays."""
    files = json.loads((folder / MANIFEST).read_text())
    files[name] = {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)}
    with write_whole(folder / MANIFEST) as beside:
        beside.write_text(json.dumps(files, indent=2))


def copy_sealed(source: Path, target: Path) -> None:
    """Copies a sealed checkpoint, and nothing that lies beside its files."""
    sealed = json.loads((source / MANIFEST).read_text())
    for path in [*_files(source), source / MANIFEST]:
        name = path.relative_to(source).as_posix()
        if name in sealed or name == MANIFEST:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target / name)


def move_files(beside: Path, folder: Path, last: tuple[str, ...]) -> None:
    """Moves the files of one folder into another, each whole, those named last in this order; removes the one."""
    give_rights(beside)
    names = [path.relative_to(beside).as_posix() for path in _files(beside)]
    for name in sorted(names, key=lambda name: (last.index(name) + 1 if name in last else 0, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        _flush(beside / name)
        (beside / name).replace(folder / name)
    shutil.rmtree(beside)


def publish(beside: Path, folder: Path) -> None:
    """Gives a sealed checkpoint its name; one that has the name already, of an earlier attempt, goes. A folder that is
    no checkpoint of ours gets another name."""
    give_rights(beside)
    old = folder.with_name(f"{OLD}{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists() and (folder / MANIFEST).is_file():
        folder.rename(old)
    elif folder.exists():
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        aside = next(name for name in names if not name.exists())
        folder.rename(aside)
        logger.warning(f"{folder} has no {MANIFEST}, so it is no checkpoint of this program: it is now {aside}.")
    beside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
    discard_replaced(folder.parent)


def discard_replaced(output_dir: Path) -> None:
    """Deletes the run that lies aside: the one in its place has a checkpoint, or its final student."""
    old = output_dir / f"{OLD}run"
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed
    if (output_dir / REPLACED).is_dir():
        (output_dir / REPLACED).rename(old)  # killed meanwhile, no part of it is left that looks like a run
        shutil.rmtree(old, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, {expected['bytes']} were written"
            if _digest(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was not finished"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    return None


def of_run(output_dir: str | os.PathLike) -> list[Path]:
    """A run's folders `checkpoint-N`, by N."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def last_whole(output_dir: str | os.PathLike) -> Path | None:
    """The last whole checkpoint of a run; damaged ones after it are named and passed over."""
    for old in Path(output_dir).glob(f"{OLD}checkpoint-*"):  # killed before another had its name
        if not (folder := old.with_name(old.name.removeprefix(OLD))).exists():
            old.rename(folder)
    for folder in reversed(of_run(output_dir)):
        wrong = damage(folder)
        if wrong is None:
            return folder
        logger.warning(f"{folder} is damaged and passed over: {wrong}.")
    return None


def to_go_on_from(asked: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The whole checkpoint that a run goes on from; None where it begins.

    Args:
        asked: a checkpoint's folder; True for the last whole one in `output_dir`; None or False for none.

    Raises:
        NotResumable: it is damaged, or there is none.
    """
    if not asked:
        return None
    if asked is True:
        folder = last_whole(output_dir)
        if folder is None:
            raise NotResumable(f"There is no whole checkpoint in {output_dir} to go on from.")
        return str(folder)
    wrong = damage(Path(asked))
    if wrong is not None:
        raise NotResumable(
            f"{asked} is damaged: {wrong}. Resume from the one before it; `--resume_from_checkpoint last` finds it."
        )
    return str(asked)


def cannot_write(what: str, error: Exception, output_dir: str | os.PathLike) -> OSError:
    """An error that says which checkpoint there is where the disk refuses another."""
    before = of_run(output_dir)
    return OSError(
        f"{what} could not be written: {error_line(error)}. The last checkpoint is "
        f"{before[-1] if before else 'none'}: free the disk, then go on by --resume_from_checkpoint last."
    )


def error_line(error: Exception) -> str:
    """The error's type and message, short enough for a sentence."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def rotate(output_dir: str | os.PathLike, limit: int | None, newest: Path, best: str | None) -> None:
    """Deletes the oldest checkpoints over the limit, by their steps: clocks are set back. Never the one just written,
    which is whole, nor the best, nor what has no manifest, which this program did not write."""
    kept = {newest} if best is None else {newest, Path(best)}
    older = [folder for folder in of_run(output_dir) if folder not in kept and (folder / MANIFEST).is_file()]
    for folder in older[: max(0, len(older) + len(kept) - limit)] if limit else []:
        shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def _flush(path: Path) -> None:
    """Writes what the system still holds of a file, or of a folder's names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
