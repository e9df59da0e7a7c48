"""Draws the share of the teacher's RSUM that students keep, over their size and over their speed.

    python -m benchmarks.size_picture --config recipes/ablation_sizes.yaml --output docs/sizes.png

Reads the lines that `benchmarks.ablation` has written and times each image tower on this machine. The tower is built
anew from its settings: the trained weights need not be there, as they do not change the speed.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

from model_cards.pictures import save_figure
from train import prepare
from trainers.recipe import as_options
from trainers.report import latency

from .ablation import Study, interval, shown, study_to_draw
from .common import machine


@functools.cache
def milliseconds_of(recipe: str, image_tower: str) -> float:
    """Milliseconds in which a new student of the recipe embeds one image.

    A tower is timed once, so that students that share it are drawn at the same place.

    Args:
        image_tower: the student's `vision_config`, as JSON.
    """
    with tempfile.TemporaryDirectory() as folder:  # a trainer creates its output folder
        options = as_options({"vision_config": json.loads(image_tower), "output_dir": folder, "report_to": "none"})
        student, _, _, _ = prepare(["--config", recipe, "--do_train", "False", *options])
    return latency(student.model, student.processing_class, max_length=12)["ms_per_image_batch_1"]


def points_of(study: Study, question: str) -> list[dict]:
    """A point for each variant that has run: millions of parameters, ms per image, and the share with its interval."""
    points = []
    for name, lines in study.lines_by_variant(question).items():
        if not lines:
            print(f"{question}, {name}: no runs yet", file=sys.stderr)
            continue
        image_tower = json.dumps((study.recipe | lines[0]["settings"])["vision_config"], sort_keys=True)
        shares = [line["eval_share_of_teacher"] for line in lines]
        mean, half = interval(shares)
        points.append(
            {
                "parameters": lines[0]["parameters"] / 1e6,
                "milliseconds": milliseconds_of(study.ablation.recipe, image_tower),
                "share": mean,
                "half": half if len(lines) > 1 else 0.0,
                "shares": shares,
            }
        )
    return points


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, figure_name, label, marks in (
        (axes[0], "parameters", "parameters, millions", [1, 2, 3, 5, 10, 20]),
        (axes[1], "milliseconds", "ms an image, batch 1", [3, 4, 5, 6, 8, 10, 15]),
    ):
        for name, points in curves.items():
            x, y, half = ([point[key] for point in points] for key in (figure_name, "share", "half"))
            axis.errorbar(x, y, yerr=half, marker="o", markersize=4, capsize=3, label=name)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xticks(marks)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3, which="both")
        axis.axhline(100, color="gray", linestyle=":", linewidth=1, label="the teacher")
    axes[0].set_ylabel("% of the teacher's RSUM, validation")
    axes[0].legend()
    save_figure(figure, path)


def main(argv: list[str]) -> None:
    study, args = study_to_draw(__doc__, argv)
    curves = {question: points_of(study, question) for question in study.ablation.questions}
    draw(curves, args.output)
    print(
        "| students | M parameters | ms an image, batch 1 | % of the teacher's RSUM, validation |\n|---|---|---|---|"
    )
    for name, points in curves.items():
        for point in points:
            share = shown(point["shares"])
            print(f"| {name} | {point['parameters']:.2f} | {point['milliseconds']:.2f} | {share} |")
    print(f"\n{machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
