"""The image files of a folder: which there are, and one read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from PIL import Image

from rows.images import open_image, to_rgb


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def list_images(folder: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """The image files below a folder, path -> [size, time of change in ns], and what cannot be listed, path -> why."""
    files, skipped = {}, {}

    def report(error: OSError) -> None:
        skipped[os.path.relpath(error.filename, folder)] = str(error)

    for parent, folders, names in os.walk(folder, onerror=report):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.startswith(".") or os.path.splitext(name)[1].lower() not in SUFFIXES:
                continue
            path = os.path.relpath(os.path.join(parent, name), folder)
            try:
                path.encode()
                status = os.lstat(os.path.join(parent, name))
            except (UnicodeEncodeError, OSError) as error:
                skipped[repr(path)] = str(error)
                continue
            if stat.S_ISREG(status.st_mode):
                files[path] = [status.st_size, status.st_mtime_ns]
    return files, skipped


def read_image(path: Path) -> Image.Image:
    """An image file in RGB.

    Raises:
        Exception: of many types, where the file is broken or refused, see [`open_image`].
    """
    with open(path, "rb") as file:
        return to_rgb(open_image(file))
