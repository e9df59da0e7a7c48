"""Fetches onnxruntime-web, which runs a student in a browser, once and checked; needs nothing but Python and npm.

    python -m inference.web_runtime

Of the npm package two files are kept, in the user's cache: the smallest build that runs a student (WebAssembly, one
thread; the builds with WebGPU have 27 to 28 MB). No PyPI package carries them.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from rows.command_line import Command, run_program
from rows.files import write_beside


NAME, VERSION = "onnxruntime-web", "1.30.0"
# Of the package as npm delivers it, and of the files that are kept.
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
FILES = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
LICENSE = """\
onnxruntime-web 1.30.0, MIT License. Copyright (c) Microsoft Corporation.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
SECONDS = 600  # for npm to fetch 33 MB


def runtime_folder() -> Path:
    """The folder of the runtime's two files and their licence, fetched where it is missing or not whole.

    Raises:
        FileNotFoundError: npm is not installed.
        OSError: npm cannot fetch the package.
        ValueError: what it fetched is another package than the one that was pinned.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "dsmd_runtime" / f"{NAME}-{VERSION}"
    if not is_whole(folder):
        if folder.is_dir():
            shutil.rmtree(folder)  # ours: a file of it was changed or lost
        try:
            with write_beside(folder) as beside:
                _fetch(beside)
        except OSError:
            if not is_whole(folder):  # another process was first
                raise
    return folder


def is_whole(folder: Path) -> bool:
    """Whether a folder holds the runtime's files as they were pinned."""
    try:
        return all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted for name, wanted in FILES.items()
        )
    except OSError:
        return False


def add_runtime(site: Path) -> None:
    """Puts the runtime into a site's folder `runtime`, where it is not there yet. Raises as [`runtime_folder`]."""
    if not is_whole(site / "runtime"):
        source = runtime_folder()
        (site / "runtime").mkdir(exist_ok=True)
        for name in (*FILES, "LICENSE"):
            shutil.copyfile(source / name, site / "runtime" / name)


def _fetch(folder: Path) -> None:
    package = f"{NAME}@{VERSION}"
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm is not installed, and it fetches {package}: install Node.js, which brings it")
    with tempfile.TemporaryDirectory() as scratch:  # and so no settings of a folder that holds a package
        command = [npm, "pack", package, "--ignore-scripts", "--silent"]
        try:
            result = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise OSError(f"npm did not fetch {package} within {SECONDS} seconds: try again") from None
        archives = list(Path(scratch).glob("*.tgz"))
        if result.returncode or len(archives) != 1:
            why = " ".join(result.stderr.split())[-300:] or f"exit status {result.returncode}"
            raise OSError(f"npm cannot fetch {package}: {why}")
        found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if found != SHA512:
            raise ValueError(f"npm fetched another {package} than the one that was checked: its sha512 is {found}")
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                with archive.extractfile(f"package/dist/{name}") as member:
                    (folder / name).write_bytes(member.read())
    (folder / "LICENSE").write_text(LICENSE, encoding="utf-8")
    if not is_whole(folder):
        raise ValueError(f"the files of {package} are not those that were checked")


def main(arguments: list[str] | None = None) -> None:
    Command("inference.web_runtime", __doc__).parse_args(arguments)
    print(f"{NAME} {VERSION}: {runtime_folder()}")


if __name__ == "__main__":
    run_program(main)
