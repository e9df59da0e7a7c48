"""All GPU figures, as one Markdown file; nothing is downloaded, all weights and images are random.

python -m benchmarks.gpu [--output runs/gpu.md] [--device cpu] [--parts eager compiled ...]

Each part runs in a process of its own: one that fails leaves the others' rows, and its row says why it failed. With
`--device cpu` the sizes are tiny, to try the programs where there is no GPU: such figures mean nothing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from rows.files import write_whole

from .common import machine
from .part import PARTS, ROOT


SECONDS = 1200  # the most that a part may take


def command_of(name: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu.part", name]


def run_part(name: str, device: str, seconds: float) -> tuple[list[str], str | None]:
    """The rows that a part printed, and what went wrong with it: None where nothing did."""
    command = [*command_of(name), *(["--tiny"] if device == "cpu" else [])]
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **hidden}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)
    try:
        printed, said = process.communicate(timeout=seconds)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started, which would hold the GPU
        printed, said = process.communicate()
        status = f"longer than {seconds:g} s"
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    if status == 0:
        return rows, None
    print(said[-4000:], file=sys.stderr)
    # torch's launcher ends with a frame of its own: the error that it speaks of is an earlier line.
    errors = [line.strip() for line in said.splitlines() if "Error" in line or "error" in line] or ["no word"]
    return rows, f"failed ({status}): {errors[-1][:300].replace('|', '/')}"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("runs/gpu.md"), help="the Markdown file that is written")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tiny sizes, to try it")
    options.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    options.add_argument("--seconds", type=float, default=SECONDS, help="the most that a part may take")
    options = options.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here: --device cpu tries the programs in tiny sizes.")
    head = f"# Figures of `python -m benchmarks.gpu`\n\n{machine()}, bf16.\n"
    if options.device == "cpu":
        head += "\nTiny sizes on a CPU, to try the programs: these figures say nothing.\n"
    lines, failed = [head, "| measure | figure |", "|---|---|"], []
    print("\n".join(lines), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for name in options.parts:
        rows, wrong = run_part(name, options.device, options.seconds)
        if wrong is not None:
            rows.append(f"| {name} | {wrong} |")
            failed.append(name)
        print("\n".join(rows), flush=True)
        lines += rows
        with write_whole(options.output) as beside:  # after each part: what is measured is kept
            beside.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{options.output}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
