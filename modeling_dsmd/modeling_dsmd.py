"""The DSMD student: a vision tower and a text tower projected into one space."""

import inspect
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_dsmd import DSMDConfig


@dataclass
class DSMDOutput(ModelOutput):
    """Output of [`DSMDModel`]; a modality that was not given leaves its fields `None`.

    Args:
        loss: symmetric contrastive loss, where `return_loss=True`.
        image_embeds: L2-normalised, `[N, D]`.
        text_embeds: L2-normalised, `[C, D]`.
        logits_per_image: cosine similarities times `exp(logit_scale)`, `[N, C]`.
        logits_per_text: its transpose, `[C, N]`.
        vision_model_output: the vision tower's output, its `pooler_output` replaced by the projection `[N, D]`.
        text_model_output: the same for the text tower `[C, D]`.
    """

    loss: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


class DSMDModel(PreTrainedModel):
    """Dual encoder for image-text retrieval with the interface of `CLIPModel`.

    Example:
        >>> model = AutoModel.from_pretrained("path/or/repo", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("path/or/repo")
        >>> inputs = processor(text=["arrow left"], images=[image], return_tensors="pt", padding=True)
        >>> model(**inputs).logits_per_image
    """

    config: DSMDConfig
    base_model_prefix = "dsmd"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _keep_in_fp32_modules_strict = ["logit_scale"]

    def __init__(
        self,
        config: DSMDConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision_model or _new_tower(config.vision_config, config.vision_pooling)
        self.text_model = text_model or _new_tower(config.text_config, config.text_pooling)
        if config.vision_pooling != "pooler" and config.vision_config.model_type in ("convnext", "convnextv2"):
            self.vision_model.layernorm = nn.Identity()  # used by ConvNeXt's own pooler only, and has no switch
        # One config object for each tower, so that a change reaches both.
        self.config.vision_config._attn_implementation = self.vision_model.config._attn_implementation
        self.config.text_config._attn_implementation = self.text_model.config._attn_implementation
        self.vision_model.config = self.config.vision_config
        self.text_model.config = self.config.text_config
        self.visual_projection = nn.Linear(_tower_width(config.vision_config), config.projection_dim, bias=False)
        self.text_projection = nn.Linear(_tower_width(config.text_config), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DSMDModel):  # a bare parameter would come back from `meta` uninitialised
            init.constant_(module.logit_scale, float(self.config.logit_scale_init_value))

    @classmethod
    def from_vision_text_configs(
        cls, vision_config: PreTrainedConfig | dict, text_config: PreTrainedConfig | dict, **config_fields
    ) -> "DSMDModel":
        """A student with random weights, to be trained from scratch.

        Args:
            vision_config, text_config: of the towers, as objects or dicts with `model_type`.
            **config_fields: other fields of [`DSMDConfig`], such as `projection_dim`.
        """
        return cls(DSMDConfig(vision_config=vision_config, text_config=text_config, **config_fields))

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        trust_remote_code: bool = False,
        **config_fields,
    ) -> "DSMDModel":
        """A student of two pre-trained towers and fresh projections.

        Args:
            vision_model_name_or_path, text_model_name_or_path: Hub ids or folders; of a dual encoder such as CLIP
                the tower asked for is taken.
            trust_remote_code: let these repositories run code of their own.
            **config_fields: other fields of [`DSMDConfig`], such as `projection_dim`.

        Raises:
            ValueError: where a tower's checkpoint lacks weights.
        """
        towers = {}
        for modality, name in (("vision", vision_model_name_or_path), ("text", text_model_name_or_path)):
            tower_config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            tower_config = getattr(tower_config, f"{modality}_config", tower_config)
            tower, info = AutoModel.from_pretrained(
                name,
                config=tower_config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                **_without_pooler(tower_config, config_fields.get(f"{modality}_pooling", "mean")),
            )
            if info["missing_keys"]:
                missing = ", ".join(sorted(info["missing_keys"])[:5])
                raise ValueError(
                    f"{name} has no weights for {len(info['missing_keys'])} parameters of its {modality} tower "
                    f"({missing}, ...): they would be random. Give a complete {modality} checkpoint, or another "
                    f"{modality}_pooling if it is only the pooler that is missing."
                )
            towers[modality] = tower
        config = DSMDConfig(
            vision_config=towers["vision"].config.to_dict(),
            text_config=towers["text"].config.to_dict(),
            **config_fields,
        )
        return cls(config, vision_model=towers["vision"], text_model=towers["text"])

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """Projected image features, not normalised.

        Args:
            pixel_values: `[N, 3, H, W]`.

        Returns:
            The tower's output with `pooler_output` `[N, D]` replaced by the projection.
        """
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = _pool(output, self.config.vision_pooling, None)
        return _with_pooled(output, self.visual_projection(pooled))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """Projected text features, not normalised.

        Args:
            input_ids: `[C, L]`.
            attention_mask: `[C, L]`, 1 for tokens, 0 for padding; default all 1.

        Returns:
            The tower's output with `pooler_output` `[C, D]` replaced by the projection.
        """
        output = self.text_model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        pooled = _pool(output, self.config.text_pooling, attention_mask)
        return _with_pooled(output, self.text_projection(pooled))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        **kwargs,
    ) -> tuple | DSMDOutput:
        """Embeds whichever modality is given; with both, their similarities too.

        Args:
            input_ids: `[C, L]`.
            pixel_values: `[N, 3, H, W]`.
            attention_mask: `[C, L]`.
            token_type_ids: `[C, L]`, for towers that take them.
            return_loss: also the symmetric contrastive loss of image i with caption i (N = C).
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Give input_ids, pixel_values or both.")
        # Both towers' own arguments (output_hidden_states, ...) arrive in kwargs; these are ours.
        kwargs = {key: value for key, value in kwargs.items() if key not in ("return_dict", "labels")}
        result = DSMDOutput()
        if pixel_values is not None:
            result.vision_model_output = self.get_image_features(pixel_values, **kwargs)
            result.image_embeds = nn.functional.normalize(result.vision_model_output.pooler_output, dim=-1)
        if input_ids is not None:
            if token_type_ids is not None:
                kwargs["token_type_ids"] = token_type_ids
            result.text_model_output = self.get_text_features(input_ids, attention_mask, **kwargs)
            result.text_embeds = nn.functional.normalize(result.text_model_output.pooler_output, dim=-1)
        if result.image_embeds is not None and result.text_embeds is not None:
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp().to(result.text_embeds.dtype)
            result.logits_per_text = result.text_embeds @ result.image_embeds.T * scale  # [C, N]
            result.logits_per_image = result.logits_per_text.T
            if return_loss:
                if len(result.logits_per_text) != len(result.logits_per_image):
                    raise ValueError(
                        f"return_loss pairs image i with caption i, but there are {len(result.image_embeds)} images "
                        f"and {len(result.text_embeds)} captions."
                    )
                labels = torch.arange(len(result.text_embeds), device=result.text_embeds.device)
                result.loss = 0.5 * (
                    nn.functional.cross_entropy(result.logits_per_image.float(), labels)
                    + nn.functional.cross_entropy(result.logits_per_text.float(), labels)
                )
        # ModelOutput fixes its keys when built, so build the one that is returned from the filled fields.
        return DSMDOutput(**{name: getattr(result, name) for name in DSMDOutput.__dataclass_fields__})


def _tower_width(config: PreTrainedConfig) -> int:
    """Width of a tower's last hidden state, under the names that transformers' configs use."""
    if hasattr(config, "hidden_size"):
        return config.hidden_size
    if hasattr(config, "hidden_sizes"):
        return config.hidden_sizes[-1]
    return config.hidden_dim  # EfficientNet


def _without_pooler(config: PreTrainedConfig, pooling: str) -> dict:
    """The keyword that keeps a tower from building a pooler that would not be used."""
    if pooling == "pooler" or type(config) not in AutoModel._model_mapping:
        return {}
    parameters = inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def _new_tower(config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
    return AutoModel.from_config(config, **_without_pooler(config, pooling))


def _pool(output: ModelOutput, pooling: str, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """One vector a row, `[B, W]`, from hidden states `[B, L, W]` or feature maps `[B, W, H', W']`."""
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError("This tower has no pooler: use 'cls' or 'mean' pooling.")
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
        if pooling == "cls":
            raise ValueError("A convolutional tower has no class token: use 'mean' or 'pooler' pooling.")
        return hidden.mean(dim=(2, 3))
    if pooling == "cls":
        return hidden[:, 0]
    if attention_mask is None:
        return hidden.mean(dim=1)
    mask = attention_mask.to(hidden.dtype).unsqueeze(-1)  # [B, L, 1]
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def _with_pooled(output: ModelOutput, projected: torch.Tensor) -> BaseModelOutputWithPooling:
    return BaseModelOutputWithPooling(
        last_hidden_state=output.last_hidden_state,
        pooler_output=projected,
        hidden_states=getattr(output, "hidden_states", None),
        attentions=getattr(output, "attentions", None),
    )
