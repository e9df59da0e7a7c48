"""All GPU figures in one Markdown table.

python -m benchmarks.gpu [--tiny]
"""

from __future__ import annotations

import itertools

from benchmarks import teacher_features

from . import loader, training
from .common import parser, print_table


def main() -> None:
    tiny = parser(__doc__).parse_args().tiny
    workers = loader.default_workers()
    if tiny:
        rows = (
            training.figures(tiny, start=8, steps=2),
            loader.figures(tiny, images=8, workers=workers),
            teacher_features.figures("tiny", rows=16, rounds=1, batch_size=8, num_workers=workers[-1]),
        )
    else:
        rows = (
            training.figures(tiny, start=32, steps=20),
            loader.figures(tiny, images=128, workers=workers),
            teacher_features.figures("ViT-L/14", rows=4096, rounds=2, batch_size=256, num_workers=workers[-1]),
        )
    print_table(itertools.chain(*rows))


if __name__ == "__main__":
    main()
