"""What a run's result follows from, kept with its checkpoints: a resumed run says what differs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import MISSING, fields
from pathlib import Path

import accelerate
import datasets
import pyarrow as pa
import torch
import transformers
from packaging.version import Version
from transformers import PretrainedConfig, TrainingArguments

from .checkpoints import NotResumable


logger = logging.getLogger(__name__)

NEWEST_TRIED = "5.24"  # the newest transformers under `make soak`; pyproject.toml admits no newer one
IDENTITY_FILE = "_run.json"
STUDENT = "student"  # the prefix of what the model's config says
FINGERPRINT_ROWS = 256
# Settings without effect on weights, logged losses or figures.
FREE_PREFIXES = ("do_", "hub_", "push_", "resume_", "logging_", "trackio_", "ddp_", "dataloader_p")
FREE = (
    "allow_changes", "card_images", "dataloader_in_order", "dataloader_multiprocessing_context",
    "dataloader_num_workers", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node",
    "per_device_eval_batch_size", "project", "report_to", "run_name", "save_total_limit", "output_dir",
    "accelerator_config", "max_skipped_steps", "local_rank",
)  # fmt: skip
GLOBAL_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "number of processes")  # their product
OF_STREAMS = ("dataloader_num_workers",)  # not free there: it decides the order of the rows
# Fields of a config that saving adds or changes.
OF_FILES = ("_name_or_path", "transformers_version", "dtype", "use_cache", "architectures", "auto_map")


def warn_of_untried_transformers() -> None:
    """Warns where transformers is newer than any that the overrides of its private methods were tried with."""
    if Version(transformers.__version__).release[:2] > Version(NEWEST_TRIED).release:
        logger.warning(
            f"transformers {transformers.__version__} is newer than {NEWEST_TRIED}, the newest that training was "
            f"tried on: checkpoints and resuming may fail. `pip install 'transformers=={NEWEST_TRIED}.*'`, or run "
            "`python -m pytest tests/trainers/run tests/test_train.py` first."
        )


def rows_fingerprint(rows: datasets.Dataset) -> str:
    """A digest of the number of rows and, of 256 of them evenly spaced, of all columns but the images."""
    count = min(len(rows), FINGERPRINT_ROWS)
    columns = [name for name in rows.column_names if name != "image"]
    part = rows.select_columns(columns).with_format("arrow")[[i * len(rows) // count for i in range(count)]]
    sink = pa.BufferOutputStream()
    # One record batch without metadata: the bytes are those of the values alone.
    table = part.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return hashlib.sha256(f"{len(rows)} rows ".encode() + sink.getvalue().to_pybytes()).hexdigest()[:32]


def describe_identity(
    settings: dict[str, object],
    args: TrainingArguments,
    config: PretrainedConfig,
    streamed: bool,
    facts: dict[str, object],
) -> dict[str, object]:
    """Names and values, JSON-able, of all that the result of a run follows from.

    Args:
        settings: of the method.
        args, config: of the trainer, and of its model.
        streamed: the training split is a stream, whose order follows from the number of loader workers.
        facts: what else the result follows from.
    """
    free = FREE if not streamed else tuple(name for name in FREE if name not in OF_STREAMS)
    described = {
        **{name: settings[name] for name in settings if name not in free and not name.startswith(FREE_PREFIXES)},
        # What holds: accelerate's configuration may have said it, and not the setting.
        **{name: args.mixed_precision == name for name in ("bf16", "fp16") if name in settings},
        **facts,
        "number of processes": args.world_size,
        "device": args.device.type,
        **_leaves(STUDENT, config.to_dict()),
        **{of.__name__: of.__version__ for of in (torch, transformers, datasets, accelerate)},
    }
    return json.loads(json.dumps(described, default=str))


def check_identity(
    now: dict[str, object], arguments_class: type[TrainingArguments], checkpoint: str, allow_changes: bool
) -> list[str]:
    """What differs between a checkpoint's run and this one, a line each.

    A setting that is newer than the checkpoint counts as its default there. One that this run does not have, because
    it is of another method or is gone, does not count.

    Args:
        now: of this run, see [`describe_identity`].
        arguments_class: its fields are the settings.

    Raises:
        NotResumable: something differs and `allow_changes` is not set, or the checkpoint does not say what it is of.
    """
    path = Path(checkpoint) / IDENTITY_FILE
    try:
        saved = json.loads(path.read_text())
    except FileNotFoundError:
        raise NotResumable(f"{checkpoint} has no {IDENTITY_FILE}: it is no checkpoint of this program.") from None
    saved = {**_defaults(arguments_class), **saved}
    known = now.keys() | {name for name in saved if name.startswith(f"{STUDENT}.")}
    lines = [
        f"{name}: {_short(saved.get(name))} in the checkpoint, {_short(now.get(name))} now"
        for name in sorted(known)
        if saved.get(name) != now.get(name)
    ]
    lines += changed_batch(saved, now)
    if lines and not allow_changes:
        listed = "\n  ".join(lines)
        raise NotResumable(
            f"{checkpoint} is of another run, so that the result could not be the same:\n  {listed}\n"
            "Resume with what it was started with, or say --allow_changes."
        )
    return lines


def changed_batch(saved: dict[str, object], now: dict[str, object]) -> list[str]:
    """Where the rows in a step have changed: a line on what this does to a resumed run, and what would keep them."""
    before, after = (math.prod(run.get(name) or 0 for name in GLOBAL_BATCH) for run in (saved, now))
    if before == after or 0 in (before, after):
        return []
    line = f"rows in a step: {before} in the checkpoint, {after} now, so that the epochs made so far "
    line += f"count {after / before:.3g} times what they did"
    if now.get("max_steps", -1) < 0:
        line += f", and the learning rate goes {'back' if after < before else 'ahead'} with them"
    a_micro_step = after // now["gradient_accumulation_steps"]
    if before % a_micro_step == 0:
        line += f" (--gradient_accumulation_steps {before // a_micro_step} would keep the step)"
    return [line]


def _defaults(arguments_class: type[TrainingArguments]) -> dict[str, object]:
    """The default of each setting, JSON-able."""
    defaults = {
        setting.name: setting.default if setting.default_factory is MISSING else setting.default_factory()
        for setting in fields(arguments_class)
    }
    defaults = {name: value for name, value in defaults.items() if value is not MISSING}
    return json.loads(json.dumps(defaults, default=lambda value: getattr(value, "value", str(value))))


def _leaves(prefix: str, config: dict) -> dict[str, object]:
    """A nested config as {"student.text_config.hidden_size": 192, ...}, without what saving adds to it."""
    leaves = {}
    for key, value in config.items():
        if key not in OF_FILES:
            name = f"{prefix}.{key}"
            leaves.update(_leaves(name, value) if isinstance(value, dict) else {name: value})
    return leaves


def _short(value: object) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else f"{text[:200]}..."
