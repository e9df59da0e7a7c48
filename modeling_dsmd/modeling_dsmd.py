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
from .text_masks import training_mask


# Submodules of vision towers that only the tower's own pooler uses, and that no option leaves out:
# `model_type` -> attribute.
OWN_POOLER = {
    "clip_vision_model": "post_layernorm",
    "convnext": "layernorm",
    "convnextv2": "layernorm",
    "siglip_vision_model": "head",
}
# Attributes of configs that hold the width of the last hidden state; the first that a config has counts.
WIDTHS = ("neck_hidden_sizes", "hidden_sizes", "hidden_size", "hidden_dim")


@dataclass
class DSMDOutput(ModelOutput):
    """Output of [`DSMDModel`]; a modality that was not given leaves its fields `None`.

    The feature-extraction pipelines return the first field that is not `None`: the normalised embedding, `[1, D]`.

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

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class DSMDModel(PreTrainedModel):
    """Dual encoder for image-text retrieval with the interface of `CLIPModel`.

    Example:
        >>> model = AutoModel.from_pretrained("path/or/repo", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("path/or/repo", backend="pil", trust_remote_code=False)
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

    def __init__(
        self,
        config: DSMDConfig,
        vision_model: PreTrainedModel | None = None,
        text_model: PreTrainedModel | None = None,
    ):
        super().__init__(config)
        self.vision_model = vision_model or _new_tower(config.vision_config, config.vision_pooling)
        self.text_model = text_model or _new_tower(config.text_config, config.text_pooling)
        for modality, tower, expected in (
            ("vision", self.vision_model, "pixel_values"),
            ("text", self.text_model, "input_ids"),
        ):
            if tower.main_input_name != expected or tower.config.is_encoder_decoder:
                kind = "is an encoder-decoder" if tower.config.is_encoder_decoder else f"takes {tower.main_input_name}"
                raise ValueError(
                    f"{type(tower).__name__} {kind}: the {modality} tower must be an encoder of {expected}."
                )
        names = [name for name, _ in self.vision_model.named_parameters()]
        if config.vision_pooling == "cls" and not any("cls_token" in name or "class_emb" in name for name in names):
            raise ValueError(
                f"{type(self.vision_model).__name__} has no class token: use 'mean' or 'pooler' for vision_pooling."
            )
        if hasattr(self.vision_model, "timm_model") and config.vision_pooling != "pooler":
            raise ValueError("A tower of timm pools by a head of its own: use 'pooler' for vision_pooling.")
        # DistributedDataParallel stops at a parameter that gets no gradient.
        if config.vision_pooling != "pooler" and config.vision_config.model_type in OWN_POOLER:
            setattr(self.vision_model, OWN_POOLER[config.vision_config.model_type], nn.Identity())
        for module in self.vision_model.modules():
            if getattr(module, "mask_token", None) is not None:  # for masked pre-training (DINOv2)
                module.mask_token = None
        # The tower and this model share one config object, so that a change reaches both.
        self.config.vision_config._attn_implementation = self.vision_model.config._attn_implementation
        self.config.text_config._attn_implementation = self.text_model.config._attn_implementation
        self.vision_model.config = self.config.vision_config
        self.text_model.config = self.config.text_config
        self.visual_projection = nn.Linear(_tower_width(self.vision_model), config.projection_dim, bias=False)
        self.text_projection = nn.Linear(_tower_width(self.text_model), config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs):
        """Also switches towers of timm, which have a method of their own for it."""
        super()._set_gradient_checkpointing(enable, **kwargs)
        if hasattr(self.vision_model, "timm_model") and self.vision_model.supports_gradient_checkpointing:
            self.vision_model._set_gradient_checkpointing(enable)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

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
            vision_config, text_config: the towers' configurations, as objects or as dicts with `model_type`.
            **config_fields: other fields of [`DSMDConfig`], such as `projection_dim`.
        """
        _check_fields(config_fields)
        return cls(DSMDConfig(vision_config=vision_config, text_config=text_config, **config_fields))

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model_name_or_path: str,
        text_model_name_or_path: str,
        trust_remote_code: bool = False,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        **config_fields,
    ) -> "DSMDModel":
        """A student of two pre-trained towers and fresh projections.

        Args:
            vision_model_name_or_path, text_model_name_or_path: Hub ids or folders; from a dual encoder such as CLIP
                only the tower asked for is taken.
            trust_remote_code: let these repositories run code of their own. A tower whose class is defined there is
                refused all the same, since the student's folder would not carry that code.
            vision_revision, text_revision: branch, tag or commit of each on the Hub.
            **config_fields: other fields of [`DSMDConfig`], such as `projection_dim`.

        Raises:
            ValueError: a tower's checkpoint lacks weights, or is of the other modality, or AutoModel of transformers
                has no class for it.
        """
        _check_fields(config_fields)
        vision = _load_tower("vision", vision_model_name_or_path, vision_revision, trust_remote_code, config_fields)
        text = _load_tower("text", text_model_name_or_path, text_revision, trust_remote_code, config_fields)
        config = DSMDConfig(vision_config=vision.config.to_dict(), text_config=text.config.to_dict(), **config_fields)
        return cls(config, vision_model=vision, text_model=text)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> tuple | BaseModelOutputWithPooling:
        """Projected image features, not normalised.

        Args:
            pixel_values: `[N, 3, H, W]`; or `[N, W]`, their `pooled_images`, which only the projection is left for.

        Returns:
            The tower's output with `pooler_output` `[N, D]` replaced by the projection.
        """
        if pixel_values.ndim == 2:
            return BaseModelOutputWithPooling(pooler_output=self.visual_projection(pixel_values))
        output = self.vision_model(pixel_values=pixel_values, return_dict=True, **kwargs)
        pooled = _pool(output, self.config.vision_pooling, None)
        return _with_pooled(output, self.visual_projection(pooled))

    def pooled_images(self, pixel_values: torch.FloatTensor) -> torch.Tensor:
        """What the vision tower makes of images `[N, 3, H, W]`, a vector `[N, W]` each, before the projection."""
        return _pool(self.vision_model(pixel_values=pixel_values, return_dict=True), self.config.vision_pooling, None)

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
        mask = attention_mask
        if self.training and mask is not None:
            mask = training_mask(self.config.text_config, mask, self.text_projection.weight.dtype)
        output = self.text_model(input_ids=input_ids, attention_mask=mask, return_dict=True, **kwargs)
        pooled = _pool(output, self.config.text_pooling, attention_mask)
        return _with_pooled(output, self.text_projection(pooled))

    def _in_buckets(self, text_buckets, input_ids, attention_mask, token_type_ids, **kwargs) -> list[torch.Tensor]:
        """Text features `[rows, D]` of each bucket, see `forward`."""
        if sum(rows for rows, _ in text_buckets) != len(input_ids):
            raise ValueError(f"text_buckets {text_buckets} are not of the {len(input_ids)} captions given.")
        features, start = [], 0
        for rows, length in text_buckets:
            ids, mask, types = (
                None if tensor is None else tensor[start : start + rows, :length]
                for tensor in (input_ids, attention_mask, token_type_ids)
            )
            output = self.get_text_features(ids, mask, token_type_ids=types, return_dict=True, **kwargs)
            features.append(output.pooler_output)
            start += rows
        return features

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        text_buckets: list[tuple[int, int]] | None = None,
        **kwargs,
    ) -> tuple | DSMDOutput:
        """Normalised embeddings of whichever modality is given; with both, their similarities too.

        Args:
            input_ids: `[C, L]`.
            pixel_values: `[N, 3, H, W]`.
            attention_mask: `[C, L]`.
            token_type_ids: `[C, L]`, for towers that take them.
            return_loss: also the symmetric contrastive loss of image i with caption i (N = C).
            interpolate_pos_encoding: take images of another size than the vision tower's, where it can.
            text_buckets: (rows, tokens) for each run of consecutive captions that the text tower gets together, cut
                to that many tokens, so that short captions are not computed with padding up to L. The rows add up to
                C. The output then has no `text_model_output`.

        Raises:
            ValueError: neither modality is given, `text_buckets` do not add up to C, or the loss is asked for without
                as many captions as images.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Give input_ids, pixel_values or both.")
        image_embeds = text_embeds = logits_per_image = logits_per_text = loss = image_output = text_output = None
        # Both towers understand what is left in kwargs (output_hidden_states, ...).
        if input_ids is not None and text_buckets is not None:
            buckets = self._in_buckets(text_buckets, input_ids, attention_mask, token_type_ids, **kwargs)
            text_embeds = nn.functional.normalize(torch.cat(buckets), dim=-1)
        elif input_ids is not None:
            text_output = self.get_text_features(
                input_ids, attention_mask, token_type_ids=token_type_ids, return_dict=True, **kwargs
            )
            text_embeds = nn.functional.normalize(text_output.pooler_output, dim=-1)
        if pixel_values is not None:
            # Passed only if set: towers of timm do not know the argument.
            image_kwargs = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
            image_output = self.get_image_features(pixel_values, return_dict=True, **image_kwargs, **kwargs)
            image_embeds = nn.functional.normalize(image_output.pooler_output, dim=-1)
        if image_embeds is not None and text_embeds is not None:
            scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
            logits_per_text = text_embeds @ image_embeds.T * scale  # [C, N]
            logits_per_image = logits_per_text.T
        if return_loss:
            if logits_per_text is None or len(text_embeds) != len(image_embeds):
                raise ValueError(
                    "return_loss pairs image i with caption i, but there are "
                    f"{0 if image_embeds is None else len(image_embeds)} images and "
                    f"{0 if text_embeds is None else len(text_embeds)} captions."
                )
            labels = torch.arange(len(text_embeds), device=text_embeds.device)
            loss = 0.5 * (
                nn.functional.cross_entropy(logits_per_image.float(), labels)
                + nn.functional.cross_entropy(logits_per_text.float(), labels)
            )
        return DSMDOutput(
            loss=loss,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            vision_model_output=image_output,
            text_model_output=text_output,
        )


def _check_fields(config_fields: dict):
    """Raises for fields unknown to [`DSMDConfig`], which it would keep without effect, and for values it refuses."""
    unknown = set(config_fields) - set(DSMDConfig.__annotations__)
    if unknown:
        raise TypeError(
            f"{', '.join(sorted(unknown))}: no field of DSMDConfig; {', '.join(DSMDConfig.__annotations__)}."
        )
    DSMDConfig(**config_fields)


def _load_tower(modality: str, name: str, revision: str | None, trust_remote_code: bool, fields: dict) -> nn.Module:
    """One pre-trained tower, see `from_vision_text_pretrained`."""
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    pooling = fields.get(f"{modality}_pooling", "mean")
    whole = AutoConfig.from_pretrained(name, **origin)
    config = getattr(whole, f"{modality}_config", whole)
    if type(config) not in AutoModel._model_mapping:
        raise ValueError(
            f"{name}: AutoModel of transformers has no class for the {modality} tower's {type(config).__name__}, "
            "so a saved student would not load. Choose another tower."
        )
    if whole.model_type == DSMDConfig.model_type:
        own = getattr(whole, f"{modality}_pooling")
        if own != pooling and "pooler" in (own, pooling):
            raise ValueError(f"The {modality} tower of {name} has {modality}_pooling={own!r}: give the same.")
        return getattr(DSMDModel.from_pretrained(name, dtype=torch.float32, **origin), f"{modality}_model")
    kwargs = {"config": config, "dtype": torch.float32, "output_loading_info": True, **origin}
    tower, info = AutoModel.from_pretrained(name, **kwargs, **_without_pooler(config, pooling))
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{name} has no weights for {len(missing)} parameters of its {modality} tower "
            f"({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}): they would be random. Give a complete "
            f"{modality} checkpoint, or another {modality}_pooling if it is only the pooler that is missing."
        )
    return tower


