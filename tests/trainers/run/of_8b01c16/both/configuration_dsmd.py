"""Configuration of the DSMD student."""

import transformers


try:
    from transformers import AutoConfig, PreTrainedConfig
    from transformers.configuration_utils import SubConfigSpec
except ImportError as error:
    raise ImportError(
        f"DSMD needs a newer transformers (5.23 is known to work); this is {transformers.__version__}."
    ) from error


POOLINGS = ("cls", "mean", "pooler")
# Where a saved folder's own code is found. `register_for_auto_class` knows one entry a class, and the zero-shot
# pipeline asks for a second.
AUTO_MAP = {
    "AutoConfig": "configuration_dsmd.DSMDConfig",
    "AutoModel": "modeling_dsmd.DSMDModel",
    "AutoModelForZeroShotImageClassification": "modeling_dsmd.DSMDModel",
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
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="bert"),
    }

    vision_config: PreTrainedConfig | dict | None = None
    text_config: PreTrainedConfig | dict | None = None
    projection_dim: int = 512
    vision_pooling: str = "mean"
    text_pooling: str = "mean"
    logit_scale_init_value: float = 2.6592

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        for name in ("vision_pooling", "text_pooling"):
            if getattr(self, name) not in POOLINGS:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(POOLINGS)}.")
        if not isinstance(self.projection_dim, int) or self.projection_dim < 1:
            raise ValueError(f"projection_dim={self.projection_dim!r}: expected a positive integer.")
        # A tower's local path would be published with the checkpoint.
        for tower in (self.vision_config, self.text_config):
            tower._name_or_path = ""
