"""Configuration of the BEiT-3 retrieval model."""

import transformers
from transformers import PreTrainedConfig


class Beit3Config(PreTrainedConfig):
    """BEiT-3 fine-tuned for retrieval: two transformers of the same size, one for images and one for texts.

    The defaults are BEiT-3 base at 384 pixels.

    Args:
        hidden_size: width of both towers.
        intermediate_size: width of the feed-forward layers.
        num_hidden_layers: layers in each tower.
        num_attention_heads: heads; the released models have 64 channels in each.
        projection_dim: width D of the features.
        image_size: side of the square input image, in pixels.
        patch_size: side of a patch, in pixels.
        num_channels: channels of the input image.
        vocab_size: rows of the token embedding (64,002 tokens and padding rows in the released models).
        max_position_embeddings: longest text, in tokens.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of random weights.
        logit_scale_init_value: logarithm of the initial inverse temperature (2.6592 = ln(1 / 0.07)).
        pad_token_id, bos_token_id, eos_token_id: XLM-R's.

    Raises:
        ValueError: `hidden_size` is no multiple of `num_attention_heads`, or `image_size` none of `patch_size`.

    Source: Wang et al., Image as a Foreign Language, https://arxiv.org/abs/2208.10442.
    """

    model_type = "beit3_retrieval"

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    projection_dim: int = 768
    image_size: int = 384
    patch_size: int = 16
    num_channels: int = 3
    vocab_size: int = 64010
    max_position_embeddings: int = 1022
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    logit_scale_init_value: float = 2.6592
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs):
        if int(transformers.__version__.split(".")[0]) < 5:
            raise ImportError(f"Beit3Config needs transformers 5 or later; this is {transformers.__version__}.")
        super().__post_init__(**kwargs)
        for size, part in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, part) < 1 or getattr(self, size) % getattr(self, part):
                raise ValueError(f"{size}={getattr(self, size)} is not a multiple of {part}={getattr(self, part)}.")
