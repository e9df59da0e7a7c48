"""Draws the share of the teacher's RSUM that students keep, over the number of pairs that they learn from.

    python -m benchmarks.pairs_picture --config recipes/ablation_pairs_emoji.yaml --output docs/pairs.png

Reads the lines that `benchmarks.ablation` has written, with their figures of the test split (`--test`). A question is
a curve, and its variants are called by their numbers of pairs, "all" at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path

from model_cards.pictures import save_figure

from .ablation import Study, interval, study_to_draw


def points_of(study: Study, question: str) -> dict[str, tuple[float, float]]:
    """The share of the teacher's test RSUM by number of pairs: mean, and half its interval (0 for one seed)."""
    points = {}
    for pairs, lines in study.lines_by_variant(question).items():
        shares = [line["test_share_of_teacher"] for line in lines if "test_share_of_teacher" in line]
        if not shares:
            print(f"{question}, {pairs} pairs: no test figures yet", file=sys.stderr)
            continue
        mean, half = interval(shares)
        points[pairs] = (mean, half if len(shares) > 1 else 0.0)
    return points


def in_order(curves: dict[str, dict[str, object]]) -> list[str]:
    """All numbers of pairs that the curves have, rising, "all" last."""
    names = {pairs for points in curves.values() for pairs in points}
    return sorted(names, key=lambda pairs: float("inf") if pairs == "all" else int(pairs.replace(",", "")))


def draw(curves: dict[str, dict[str, tuple[float, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = {pairs: place for place, pairs in enumerate(in_order(curves))}
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axis.axhline(100, color="gray", linestyle=":", linewidth=1, label="the teacher")
    for name, points in curves.items():
        x = [places[pairs] for pairs in points]
        mean, half = zip(*points.values())
        axis.errorbar(x, mean, yerr=half, marker="o", markersize=4, capsize=3, label=name)
    axis.set_xticks(list(places.values()), list(places))
    axis.set_xlabel("pairs of an image and its captions")
    axis.set_ylabel("% of the teacher's RSUM, test")
    axis.set_ylim(0)
    axis.grid(alpha=0.3)
    axis.legend()
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    study, args = study_to_draw(__doc__, argv)
    curves = {question: points_of(study, question) for question in study.ablation.questions}
    curves = {question: points for question, points in curves.items() if points}
    if not curves:
        sys.exit(
            f"{study.ablation.results} has no test figures of {args.config}: run benchmarks.ablation, then --test"
        )
    draw(curves, args.output)
    print("| pairs | " + " | ".join(curves) + " |\n|" + "---|" * (len(curves) + 1))
    for pairs in in_order(curves):
        shares = [f"{points[pairs][0]:.1f}" if pairs in points else "-" for points in curves.values()]
        print(f"| {pairs} | {' | '.join(shares)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
