"""A teacher's features for a whole dataset: made once, by one run at a time, taken up where it was stopped."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from huggingface_hub import HfApi

from datasets_scripts.feature_shards import Encoding, all_left_out, rows_in
from datasets_scripts.left_out import LeftOut
from datasets_scripts.opening import license_of
from datasets_scripts.teacher_dataset import assemble, assemble_columns, figures_table
from datasets_scripts.teacher_features import encode_dataset
from datasets_scripts.teacher_identity import earlier_fingerprint, teacher_fingerprint, without_names
from rows.files import named, shown_name, write_whole
from rows.teacher_columns import TEACHER_COLUMNS
from teachers import Teacher, load_teacher
from trainers.run.distributed import usable_cores
from trainers.run.locking import alone
from trainers.teacher_pca import PCA_FILE


# Files that this program writes into the finished folder, and into the partial one.
OF_OUTPUT = re.compile(rf"README\.md|{re.escape(PCA_FILE)}|data/.+-\d{{5}}-of-\d{{5}}\.parquet")
OF_PARTIAL = re.compile(r"(settings\.json|.+-\d{5}\.(parquet|npz|json))(\.part)?|(dataset|replaced)/.*")


def make_teacher_features(
    rows: datasets.DatasetDict | datasets.IterableDatasetDict,
    teachers: list[Teacher],
    identity: dict,
    output: Path,
    encoding: Encoding,
    source: str,
    num_workers: int,
    overwrite: bool = False,
    license: str | None = None,
    skip_broken: bool = False,
    max_skipped: float | None = None,
    earlier: Callable[[], list[str]] | None = None,
    columns_only: bool = False,
) -> None:
    """Writes a dataset with teacher features; the work of an earlier, stopped call is taken up.

    Runs on every process of `accelerate launch`. Until all is done the files stand in `{output}.partial`.

    Args:
        rows: the splits, map-style or streamed: `image`, `captions`, `image_id` and any others.
        teachers: one, or several whose features are joined.
        identity: what tells these rows and teachers from others, see [`identity_of`]: partial work is taken up only
            with the same.
        output: a folder that does not exist, or is replaced with `overwrite`.
        encoding: how features are made and stored.
        source: what the rows are, for the card.
        num_workers: processes that decode and tokenise.
        overwrite: replace `output`, and start afresh where the partial work was done with other settings.
        license: of the data, for the card.
        skip_broken: leave out rows whose image or captions cannot be used, listed in `{output}.broken.txt`.
        max_skipped: the largest share of rows that `skip_broken` leaves out, in [0, 1]; None: any.
        earlier: the [`earlier_fingerprint`] of each teacher, by which work that was begun before is known.
        columns_only: write what [`join_columns`] reads, without the images; `rows` are map-style.

    Raises:
        ValueError: `output` exists, or holds more than this program writes, or another process is at work on it, or
            the partial work there was done with other settings; see [`encode_dataset`].
    """
    state = PartialState()
    partial = output.with_name(output.name + ".partial")
    described = describe_teachers(teachers, encoding, identity["teacher files"])
    settings = json.loads(json.dumps({**identity, "teacher": described, **asdict(encoding)}))
    output.parent.mkdir(parents=True, exist_ok=True)
    lock_file = partial.with_name(f"{partial.name}.lock")
    with alone(partial, lock_file) if state.is_main_process else nullcontext():
        if state.is_main_process and (partial / "replaced").is_dir() and not output.exists():
            os.rename(partial / "replaced", output)  # of a run that was killed between its two last renames
        if output.exists() and not overwrite:
            raise ValueError(f"{output} exists: name another --output_dir, or replace it with --overwrite_output_dir.")
        if output.exists() and state.is_main_process:
            check_replaceable(output)
        if state.is_main_process:
            _take_up(partial, settings, overwrite, earlier)
        state.wait_for_everyone()
        # As it was begun: under another name of the teacher's folder, the rows must still say one thing.
        described = json.loads((partial / "settings.json").read_text())["teacher"]
        how = (num_workers, skip_broken, columns_only)
        files = encode_dataset(rows, teachers, json.dumps(described), encoding, partial, *how)
        state.wait_for_everyone()
        if state.is_main_process:
            kept = {split: sum(rows_in(partial, split, i) for i in range(count)) for split, count in files.items()}
            lines, images, dropped = all_left_out(partial, files)
            out = LeftOut(report_of(output), skip_broken, max_skipped, lines, [], images)
            out.check(sum(kept.values()))
            if empty := [split for split, count in kept.items() if not count]:
                raise ValueError(f"no row is left of the {', '.join(empty)} split: all are listed in {out.report}")
            if columns_only:
                figures = assemble_columns(partial, files, described, rows, encoding.shard_rows)
            else:
                figures = assemble(partial, files, described, source, license, encoding.int8, out.on_card())
            # From here to the end a kill loses nothing: the files under `partial` are still there.
            if output.exists():
                check_replaceable(output)  # again: encoding took its time
                shutil.rmtree(partial / "replaced", ignore_errors=True)  # left by an earlier replacement
                os.rename(output, partial / "replaced")
            os.rename(partial / "dataset", output)
            _discard(partial)
            print(f"\n{figures_table(figures)}\n" if figures else "")
            out.say(sum(kept.values()))
            print(f"{dropped:,} empty captions dropped\n" if dropped else "", end="")
            if columns_only:
                size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e6
                print(f"The features are kept in {output}, {size:,.1f} MB; `rm -r {output.parent}` clears all such")
    state.wait_for_everyone()


def check_replaceable(output: Path) -> None:
    """Refuses to replace, or to push, what [`make_teacher_features`] did not write.

    Raises:
        ValueError: it is no dataset with teacher features, or more than that.
    """
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if _is_leaf(path)]
    foreign = sorted(name for name in files if not OF_OUTPUT.fullmatch(name))
    parquet = [name for name in files if name.endswith(".parquet")]
    foreign = foreign or [name for name in sorted(parquet) if not _has_features(output / name)]
    if foreign or not parquet:
        what = f"holds {named(foreign)}, which" if foreign else "exists and"
        raise ValueError(
            f"{output} {what} was not made by this program: nothing was deleted; name another --output_dir, or move "
            "that away."
        )


def _is_leaf(path: Path) -> bool:
    return path.is_symlink() or not path.is_dir() or not any(path.iterdir())


def _has_features(path: Path) -> bool:
    try:
        return {*TEACHER_COLUMNS, "teacher"} <= set(pq.read_schema(path).names)
    except (OSError, pa.ArrowInvalid):
        return False


def identity_of(rows: datasets.DatasetDict | datasets.IterableDatasetDict, name: str, teachers: list[str]) -> dict:
    """What tells rows and teachers from others: fingerprints of the splits, and of the teachers' files.

    Args:
        rows: the splits. A stream has no fingerprint: its files stand for it, or the dataset's commit on the Hub.
        name: as given to [`open_dataset`].
        teachers: [`teacher_fingerprint`] of each.
    """
    if isinstance(rows, datasets.DatasetDict):
        return {"rows": {split: part._fingerprint for split, part in rows.items()}, "teacher files": teachers}
    if Path(name).exists():
        found = [(path, path.stat()) for path in sorted(Path(name).resolve().rglob("*")) if path.is_file()]
        which = [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in found]
    else:
        which = [name, HfApi().dataset_info(name).sha]
    columns = {split: str(part.features) for split, part in rows.items()}
    return {"rows": which, "columns": columns, "teacher files": teachers}


def report_of(output: Path) -> Path:
    """The file that lists the rows which were left out of a dataset."""
    return output.with_name(f"{output.name}.broken.txt")


def describe_teachers(teachers: list[Teacher], encoding: Encoding, fingerprints: list[str]) -> dict:
    """What the column `teacher` says: one teacher's description, or those of several and how they are joined."""
    described = [
        {**teacher.describe(), "fingerprint": fingerprint} for teacher, fingerprint in zip(teachers, fingerprints)
    ]
    stored = {"stored_as": "int8 with a scale a row" if encoding.int8 else "float16"}
    if encoding.image_size is not None:
        stored["images"] = f"stored with no side above {encoding.image_size} pixels; the teacher saw them whole"
    if len(described) == 1:
        return {**described[0], **stored}
    return {
        "id": " + ".join(teacher["id"] for teacher in described),
        "dim": sum(teacher["dim"] for teacher in described),
        "teachers": described,
        "weights": encoding.weights,
        "joined": "each normalised and scaled by the root of its weight: a dot product is the mean of the cosines",
        **stored,
    }


