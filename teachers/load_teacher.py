"""One interface over teachers: dual encoders of transformers and sentence-transformers, BEiT-3, our own students."""

from __future__ import annotations

import inspect
import json
import os

import torch
from PIL import Image
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import ModelOutput, cached_file
from transformers.utils.hub import resolve_revision

# Importing them registers their classes: our own folders then load without running the code inside.
import modeling_dsmd  # noqa: F401
import teachers.beit3  # noqa: F401
from rows.columns import LONGEST_CAPTION
from rows.images import to_rgb


TEXT_SETTINGS = {"padding": "longest", "truncation": True}  # where the processor asks for nothing else
NO_LIMIT = 10**6  # a tokenizer that does not know its longest text says 10**30
REPORT = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # wrong sizes too are then listed by name
IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std"),
    *("patch_size", "max_num_patches"),  # NaFlex: the image keeps its shape, cut into so many patches
)


class Teacher:
    """A dual encoder that only embeds; [`load_teacher`] makes one.

    `prepare_*` needs no model and runs in workers (a pickled copy leaves the model behind), `*_features` runs it,
    `embed_*` is both. All features are raw outputs, not normalised.

    Attributes:
        dim: width D of the features.
    """

    def __init__(
        self,
        model: nn.Module,
        image_processor,
        tokenizer: PreTrainedTokenizerBase,
        text_settings: dict,
        source: dict,
        dtype: torch.dtype,
        device: str | torch.device,
    ):
        self.model = model.eval().to(device)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.text_settings = text_settings
        self.source = source
        self.dtype = dtype
        self.device = torch.device(device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._init_inputs()
        text_dim = self._fix_padding()
        self.dim = self.image_features(self.prepare_images([Image.new("RGB", (64, 64), "gray")])).shape[1]
        if text_dim != self.dim:
            raise ValueError(f"{source['id']} is no dual encoder: images have {self.dim} features, texts {text_dim}.")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "model": None}

    def _init_inputs(self) -> None:
        self.prompt = None
        self.image_inputs = set(inspect.signature(self.model.get_image_features).parameters)
        self.text_inputs = set(inspect.signature(self.model.get_text_features).parameters)
        # The Gemma tokenizer of SigLIP 2 carries the flag without obeying it; for those that obey it changes nothing.
        self.lower_case = bool(self.tokenizer.init_kwargs.get("do_lower_case"))

    def _fix_padding(self) -> int:
        """Pads every text to the longest where padding changes a feature: the model then knows only that length.

        It is measured, since neither configuration nor tokenizer says so: SigLIP pools the last position and sees the
        padding; CLIP and BERT do not. Returns the width of the features.
        """
        one, longest = "a", "a " * min(self.text_settings["max_length"], 16)
        alone = self.text_features(self.prepare_texts([one]))
        beside = self.text_features(self.prepare_texts([one, longest]))[:1]
        # Half of the type's digits: rounding stays below, a pooled padding token far above.
        if (alone - beside).norm() > torch.finfo(self.dtype).eps ** 0.5 * beside.norm():
            self.text_settings["padding"] = "max_length"
        return alone.shape[1]

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """CPU tensors for `image_features`, made of N images of any mode, at least one."""
        inputs = self.image_processor(images=[to_rgb(image) for image in images], return_tensors="pt")
        return {name: inputs[name] for name in inputs if name in self.image_inputs}

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """CPU tensors for `text_features`, made of N texts, at least one; what is too long is cut."""
        texts = [text[:LONGEST_CAPTION] for text in texts]
        texts = [text.lower() for text in texts] if self.lower_case else texts
        inputs = self.tokenizer(texts, return_tensors="pt", **self.text_settings)
        return {name: inputs[name] for name in inputs if name in self.text_inputs}

    def image_features(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[N, D]` float32 on the teacher's device."""
        return self._features("image", prepared)

    def text_features(self, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[N, D]` float32 on the teacher's device."""
        return self._features("text", prepared)

    @torch.inference_mode()
    def _features(self, modality: str, prepared: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {}
        for name, value in prepared.items():
            if isinstance(value, torch.Tensor):
                value = value.to(self.device, non_blocking=True)  # first: pinned memory is copied as it is
                value = value.to(self.dtype) if value.is_floating_point() else value
            inputs[name] = value
        return _pooled(self._forward(modality, inputs))

    def _forward(self, modality: str, inputs: dict) -> ModelOutput | torch.Tensor | tuple:
        return getattr(self.model, f"get_{modality}_features")(**inputs)

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """`[N, D]` float32 on the CPU, N = 0 too."""
        return self.image_features(self.prepare_images(images)).cpu() if images else torch.empty(0, self.dim)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """`[N, D]` float32 on the CPU, N = 0 too."""
        return self.text_features(self.prepare_texts(texts)).cpu() if texts else torch.empty(0, self.dim)

    def describe(self) -> dict:
        """What made the features, ready for JSON; the revision is the commit, or None for a folder."""
        image = {name: getattr(self.image_processor, name, None) for name in IMAGE_SETTINGS}
        image = {name: value for name, value in image.items() if value is not None}
        if "resample" in image:
            image["resample"] = Image.Resampling(image["resample"]).name.lower()
        upper, lower = (self.prepare_texts([text]) for text in ("A RED CAR", "a red car"))
        return {
            **self.source,
            "dim": self.dim,
            "parameters": self.parameters,
            "dtype": str(self.dtype).removeprefix("torch."),
            "preprocessing": {
                "image": json.loads(json.dumps({**image, "transparent": "white"}, default=dict)),
                "text": {
                    **{name: self.text_settings[name] for name in ("max_length", "padding")},
                    "lower_case": torch.equal(upper["input_ids"], lower["input_ids"]),
                    **({"prompt": self.prompt} if self.prompt else {}),
                },
            },
        }


class SentenceTransformersTeacher(Teacher):
    """As the model's own `encode`: its default prompt, pooling and further modules are part of the features."""

    def __getstate__(self) -> dict:
        return self.__dict__  # here the model prepares its inputs

    def _init_inputs(self) -> None:
        self.prompt = self.model.prompts.get(self.model.default_prompt_name)

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return self._prepare([to_rgb(image) for image in images])

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return self._prepare([text[:LONGEST_CAPTION] for text in texts])

    def _prepare(self, inputs: list[Image.Image] | list[str]) -> dict[str, torch.Tensor]:
        prepared = self.model.preprocess(inputs, prompt=self.prompt)  # it tells them apart by itself
        return {name: value for name, value in prepared.items() if name != "modality"}

    def _forward(self, modality: str, inputs: dict) -> torch.Tensor:
        return self.model({**inputs, "modality": modality})["sentence_embedding"]


def load_teacher(
    model_id: str,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Teacher:
    """A dual encoder as a teacher.

    A model with a `modules.json` is loaded by sentence-transformers, since what follows its encoder there belongs to
    its features; every other by transformers. Weights in an old `.bin` are read as tensors only, never unpickled.

    Args:
        model_id: a Hub id or a folder.
        revision: branch, tag or commit on the Hub.
        dtype: of the weights; features are float32 in any case.
        trust_remote_code: let the repository run code of its own.

    Raises:
        ValueError: it is no dual encoder, or its checkpoint does not hold exactly the model's weights (RuntimeError
            from BEiT-3, which checks that itself).
        ImportError: sentence-transformers is needed and not installed.
    """
    pinned = resolve_revision(model_id, revision)  # one commit for all files
    origin = {"revision": pinned, "trust_remote_code": trust_remote_code}
    source = {
        "id": os.path.basename(os.path.abspath(model_id)) if os.path.isdir(model_id) else model_id,
        "revision": getattr(pinned, "resolved", None),
    }
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    modules = cached_file(model_id, "modules.json", revision=pinned, **quiet)
    if modules is not None:
        with open(modules, encoding="utf-8") as file:
            subfolder = json.load(file)[0]["path"]
        parts = _load_sentence_transformers(model_id, subfolder, origin, dtype, device)
        return SentenceTransformersTeacher(*parts, source, dtype, device)
    return Teacher(*_load_transformers(model_id, origin, dtype), source, dtype, device)


def _load_transformers(model_id: str, origin: dict, dtype: torch.dtype) -> tuple:
    """Model, image processor, tokenizer and settings of its call."""
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
    # For a folder without its files transformers makes a tokenizer that knows nothing.
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
        needed = "pip install 'dsmd[sentence-transformers]'"
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
    # sentence-transformers keeps the report to itself; on "meta" only the names and shapes are read again.
    _, info = type(encoder).from_pretrained(
        model_id, config=encoder.config, subfolder=subfolder, device_map="meta", **REPORT, **origin
    )
    _check_weights(model_id, info)
    processing = getattr(model[0], "processing_kwargs", {})
    settings = {**TEXT_SETTINGS, **processing.get("text", {})}
    settings["max_length"] = _max_length(encoder, model.tokenizer, settings)
    model[0].processing_kwargs = {**processing, "text": settings}  # the teacher's own, so that it can set the padding
    return model, model.processor.image_processor, model.tokenizer, settings


def _check_weights(model_id: str, info: dict) -> None:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = {kind: sorted(map(str, info[kind])) for kind in kinds if info[kind]}
    # Counters that older releases saved with the weights.
    counters = ("token_type_ids", "position_ids")
    unexpected = [name for name in wrong.pop("unexpected_keys", []) if not name.endswith(counters)]
    if wrong:
        raise ValueError(
            f"{model_id} does not hold all of the model's weights, so its features would be partly random: {wrong}."
        )
    if unexpected:
        raise ValueError(f"{model_id} holds weights that the model has no place for, so it is another: {unexpected}.")


def _max_length(model: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: dict) -> int:
    """The longest text in tokens: the least of what processor, tokenizer and position embeddings allow."""
    limits = [settings.get("max_length", NO_LIMIT), tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions:
        limits.append(positions)
    for name, module in model.named_modules():
        # RoBERTa and its kin count from the row after the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    if min(limits) >= NO_LIMIT:
        raise ValueError(
            f"Neither the tokenizer nor the configuration of {type(model).__name__} says how long a text may be: "
            "set model_max_length in tokenizer_config.json."
        )
    return min(limits)


def _pooled(output: ModelOutput | torch.Tensor | tuple) -> torch.Tensor:
    """The features `[N, D]` of either return style: the pooled output, the tensor itself, the tuple's 2-D tensor."""
    if isinstance(output, tuple):
        output = next((value for value in output if getattr(value, "ndim", 0) == 2), None)
    features = getattr(output, "pooler_output", output)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        found = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"Expected features [N, D] from the teacher, got {found}: it is no dual encoder.")
    return features.float()
