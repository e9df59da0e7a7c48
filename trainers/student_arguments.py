"""The settings that say which student a run trains."""

from __future__ import annotations

import json
from dataclasses import dataclass, field


@dataclass
class StudentArguments:
    """Three ways to a student: a saved one, two pre-trained towers, or two configurations to train from scratch."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Start from a saved student as it is: its folder or Hub id."}
    )
    vision_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Start the vision tower from this pre-trained model: a folder or Hub id, or 'teacher' for the "
            "teacher's own tower and, where it fits, its projection."
        },
    )
    text_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The same for the text tower, which brings its tokenizer."}
    )
    vision_layers: int | None = field(
        default=None,
        metadata={
            "help": "Keep this many layers of the pre-trained vision tower, evenly spaced from the first to the last; "
            "of a convolutional one its first stages (default: all)."
        },
    )
    text_layers: int | None = field(
        default=None,
        metadata={"help": "The same for the text tower. With 0 its word embeddings alone are left."},
    )
    vision_layer_indices: list[int] | None = field(
        default=None, metadata={"help": "Keep these layers of the pre-trained vision tower, counted from 0."}
    )
    text_layer_indices: list[int] | None = field(default=None, metadata={"help": "The same for the text tower."})
    trim_vocabulary: int | None = field(
        default=None,
        metadata={
            "help": "Keep about this many word pieces of the pre-trained text tower: all those of the training "
            "captions, all single characters, then its first ones (default: all)."
        },
    )
    vision_config: dict | str | None = field(
        default=None,
        metadata={"help": "Train the vision tower from scratch: its configuration, with model_type, in JSON."},
    )
    text_config: dict | str | None = field(
        default=None,
        metadata={"help": "Train the text tower from scratch: its configuration; the tokenizer gives its vocab_size."},
    )
    vision_pooling: str = field(
        default="mean",
        metadata={
            "choices": ["cls", "mean", "pooler"],
            "help": "How the vision tower's output becomes one vector per image: its first token, the mean of its "
            "tokens or positions, or the tower's own pooler.",
        },
    )
    text_pooling: str = field(
        default="mean",
        metadata={
            "choices": ["cls", "mean", "pooler"],
            "help": "How the text tower's output becomes one vector per caption; see vision_pooling.",
        },
    )
    projection_dim: int | None = field(
        default=None, metadata={"help": "Width of the embeddings (default: the teacher's, or 256 without a teacher)."}
    )
    image_size: int = field(
        default=224, metadata={"help": "Side in pixels of the images that a vision tower trained from scratch sees."}
    )
    vocab_size: int = field(
        default=8000,
        metadata={"help": "Largest vocabulary of the tokenizer that is trained for a text tower from scratch."},
    )
    license: str | None = field(
        default=None, metadata={"help": "Licence of the student, shown on its card, such as 'apache-2.0'."}
    )
    language: list[str] | None = field(
        default=None, metadata={"help": "Languages of the captions, shown on the card, such as 'en'."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that the repositories of towers and teacher bring."}
    )

    def __post_init__(self):
        for name in ("vision_config", "text_config"):
            value = getattr(self, name)
            if isinstance(value, str):
                value = json.loads(value)
                setattr(self, name, value)
            if value is not None and "model_type" not in value:
                raise ValueError(f"{name}={value}: model_type is missing, such as 'vit' or 'bert'.")
        for modality, least in (("vision", 1), ("text", 0)):
            self._check_layers(modality, least)
        if self.trim_vocabulary is not None and self.text_config is not None:
            raise ValueError("trim_vocabulary is for a pre-trained text tower: that of text_config has vocab_size.")

    def _check_layers(self, modality: str, least: int) -> None:
        number, indices = getattr(self, f"{modality}_layers"), getattr(self, f"{modality}_layer_indices")
        if number is None and indices is None:
            return
        if number is not None and indices is not None:
            raise ValueError(f"{modality}_layers and {modality}_layer_indices say the same: give one of them.")
        if getattr(self, f"{modality}_config") is not None:
            raise ValueError(
                f"{modality}_layers and {modality}_layer_indices are for a pre-trained tower: {modality}_config says "
                "itself how many layers its tower has."
            )
        if number is not None and number < least:
            raise ValueError(f"{modality}_layers={number}: expected {least} or more.")
        if indices is not None and (not indices or indices[0] < 0 or sorted(set(indices)) != indices):
            raise ValueError(f"{modality}_layer_indices={indices}: expected numbers from 0 that rise, such as 0 2 5.")
