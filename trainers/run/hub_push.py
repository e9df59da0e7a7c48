"""What goes to the Hub while a student trains, and back: whole revisions, and a push that never stops the training."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory, snapshot_download
from huggingface_hub.utils import _http
from transformers.trainer_utils import HubStrategy

from .checkpoints import copy_sealed, damage, error_line, publish, reseal


logger = logging.getLogger(__name__)

LAST_CHECKPOINT = "last-checkpoint"
# Files of a checkpoint that only resuming needs; the others are the student that `from_pretrained` loads.
RESUME_FILE = re.compile(r"optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|_.*")
# Files of a run's folder that are never pushed: emissions.csv says where on earth the machine stands.
NOT_THE_STUDENTS = ("_*", "checkpoint-*/*", "*.part", "emissions.csv")


def let_workers_fork() -> None:
    """Makes pushes in a thread safe for loader workers, which are forked meanwhile.

    huggingface_hub closes its client in every new process. Where a push has just taken the client's lock, the new
    worker waits for it for ever, and the training for the worker.
    """
    make = _http._GLOBAL_CLIENT_FACTORY  # the user's own, where there is one
    if make.__module__ == __name__:
        return

    def make_client():
        client, process = make(), os.getpid()
        close = client.close
        client.close = lambda: close() if os.getpid() == process else None
        return client

    set_client_factory(make_client)


def snapshot(checkpoint: Path, folder: Path) -> None:
    """The checkpoint's files in a new folder, as hard links where the disk has them: the checkpoint may be rotated
    away before it is pushed. Of the best checkpoint's path on this machine only the name is kept.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir()
    for file in checkpoint.iterdir():
        if file.name == "trainer_state.json":
            state = json.loads(file.read_text())
            state["best_model_checkpoint"] = (
                state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).name
            )
            (folder / file.name).write_text(json.dumps(state, indent=2))
        elif file.is_dir():
            shutil.copytree(file, folder / file.name)
        else:
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy(file, folder / file.name)
    reseal(folder, "trainer_state.json")


def push_checkpoint(
    folder: Path,
    repo_id: str,
    place: str | None,
    message: str,
    revision: str | None,
    private,
    optional: Sequence[str] = (),
) -> None:
    """Pushes a checkpoint in one commit, so that every revision is whole: the student at the root, and all files under
    `place` to resume from. Files of an earlier run are deleted where they would be taken for this run's.

    Args:
        folder: made by [`snapshot`]; removed at the end.
        place: `last-checkpoint` or `checkpoint-N` in the repository; None to push the student alone.
        optional: names of files that not every student has.
    """
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        operations = []
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            name = path.relative_to(folder).as_posix()
            if not RESUME_FILE.fullmatch(name):
                operations.append(CommitOperationAdd(name, path))
            if place is not None:
                operations.append(CommitOperationAdd(f"{place}/{name}", path))
        added = {operation.path_in_repo for operation in operations}
        operations += [
            CommitOperationDelete(name)
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in added and (name in optional or (place is not None and name.startswith(f"{place}/")))
        ]
        api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except Exception as error:  # of any class: no failure of the Hub, the network or the disk may end a training
        logger.warning(
            f"Push to {repo_id} failed ({message}): {error_line(error)}. Training goes on; the next save pushes."
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def push_run(
    folder: str, repo_id: str, message: str, revision: str | None, private: bool | None, optional: Sequence[str] = ()
):
    """Pushes the finished run's folder without its checkpoints. A failure is printed with the command to complete it.

    Args:
        optional: names of files that not every student has: an earlier run's are deleted, this run's own stay.

    Returns:
        The commit, or None where the push failed.
    """
    try:
        forget_host(Path(folder))
        api = HfApi()
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            ignore_patterns=list(NOT_THE_STUDENTS),  # a copy: the call appends to it
            delete_patterns=list(optional),
        )
    except Exception as error:  # as in `push_checkpoint`
        excluded = " ".join(f"--exclude {shlex.quote(pattern)}" for pattern in NOT_THE_STUDENTS)
        at = f" --revision {shlex.quote(revision)}" if revision else ""
        at += " --private" if private else ""
        print(
            f"\nThe push to {repo_id} failed: {error_line(error)}\nNothing is lost: the student is in {folder}. "
            f"This completes the push:\n  hf upload {repo_id} {shlex.quote(str(folder))} .{at} {excluded}"
            + "".join(f" --delete {shlex.quote(name)}" for name in optional)
        )
        return None


def forget_host(folder: Path) -> None:
    """Takes this machine's name out of the names of TensorBoard's folders and files."""
    host = socket.gethostname()
    for path in sorted((folder / "runs").rglob("*"), reverse=True):  # a folder after what it holds
        name = path.name.removesuffix(f"_{host}").replace(f".{host}.", ".")
        if name != path.name:
            path.rename(path.with_name(name))


def pushed_place(strategy: HubStrategy, checkpoint: str) -> str | None:
    """The repository's folder for a checkpoint's files to resume from; None where they are not pushed."""
    if strategy == HubStrategy.CHECKPOINT:
        return LAST_CHECKPOINT
    return Path(checkpoint).name if strategy == HubStrategy.ALL_CHECKPOINTS else None


def fetch_last_checkpoint(repo_id: str, output_dir: str) -> str:
    """Downloads `last-checkpoint` of a repository as the run's own `checkpoint-N`, and returns that folder.

    The best checkpoint so far may be another one, which is not on the Hub: then it is forgotten which was the best.

    Raises:
        ValueError: the repository has no `last-checkpoint`, or a damaged one.
    """
    source = Path(snapshot_download(repo_id, allow_patterns=[f"{LAST_CHECKPOINT}/*"])) / LAST_CHECKPOINT
    if not (source / "trainer_state.json").is_file():
        raise ValueError(
            f"{repo_id} has no {LAST_CHECKPOINT} to go on from: it is pushed with --hub_strategy checkpoint."
        )
    wrong = damage(source)
    if wrong is not None:
        raise ValueError(
            f"The {LAST_CHECKPOINT} of {repo_id} is damaged: {wrong}. Try again, or go on from a checkpoint on the "
            "machine that pushed it: --resume_from_checkpoint last."
        )
    state = json.loads((source / "trainer_state.json").read_text())
    folder = Path(output_dir) / f"checkpoint-{state['global_step']}"
    best = state["best_model_checkpoint"] and Path(output_dir) / Path(state["best_model_checkpoint"]).name
    if best and best != folder and not best.is_dir():
        logger.warning(f"The best checkpoint so far, {best.name}, is not in {repo_id}: the next best one counts.")
        best = state["best_metric"] = state["best_global_step"] = None
    state["best_model_checkpoint"] = best and str(best)
    beside = folder.with_name(f"_{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    copy_sealed(source, beside)
    (beside / "trainer_state.json").write_text(json.dumps(state, indent=2))
    reseal(beside, "trainer_state.json")
    publish(beside, folder)
    return str(folder)
