"""Configuration of the DSMD student."""

import json
from pathlib import Path

import transformers


# Older ones have other names for the weights of some towers (CLIP, DINOv3), which would be random with only a warning.
OLDEST_TRANSFORMERS = "5.9"


def _major_and_minor(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


if _major_and_minor(transformers.__version__) < _major_and_minor(OLDEST_TRANSFORMERS):
    raise ImportError(
        f"DSMD needs transformers {OLDEST_TRANSFORMERS} or later, this is {transformers.__version__}: "
        "`pip install --upgrade transformers`."
    )

from transformers import AutoConfig, PreTrainedConfig  # noqa: E402 (older ones have not all of it)


POOLINGS = ("cls", "mean", "pooler")
# The classes in a saved folder's own code. `register_for_auto_class` makes one entry for each class, and the zero-shot
# pipeline needs a second one for the model.
AUTO_MAP = {
    "AutoConfig": "configuration_dsmd.DSMDConfig",
    "AutoModel": "modeling_dsmd.DSMDModel",
    "AutoModelForZeroShotImageClassification": "modeling_dsmd.DSMDModel",
}
# Files for sentence-transformers, which would otherwise give the embeddings before normalisation. The names of its
# classes are those that its older versions have too.
FEATURES = {"method_output_name": "pooler_output"}
FOR_SENTENCE_TRANSFORMERS = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "get_text_features", **FEATURES},
            "image": {"method": "get_image_features", **FEATURES},
        },
        "module_output_name": "sentence_embedding",
    },
}


class DSMDConfig(PreTrainedConfig):
    """A dual encoder of any vision tower and any text tower of the Hub.

    Args:
        vision_config: configuration of the vision tower, as an object or as the dict of one (with `model_type`).
        text_config: the same for the text tower.
        projection_dim: width D of the embeddings; the teacher's width when distilling.
        vision_pooling: `"cls"` (first token), `"mean"` (over tokens or positions) or `"pooler"` (the tower's own).
        text_pooling: the same for text; `"mean"` leaves padding out.
        logit_scale_init_value: logarithm of the initial inverse temperature (2.6592 = ln(1 / 0.07), as CLIP).
    """

    model_type = "dsmd"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 512
    vision_pooling: str = "mean"
    text_pooling: str = "mean"
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs):
        self.vision_config = _tower_config(self.vision_config, "vit")
        self.text_config = _tower_config(self.text_config, "bert")
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        for name in ("vision_pooling", "text_pooling"):
            if getattr(self, name) not in POOLINGS:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(POOLINGS)}.")
        if not isinstance(self.projection_dim, int) or self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim!r}: expected a positive integer.")

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Also leaves the files for sentence-transformers, so that every folder of a saved student has them."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        for name, content in FOR_SENTENCE_TRANSFORMERS.items():
            Path(save_directory, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def to_diff_dict(self) -> dict:
        """What is saved: of the towers too only what is not every configuration's default."""
        saved = super().to_diff_dict()
        for name in self.sub_configs:
            saved[name] = getattr(self, name).to_diff_dict()
            saved[name].pop("transformers_version", None)
        return saved


def _tower_config(config: PreTrainedConfig | dict | None, default_type: str) -> PreTrainedConfig:
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.for_model(**{"model_type": default_type, **(config or {})})
    config._name_or_path = ""  # a local path would be published with the checkpoint
    return config
