"""The pictures on a card: curves, samples of the data, and what queries find."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch
from PIL import Image

from rows.columns import pairs_alone, pairs_of, partners, rows_and_captions
from rows.files import write_whole
from rows.images import load_rgb

from .tables import SHOWN


if TYPE_CHECKING:
    from matplotlib.figure import Figure


# Beside a card, those that show images of the data or their captions.
PICTURES_OF_DATA = (
    "assets/text_to_image.png", "assets/image_to_text.png", "assets/query.png",
    "assets/sample_1.png", "assets/sample_2.png", "assets/sample_3.png",
)  # fmt: skip


def draw_grids(
    rows: datasets.Dataset,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    folder: Path,
    by_index: bool = False,
) -> dict[str, list[str]]:
    """Draws what a few queries find among all pairs: per direction, up to two whose first answer is right, two wrong.

    Without pairs nothing is drawn.

    Args:
        rows: the N rows of a split with C captions.
        image_embeds: of their images, L2-normalised `[N, D]`.
        text_embeds: of their captions, L2-normalised `[C, D]`, those of one row after another's.
        folder: where `text_to_image.png` and `image_to_text.png` are written.
        by_index: a caption that is equal to a right one is none itself.

    Returns:
        For each picture's file the texts that its font cannot draw, see [`result_grid`].
    """
    from .grid import Cell, result_grid  # it needs matplotlib

    rows, image_embeds, text_embeds = pairs_alone(rows, image_embeds, text_embeds)
    if not len(rows):
        return {}
    groups, caption_to_image = (ids.to(image_embeds.device) for ids in rows_and_captions(rows))
    captions = [caption for own in rows["captions"] for caption in own]
    owners, text_owners = groups.tolist(), groups[caption_to_image].tolist()
    of_group = defaultdict(set)  # what its captions are told apart by: their texts, or nothing but their group
    names = text_owners if by_index else captions
    for owner, name in zip(text_owners, names):
        of_group[owner].add(name)
    undecoded = _undecoded(rows, ["image"])

    def image(i: int) -> Image.Image:
        return load_rgb(undecoded[i]["image"])

    def caption(i: int) -> str:
        return captions[i]

    def fits(i: int, c: int) -> bool:
        return names[c] in of_group[owners[i]]

    ways = {
        "text_to_image": (caption, text_embeds, image, image_embeds, lambda c, i: fits(i, c)),
        "image_to_text": (image, image_embeds, caption, text_embeds, fits),
    }
    left_out = {}
    for way, (query, queries, answer, index, fits_query) in ways.items():
        tried = torch.tensor(evenly(range(len(queries)), 200), device=index.device)
        found = (queries[tried] @ index.T).topk(min(5, len(index)))
        answers = found.indices.tolist()
        right = [[fits_query(asked, i) for i in own] for asked, own in zip(tried.tolist(), answers)]
        hits, misses = ([i for i, own in enumerate(right) if own[0] is wanted] for wanted in (True, False))
        chosen = evenly(hits, 2) + evenly(misses, 2)
        cells = [
            [
                Cell(answer(i), f"{score:.2f}", is_right)
                for i, score, is_right in zip(answers[row], found.values[row].tolist(), right[row])
            ]
            for row in chosen
        ]
        left_out[f"{way}.png"] = result_grid([query(i) for i in tried[chosen].tolist()], cells, folder / f"{way}.png")
    return left_out


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def save_samples(rows: datasets.Dataset | datasets.IterableDataset, folder: Path) -> list[list[str]]:
    """Saves up to three readable images as `sample_1.png`, ... in `folder`; returns at most five captions of each.

    Of a stored split they are pairs, where it has any, or else images without captions.
    """
    if isinstance(rows, datasets.Dataset):
        pairs, (has_image, _) = pairs_of(rows).tolist(), partners(rows)
        part = rows.select(evenly(pairs or has_image.nonzero()[0].tolist(), 3))
    else:
        part = rows.take(3)
    captions = []
    for row in _undecoded(part, ["image", "captions"]):
        try:
            image = load_rgb(row["image"] or {"bytes": b"", "path": None})
        except ValueError:  # training skips such rows too
            continue
        captions.append([caption[:SHOWN] for caption in row["captions"][:5]])
        _save_small(image, folder / f"sample_{len(captions)}.png", 128)
    return captions


def save_query(rows: datasets.Dataset, folder: Path) -> list[str]:
    """Saves an image as `query.png` in `folder`; returns one caption of it and one each of two other images.

    Without pairs any image and any three texts; none of these, and no picture, where there is no image or no text.
    """
    part, pairs = _undecoded(rows, ["image", "captions"]), pairs_of(rows).tolist()
    if not pairs:
        has_image, counts = partners(rows)
        if not has_image.any() or not counts.any():
            return []
        _save_small(load_rgb(part[int(has_image.argmax())]["image"]), folder / "query.png", 256)
        texts = evenly(counts.nonzero()[0].tolist(), 3)
        return [" ".join(part[i]["captions"][0].split())[:SHOWN] for i in texts]
    first, *others = evenly(pairs, 3)
    _save_small(load_rgb(part[first]["image"]), folder / "query.png", 256)
    return [" ".join(part[i]["captions"][0].split())[:SHOWN] for i in (first, *others)]


def _undecoded(rows, columns: list[str]):
    return rows.select_columns(columns).cast_column("image", datasets.Image(decode=False))


def _save_small(image: Image.Image, path: Path, side: int) -> None:
    image.thumbnail((side, side))
    image.info.clear()  # Pillow would keep a colour profile, which may name a device
    with write_whole(path) as beside:
        image.save(beside, format="PNG", optimize=True)


def plot_curves(log_history: list[dict], path: Path) -> None:
    """Draws each loss, each loss's weight and the validation RSUM over the steps, as one picture.

    Args:
        log_history: of Trainer's state.
        path: the PNG file to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    logged = dict.fromkeys(name for entry in log_history for name in entry if name.startswith("weight_"))
    names = [name.removeprefix("weight_") for name in logged]  # of the losses; without a teacher: none
    has_pairs = any("eval_rsum" in entry for entry in log_history)
    has_agreement = any("eval_agreement" in entry for entry in log_history)
    figure_name = "eval_agreement" if has_agreement and not has_pairs else "eval_rsum"
    last = "validation RSUM" if figure_name == "eval_rsum" else "agreement with the teacher, %"
    panels = ["losses", "weights", last] if names else ["loss", last]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, title in zip(axes, panels):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if names:
        for name in names:
            axes[0].plot(*series(f"loss_{name}"), label=name.replace("_", " "))
            axes[1].plot(*series(f"weight_{name}"), label=name.replace("_", " "))
        axes[1].set_yscale("log")
        axes[0].set_yscale("log")
        axes[0].legend(fontsize="small")
    else:
        axes[0].plot(*series("loss"))
    axes[-1].plot(*series(figure_name), marker="o", markersize=3, label="student")
    teacher = series("teacher_eval_rsum")[1]
    if teacher:
        axes[-1].axhline(teacher[-1], linestyle="--", color="grey", label="teacher")
        axes[-1].legend(fontsize="small")
    axes[-1].set_ylim(bottom=0)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure of matplotlib's as a PNG file, whole or not at all, and closes it.

    The file names no program: of the same figure it has the same bytes.
    """
    import matplotlib.pyplot as plt

    with write_whole(path) as beside:
        figure.savefig(beside, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
