"""A student's numbers sorted by how much they say: rotated once, when it is finished, it can be cut for nothing."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import nn

from .base_trainer import RetrievalTrainer
from .metrics import retrieval_metrics
from .run import distributed
from .run.checkpoints import error_line
from .run.sharding import show_shards


logger = logging.getLogger(__name__)

PROJECTIONS = ("visual_projection", "text_projection")
WIDTHS = (512, 256, 128, 64, 32, 16, 8)  # the table's, as far as they are below the student's own


@torch.no_grad()
def rotate(trainer: RetrievalTrainer, components: Callable[[], torch.Tensor | None]) -> bool:
    """Turns the student's space so that its first k numbers are its best k, by its teacher's principal components.

    A rotation changes no dot product, so recalls, scores and the temperature stay; [`fit_pca`] sorts the directions of
    the teacher's features, which the student has learned. Both projections are without a bias, so the rotation enters
    their weights and costs nothing. From then on `trainer.teacher_projection` brings the teacher's features to the
    student; it is saved as `teacher_pca.safetensors`. Called on every process.

    Args:
        trainer: a DSMDTrainer; its model is the finished student.
        components: gives `[D, D]`, orthonormal columns, the most important first, or None; called on the first
            process alone, where the student is to be rotated, after hours of training: what is wrong with them, and
            what it raises, is warned of and no reason to stop.

    Returns:
        Whether the student was rotated: not where its projections are no linear layers without a bias, nor where it
        learned under a projection, whose directions are sorted already, nor without a rotation of its width.
    """
    layers = [getattr(trainer.model, name, None) for name in PROJECTIONS]
    plain = all(isinstance(layer, nn.Linear) and layer.bias is None for layer in layers)
    if not plain or trainer.teacher_projection is not None:
        return False
    dim = trainer.model.config.projection_dim
    # The first process decides: each might fit its own, or fail alone, and the others would wait for it for ever.
    rotation, failure = distributed.decided_by_first_rank(lambda: _usable(components, dim))
    if rotation is None:
        if trainer.is_world_process_zero():
            logger.warning(f"The student is not rotated: {failure}.")
        return False
    rotation = rotation.to(trainer.args.device)
    show_shards(trainer.model)
    rotated = []  # both are computed before either is changed
    for layer in layers:
        weight = layer.weight  # [D, W]
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # FSDP's is in shards
        turned = (rotation.to(whole.device).double().T @ whole.double()).to(whole.dtype)
        if whole is not weight:
            from torch.distributed.tensor import distribute_tensor

            turned = distribute_tensor(turned, weight.device_mesh, weight.placements)
        rotated.append((weight, turned))
    for weight, turned in rotated:
        weight.copy_(turned)
    trainer.teacher_projection = rotation
    return True


def _usable(components: Callable[[], torch.Tensor | None], dim: int) -> tuple[torch.Tensor | None, str | None]:
    """The components, if they are a rotation `[dim, dim]`, on the CPU; else why there is none."""
    try:
        rotation = components()
        if rotation is not None and rotation.shape == (dim, dim) and is_rotation(rotation):
            return rotation.cpu(), None
    except Exception as error:  # of the Hub, of a damaged file, of memory: nothing may cost the trained student
        return None, f"the principal components of the teacher's features cannot be had ({error_line(error)})"
    return None, f"there are no principal components [{dim}, {dim}] of the teacher's features"


def is_rotation(matrix: torch.Tensor) -> bool:
    """Whether the columns of `[D, D]` are orthonormal."""
    matrix = matrix.double()
    return bool(torch.allclose(matrix.T @ matrix, torch.eye(len(matrix), dtype=torch.float64), atol=1e-3))


def figures_by_width(
    image_embeds: torch.Tensor, text_embeds: torch.Tensor, groups: torch.Tensor, caption_to_image: torch.Tensor, texts
) -> dict[str, float]:
    """RSUM of the first k numbers of embeddings, for each k of `WIDTHS` below their width: `{"rsum_at_64": ...}`.

    Args:
        image_embeds, text_embeds: `[N, D]` and `[M, D]`; what is left of each is normalised again.
        groups, caption_to_image, texts: see [`RetrievalTrainer.beside_the_teacher`].
    """
    return {
        f"rsum_at_{k}": retrieval_metrics(
            image_embeds[:, :k], text_embeds[:, :k], groups, groups[caption_to_image], text_ids=texts
        )["rsum"]
        for k in WIDTHS
        if k < image_embeds.shape[1]
    }
