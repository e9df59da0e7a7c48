"""What a student has of other models: whose towers, which of their layers and word pieces, under which licence."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from modeling_dsmd import DSMDModel
from rows.files import shown_name

from .student_arguments import StudentArguments
from .tower_layers import cut_student, depth_of, is_staged, kept_layers
from .vocabulary import check_trimming, pieces_to_keep, trim_embeddings, trim_tokenizer


TEACHER = "teacher"  # as the name of a tower: the teacher's own
MODALITIES = ("vision", "text")
Source = tuple[str, str | None]  # a folder or Hub id, and its revision there
NOT_FOR_ALL = re.compile(r"\bnc\b|research|non-?commercial|amlr", re.IGNORECASE)  # in the name of a licence


def teacher_source(teachers: list[Source], description: dict | None) -> Source | None:
    """The teacher whose towers a student may have; None where there is none, or there are several.

    Args:
        teachers: those that the run names.
        description: what the dataset says of the teacher of its features; None where it says nothing, or is not read
            yet.
    """
    if description is None:
        return teachers[0] if len(teachers) == 1 else None
    named = [teacher for teacher in teachers if shown_name(teacher[0]) == description["id"]]
    return named[0] if named else (description["id"], description.get("revision"))


def tower_source(args: StudentArguments, modality: str, teacher: Source | None) -> Source:
    """Where a pre-trained tower comes from.

    Args:
        teacher: the teacher of the run, where there is one.

    Raises:
        ValueError: it is to be the teacher's, and the run has not one.
    """
    name = getattr(args, f"{modality}_model_name_or_path")
    if name != TEACHER:
        return name, None
    if teacher is None:
        raise ValueError(
            f"{modality}_model_name_or_path=teacher: this run has not one teacher. Name it by "
            "teacher_model_name_or_path, or a dataset that has its features, or name another model here."
        )
    return teacher


def tower_config(args: StudentArguments, modality: str, teacher: Source | None) -> PreTrainedConfig:
    """The configuration of a pre-trained tower as it comes, not cut.

    Raises:
        ValueError: it is to be the teacher's, which cannot be found by its name, or has no tower of this kind.
        OSError: there is no such model.
    """
    name, revision = tower_source(args, modality, teacher)
    of_teacher = getattr(args, f"{modality}_model_name_or_path") == TEACHER
    try:
        whole = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        if not of_teacher:
            raise
        raise ValueError(
            f"{modality}_model_name_or_path=teacher: the teacher is {name!r}, which is not found as a model of "
            f"transformers: give the folder or Hub id of its tower instead. ({str(error).strip().splitlines()[0]})"
        ) from error
    config = getattr(whole, f"{modality}_config", None)
    if config is None and of_teacher:
        raise ValueError(
            f"{modality}_model_name_or_path=teacher: {name} ({type(whole).__name__}) has no {modality} tower of its "
            "own: name another model."
        )
    return whole if config is None else config


def kept_of(args: StudentArguments, modality: str, config: PreTrainedConfig) -> list[int] | None:
    """Which layers of a pre-trained tower the student keeps; None for all of them.

    Args:
        config: of the whole tower.
    """
    number, indices = getattr(args, f"{modality}_layers"), getattr(args, f"{modality}_layer_indices")
    if number is None and indices is None:
        return None
    kept = kept_layers(config, modality, number, indices)
    return None if len(kept) == depth_of(config) else kept


def load_tokenizer(args: StudentArguments, teacher: Source | None) -> PreTrainedTokenizerBase:
    """The tokenizer that a pre-trained text tower comes with."""
    name, revision = tower_source(args, "text", teacher)
    return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)


def cut_to_size(
    model: DSMDModel, tokenizer: PreTrainedTokenizerBase, args: StudentArguments, captions: Iterable[str]
) -> tuple[DSMDModel, PreTrainedTokenizerBase]:
    """A student of whole pre-trained towers, and its tokenizer, made as small as the arguments say.

    Args:
        captions: of the training split, read only where the vocabulary is trimmed.
    """
    found = {modality: getattr(model.config, f"{modality}_config") for modality in MODALITIES}
    layers = {modality: kept_of(args, modality, config) for modality, config in found.items()}
    layers = {modality: kept for modality, kept in layers.items() if kept is not None}
    if layers:
        model = cut_student(model, layers)
    if args.trim_vocabulary is not None:
        check_trimming(tokenizer, args.trim_vocabulary)
        kept = pieces_to_keep(tokenizer, captions, args.trim_vocabulary)
        tokenizer = trim_tokenizer(tokenizer, kept)
        trim_embeddings(model.text_model, kept)
    return model, tokenizer


@torch.no_grad()
def take_projections(model: DSMDModel, args: StudentArguments, teacher: Source | None) -> list[str]:
    """Lets the student project as the teacher does, behind each tower that is the teacher's.

    A whole tower then gives the teacher's features from the first step on. It is left out where the teacher (a DSMD
    student, or of CLIP's kind) pools otherwise, or its projection is of another shape.

    Args:
        model: the student; its projections are changed in place.
        args: which towers it has.
        teacher: the one of the run.

    Returns:
        The modalities whose projection is the teacher's now.
    """
    whose = [modality for modality in MODALITIES if getattr(args, f"{modality}_model_name_or_path") == TEACHER]
    if not whose:
        return []
    name, revision = teacher
    origin = {"revision": revision, "trust_remote_code": args.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **origin)  # first, a small file: the weights may be gigabytes
    pooling = {modality: getattr(config, f"{modality}_pooling", None) or "pooler" for modality in whose}  # as CLIP
    whose = [modality for modality in whose if pooling[modality] == getattr(args, f"{modality}_pooling")]
    if not whose or getattr(config, "projection_dim", None) not in (None, model.config.projection_dim):
        return []
    source = AutoModel.from_pretrained(name, dtype=torch.float32, **origin)
    taken = []
    for modality in whose:
        projection = "visual_projection" if modality == "vision" else "text_projection"
        theirs, own = getattr(source, projection, None), getattr(model, projection)
        plain = isinstance(theirs, torch.nn.Linear) and theirs.bias is None
        if plain and theirs.weight.shape == own.weight.shape:
            own.weight.copy_(theirs.weight)
            taken.append(modality)
    return taken


def describe_origin(args: StudentArguments, teacher: Source | None, model: DSMDModel) -> tuple[list[str], str | None]:
    """For the card: what was cut from what, a sentence each; and the licence that a tower of the teacher brings.

    Args:
        model: the student that was made of these arguments.
    """
    sentences, licence = [], None
    for modality in MODALITIES if args.model_name_or_path is None else ():
        given = getattr(args, f"{modality}_model_name_or_path")
        if given is None:
            continue
        (name, _), config = tower_source(args, modality, teacher), tower_config(args, modality, teacher)
        shown = shown_name(name)
        whose = f"the teacher's, {shown}" if given == TEACHER else shown
        kept = kept_of(args, modality, config)
        if kept is not None:
            count, unit = depth_of(config), "stages" if is_staged(config) else "layers"
            which = f"{', '.join(map(str, kept))} (counted from 0)" if kept else "none, the embeddings alone"
            sentences.append(f"The {modality} tower was cut from {whose}: of its {count} {unit} it has {which}.")
        elif given == TEACHER:
            sentences.append(f"The {modality} tower started as {whose}.")
        if modality == "text" and args.trim_vocabulary is not None:
            own = model.config.text_config.vocab_size
            sentences.append(f"Of the {config.vocab_size:,} word pieces of {shown} {own:,} were kept.")
    if sentences and TEACHER in (args.vision_model_name_or_path, args.text_model_name_or_path):
        name, revision = teacher
        shown = shown_name(name)
        licence, told = model_license(name, revision)
        limits = " It allows research or non-commercial use only, and so does this model's."
        sentences.append(
            f"The licence of {shown} is {told or 'not stated on its card'}; it holds for what was taken of it."
            + limits * bool(told and NOT_FOR_ALL.search(told))
        )
    return sentences, licence


def license_of_teacher(teacher: Source | None, args: TrainingArguments) -> str | None:
    """The licence on a teacher's card, as a reader is told of it; only a run that is pushed asks the Hub for it."""
    if teacher is None or not (args.push_to_hub or os.path.isdir(teacher[0])):
        return None
    return model_license(*teacher)[1]


def model_license(name: str, revision: str | None) -> tuple[str | None, str | None]:
    """The licence on the card of a model, its folder's README.md or the Hub's: as the Hub's list has it, and as a
    reader is told of it, which differ where it is none of that list. None and None where no card states one.
    """
    try:
        if os.path.isdir(name):
            card = os.path.join(name, "README.md")
        else:
            card = hf_hub_download(name, "README.md", revision=revision)
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that is not well-formed, states nothing
        return None, None
    stated = data.license
    if isinstance(stated, list):
        return "other", ", ".join(map(str, stated))
    if stated == "other":
        return stated, str(getattr(data, "license_name", None) or stated)
    return (str(stated), str(stated)) if stated else (None, None)
