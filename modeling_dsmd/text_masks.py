"""Attention masks of text towers in training, made so that the host does not wait for the device.

Given a mask `[C, L]`, transformers first asks the device whether it masks anything (`padding_mask.all()` in its
`masking_utils`), which stops the host at every bucket of captions. A mask that is whole already is taken as it is.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig


# Towers whose tokens attend to all tokens of the caption, by `model_type`; others are left to transformers.
BIDIRECTIONAL = (
    "albert", "bert", "camembert", "distilbert", "electra", "ernie", "mobilebert", "mpnet", "nomic_bert", "roberta",
    "xlm-roberta",
)  # fmt: skip
# Towers whose tokens attend to those before them.
CAUSAL = ("clip_text_model",)
# Towers that take a mask for each kind of layer: full attention, and a window around each token.
WINDOWED = ("modernbert",)
ADDED = ("eager", "sdpa")


def training_mask(
    config: PretrainedConfig, attention_mask: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor | dict[str, torch.Tensor]:
    """What a text tower is given as `attention_mask`: the same attention, without a question to the device.

    Args:
        config: the text tower's.
        attention_mask: `[C, L]`, 1 for tokens, 0 for padding.
        dtype: the tower's, of a mask that is added to the attention's logits.

    Returns:
        `[C, 1, 1, L]` or `[C, 1, L, L]`: under "sdpa" boolean, True where a token may attend; under "eager" 0 there
        and the smallest number elsewhere. A dict of two for towers with windows. `attention_mask` itself for towers
        and kinds of attention that are not known here.
    """
    kind, attention = config.model_type, config._attn_implementation
    if attention not in ADDED or kind not in BIDIRECTIONAL + CAUSAL + WINDOWED:
        return attention_mask

    def as_taken(allowed: torch.Tensor) -> torch.Tensor:
        if attention == "sdpa":
            return allowed
        return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)

    keys = attention_mask[:, None, None, :] > 0  # [C, 1, 1, L]
    if kind in BIDIRECTIONAL:
        return as_taken(keys)
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    ahead = positions[None, :] - positions[:, None]  # [L, L], how far a key lies after its query
    if kind in CAUSAL:
        return as_taken(keys & (ahead <= 0))
    return {
        "full_attention": as_taken(keys),
        "sliding_attention": as_taken(keys & (ahead.abs() <= config.sliding_window)),
    }
