"""The precision that a run is trained in, where nobody has said: bf16 with TF32 on GPUs that have both."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from .run.distributed import launchers_words


HAS_BOTH = (8, 0)  # the first compute capability, Ampere's, that multiplies in bf16 and in TF32


def choose(
    bf16: bool | None, fp16: bool, tf32: bool | None, of_accelerate: str | None, capability: tuple[int, int] | None
) -> tuple[bool, bool | None]:
    """Whether a run is trained in bf16, and whether float32 products are made in TF32 (None: as torch does).

    What was said stays. Where nothing was, a GPU of compute capability 8 or more gets both.

    Args:
        bf16, fp16, tf32: the settings; None for one that was not given.
        of_accelerate: what accelerate's configuration says, see [`said_to_accelerate`].
        capability: compute capability of the GPU; None on any other device.
    """
    fits = capability is not None and capability >= HAS_BOTH
    if bf16 is None:
        bf16 = fits and not fp16 and of_accelerate in (None, "bf16")
    return bf16, True if tf32 is None and fits and bf16 else tf32


def capability_of_gpus(use_cpu: bool) -> tuple[int, int] | None:
    """The lowest compute capability of this machine's NVIDIA GPUs, so that all its ranks choose alike; None where a
    run has none: on a CPU, on MPS, on another maker's GPU."""
    on_cpu = use_cpu or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes", "y", "on", "t")
    if on_cpu or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count()))


def said_to_accelerate(environment: Mapping[str, str], launcher: Sequence[str] | None) -> str | None:
    """The mixed precision that accelerate was told, "no" among them; None where nobody has told it any.

    `accelerate launch` says "no" where it was told nothing: then its command line and configuration are looked at.

    Args:
        environment: of this process.
        launcher: the command line of the `accelerate launch` that started it; None where none did, or where the system
            does not say.
    """
    told = environment.get("ACCELERATE_MIXED_PRECISION")
    if told != "no" or launcher is None:
        return told
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("mixed_precision", "config_file"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    options, _ = parser.parse_known_args(list(launcher))
    if options.mixed_precision is not None:
        return told
    if options.config_file is None and not Path(default_config_file).is_file():
        return None
    return None if load_config_from_file(options.config_file).mixed_precision is None else told


def of_this_process() -> str | None:
    """[`said_to_accelerate`] for this process."""
    return said_to_accelerate(os.environ, launchers_words())


def describe(mixed_precision: str, tf32: bool | None, capability: tuple[int, int] | None) -> str:
    """A run's precision in words.

    Args:
        mixed_precision: "no", "bf16", "fp16" or another of accelerate's.
        tf32: of the settings.
        capability: see [`capability_of_gpus`].
    """
    words = "float32" if mixed_precision == "no" else f"{mixed_precision} autocast of float32 weights"
    if capability is not None:
        products = {None: "as torch makes them", True: "in TF32", False: "not in TF32"}[tf32]
        words += f", float32 products {products}"
        words += f" (compute capability {capability[0]}.{capability[1]})"
    return words
