"""The matrix that brings a teacher's features to a student's width: whose it is, or how it is made."""

from __future__ import annotations

import torch

from datasets_scripts.data_loading import DataArguments
from rows.columns import Splits
from rows.teacher_columns import teacher_batches, teacher_width
from trainers.teacher_pca import PCA_FILE, fit_pca, projection_of_student, stored_pca


def teacher_projection(
    rows: Splits, args: DataArguments, projection_dim: int, saved: str | None
) -> torch.Tensor | None:
    """`[D, projection_dim]`, which brings the teacher's features to the student's width; None where they have it.

    The projection that came with the student, which may be a rotation ([`rotate`]), else the one that came with the
    dataset, else one fitted on the training split's features; see [`fit_pca`].

    Args:
        saved: folder or Hub id of the student or checkpoint that the run starts from.

    Raises:
        ValueError: the student would be wider than its teacher; or a stream came without a projection.
    """
    width = teacher_width(rows)
    if width is None:
        return None
    if projection_dim > width:
        way_out = f"train with --projection_dim {width} or less"
        if saved is not None:
            way_out = "evaluate it by --method contrastive, which takes features of any width, or make wider ones"
        raise ValueError(
            f"projection_dim={projection_dim} is more than the {width} of the teacher's features: {way_out}."
        )
    components = None if saved is None else projection_of_student(saved, projection_dim, width)
    if components is None and projection_dim == width:
        return None
    if components is None:
        components = principal_components(rows, args)
    if components is None and args.streaming:
        raise ValueError(
            f"projection_dim={projection_dim} is less than the teacher's {width}, and the dataset brings no "
            f"{PCA_FILE} to project with: add its features with datasets_scripts.add_teacher_features."
        )
    if components is None:
        raise ValueError(
            f"projection_dim={projection_dim} is less than the teacher's {width}, and neither {saved} nor the dataset "
            f"brings a {PCA_FILE} to project with: evaluate by --method contrastive, which projects nothing."
        )
    if components.shape[0] != width or components.shape[1] < projection_dim:
        raise ValueError(
            f"{PCA_FILE} is {list(components.shape)}, expected [{width}, {projection_dim} or more]: it is of another "
            "teacher's features. Use the dataset that the student was trained on, or --method contrastive, which "
            "projects nothing."
        )
    return components[:, :projection_dim].contiguous()


def principal_components(rows: Splits, args: DataArguments) -> torch.Tensor | None:
    """The teacher's principal components, `[D, D]`: those that came with the dataset, else of its training split.

    None of a stream, or of a dataset without a training split, that brings none.
    """
    components = None if args.dataset_name == "icons" else stored_pca(args.dataset_name, "dataset")
    if components is None and not args.streaming and "train" in rows:
        components = fit_pca(teacher_batches(rows["train"]))
    return components
