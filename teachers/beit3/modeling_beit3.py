"""BEiT-3 for retrieval, as two towers.

BEiT-3 keeps separate weights for images and texts in every layer. In retrieval no sequence holds both, so each
modality runs through its own weights only, and the multiway network is two plain transformers.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_beit3 import Beit3Config


@dataclass
class Beit3RetrievalOutput(ModelOutput):
    """Output of [`Beit3RetrievalModel`]; a modality that was not given leaves its fields `None`.

    Args:
        loss: symmetric contrastive loss, where `return_loss=True`.
        image_embeds: L2-normalised, `[N, D]`.
        text_embeds: L2-normalised, `[C, D]`.
        logits_per_image: cosine similarities times `exp(logit_scale)`, `[N, C]`.
        logits_per_text: its transpose, `[C, N]`.
        vision_model_output: what `get_image_features` returns.
        text_model_output: what `get_text_features` returns.
    """

    loss: torch.FloatTensor | None = None
    image_embeds: torch.FloatTensor | None = None
    text_embeds: torch.FloatTensor | None = None
    logits_per_image: torch.FloatTensor | None = None
    logits_per_text: torch.FloatTensor | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention without a fused kernel, softmax in float32.

    Args:
        query, key, value: `[N, heads, L, d]`.
        attention_mask: added to the scores `[N, heads, L, L]`; None for none.
        scaling: factor of the scores.

    Returns: the context `[N, L, heads, d]` and the attention weights `[N, heads, L, L]`.
    """
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class Beit3Attention(nn.Module):
    """Self-attention with a layer norm between the heads and the output projection (sub-LN)."""

    is_causal = False

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.inner_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        heads_shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(heads_shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        context, _ = attention(
            self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, dropout=0.0, **kwargs
        )
        return self.out_proj(self.inner_layer_norm(context.reshape(hidden_states.shape)))


class Beit3MLP(nn.Module):
    """Feed-forward network with a layer norm before its second projection (sub-LN)."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.inner_layer_norm = nn.LayerNorm(config.intermediate_size, eps=config.layer_norm_eps)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.fc1(hidden_states)
        # The published code computes the exact GELU in float32 whatever the model's dtype.
        hidden_states = nn.functional.gelu(hidden_states.float()).to(hidden_states.dtype)
        return self.fc2(self.inner_layer_norm(hidden_states))


class Beit3Layer(GradientCheckpointingLayer):
    def __init__(self, config: Beit3Config):
        super().__init__()
        self.attention_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Beit3Attention(config)
        self.mlp_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Beit3MLP(config)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attention(
            self.attention_layer_norm(hidden_states), attention_mask, **kwargs
        )
        return hidden_states + self.mlp(self.mlp_layer_norm(hidden_states))


class Beit3Encoder(nn.Module):
    """The layers of one modality and the final layer norm."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([Beit3Layer(config) for _ in range(config.num_hidden_layers)])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor:
        """`hidden_states` `[N, L, hidden_size]`, `attention_mask` `[N, L]` with 1 for a token and 0 for padding."""
        mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask
        )
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return self.layer_norm(hidden_states)


