"""A teacher: one interface over dual encoders of several libraries, which only embeds."""

from __future__ import annotations

import inspect
import json

import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from rows.images import to_rgb
from rows.texts import cut


IMAGE_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "image_mean", "image_std"),
    *("patch_size", "max_num_patches"),  # NaFlex: the image keeps its shape, cut into so many patches
)


class Teacher:
    """A dual encoder that only embeds; [`load_teacher`] makes one.

    `prepare_*` makes the model's inputs. It needs no model, so it can run in the workers of a loader, whose pickled
    copies of a teacher come without the model. `*_features` runs the model on these inputs, and `embed_*` does both.
    All features are raw outputs, not normalised.

    Attributes:
        dim: width D of the features.
        parameters: how many the model has.
        text_settings: keyword arguments of the tokenizer's call.
        prompt: what sentence-transformers puts before each input; None for none.

    Raises:
        ValueError: images and texts have features of different widths, or features that are not `[N, D]`.
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
        # The Gemma tokenizer of SigLIP 2 has this flag but ignores it, so texts are lower-cased before. For tokenizers
        # that obey it, this changes nothing.
        self.lower_case = bool(self.tokenizer.init_kwargs.get("do_lower_case"))

    def _fix_padding(self) -> int:
        """Pads every text to `max_length` if padding changes its feature: such a model knows only that length.

        Whether it does is measured, since neither configuration nor tokenizer says so: SigLIP pools the last position
        and sees the padding; CLIP and BERT do not.

        Returns: the width of a text's feature.
        """
        one, longest = "a", "a " * min(self.text_settings["max_length"], 16)
        alone = self.text_features(self.prepare_texts([one]))
        beside = self.text_features(self.prepare_texts([one, longest]))[:1]
        # The bound is half of the dtype's digits: rounding stays below it, pooling a padding token goes far above.
        if (alone - beside).norm() > torch.finfo(self.dtype).eps ** 0.5 * beside.norm():
            self.text_settings["padding"] = "max_length"
        return alone.shape[1]

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """Inputs of `image_features`, as CPU tensors, from N >= 1 images of any mode."""
        inputs = self.image_processor(images=[to_rgb(image) for image in images], return_tensors="pt")
        return {name: inputs[name] for name in inputs if name in self.image_inputs}

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        """Inputs of `text_features`, as CPU tensors, from N >= 1 texts; texts that are too long are cut."""
        texts = [cut(text) for text in texts]
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
                value = value.to(self.device, non_blocking=True)  # before the cast, which would leave pinned memory
                value = value.to(self.dtype) if value.is_floating_point() else value
            inputs[name] = value
        return _pooled(self._forward(modality, inputs))

    def _forward(self, modality: str, inputs: dict) -> ModelOutput | torch.Tensor | tuple:
        return getattr(self.model, f"get_{modality}_features")(**inputs)

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Features `[N, D]` of N >= 0 images, float32 on the CPU."""
        return self.image_features(self.prepare_images(images)).cpu() if images else torch.empty(0, self.dim)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Features `[N, D]` of N >= 0 texts, float32 on the CPU."""
        return self.text_features(self.prepare_texts(texts)).cpu() if texts else torch.empty(0, self.dim)

    def describe(self) -> dict:
        """What determines the features, as plain values for JSON; `revision` is the commit, or None for a folder."""
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
    """A teacher whose features are those of sentence-transformers' `encode`: with prompt, pooling and all modules."""

    def __getstate__(self) -> dict:
        return self.__dict__  # with the model, which prepares its own inputs

    def _init_inputs(self) -> None:
        self.prompt = self.model.prompts.get(self.model.default_prompt_name)

    def prepare_images(self, images: list[Image.Image]) -> dict[str, torch.Tensor]:
        return self._prepare([to_rgb(image) for image in images])

    def prepare_texts(self, texts: list[str]) -> dict[str, torch.Tensor]:
        return self._prepare([cut(text) for text in texts])

    def _prepare(self, inputs: list[Image.Image] | list[str]) -> dict[str, torch.Tensor]:
        prepared = self.model.preprocess(inputs, prompt=self.prompt)  # it tells images from texts by itself
        return {name: value for name, value in prepared.items() if name != "modality"}

    def _forward(self, modality: str, inputs: dict) -> torch.Tensor:
        return self.model({**inputs, "modality": modality})["sentence_embedding"]


def _pooled(output: ModelOutput | torch.Tensor | tuple) -> torch.Tensor:
    """The features `[N, D]`, float32, from an output object, a tensor, or the first 2-D tensor of a tuple."""
    if isinstance(output, tuple):
        output = next((value for value in output if getattr(value, "ndim", 0) == 2), None)
    features = getattr(output, "pooler_output", output)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        found = list(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise ValueError(f"Expected features [N, D] from the teacher, got {found}: it is no dual encoder.")
    return features.float()
