"""RSUM against milliseconds, a named point for each model."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from model_cards.pictures import save_figure


PLACES = ((6, 4), (6, -11), (-6, 4), (-6, -11), (0, 9), (0, -16), (6, 15), (6, -22), (6, 26), (6, -33))  # points


def draw_comparison(found: list[dict], title: str, path: Path) -> None:
    """Draws what [`compare`] found as a PNG.

    Args:
        found: `model`, `runtime`, `device`, `rsum`, `ms_per_image` and `ms_per_caption` of each.
        title: over the picture.
        path: the file to write.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    milliseconds = [row["ms_per_image"] + row["ms_per_caption"] for row in found]
    ways = [f"{row['runtime']}, {row['device']}" for row in found]
    for way, marker in zip(dict.fromkeys(ways), "o^sD"):
        own = [i for i, of in enumerate(ways) if of == way]
        axes.plot([milliseconds[i] for i in own], [found[i]["rsum"] for i in own], marker, label=way)
    axes.set_xscale("log")
    axes.set_xlim(min(milliseconds) / 1.6, max(milliseconds) * 2.5)
    axes.margins(y=0.15)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("milliseconds of an image and a caption, batch 1")
    axes.set_ylabel("RSUM")
    axes.set_title(_plain(title), fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.canvas.draw()
    taken = []
    for x, row in sorted(zip(milliseconds, found), key=lambda item: -item[1]["rsum"]):
        for right, up in PLACES:  # the first place where the name covers no other one
            side = "left" if right > 0 else "right" if right < 0 else "center"
            name = axes.annotate(
                _plain(row["model"]), (x, row["rsum"]), (right, up), textcoords="offset points", ha=side, fontsize=8
            )
            box = name.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if (right, up) != PLACES[-1]:
                name.remove()
        taken.append(box)
    save_figure(figure, path)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # no formula
