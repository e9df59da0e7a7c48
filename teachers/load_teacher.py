"""One interface over teachers: dual encoders of transformers, sentence-transformers, open_clip; BEiT-3; students."""

from __future__ import annotations

import json
import os

import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

# Importing them registers their classes: our own folders then load without running the code inside.
import modeling_dsmd
import teachers.beit3  # noqa: F401
from rows.texts import text_positions

from .open_clip_teacher import HUB_PREFIX, is_open_clip, load_open_clip
from .teacher import SentenceTransformersTeacher, Teacher


TEXT_SETTINGS = {"padding": "longest", "truncation": True}  # unless the processor's own settings differ
NO_LIMIT = 10**6  # tokens; a tokenizer without a longest text gives its longest as 10**30
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that wrong shapes are listed, not raised


def load_teacher(
    model_id: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """Loads a dual encoder as a teacher.

    A model with a `modules.json` is loaded by sentence-transformers, since its features come from all the modules that
    this file lists, and not from the encoder alone; one with an `open_clip_config.json` and no config of transformers,
    or named by `hf-hub:`, by open_clip; any other model, and a student of ours, by transformers. Weights in an old
    `.bin` are read as tensors only, never unpickled.

    Args:
        model_id: a Hub id or a folder.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights; features are float32 in any case.
        device: where the teacher runs.
        trust_remote_code: let the repository run code of its own.

    Raises:
        ValueError: the model is no dual encoder, or its checkpoint does not hold exactly its weights.
        RuntimeError: the same for the weights of BEiT-3, which checks them itself.
        ImportError: sentence-transformers or open_clip is needed and not installed.
    """
    given, model_id = model_id, model_id.removeprefix(HUB_PREFIX)
    pinned = resolve_revision(model_id, revision)  # one commit for all files
    origin = {"revision": pinned, "trust_remote_code": trust_remote_code}
    source = {
        "id": os.path.basename(os.path.abspath(model_id)) if os.path.isdir(model_id) else given,
        "revision": getattr(pinned, "resolved", None),
    }
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}

    def find(name: str) -> str | None:
        return cached_file(model_id, name, revision=pinned, **quiet)

    modules = find("modules.json")
    if given != model_id or (modules is None and is_open_clip(find)):
        return load_open_clip(model_id, pinned, source, dtype, device, trust_remote_code)
    if modules is not None and not _is_student(find("config.json")):
        with open(modules, encoding="utf-8") as file:
            subfolder = json.load(file)[0]["path"]
        parts = _load_sentence_transformers(model_id, subfolder, origin, dtype, device)
        return SentenceTransformersTeacher(*parts, source, dtype, device)
    return Teacher(*_load_transformers(model_id, origin, dtype), source, dtype, device)


def _is_student(config: str | None) -> bool:
    """Whether a repository with this `config.json` holds a student of ours: it has a `modules.json` for others."""
    if config is None:
        return False
    with open(config, encoding="utf-8") as file:
        return json.load(file).get("model_type") == modeling_dsmd.DSMDConfig.model_type


def _load_transformers(model_id: str, origin: dict, dtype: torch.dtype) -> tuple:
    """Model, image processor, tokenizer, and the keyword arguments of the tokenizer's call."""
    model, info = AutoModel.from_pretrained(model_id, dtype=dtype, **REPORT, **origin)
    errors = []

    def load(auto_class, **settings):
        try:
            return auto_class.from_pretrained(model_id, **settings, **origin)
        except (OSError, ValueError) as error:
            errors.append(str(error).strip().splitlines()[0])

    # PIL's resizing, so that the features do not depend on whether torchvision is installed.
    processor = load(AutoProcessor, backend="pil")
    image_processor = getattr(processor, "image_processor", None) or load(AutoImageProcessor, backend="pil")
    tokenizer = getattr(processor, "tokenizer", None) or load(AutoTokenizer)
    # For a folder without a tokenizer's files transformers makes one that has only special tokens.
    if tokenizer is not None and len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        tokenizer = None
    parts = {
        "get_image_features": getattr(model, "get_image_features", None),
        "get_text_features": getattr(model, "get_text_features", None),
        "an image processor": image_processor,
        "a tokenizer": tokenizer,
    }
    lacking = [name for name, part in parts.items() if part is None]
    if lacking:
        raise ValueError(
            f"{model_id} ({type(model).__name__}) is no dual encoder that can teach: it lacks {', '.join(lacking)}. "
            f"Choose a model such as CLIP or SigLIP, with its processor's files. {' '.join(errors)}"
        )
    _check_weights(model_id, info)
    settings = {**TEXT_SETTINGS, **getattr(processor, "text_kwargs", {})}
    settings["max_length"] = _max_length(model, tokenizer, settings)
    return model, image_processor, tokenizer, settings


def _load_sentence_transformers(
    model_id: str, subfolder: str, origin: dict, dtype: torch.dtype, device: str | torch.device
) -> tuple:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        needed = "pip install -e '.[sentence-transformers]'"
        raise ImportError(f"{model_id} is a sentence-transformers model: {needed}") from error
    model = SentenceTransformer(
        model_id, device=str(device), model_kwargs={"dtype": dtype}, processor_kwargs={"backend": "pil"}, **origin
    )
    lacking = [modality for modality in ("image", "text") if not model.supports(modality)]
    if lacking:
        raise ValueError(
            f"{model_id} is no dual encoder that can teach: this sentence-transformers model embeds "
            f"{', '.join(map(str, model.modalities))}, not {' or '.join(lacking)}."
        )
    encoder = model.transformers_model
    # sentence-transformers does not pass on the loading report. Loading to "meta" reads names and shapes alone.
    _, info = type(encoder).from_pretrained(
        model_id, config=encoder.config, subfolder=subfolder, device_map="meta", **REPORT, **origin
    )
    _check_weights(model_id, info)
    processing = getattr(model[0], "processing_kwargs", {})
    settings = {**TEXT_SETTINGS, **processing.get("text", {})}
    settings["max_length"] = _max_length(encoder, model.tokenizer, settings)
    model[0].processing_kwargs = {**processing, "text": settings}  # shared, so that the teacher can set the padding
    return model, model.processor.image_processor, model.tokenizer, settings


def _check_weights(model_id: str, info: dict) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    # Constant buffers that older releases of transformers saved with the weights.
    counters = ("token_type_ids", "position_ids")
    unexpected = [name for name in wrong.pop("unexpected_keys", []) if not name.endswith(counters)]
    if wrong:
        raise ValueError(
            f"{model_id} does not hold all of the model's weights, so its features would be partly random: {wrong}."
        )
    if unexpected:
        raise ValueError(
            f"{model_id} holds weights that the model has no place for, so it is another model: {unexpected}."
        )


def _max_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: dict) -> int:
    """The longest text, in tokens, that processor, tokenizer and position embeddings all allow."""
    longest = min(settings.get("max_length", NO_LIMIT), tokenizer.model_max_length, text_positions(model))
    if longest >= NO_LIMIT:
        raise ValueError(
            f"Neither the tokenizer nor the configuration of {type(model).__name__} says how long a text may be: "
            "set model_max_length in tokenizer_config.json."
        )
    return longest
