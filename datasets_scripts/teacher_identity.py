"""Which teacher made features: told by its weights and preprocessing, whatever its folder or card says."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.hf_api import RepoFile

from rows.files import shown_name
from teachers.open_clip_teacher import HUB_PREFIX


# As transformers, PEFT and open_clip name them. What lies beside them under another name, such as a copy in half
# precision or for another library, is not read.
WEIGHTS = re.compile(r"(adapter_|open_clip_)?(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)")
SETTINGS = (".json", ".txt", ".model", ".py", ".spm", ".tiktoken")  # configuration, preprocessing, tokenizer, code
# Beside the model: one folder deep those of sentence-transformers' modules.
PLACE = re.compile(r"([0-9][^/]*/)?[^/]+")
NOT_OF_FEATURES = re.compile(r"(.*_(results|args)|trainer_state|LICENSE|requirements)\.(json|txt)")


def teacher_fingerprint(model_id: str, revision: str | None) -> str:
    """A digest of a teacher's files that features follow from: weights, configuration, preprocessing, code.

    The same for a folder and for the same files on the Hub, of which the weights are not downloaded. A card, results
    and logs are no part of it, nor are names, commits and devices.

    Raises:
        OSError: it is not there or cannot be reached.
    """
    model_id = model_id.removeprefix(HUB_PREFIX)
    folder = Path(model_id)
    if folder.is_dir():
        digests = _of_folder(folder)
    else:
        names = [f"*{ending}" for ending in SETTINGS]
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=names))
        try:
            listed = [*HfApi().list_repo_tree(model_id, recursive=True, revision=folder.name)]
        except Exception as error:  # without a network: of its clients, whose errors have no common type
            digests = _of_folder(folder)
            if not any(WEIGHTS.fullmatch(PurePosixPath(name).name) for name in digests):
                raise OSError(f"{model_id} cannot be reached, and its weights are not in the cache") from error
        else:
            files = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
            digests = {}
            for name in _that_count(files):
                stored = files[name].lfs
                digests[name] = (
                    _sha256(Path(hf_hub_download(model_id, name, revision=folder.name)))
                    if stored is None
                    else stored.sha256
                )
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        digest.update(f"{name}\n{digests[name]}\n".encode())
    return digest.hexdigest()


def _of_folder(folder: Path) -> dict[str, str]:
    names = [path.relative_to(folder).as_posix() for path in folder.glob("*") if path.is_file()]
    names += [path.relative_to(folder).as_posix() for path in folder.glob("[0-9]*/*") if path.is_file()]
    return {name: _sha256(folder / name) for name in _that_count(names)}


def _that_count(names: Sequence[str]) -> list[str]:
    """Of weights in both formats only safetensors, which is what is loaded."""
    found = []
    for name in names:
        path = PurePosixPath(name)
        if not PLACE.fullmatch(name) or path.name.startswith("."):
            continue
        weights = WEIGHTS.fullmatch(path.name)
        if weights or (path.suffix in SETTINGS and not NOT_OF_FEATURES.fullmatch(path.name)):
            found.append(name)
    safe = {str(PurePosixPath(name).parent) for name in found if name.endswith(".safetensors")}
    return [name for name in found if not (name.endswith(".bin") and str(PurePosixPath(name).parent) in safe)]


def _sha256(path: Path) -> str:
    return _digest_of(path, hashlib.sha256()).hexdigest()


def _digest_of(path: Path, digest):
    """The digest, which has read the file."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest


def earlier_fingerprint(model_id: str, revision: str | None) -> str:
    """What stood for a teacher before: its commit, or a digest of nearly all its files. Older work is found by it."""
    model_id = model_id.removeprefix(HUB_PREFIX)
    folder = Path(model_id)
    if not folder.is_dir():
        return _commit_of(model_id, revision)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("*"), *folder.glob("[0-9]*/*")]):
        is_result = path.name.endswith(("_results.json", "_args.json"))
        if path.is_file() and path.suffix not in (".md", ".png") and not is_result:
            digest.update(path.relative_to(folder).as_posix().encode())
            _digest_of(path, digest)
    return digest.hexdigest()


def _commit_of(model_id: str, revision: str | None) -> str:
    return Path(snapshot_download(model_id, revision=revision, allow_patterns=["*.json"])).name


def without_names(description: dict, *more: str) -> dict:
    """A teacher's description without what says nothing of features: how it is called, its commit, and `more`."""
    parts = description.get("teachers")
    kept = {name: value for name, value in description.items() if name not in ("id", "revision", *more)}
    return kept if parts is None else {**kept, "teachers": [without_names(part, *more) for part in parts]}


def check_same_teachers(description: dict, teachers: Sequence[tuple[str, str | None]], where: str) -> None:
    """Refuses features of other teachers than those named.

    Teachers are compared by their fingerprints. Features that were made without one are compared by the teachers'
    names, and by commits where a revision is asked for; so are those of teachers that cannot be reached.

    Args:
        description: what the column `teacher` says.
        teachers: id and revision of each.
        where: what has the features, for the message.

    Raises:
        ValueError: they are others, saying which.
    """
    of_each = description.get("teachers", [description])
    asked = " + ".join(shown_name(model_id) for model_id, _ in teachers)
    made_by = description.get("id", "an unnamed teacher")
    stored = [part.get("fingerprint") for part in of_each]
    if None not in stored:
        try:
            found = [teacher_fingerprint(*which) for which in teachers]
        except OSError as error:
            print(f"{asked} is compared by name alone with the teacher of {where}: {error}")
        else:
            if found == stored:
                return
            if made_by == asked:
                raise ValueError(
                    f"{where} has features of another {made_by} than this one: weights or preprocessing differ"
                )
    if made_by != asked:
        raise ValueError(f"{where} has features of {made_by}, not of {asked}")
    for part, (model_id, revision) in zip(of_each, teachers):
        if revision is not None and part.get("revision") is not None:
            commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else _commit_of(model_id, revision)
            if commit != part["revision"]:
                raise ValueError(
                    f"{where} has features of {part['id']} at commit {part['revision']}; {revision} is {commit}"
                )
