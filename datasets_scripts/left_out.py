"""What of a source does not get into the dataset: listed, counted, and an error unless it is to be skipped."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

from rows.files import counted, printable


SHOWN = 20
LEAVE_OUT = "Mend it, or leave such rows out with --skip_broken."


def share(text: str) -> float:
    """An option's value in [0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share from 0 to 1, such as 0.01")
    return number


@dataclass
class LeftOut:
    """Rows that are left out, each a line that names it and says why.

    Args:
        report: the file that lists all of them; an earlier run's is removed.
        skip: leave them out; else they are an error.
        most: the largest share of them that is skipped, in [0, 1]; None: any.
        rows: what cannot be used, for any reason but the next two.
        images: missing, or that cannot be decoded.
        hint: names an option that would keep some of them, with their number.
        failed: that the source itself marks as failed, such as downloads; never an error, and no part of the share.
    """

    report: Path
    skip: bool
    most: float | None
    rows: list[str]
    failed: list[str]
    images: list[str] = field(default_factory=list)
    hint: str = ""

    def check(self, kept: int) -> None:
        """Writes the list, or removes an earlier run's, and refuses what may not be skipped.

        Args:
            kept: number of the other rows.

        Raises:
            ValueError: rows cannot be used and are not to be skipped, or are too many, or nothing is left.
        """
        lines = [*map(printable, [*self.rows, *self.images, *self.failed])]
        if not lines:
            self.report.unlink(missing_ok=True)
            if not kept:
                raise ValueError("there are no rows; expected some in one of the splits")
            return
        self.report.write_text("\n".join(lines) + "\n", encoding="utf-8")
        what = [f"{counted(len(self.images), 'image is', 'images are')} missing or broken"] if self.images else []
        what += [f"{counted(len(self.rows), 'row', 'rows')} cannot be used"] if self.rows else []
        what += [f"{counted(len(self.failed), 'row', 'rows')} marked as failed"] if self.failed else []
        where = f"all listed in {self.report}; the first:\n  " + "\n  ".join(lines[:SHOWN])
        message = f"{', '.join(what)}, {where}"
        count = len(self.rows) + len(self.images)
        if count and not self.skip:
            elsewhere = "Do they lie in another folder? Name it by --images. " if self.images and not kept else ""
            raise ValueError(f"{message}\n{elsewhere}{self.hint}Mend them, or leave them out with --skip_broken.")
        if not kept:
            raise ValueError(f"no row is left: {message}")
        if self.most is not None and count / (count + kept) > self.most:
            found = f"{100 * count / (count + kept):.3g} % of the rows cannot be used"
            raise ValueError(f"{found}, expected {100 * self.most:.3g} % at most (--max_skipped): {message}")

    def say(self, kept: int) -> None:
        """Prints how many rows are left out."""
        count = len(self.rows) + len(self.images) + len(self.failed)
        if not count:
            return
        share = f"{100 * count / (count + kept):.1f} %"
        line = f"{counted(count, 'row is', 'rows are')} left out, all listed in {self.report}, {share}"
        if self.failed:
            line += f" ({len(self.failed):,} of them failed in the source: --max_skipped does not count these)"
        print(line)

    def on_card(self) -> str:
        """A paragraph for the card; empty where nothing is left out."""
        reasons = (
            (self.images, "image was missing or broken and is", "images were missing or broken and are"),
            (self.rows, "row could not be used and is", "rows could not be used and are"),
            (self.failed, "row that the source marks as failed is", "rows that the source marks as failed are"),
        )
        lines = [f"{counted(len(rows), one, many)} left out." for rows, one, many in reasons if rows]
        return "\n\n" + " ".join(lines) if lines else ""