def _tower_width(tower: PreTrainedModel) -> int:
    """Width W of the vector `[B, W]` that a tower's output is pooled to."""
    if hasattr(tower, "timm_model"):  # its config names an architecture, not its sizes
        return tower.timm_model.head_hidden_size
    config = tower.config
    for name in WIDTHS:
        width = getattr(config, name, None)
        if width is not None:
            return width[-1] if isinstance(width, (list, tuple)) else width
    raise ValueError(
        f"{type(config).__name__} has none of {', '.join(WIDTHS)}, so the width of its features is unknown. "
        "Choose another tower."
    )


def _without_pooler(config: PreTrainedConfig, pooling: str) -> dict:
    """The keyword argument that keeps a tower from building a pooler that would not be used; {} if it has none."""
    if pooling == "pooler" or type(config) not in AutoModel._model_mapping:  # AutoModel itself reports the latter
        return {}
    parameters = inspect.signature(AutoModel._model_mapping[type(config)].__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in parameters else {}


def _new_tower(config: PreTrainedConfig, pooling: str) -> PreTrainedModel:
    if not getattr(AutoModel._model_mapping.get(type(config), None), "_supports_sdpa", True):
        config._attn_implementation = "eager"  # ConvNeXt has no attention and raises when asked for "sdpa"
    return AutoModel.from_config(config, **_without_pooler(config, pooling))


def _pool(output: ModelOutput, pooling: str, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """One vector for each image or caption, `[B, W]`, from hidden states `[B, L, W]` or feature maps `[B, W, h, w]`.

    Padding is left out of a mean: `attention_mask` `[B, L]` is 1 for tokens and 0 for padding; None for images.
    """
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            raise ValueError("This tower has no pooler: use 'cls' or 'mean' pooling.")
        return pooled.flatten(1)
    hidden = output.last_hidden_state
    if hidden.ndim == 4:
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
