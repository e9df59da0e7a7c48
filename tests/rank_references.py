"""Ranks by loops over numpy, ties and equal texts counted as the definition has it, and random rows for them."""

import math

import numpy as np
import torch

from trainers.metrics import ranks


def reference_ranks(queries, items, query_groups, item_groups, is_right=None):
    """The definition in float64, one pair at a time; only exact ties (to rounding of float64) count as ties.

    `is_right` `[queries, items]` says what is right instead of the groups.
    """
    queries, items = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in (np.asarray(queries, dtype=np.float64), np.asarray(items, dtype=np.float64))
    )
    found = []
    if is_right is None:
        is_right = np.array([[group == other for other in item_groups] for group in query_groups])
    for query, right in zip(queries, is_right, strict=True):
        best, wrong = -math.inf, []
        for item, fits in zip(items, right, strict=True):
            score = float(np.dot(query, item))
            if fits:
                best = max(best, score)
            else:
                wrong.append(score)
        found.append(1 + sum(score >= best - 1e-12 for score in wrong))
    return found


def assert_matches_reference(images, texts, image_groups, text_groups, **settings):
    image_ranks, text_ranks = ranks(images, texts, image_groups, text_groups, **settings)
    assert image_ranks.dtype == text_ranks.dtype == torch.int64
    image_groups, text_groups = (g.tolist() if hasattr(g, "tolist") else list(g) for g in (image_groups, text_groups))
    assert image_ranks.tolist() == reference_ranks(images.double(), texts.double(), image_groups, text_groups)
    assert text_ranks.tolist() == reference_ranks(texts.double(), images.double(), text_groups, image_groups)
    return image_ranks, text_ranks


def random_problem(seed, num_images=37, dim=9, images_a_group=1, max_captions=7):
    """Shuffled, related embeddings: 1 to `max_captions` captions an image, up to `images_a_group` images a group."""
    generator = torch.Generator().manual_seed(seed)
    image_groups = torch.arange(num_images) // images_a_group * 1_000_003 - 5
    counts = torch.randint(1, max_captions + 1, (num_images,), generator=generator)
    caption_to_image = torch.repeat_interleave(torch.arange(num_images), counts)
    images = torch.randn(num_images, dim, generator=generator)
    texts = images[caption_to_image] + 0.9 * torch.randn(len(caption_to_image), dim, generator=generator)
    image_order = torch.randperm(num_images, generator=generator)
    text_order = torch.randperm(len(texts), generator=generator)
    text_groups = image_groups[caption_to_image][text_order]
    return images[image_order] * 3.0, texts[text_order] * 0.2, image_groups[image_order], text_groups


def reference_right(image_groups, text_groups, texts):
    """`[images, texts]`: a text is right for an image where a text of the image's group is equal to it."""
    return np.array(
        [
            [any(g == group and t == text for g, t in zip(text_groups, texts)) for text in texts]
            for group in image_groups
        ]
    )


def with_equal_texts(seed, **shape):
    """`random_problem` and texts, of which few or most are equal to others, equal ones at the same point or not."""
    images, texts, image_groups, text_groups = random_problem(seed, **shape)
    rng = np.random.default_rng(seed)
    words = np.array([*map(str, range(len(texts) * (1 + seed % 3)))])
    words[: len(words) // 3] = "a photo"
    names = rng.choice(words, len(texts))
    if seed % 2:
        first = {name: c for c, name in reversed(list(enumerate(names)))}
        texts = texts[[first[name] for name in names]]
    return images, texts, image_groups, text_groups, names.tolist()