class Beit3VisionModel(nn.Module):
    """The vision tower: patches and a CLS token, learned positions, the encoder."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.image_size = config.image_size
        self.patch_size = config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Embedding(1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)
        self.encoder = Beit3Encoder(config)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings `[1 + height/patch * width/patch, hidden_size]` for an image of that many pixels.

        The grid is resized bicubically in float32 and the CLS token's row kept, as in the published fine-tuning code.

        Raises:
            ValueError: a side is no multiple of the patch size.
        """
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"Image of {height}x{width} pixels: expected sides that are multiples of {self.patch_size}."
            )
        positions = self.position_embedding.weight
        size = (height // self.patch_size, width // self.patch_size)
        side = self.image_size // self.patch_size
        if size == (side, side):
            return positions
        grid = positions[1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        grid = nn.functional.interpolate(grid, size=size, mode="bicubic", align_corners=False)
        return torch.cat([positions[:1], grid.flatten(2).squeeze(0).T.to(positions.dtype)])

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> BaseModelOutputWithPooling:
        height, width = pixel_values.shape[-2:]
        if not interpolate_pos_encoding and (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"Image of {height}x{width} pixels: the model takes {self.image_size}x{self.image_size}. Resize the "
                "image, or pass interpolate_pos_encoding=True."
            )
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        hidden_states = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        hidden_states = hidden_states + self.interpolate_pos_encoding(height, width)
        hidden_states = self.encoder(hidden_states, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class Beit3TextModel(nn.Module):
    """The text tower: tokens, learned positions, the encoder; the pooled output is that of the first token, `<s>`."""

    def __init__(self, config: Beit3Config):
        super().__init__()
        self.pad_token_id = config.pad_token_id
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.encoder = Beit3Encoder(config)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        length, longest = input_ids.shape[1], self.position_embedding.num_embeddings
        if length > longest:
            raise ValueError(f"Text of {length} tokens: the model takes at most {longest}. Truncate it.")
        if attention_mask is None:
            attention_mask = input_ids != self.pad_token_id
        hidden_states = self.token_embedding(input_ids) + self.position_embedding.weight[:length]
        hidden_states = hidden_states * attention_mask.unsqueeze(-1).to(hidden_states.dtype)
        hidden_states = self.encoder(hidden_states, attention_mask, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


class Beit3RetrievalModel(PreTrainedModel):
    """BEiT-3 for image-text retrieval with the interface of `CLIPModel`.

    Example:
        >>> model = AutoModel.from_pretrained("path/or/repo", trust_remote_code=True)
        >>> processor = AutoProcessor.from_pretrained("path/or/repo", backend="pil")
        >>> inputs = processor(text=["a dog"], images=[image], padding=True, truncation=True, return_tensors="pt")
        >>> model(**inputs).logits_per_image
    """

    config: Beit3Config
    base_model_prefix = "beit3"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Beit3Layer"]

    def __init__(self, config: Beit3Config):
        super().__init__(config)
        self.vision_model = Beit3VisionModel(config)
        self.text_model = Beit3TextModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Beit3VisionModel):
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, Beit3RetrievalModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.token_embedding

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, but a checkpoint that does not hold exactly the model's weights is an error.

        transformers would initialise what is missing at random and only print a report; a teacher must not be random.

        Raises:
            RuntimeError: the checkpoint lacks weights of the model or holds others.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        if any(wrong.values()):
            raise RuntimeError(
                f"{pretrained_model_name_or_path} does not hold the weights of {cls.__name__}: {wrong}."
            )
        return (model, info) if output_loading_info else model

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """Features of images.

        Args:
            pixel_values: `[N, num_channels, image_size, image_size]`, as the image processor returns them.
            interpolate_pos_encoding: take images of another size, with resized position embeddings.

        Returns:
            `last_hidden_state` `[N, 1 + patches, hidden_size]` and, as `pooler_output`, the projected feature `[N, D]`
            (not normalised).

        Raises:
            ValueError: the images have another size.
        """
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> tuple | BaseModelOutputWithPooling:
        """Features of texts.

        Args:
            input_ids: `[C, L]`, each row `<s> ... </s>` and padding on the right up to any L.
            attention_mask: `[C, L]`, 1 for a token and 0 for padding; by default read off the padding tokens.

        Returns:
            `last_hidden_state` `[C, L, hidden_size]` and, as `pooler_output`, the projected feature `[C, D]`, not
            normalised.

        Raises:
            ValueError: L is more than `max_position_embeddings`.
        """
        outputs = self.text_model(input_ids, attention_mask, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool | None = None,
        **kwargs,
    ) -> tuple | Beit3RetrievalOutput:
        """Normalised features and similarities of N images, C texts, or both.

        Args:
            input_ids: `[C, L]`, see `get_text_features`.
            pixel_values: `[N, num_channels, image_size, image_size]`, see `get_image_features`.
            attention_mask: `[C, L]`.
            interpolate_pos_encoding: take images of another size.
            return_loss: also the symmetric contrastive loss, text i belonging to image i (N = C).

        Raises:
            ValueError: neither modality is given, or the loss is asked for without as many texts as images.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("Neither input_ids nor pixel_values were given: pass at least one of them.")
        output = Beit3RetrievalOutput()
        if pixel_values is not None:
            output.vision_model_output = self.get_image_features(
                pixel_values, interpolate_pos_encoding, **kwargs, return_dict=True
            )
            output.image_embeds = nn.functional.normalize(output.vision_model_output.pooler_output, dim=-1)
        if input_ids is not None:
            output.text_model_output = self.get_text_features(input_ids, attention_mask, **kwargs, return_dict=True)
            output.text_embeds = nn.functional.normalize(output.text_model_output.pooler_output, dim=-1)
        if output.image_embeds is not None and output.text_embeds is not None:
            output.logits_per_text = output.text_embeds @ output.image_embeds.T * self.logit_scale.exp()
            output.logits_per_image = output.logits_per_text.T
        if return_loss:
            if output.logits_per_text is None or len(output.text_embeds) != len(output.image_embeds):
                raise ValueError(
                    "return_loss=True needs as many texts as images, the i-th text being the i-th image's."
                )
            target = torch.arange(len(output.logits_per_text), device=output.logits_per_text.device)
            output.loss = sum(
                nn.functional.cross_entropy(logits.float(), target) / 2
                for logits in (output.logits_per_image, output.logits_per_text)
            )
        return output