def cached_teacher_features(
    rows: datasets.DatasetDict,
    teachers: list[tuple[str, str | None]],
    weights: list[float],
    source: str,
    trust_remote_code: bool,
    skip_broken: bool = False,
    max_skipped: float | None = None,
    before_teacher: Callable[[], int | None] | None = None,
) -> Path:
    """Folder of the rows' teacher features, for [`join_columns`], made unless an earlier run has made them.

    They are kept in the cache of `datasets`, by the fingerprints of rows and teacher and the dtype.

    Args:
        teachers: id and revision of each.
        weights: of each, summing to 1.
        source: what the rows are, for the card.
        skip_broken, max_skipped: see [`make_teacher_features`].
        before_teacher: called before the teachers are loaded, where they are; returns the width that the student was
            told to have, or None.

    Raises:
        ValueError: the student would be wider than the teacher; or rows cannot be used, now or when the features were
            made, and are not to be skipped or are too many.
    """
    state = PartialState()
    encoding = Encoding(weights=weights)
    identity = identity_of(rows, source, [teacher_fingerprint(*which) for which in teachers])
    folder = _cache_folder(identity, encoding)
    if not folder.is_dir():
        earlier = {**identity, "teacher files": [earlier_fingerprint(*which) for which in teachers]}
        before = _cache_folder(earlier, encoding)
        folder = before if before.is_dir() or before.with_name(f"{before.name}.partial").is_dir() else folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.run")  # a second run of the same waits for the first, then finds its folder
    _acquire_together(lock, state)
    try:
        if not folder.is_dir():
            width = None if before_teacher is None else before_teacher()
            settings = {"dtype": default_dtype(), "device": state.device, "trust_remote_code": trust_remote_code}
            loaded = [load_teacher(name, revision, **settings) for name, revision in teachers]
            widest = sum(teacher.dim for teacher in loaded)
            if width is not None and width > widest:
                raise ValueError(
                    f"projection_dim={width} is more than the {widest} of the teacher's features: "
                    f"train a student with --projection_dim {widest} or less, or take a wider teacher."
                )
            make_teacher_features(
                rows,
                loaded,
                identity,
                folder,
                encoding,
                shown_name(source),
                default_workers(),
                license=license_of(rows, source),
                skip_broken=skip_broken,
                max_skipped=max_skipped,
                earlier=lambda: [earlier_fingerprint(*which) for which in teachers],
                overwrite=True,  # of work that was begun otherwise there: nobody has a folder to name
                columns_only=True,
            )
            del loaded
            if state.device.type == "cuda":
                torch.cuda.empty_cache()
        elif report_of(folder).is_file():
            lines = report_of(folder).read_text(encoding="utf-8").splitlines()
            out = LeftOut(report_of(folder), skip_broken, max_skipped, lines, [])
            out.check(sum(map(len, rows.values())) - len(lines))
            if state.is_main_process:
                out.say(sum(map(len, rows.values())) - len(lines))
    finally:
        lock.release()
    return folder


