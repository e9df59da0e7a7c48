"""How long a text may be: in characters, before a tokenizer reads it, and in tokens, by a model's positions."""

from __future__ import annotations

import math

from torch import nn


# Of a million characters, a tokenizer takes seconds, and minutes to be trained on them.
LONGEST_CAPTION = 8192


def cut(text: str) -> str:
    """The text without what stands behind its first `LONGEST_CAPTION` characters."""
    return text[:LONGEST_CAPTION]


def text_positions(model: nn.Module) -> float:
    """The longest text, in tokens with the special ones, that a model of transformers has positions for.

    Args:
        model: a text tower, or a model of images and texts.

    Returns:
        The number of tokens, or infinity for a model without a table of positions.
    """
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf]
    for name, module in model.named_modules():
        # RoBERTa and models like it number positions from the row after the padding's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)
