"""The temperature of a distilled student: its losses do not train one, so it is fitted once, when it is finished."""

from __future__ import annotations

import math

import datasets
import torch

from rows.columns import pairs_of

from .base_trainer import RetrievalTrainer


MOST_PAIRS = 1000
LARGEST_SCALE = 100.0  # the model's own limit
HALVINGS = 40  # of the range of scales


def fit_temperature(trainer: RetrievalTrainer, rows: datasets.Dataset) -> dict[str, float] | None:
    """Sets the student's `logit_scale` to what makes pairs of an image and a caption likeliest.

    Rankings stay: every score is multiplied by the same number. Called on every process.

    Args:
        trainer: its model is the finished student.
        rows: a split that was not trained on; of it up to `MOST_PAIRS` rows at even distances, each of a group of its
            own, with their first captions.

    Returns:
        `scale`, which cosines are multiplied by, and `candidates`, the number of pairs that each was told from; None,
        and the student as it was, where there are fewer than two pairs.
    """
    pairs = pairs_of_own_groups(rows)
    if len(pairs) < 2:
        return None
    image_embeds, text_embeds = trainer.encode(pairs)
    firsts = [0]
    for captions in pairs["captions"][:-1]:
        firsts.append(firsts[-1] + len(captions))
    scale = likeliest_scale(image_embeds, text_embeds[firsts])
    with torch.no_grad():
        trainer.model.logit_scale.fill_(math.log(scale))
    return {"scale": scale, "candidates": len(pairs)}


def pairs_of_own_groups(rows: datasets.Dataset) -> datasets.Dataset:
    """Up to `MOST_PAIRS` rows that have an image and a caption, at even distances, no two of one group."""
    group = "group_id" if "group_id" in rows.column_names else "image_id"
    pairs = pairs_of(rows)
    first = {}  # group -> its first pair
    for row, own in zip(pairs.tolist(), rows.select(pairs)[group]):
        first.setdefault(own, row)
    found = list(first.values())
    most = min(len(found), MOST_PAIRS)
    return rows.select([found[(2 * i + 1) * len(found) // (2 * most)] for i in range(most)])


def likeliest_scale(image_embeds: torch.Tensor, text_embeds: torch.Tensor) -> float:
    """The scale of cosines with the least cross-entropy of N pairs, each among N candidates, in both directions.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599). The cross-entropy is convex in the scale, so the range
    [1, `LARGEST_SCALE`] is halved by the sign of its slope.

    Args:
        image_embeds, text_embeds: normalised, `[N, D]`; row i of both is a pair.
    """
    cosines = image_embeds.double() @ text_embeds.double().T  # [N, N]
    low, high = 1.0, LARGEST_SCALE
    for _ in range(HALVINGS):
        scale = (low + high) / 2
        expected = sum(((scale * cosines).softmax(dim) * cosines).sum(dim).mean() for dim in (0, 1))
        if expected > 2 * cosines.diagonal().mean():
            high = scale
        else:
            low = scale
    return (low + high) / 2
