"""Time and memory of `trainers.metrics.ranks` on random embeddings.

python -m benchmarks.retrieval_speed

First, embeddings of the shape of COCO's 5K test split, beside the loop over queries of the VSE++ and DSMD code, which
sorts all scores of a query in numpy; it is run on some of the queries and scaled up. Second, 100,000 images and
as many captions, beside half of both, to see how time and memory grow.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trainers.metrics import ranks
from trainers.timing import seconds_of

from .common import Row, interleaved, print_table, ratio


def memory_mib(field: str) -> float:
    """Memory of this process in MiB, as the Linux kernel counts it: `VmRSS` is held now, `VmHWM` the most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark measures memory on Linux only.")


def make_embeds(images: int, captions: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit rows `[images, dim]`, `[captions, dim]` and their groups; captions lie near their image."""
    torch.manual_seed(0)
    image_groups, text_groups = torch.arange(images), torch.arange(captions) % images
    image = torch.randn(images, dim)
    text = torch.randn(captions, dim).add_(image[text_groups], alpha=0.12)
    image, text = (torch.nn.functional.normalize(rows, dim=1) for rows in (image, text))
    return image, text, image_groups, text_groups


def ranks_by_sorting(queries: np.ndarray, items: np.ndarray, answers: list[np.ndarray]) -> list[int]:
    """Ranks, 1 at best, of queries `[Q, D]` among items `[K, D]`, found by sorting as in the authors' evaluation.

    Args:
        answers: for each query the rows of its right items.
    """
    found = []
    for query, right in zip(queries, answers, strict=True):
        order = np.argsort(query @ items.T)[::-1]
        found.append(1 + min(np.where(order == answer)[0][0] for answer in right))
    return found


def beside_the_loop(
    images: int = 5000, captions: int = 25010, dim: int = 768, some: int = 200, rounds: int = 3
) -> list[Row]:
    """The table's row of `ranks` beside the authors' loop, which is run on `some` queries of each direction."""
    problem = make_embeds(images, captions, dim)
    image, text, image_groups, text_groups = (tensor.numpy() for tensor in problem)
    texts_of = [np.flatnonzero(text_groups == group) for group in range(images)]
    generator = np.random.default_rng(0)
    some_images, some_texts = (generator.permutation(count)[:some] for count in (images, captions))

    def loop() -> float:
        texts, groups = [texts_of[i] for i in some_images], [text_groups[[i]] for i in some_texts]
        there = seconds_of(lambda: ranks_by_sorting(image[some_images], text, texts))
        back = seconds_of(lambda: ranks_by_sorting(text[some_texts], image, groups))
        return there / len(some_images) * images + back / len(some_texts) * captions

    times = interleaved(partial(seconds_of, partial(ranks, *problem)), loop, rounds=rounds)
    ours, theirs = (statistics.median(column) for column in times)
    return [
        Row(
            f"retrieval, {images:,} images x {captions:,} captions x {dim}",
            f"{ours:.2f} s",
            f"the authors' loop over queries: {theirs:.1f} s",
            f"{ratio(times[1], times[0]):.1f} x faster",
            "faster",
        )
    ]


def at_scale(side: int = 100_000, dim: int = 256) -> list[Row]:
    """The table's rows of time and memory of `side` x `side` pairs; half the side is timed before and after it."""
    half = make_embeds(side // 2, side // 2, dim)
    whole = make_embeds(side, side, dim)
    before = seconds_of(partial(ranks, *half))
    # Writing 5 resets VmHWM to what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    held = memory_mib("VmRSS")
    seconds = seconds_of(partial(ranks, *whole))
    extra = memory_mib("VmHWM") - held
    smaller = statistics.mean([before, seconds_of(partial(ranks, *half))])
    embeds = sum(rows.nbytes for rows in whole[:2]) / 2**20
    return [
        Row(
            f"retrieval, {side:,} x {side:,} x {dim}",
            f"{seconds:.1f} s",
            f"half the side: {smaller:.1f} s",
            f"{seconds / smaller:.2f} x",
            "4 x (linear in pairs)",
        ),
        Row("its memory", f"{extra:.0f} MiB", f"the embeddings: {embeds:.0f} MiB", "-", "under 1 GB beside them"),
    ]


def measure() -> list[Row]:
    return [*beside_the_loop(), *at_scale()]


if __name__ == "__main__":
    print_table(measure())
