"""Captions with equal texts that stand for several images: found before training, and said.

Texts are compared as they are written, by the hash [`text_id`]: the rule is one of the data, the same for every
tokenizer, process and machine.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import datasets
import numpy as np
from tqdm.auto import tqdm

from rows.columns import caption_lists, id_hash, text_id
from rows.files import printable

from .run import distributed


logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 5000


@dataclass(frozen=True)
class SharedTexts:
    """The texts of a split that stand for several images, each of another group."""

    ids: frozenset[int] = frozenset()  # their text_ids
    share: float = 0.0  # percent of all captions that have such a text


def find_shared_texts(dataset: datasets.Dataset, split: str, rule: str) -> SharedTexts:
    """Looks through all captions of a split, and logs the share of those that stand for several images, if any.

    To be called on every rank: each reads its share of the rows.

    Args:
        dataset: rows of the contract, not streamed.
        split: its name.
        rule: what such captions count as, for the log.
    """
    column = "group_id" if "group_id" in dataset.column_names else "image_id"
    rows = dataset.select_columns(["captions", column]).with_format("arrow")
    rank, ranks = distributed.rank(), distributed.world_size()
    start, stop = len(rows) * rank // ranks, len(rows) * (rank + 1) // ranks
    found = [np.empty((0, 2), np.int64)]  # the text_id and the group of each caption
    for first in tqdm(range(start, stop, ROWS_AT_ONCE), desc=f"compare {split}", leave=False, disable=None):
        table = rows[first : min(first + ROWS_AT_ONCE, stop)]
        captions = table["captions"].to_pylist()
        texts = [text_id(caption) for own in captions for caption in own]
        groups = [id_hash(group) for group in table[column].to_pylist()]
        found.append(np.array([texts, np.repeat(groups, [len(own) for own in captions])], np.int64).T)
    texts, groups = np.concatenate(distributed.gather_arrays(np.concatenate(found).ravel())).reshape(-1, 2).T
    ids, group_counts = texts_of_several_groups(texts, groups)
    if not len(ids):
        return SharedTexts()
    most = ids[group_counts.argmax()]
    example = next(text for own in caption_lists(dataset) for text in own if text_id(text) == most)
    share = 100 * float(np.isin(texts, ids).mean())
    if rank == 0:
        shown = printable(example if len(example) < 60 else f"{example[:57]}...")
        logger.warning(
            f"{share:.3g} % of the captions of {split} stand for several images ({shown!r} for "
            f"{group_counts.max():,}): {rule}. Captions that say more would tell these images apart."
        )
    return SharedTexts(frozenset(ids.tolist()), share)


def texts_of_several_groups(texts: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids, ascending, of texts that occur in more than one group `[S]`, and in how many each does `[S]`.

    Args:
        texts, groups: of each caption, `[M]` int64.
    """
    order = np.lexsort((groups, texts))
    texts, groups = texts[order], groups[order]
    is_new = np.ones(len(texts), bool)  # the first caption of its text and group
    is_new[1:] = (texts[1:] != texts[:-1]) | (groups[1:] != groups[:-1])
    ids, counts = np.unique(texts[is_new], return_counts=True)
    return ids[counts > 1], counts[counts > 1]
