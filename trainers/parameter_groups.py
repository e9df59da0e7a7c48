"""The groups of parameters that an optimiser is made of."""

from __future__ import annotations

from collections.abc import Set

from torch import nn

from .training_args import RetrievalTrainingArguments


def parameter_groups(model: nn.Module, args: RetrievalTrainingArguments, unused: Set[str]) -> list[dict]:
    """Towers and heads with their own learning rates; no decay on biases, norms and the temperature.

    Args:
        unused: names of parameters that no embedding depends on. They stay in their group, as in older checkpoints;
            without a gradient nothing moves them.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or name in unused:
            is_tower = "vision_model." in name or "text_model." in name
            groups.setdefault((is_tower, parameter.ndim > 1), []).append(parameter)
    head_rate = args.head_learning_rate
    return [
        {
            "params": parameters,
            "weight_decay": args.weight_decay if decayed else 0.0,
            "lr": args.learning_rate if is_tower or head_rate is None else head_rate,
        }
        for (is_tower, decayed), parameters in groups.items()
    ]