def _cache_folder(identity: dict, encoding: Encoding) -> Path:
    key = json.dumps([identity, str(default_dtype()), asdict(encoding)], sort_keys=True)
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE) / "dsmd_teacher_features" / name


def _acquire_together(lock: FileLock, state: PartialState) -> None:
    """The main process takes the lock. All meet after each try, or the others would give up on it."""
    held = [False]
    while not held[0]:
        if state.is_main_process:
            with suppress(Timeout):
                lock.acquire(timeout=60)
                held = [True]
        broadcast_object_list(held)


def default_dtype() -> torch.dtype:
    return torch.bfloat16 if PartialState().device.type == "cuda" else torch.float32


def default_workers() -> int:
    """Loader workers of a process: its share of the cores, 8 at most."""
    return max(1, min(8, usable_cores() // PartialState().num_processes))


def _discard(partial: Path) -> None:
    """Renames the partial folder, then removes it: a kill leaves nothing that looks like work to take up.

    Raises:
        ValueError: it holds what this program did not write.
    """
    files = [path.relative_to(partial).as_posix() for path in partial.rglob("*") if _is_leaf(path)]
    foreign = sorted(name for name in files if not OF_PARTIAL.fullmatch(name))
    if foreign:
        raise ValueError(
            f"{partial} is no longer needed, and holds {named(foreign)}, which this program did not write: move that "
            f"away, and remove {partial}."
        )
    removed = _removed(partial)
    os.rename(partial, removed)
    shutil.rmtree(removed)


def _removed(partial: Path) -> Path:
    return partial.with_name(f".{partial.name}.removed")


def _take_up(partial: Path, settings: dict, overwrite: bool, earlier: Callable[[], list[str]] | None = None) -> None:
    """Makes the partial folder, or checks that what it holds was made with the same settings.

    Args:
        earlier: see [`make_teacher_features`].
    """
    if _removed(partial).exists():  # of a run that was killed
        shutil.rmtree(_removed(partial))
    path = partial / "settings.json"
    if partial.exists() and {file.name for file in partial.iterdir()} - {"settings.json.part"}:
        if not path.is_file():
            raise ValueError(f"{partial} is in the way, and is no partial work of this program: move it.")
        before = json.loads(path.read_text())
        before["teacher"], now = without_names(before["teacher"]), dict(settings)
        now["teacher"] = without_names(settings["teacher"])
        if "fingerprint" not in json.dumps(before["teacher"]) and earlier is not None:  # begun before there were any
            now["teacher files"] = earlier()
            now["teacher"] = without_names(settings["teacher"], "fingerprint")
        if before == now:
            return
        if not overwrite:
            differing = [name for name in now if before.get(name) != now[name]]
            raise ValueError(
                f"{partial} holds work with another {', '.join(differing)}: finish it with the settings it was begun "
                "with, remove it, or start afresh with --overwrite_output_dir."
            )
        _discard(partial)
    partial.mkdir(exist_ok=True)
    with write_whole(path) as beside:
        beside.write_text(json.dumps(settings))
