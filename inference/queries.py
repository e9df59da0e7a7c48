"""One's own queries, each with the files that answer it: how many are found among the first."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Collection
from pathlib import Path

from inference.vectors import Result
from model_cards.tables import markdown_table
from rows.files import named


CUTS = (1, 5, 10)
EQUAL = 1e-6  # scores closer than this are a tie, which counts against the model


def read_queries(file: Path, ids: Collection[str]) -> dict[str, set[str]]:
    """Query -> the files that answer it, of a CSV with the columns `query` and `file`, a line for each pair. Its cells
    are separated by commas, semicolons or tabs.

    Args:
        file: UTF-8.
        ids: of the images that are searched.

    Raises:
        ValueError: it cannot be read, has other columns or no lines, or names files that are not there.
    """
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            reader = csv.DictReader(lines, delimiter=max(",;\t", key=first.count))
            if not {"query", "file"} <= set(reader.fieldnames or ()):
                raise ValueError(f"it has the columns {', '.join(reader.fieldnames or ())}, expected query and file")
            pairs = [(row["query"].strip(), row["file"].strip()) for row in reader if row["query"] and row["file"]]
        if not pairs:
            raise ValueError("it has no line with a query and a file")
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"--queries {file} cannot be read: {error}.") from error
    known = set(ids)
    if unknown := sorted({own for _, own in pairs} - known):
        raise ValueError(f"--queries {file} names {len(unknown):,} files that the index has not: {named(unknown)}.")
    queries: dict[str, set[str]] = {}
    for query, own in pairs:
        queries.setdefault(query, set()).add(own)
    return queries


def rank_of(results: list[Result], right: set[str]) -> int:
    """1 + the number of wrong files that score at least as much as the best right one.

    Args:
        results: all files, best first; of an approximate search those that it found, and a right one that is not
            among them comes after all of these.
    """
    best = max((result.score for result in results if result.path in right), default=float("-inf"))
    return 1 + sum(result.score >= best - EQUAL and result.path not in right for result in results)


def evaluate_queries(search: Callable[[str, int], list[Result]], queries: dict[str, set[str]], count: int) -> str:
    """A table of the share of queries that are answered among the first 1, 5 and 10, and of those that are not.

    Args:
        search: the k best files of a query.
        queries: see [`read_queries`].
        count: of all files.
    """
    ranks = {query: rank_of(search(query, count), right) for query, right in queries.items()}
    rows = [[f"{len(queries):,} queries, {count:,} images", ""]]
    for k in CUTS:
        found = sum(rank <= k for rank in ranks.values())
        rows.append([f"answered among the first {k}", f"{100 * found / len(ranks):.1f} %"])
    rows.append(["median rank", f"{statistics.median(ranks.values()):g}"])
    worst = sorted(ranks, key=lambda query: -ranks[query])[:5]
    missed = [f"  {ranks[query]:,}  {query}" for query in worst if ranks[query] > CUTS[-1]]
    return "\n".join([markdown_table(rows), *(["Furthest from an answer (rank, query):", *missed] if missed else [])])
