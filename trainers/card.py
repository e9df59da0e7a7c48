"""The record of a run, taken from its trainer, and the card made of it."""

from __future__ import annotations

import csv
import json
import os
import platform
from pathlib import Path

import accelerate
import datasets
import torch
import transformers
from transformers import PreTrainedModel, TrainerState

from model_cards import RunFacts, RunRecord, render_card
from rows.files import write_whole

from .training_args import RetrievalTrainingArguments, settings_that_differ


# Settings that differ from their defaults without any effect on what is learned.
HOUSEKEEPING = ("accelerator_config", "dataloader_pin_memory", "disable_tqdm", "report_to", "use_cpu")
HOUSEKEEPING_PREFIXES = ("do_", "hub_", "push_", "resume_", "logging_", "save_")


def describe_run(
    args: RetrievalTrainingArguments,
    settings: dict[str, object],
    state: TrainerState,
    model: PreTrainedModel,
    facts: RunFacts,
    method: str,
    folder: Path,
    in_training: bool,
) -> RunRecord:
    """What is known of a run at this moment.

    Args:
        args, state, model: of the trainer, before, in or after training.
        settings: those of the method.
        facts: what the trainer cannot know by itself.
        method: "distillation" or "contrastive".
        folder: where the student is saved; pictures are those in its `assets/`.
        in_training: training is going on.
    """
    weights_step = state.global_step
    if args.load_best_model_at_end and state.best_model_checkpoint is not None and not in_training:
        weights_step = state.best_global_step
    metrics, metrics_step = facts.metrics, weights_step
    if not metrics:
        evaluations = [entry for entry in state.log_history if "eval_images" in entry]
        of_these = [entry for entry in evaluations if entry["step"] == weights_step] or evaluations
        # The first at that step: a later one may be of the best checkpoint's weights.
        metrics = of_these[0 if of_these[0]["step"] == weights_step else -1] if of_these else {}
        metrics_step = metrics.get("step", weights_step)
    resumed_at = [entry["step"] for entry in state.log_history if "resumed" in entry]
    settings = {name: value for name, value in settings.items() if not _is_path(value)}
    differing = settings_that_differ(args)
    log = [
        [entry["step"], {name.removeprefix("weight_"): entry[name] for name in entry if name.startswith("weight_")}]
        for entry in state.log_history
        if any(name.startswith("weight_") for name in entry)
    ]
    seconds = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    config = model.config
    return RunRecord(
        name=facts.repo_id or args.hub_model_id or Path(args.output_dir).resolve().name,
        method=method,
        facts=facts,
        metrics=metrics,
        metrics_step=metrics_step,
        step=state.global_step,
        max_steps=state.max_steps,
        in_training=in_training,
        weights_step=weights_step,
        resumed_at=resumed_at,
        seconds=seconds[-1] if seconds and not resumed_at else None,
        weights=[log[0], log[-1]] if log else [],
        model={
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dim": config.projection_dim,
            "towers": [config.vision_config.model_type, config.text_config.model_type],
        },
        changed={
            name: differing[name]
            for name in sorted(differing.keys() & settings.keys())
            if name not in HOUSEKEEPING and not name.startswith(HOUSEKEEPING_PREFIXES)
        },
        settings=json.loads(json.dumps(settings, default=str)),
        hardware=_hardware(args.device, args.world_size),
        versions={
            "Python": platform.python_version(),
            **{of.__name__: of.__version__ for of in (torch, transformers, datasets, accelerate)},
        },
        emissions=None if in_training or resumed_at else _emissions(Path(args.output_dir), facts.towers),
        assets=sorted(path.name for path in (folder / "assets").glob("*.png")),
    )


def write_readme(record: RunRecord, folder: str | os.PathLike) -> RunRecord:
    """Writes `README.md` beside a saved student, whole or not at all; returns the record."""
    with write_whole(Path(folder) / "README.md") as beside:
        beside.write_text(render_card(record), encoding="utf-8")
    return record


def _is_path(value: object) -> bool:
    return isinstance(value, str) and os.path.isabs(value)


def _hardware(device: torch.device, processes: int) -> str:
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"a CPU with {threads} thread{'s' * (threads > 1)}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if processes == 1 else f"{name}, {processes} processes"


def _emissions(folder: Path, towers: list[str]) -> dict[str, object] | None:
    """What codecarbon measured of this training: it adds a line to its file at the end."""
    if not (folder / "emissions.csv").is_file():
        return None
    with open(folder / "emissions.csv", newline="") as lines:
        last = list(csv.DictReader(lines))[-1]
    return {
        "emissions": 1000 * float(last["emissions"]),  # the file has kilograms, the Hub grams
        "source": "codecarbon",
        "training_type": "fine-tuning" if towers else "pre-training",
        "hardware_used": last.get("gpu_model") or last["cpu_model"],
    }
