"""Retrieval in both directions between images and texts: ranks, recall and median rank, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm


# Cosines closer than this times the width count as equal. A float32 matmul rounds the same dot product differently in
# blocks of different shape: by some 3e-7 as a rule, but by up to 4e-9 a column (measured) for rows of equal entries,
# where all rounding goes one way.
TIE_TOLERANCE_PER_COLUMN = 1e-8
MIN_TIE_TOLERANCE = 1e-6
PAIRS_OF_A_BAR = 10**9  # pairs from which on a progress bar is shown; these take some ten seconds on two CPU cores

Groups = torch.Tensor | np.ndarray | Sequence[str] | Sequence[int]


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_groups: Groups,
    text_groups: Groups,
    *,
    text_ids: Groups | None = None,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """
    Recall at 1, 5 and 10 and median rank of image-to-text and text-to-image retrieval by cosine.

    A pair is right when its groups are equal: an image may have any number of texts, a text any number of images. With
    `text_ids` it is also right when a text of the image's group is equal to this text: equal texts, such as the names
    of classes, are right for the same images. The rank of a query is 1 + the number of wrong items that score at least
    as much as its best right item: ties count against the model, and one that maps everything to the same point
    scores 0.

    Args:
        image_embeds: `[N, D]` floats of any scale; normalised here, in float32.
        text_embeds: `[M, D]`, on the same device.
        image_groups: `[N]` integers or strings.
        text_groups: `[M]`, of the same kind.
        text_ids: `[M]`, the texts, or integers or strings that are equal where texts are. Default: no text is equal to
            another, as Flickr30k and COCO are reported.
        chunk_size: side of the score blocks; extra memory is some `8 * chunk_size**2` bytes beside copies of the
            embeddings.

    Returns:
        `image_to_text_r1`, `_r5`, `_r10`, `text_to_image_r1`, `_r5`, `_r10` (percent), `rsum` (their sum, 600 at
        most), `image_to_text_median_rank` and `text_to_image_median_rank` (1 at best).

    Raises:
        ValueError: embeds that are empty, NaN, infinite or zero, or differ in width, or in number from their groups or
            texts; groups or texts that are neither integers nor strings; a query whose group the other side lacks.
    """
    groups = (image_groups, text_groups)
    return metrics_from_ranks(*ranks(image_embeds, text_embeds, *groups, text_ids=text_ids, chunk_size=chunk_size))


@torch.no_grad()
def ranks(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_groups: Groups,
    text_groups: Groups,
    *,
    text_ids: Groups | None = None,
    chunk_size: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The rank of every query, as [`retrieval_metrics`] defines it; arguments and errors are the same.

    Scores less than `max(1e-6, 1e-8 * D)` below the best right one count as equal to it, so that ties are seen as ties
    whatever the blocks; only a score at the very edge of that band can depend on `chunk_size`.

    Returns:
        Image-to-text ranks `[N]` and text-to-image ranks `[M]`, int64, 1 at best, in the order of the rows given and
        on their device.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be 1 or more, got {chunk_size}.")
    images = _normalised(image_embeds, "image_embeds")
    texts = _normalised(text_embeds, "text_embeds")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"image_embeds are {images.shape[1]} wide and text_embeds {texts.shape[1]}: both must come from one space."
        )
    if images.device != texts.device:
        raise ValueError(f"image_embeds are on {images.device} and text_embeds on {texts.device}: move one of them.")
    image_ids, group_ids = _dense_groups(image_groups, text_groups, len(images), len(texts))

    # Once both sides are sorted by group, the right texts of consecutive images are one range of columns: only in a
    # narrow band of the score matrix must right pairs be told from wrong ones, but for those of equal texts.
    image_order, text_order = np.argsort(image_ids, kind="stable"), np.argsort(group_ids, kind="stable")
    image_ids, group_ids = image_ids[image_order], group_ids[text_order]
    equal_texts = None
    if text_ids is not None:
        equal_texts = _EqualTexts(
            image_ids, group_ids, _dense("text_ids", text_ids, len(texts), "text_embeds", {}, {})[text_order]
        )
    first_text = np.searchsorted(group_ids, image_ids, side="left")
    past_text = np.searchsorted(group_ids, image_ids, side="right")
    device = images.device
    image_order, text_order = torch.from_numpy(image_order).to(device), torch.from_numpy(text_order).to(device)
    image_ids, group_ids = torch.from_numpy(image_ids).to(device), torch.from_numpy(group_ids).to(device)
    images, texts = images[image_order], texts[text_order]

    best_of_image = images.new_full((len(images),), -torch.inf)
    best_of_text = texts.new_full((len(texts),), -torch.inf)
    above_image = torch.zeros(len(images), dtype=torch.int64, device=device)
    above_text = torch.zeros(len(texts), dtype=torch.int64, device=device)

    with _exact_matmul(device):
        # Few rows at a time keep the band narrow.
        for start, stop in _spans(0, len(images), min(chunk_size, 128)):
            for left, right in _spans(int(first_text[start]), int(past_text[stop - 1]), chunk_size):
                scores = images[start:stop] @ texts[left:right].T
                scores.masked_fill_(image_ids[start:stop, None] != group_ids[None, left:right], -torch.inf)
                torch.maximum(best_of_image[start:stop], scores.amax(1), out=best_of_image[start:stop])
                torch.maximum(best_of_text[left:right], scores.amax(0), out=best_of_text[left:right])

        for start, stop, left, right, own in () if equal_texts is None else equal_texts.blocks(chunk_size):
            scores = images[start:stop] @ texts[left:right].T
            scores.masked_fill_(~own.to(device), -torch.inf)
            torch.maximum(best_of_image[start:stop], scores.amax(1), out=best_of_image[start:stop])
            torch.maximum(best_of_text[left:right], scores.amax(0), out=best_of_text[left:right])

        tolerance = max(MIN_TIE_TOLERANCE, TIE_TOLERANCE_PER_COLUMN * images.shape[1])
        image_bar, text_bar = best_of_image - tolerance, best_of_text - tolerance
        small = len(images) * len(texts) < PAIRS_OF_A_BAR
        progress = tqdm(total=len(images), desc="rank", leave=False, disable=True if small or _rank() else None)
        for start, stop in _spans(0, len(images), chunk_size):
            for left, right in _spans(0, len(texts), chunk_size):
                scores = images[start:stop] @ texts[left:right].T
                # The columns of this block that are right for any of its rows.
                low, high = max(left, int(first_text[start])), min(right, int(past_text[stop - 1]))
                if low < high:
                    own = image_ids[start:stop, None] == group_ids[None, low:high]
                    scores[:, low - left : high - left].masked_fill_(own, -torch.inf)
                own = None if equal_texts is None else equal_texts.block(start, stop, left, right)
                if own is not None:
                    scores.masked_fill_(own.to(device), -torch.inf)
                # Sums of float 0 and 1 are several times faster than sums of booleans; they are exact below 2**24.
                reached = torch.ge(scores, image_bar[start:stop, None], out=torch.empty_like(scores))
                above_image[start:stop] += reached.sum(1).long()
                above_text[left:right] += scores.ge_(text_bar[left:right]).sum(0).long()
            progress.update(stop - start)
        progress.close()

    image_ranks, text_ranks = torch.empty_like(above_image), torch.empty_like(above_text)
    image_ranks[image_order] = above_image + 1
    text_ranks[text_order] = above_text + 1
    return image_ranks, text_ranks


def metrics_from_ranks(image_to_text_ranks: torch.Tensor, text_to_image_ranks: torch.Tensor) -> dict[str, float]:
    """
    The figures of [`retrieval_metrics`] from ranks `[N]` and `[M]` (integers, 1 at best), or from a resample of them.

    The median of an even number of ranks is the mean of the middle two.

    Raises:
        ValueError: no ranks in a direction, or a rank below 1.
    """
    metrics, medians = {}, {}
    for direction, values in (("image_to_text", image_to_text_ranks), ("text_to_image", text_to_image_ranks)):
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(
                f"{direction} ranks must be one or more in one dimension, got shape {tuple(values.shape)}."
            )
        ordered = values.sort().values
        if ordered[0] < 1:
            raise ValueError(f"{direction} ranks start at 1, got {ordered[0].item()}.")
        for k in (1, 5, 10):
            metrics[f"{direction}_r{k}"] = 100.0 * int((values <= k).sum()) / len(values)
        medians[f"{direction}_median_rank"] = (
            int(ordered[(len(values) - 1) // 2]) + int(ordered[len(values) // 2])
        ) / 2
    return {**metrics, "rsum": sum(metrics.values()), **medians}


def fold_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    image_groups: torch.Tensor,
    caption_to_image: torch.Tensor,
    fold_size: int,
    text_ids: torch.Tensor | None = None,
) -> dict[str, float]:
    """
    Means of the figures of [`retrieval_metrics`] over consecutive folds of `fold_size` images with all their texts.

    With 5,000 COCO test images in the order of the Karpathy file and folds of 1,000, this is what is called COCO 1K.

    Args:
        image_embeds, text_embeds, image_groups: as in [`retrieval_metrics`].
        caption_to_image: `[M]`, row of each text's image.
        fold_size: images in a fold; it must divide N.
        text_ids: `[M]`, as in [`retrieval_metrics`].

    Raises:
        ValueError: N is not a multiple of `fold_size`, or as in [`retrieval_metrics`].
    """
    if len(image_embeds) % fold_size:
        raise ValueError(
            f"{len(image_embeds)} images are not folds of {fold_size}: give a fold size that divides them."
        )
    folds = []
    for start in range(0, len(image_embeds), fold_size):
        texts = torch.nonzero((caption_to_image >= start) & (caption_to_image < start + fold_size)).squeeze(1)
        groups = image_groups[start : start + fold_size]
        folds.append(
            retrieval_metrics(
                image_embeds[start : start + fold_size],
                text_embeds[texts.to(text_embeds.device)],
                groups,
                image_groups[caption_to_image[texts]],
                text_ids=None if text_ids is None else text_ids[texts],
            )
        )
    return {name: sum(fold[name] for fold in folds) / len(folds) for name in folds[0]}


def _normalised(embeds: torch.Tensor, name: str) -> torch.Tensor:
    """Rows `[N, D]` of length 1 in float32."""
    if not isinstance(embeds, torch.Tensor) or embeds.ndim != 2 or not embeds.is_floating_point():
        kind = f"{embeds.dtype} {tuple(embeds.shape)}" if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ValueError(f"{name} must be a floating point tensor [rows, width], got {kind}.")
    if embeds.numel() == 0:
        raise ValueError(f"{name} are empty, of shape {tuple(embeds.shape)}: expected one row or more.")
    if embeds.dtype != torch.float64:
        embeds = embeds.float()
    # Divided by the largest entry first, so that the squares of the norm neither over- nor underflow.
    largest = embeds.abs().amax(1, keepdim=True)
    bad = ~torch.isfinite(largest[:, 0])
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        value = embeds[row][~torch.isfinite(embeds[row])][0].item()
        raise ValueError(f"{name} must be finite, but row {row} holds {value} ({int(bad.sum())} such rows).")
    zero = largest[:, 0] == 0
    if zero.any():
        raise ValueError(
            f"{name} must have a direction, but row {int(zero.nonzero()[0, 0])} is all 0 "
            f"({int(zero.sum())} such rows)."
        )
    embeds = (embeds / largest).float()
    return embeds.div_(torch.linalg.vector_norm(embeds, dim=1, keepdim=True))


def _dense_groups(
    image_groups: Groups, text_groups: Groups, num_images: int, num_texts: int
) -> tuple[np.ndarray, np.ndarray]:
    """The groups of both sides as int64 ids from 0 on, `[N]` and `[M]`: two ids are equal where the groups are."""
    ids: dict[str | int, int] = {}
    kinds: dict[str, str] = {}
    rows = [
        _dense("image_groups", image_groups, num_images, "image_embeds", ids, kinds),
        _dense("text_groups", text_groups, num_texts, "text_embeds", ids, kinds),
    ]
    names = list(ids)
    for name, own, other in (("image", *rows), ("text", *rows[::-1])):
        lonely = np.flatnonzero(~np.isin(own, other))
        if len(lonely):
            raise ValueError(
                f"Every query needs an answer, but {name} row {lonely[0]} of group {names[own[lonely[0]]]!r} has none "
                f"on the other side ({len(lonely)} such rows): remove them or add what belongs to them."
            )
    return rows[0], rows[1]


def _dense(
    name: str, given: Groups, count: int, of: str, ids: dict[str | int, int], kinds: dict[str, str]
) -> np.ndarray:
    """Groups or texts as int64 ids from 0 on, `[count]`: those that `ids` has, and new ones that it gets.

    Args:
        name, of: of the argument, and of the one whose rows it names, for the error message.
        kinds: gets where the first string and the first integer stood; both together are an error.
    """
    values = given.tolist() if isinstance(given, torch.Tensor | np.ndarray) else list(given)
    if not isinstance(values, list) or len(values) != count:
        size = len(values) if isinstance(values, list) else "a single value"
        one = name.removeprefix("image_").removeprefix("text_").removesuffix("s")
        raise ValueError(
            f"{name} must name {'an' if one == 'id' else 'a'} {one} for each of the {count} {of}, got {size}."
        )
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int | np.integer):
            raise ValueError(
                f"{name} must be integers or strings, but row {row} is {value!r} ({type(value).__name__})."
            )
        kinds.setdefault("string" if isinstance(value, str) else "integer", f"{value!r} in {name}, row {row}")
    if len(kinds) > 1:
        raise ValueError(
            f"{name} must be all integers or all strings, got {' and '.join(kinds.values())}: these are never equal."
        )
    return np.array([ids.setdefault(value, len(ids)) for value in values], dtype=np.int64)


class _EqualTexts:
    """Where an image is right for a text since its group has an equal one; texts of one group alone are left out.

    Args:
        image_groups: `[N]`, ascending.
        text_groups: `[M]`.
        text_ids: `[M]`, from 0 on.
    """

    def __init__(self, image_groups: np.ndarray, text_groups: np.ndarray, text_ids: np.ndarray):
        number = int(text_ids.max()) + 1
        groups, texts = np.divmod(np.unique(text_groups * number + text_ids), number)  # of each pair there is
        is_shared = np.bincount(texts, minlength=number) > 1
        self.image_groups = image_groups
        self.text_ids = np.where(is_shared[text_ids], text_ids, -1)  # [M]
        self.groups, self.texts = groups[is_shared[texts]], texts[is_shared[texts]]  # [P], ascending by group

    def blocks(self, size: int) -> Iterator[tuple[int, int, int, int, torch.Tensor]]:
        """Rows from start to stop and columns from left to right, with what [`block`] gives, where it is not None."""
        for start, stop in _spans(0, len(self.image_groups), size):
            for left, right in _spans(0, len(self.text_ids), size):
                own = self.block(start, stop, left, right)
                if own is not None:
                    yield start, stop, left, right, own

    def block(self, start: int, stop: int, left: int, right: int) -> torch.Tensor | None:
        """Which of some images are right for which of some texts, `[stop - start, right - left]`; None if none is."""
        of_columns = self.text_ids[left:right]
        asked = np.unique(of_columns[of_columns >= 0])
        if not len(asked):
            return None
        # The shared texts of each image, one image's after another's.
        first = np.searchsorted(self.groups, self.image_groups[start:stop], side="left")
        counts = np.searchsorted(self.groups, self.image_groups[start:stop], side="right") - first
        rows = np.repeat(np.arange(stop - start), counts)
        texts = self.texts[np.arange(len(rows)) + np.repeat(first - counts.cumsum() + counts, counts)]
        columns = np.searchsorted(asked, texts).clip(max=len(asked) - 1)
        found = asked[columns] == texts
        if not found.any():
            return None
        has = np.zeros((stop - start, len(asked) + 1), dtype=bool)  # the last: texts that are not shared
        has[rows[found], columns[found]] = True
        return torch.from_numpy(has[:, np.where(of_columns >= 0, np.searchsorted(asked, of_columns), len(asked))])


def _spans(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    for left in range(start, stop, size):
        yield left, min(left + size, stop)


def _rank() -> int:
    """Rank of this process. Written here and not imported, since `evaluate` copies this file without the package."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """Matmul in full float32: the errors of autocast and TF32, which training may have on, exceed the tolerance."""
    if hasattr(torch.backends, "fp32_precision"):
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            with torch.autocast(device.type, enabled=False):
                yield
        finally:
            torch.set_float32_matmul_precision(precision)
