"""The share of the teacher that students keep against their size and their speed, as a picture.

    python -m benchmarks.size_picture --config recipes/ablation_sizes.yaml --output docs/sizes.png

Reads the lines that `benchmarks.ablation` has written and times each variant's student on this machine. It is built
anew for that: its weights, which only its run had, do not change its speed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from train import as_options, prepare
from trainers.report import latency

from .ablation import Ablation, Study, interval, shown
from .common import machine


def points_of(study: Study, question: str, milliseconds: dict[int, float]) -> list[dict]:
    """Of each variant that has run: parameters in millions, ms an image, and the share with half its interval.

    Args:
        study: its lines.
        question: of the study.
        milliseconds: by parameters, of students that were timed; those of other sizes are added.
    """
    points = []
    for name, lines in study.lines_by_variant(question).items():
        if not lines:
            print(f"{question}, {name}: no runs yet", file=sys.stderr)
            continue
        parameters = lines[0]["parameters"]
        if parameters not in milliseconds:
            with tempfile.TemporaryDirectory() as folder:  # a trainer makes its folder
                options = as_options(lines[0]["settings"] | {"output_dir": folder, "report_to": "none"})
                student, _, _, _ = prepare(["--config", study.ablation.recipe, "--do_train", "False", *options])
            speed = latency(student.model, student.processing_class, max_length=12)
            milliseconds[parameters] = speed["ms_per_image_batch_1"]
        shares = [line["eval_share_of_teacher"] for line in lines]
        mean, half = interval(shares)
        points.append(
            {
                "parameters": parameters / 1e6,
                "milliseconds": milliseconds[parameters],
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
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=110, metadata={"Software": None})
    plt.close(figure)
    os.replace(beside, path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="an ablation whose questions are the curves")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    study = Study(Ablation.read(args.config), train=False)
    milliseconds = {}
    curves = {question: points_of(study, question, milliseconds) for question in study.ablation.questions}
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
