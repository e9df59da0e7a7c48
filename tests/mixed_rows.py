"""Rows of the contract without partners: images without captions, texts without images."""

import datasets
from conftest import make_rows


def without_partners(rows: datasets.Dataset, images=lambda i: i % 3 == 1, texts=lambda i: i % 3 == 2):
    """The rows, of which those that `images` picks lose their captions, and those that `texts` picks their images."""
    changed = []
    for i, row in enumerate(rows):
        if images(i):
            row |= {"captions": [], "teacher_text_embeds": []}
        elif texts(i):
            row |= {"image": None, "teacher_image_embeds": None}
        changed.append(row)
    return datasets.Dataset.from_list(changed, features=rows.features)


def mixed_rows(count: int, seed: int = 0) -> datasets.Dataset:
    """A third of pairs, a third of images, a third of texts, some of one group."""
    return without_partners(make_rows(count, seed))
