"""Replaces an old run by a new one: the old one is moved aside, and deleted once the new one has a result."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from .checkpoints import BESIDE, MANIFEST, OLD, REPLACED, WRITING, discard_replaced, of_run
from .hub_push import RESUME_FILE


LOCK = "_lock"  # in output_dir, while a run writes there
COMMAND_FILE = "_command.json"  # in output_dir: a digest of the run's command, and the weights that it ended with
MOVING = "_moving"  # while the old run is moved aside or back
ARGUMENTS_FILE = "training_args.json"
# Files that transformers saves with any model, and trackers in a run's folder.
FILES = (
    "README.md", "config.json", ARGUMENTS_FILE, "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja", "emissions.csv",
    "modules.json", "sentence_bert_config.json",
)  # fmt: skip
CODE_NAMED_IN = ("config.json", "processor_config.json", "tokenizer_config.json")
EVENTS = "events.out.tfevents.*"
# What stands in a run's folder only while something is written or moved.
OF_THE_MOMENT = re.compile(
    rf"{LOCK}|{BESIDE}(-\d+)?|{WRITING}|_push-\d+|{OLD}.+|{re.escape(COMMAND_FILE)}(\.part)?|{REPLACED}|{MOVING}"
)


def strangers(folder: Path, own: Sequence[str]) -> list[str]:
    """Files in a run's folder that no run leaves there, as sorted relative paths: of a checkpoint those that its
    manifest does not name, others judged by their names.

    Args:
        own: patterns (relative paths) of the files that a run of this method leaves beside those of any run.
    """
    sealed = {name for checkpoint in of_run(folder) for name in _sealed(checkpoint)}
    names = {name for name in sealed if "/" not in name and not RESUME_FILE.fullmatch(name)} | _code(folder)
    found = []
    for path in folder.iterdir():
        found += _strangers_of(path, [*FILES, *own, *map(_literally, names)])
    return sorted(path.relative_to(folder).as_posix() for path in found)


def is_a_runs(folder: Path) -> bool:
    """Whether the folder has the mark of a run of ours: its command, its arguments, or a checkpoint that is sealed."""
    marks = (COMMAND_FILE, ARGUMENTS_FILE)
    return any((folder / name).is_file() for name in marks) or any(_sealed(path) for path in of_run(folder))


def move_aside(folder: Path) -> None:
    """Moves the run in the folder into `_replaced`. After a kill midway, `put_back` finds what was moved."""
    moving = folder / MOVING
    moving.mkdir()
    for path in _content(folder):
        path.rename(moving / path.name)
    moving.rename(folder / REPLACED)


def put_back(folder: Path, own: Sequence[str]) -> bool:
    """Undoes `move_aside` where the new run has left nothing to go on from; returns whether it did.

    Args:
        own: see [`strangers`].

    Raises:
        ValueError: a file that no run leaves lies in the way.
    """
    replaced, moving = folder / REPLACED, folder / MOVING
    if not moving.is_dir():
        if not replaced.is_dir():
            return False
        foreign = {name.split("/")[0] for name in strangers(folder, own)}
        in_the_way = sorted(foreign & {path.name for path in replaced.iterdir()})
        if in_the_way:
            raise ValueError(
                f"{folder / in_the_way[0]} is in the way of the run that was there before, which goes back from "
                f"{replaced}: move it."
            )
        for path in _content(folder):  # of the new run
            if path.name not in foreign:
                _remove(path)
        replaced.rename(moving)
    for path in moving.iterdir():
        path.rename(folder / path.name)
    moving.rmdir()
    print(f"The run that was to be replaced is back in {folder}: the one in its place had left nothing to go on from.")
    return True


def settle(folder: Path, own: Sequence[str], goes_on: bool) -> None:
    """Finishes what a start left undone that died while it replaced a run: the old run goes or comes back.

    Args:
        own: see [`strangers`].
        goes_on: the new run is resumed; where it has no checkpoint, it begins again and the old one stays aside.
    """
    if of_run(folder) or (folder / "config.json").is_file():  # the new run's, which is whole
        if not (folder / MOVING).is_dir():
            discard_replaced(folder)
            return
    if not (goes_on and (folder / REPLACED).is_dir()):
        put_back(folder, own)


def _content(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in (LOCK, REPLACED, MOVING)]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _strangers_of(path: Path, own: Sequence[str]) -> list[Path]:
    """The strangers among one entry of a run's folder and what is in it."""
    if path.is_symlink():
        return [path]
    if OF_THE_MOMENT.fullmatch(path.name):
        return []
    if not path.is_dir():
        return [] if _matches(path.name, own) else [path]
    if re.fullmatch(r"checkpoint-\d+", path.name):
        sealed = _sealed(path)
        names = {MANIFEST, *sealed}
        return [path] if not sealed else [file for file in _files(path) if _name(file, path) not in names]
    if path.name == "runs":
        return [file for file in _files(path) if file.is_symlink() or not fnmatch(file.name, EVENTS)]
    inside = [file for file in _files(path) if file.is_symlink() or not _matches(_name(file, path.parent), own)]
    return inside if any(pattern.startswith(f"{path.name}/") for pattern in own) else [path]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name.removesuffix(".part"), pattern) for pattern in patterns)


def _literally(name: str) -> str:
    """A pattern of `fnmatch` that matches this name alone."""
    return re.sub(r"([\[*?])", r"[\1]", name)


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]


def _sealed(checkpoint: Path) -> list[str]:
    """The files that a checkpoint's manifest names; none where it cannot be read."""
    return list(_json(checkpoint / MANIFEST))


def _code(folder: Path) -> set[str]:
    """Names of the files of code that travel with a student: those that `auto_map` names, and what they import."""
    found = set()
    for name in CODE_NAMED_IN:
        auto_map = _json(folder / name).get("auto_map")
        for places in auto_map.values() if isinstance(auto_map, dict) else ():
            for place in places if isinstance(places, list) else [places]:
                module = folder / f"{str(place).rpartition('--')[2].split('.')[0]}.py"
                if module.is_file():
                    found |= {module.name, *(Path(file).name for file in get_relative_import_files(module))}
    return found


def _json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
