"""Signs that a student has collapsed: that all images, or all captions, are nearly one vector to it."""

from __future__ import annotations

import torch


NEARLY_ONE = 1e-3  # one minus the mean cosine of rows that are nearly the same
AT_THE_MARGIN = 0.02  # relative distance from it that still counts
LOGS = 3  # in a row that must agree


def constant_sides(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> list[str]:
    """Which of "images" and "captions" are nearly one vector: their mean cosine is over 0.999.

    Args:
        image_embeds, text_embeds: of a split, `[N, D]` and `[M, D]`; a side of one row says nothing.
    """
    sides = []
    for name, embeds in (("images", image_embeds), ("captions", text_embeds)):
        rows = torch.nn.functional.normalize(embeds.float(), dim=1)
        spread = (rows - rows.mean(dim=0)).square().sum(dim=1).mean()  # of unit rows, one minus their mean cosine
        if len(rows) > 1 and spread < NEARLY_ONE:
            sides.append(name)
    return sides


def pairs_at_the_margin(log_history: list[dict], margin: float) -> list[str]:
    """The pairs whose hinge has stood at the margin, in both of its directions, in each of the last three logs.

    That is its value for a student that gives every row the same embedding: no row is nearer than any other.

    Args:
        log_history: entries of a trainer's log; the hinges are `loss_hard_negative_{pair}`.
        margin: m, above 0; the hinge of one collapsed query is 2 m.
    """
    prefix = "loss_hard_negative_"
    logs = [entry for entry in log_history if any(name.startswith(prefix) for name in entry)][-LOGS:]
    if len(logs) < LOGS:
        return []
    names = [name for name in logs[-1] if name.startswith(prefix)]
    stays = [all(abs(log.get(name, 0) / (2 * margin) - 1) < AT_THE_MARGIN for log in logs) for name in names]
    return [name.removeprefix(prefix) for name, stay in zip(names, stays) if stay]
