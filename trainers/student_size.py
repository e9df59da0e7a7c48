"""What a student is made of, printed before it is trained, while another can still be chosen."""

from __future__ import annotations

from collections.abc import Sized

from model_cards.tables import markdown_table
from modeling_dsmd import DSMDModel

from . import loader_speed, precision
from .base_trainer import RetrievalTrainer
from .report import latency
from .student_arguments import StudentArguments


FEW = 2000  # images: below, a tower that starts from nothing has too few examples to learn to see or read from
TOWERS = ("vision", "text")
BYTES = 4  # of a parameter as it is saved, float32


def parameters_by_part(model: DSMDModel) -> dict[str, int]:
    """Numbers of parameters of a student's parts, which make up the whole."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    vision, text = (sum(of for name, of in counts.items() if name.startswith(f"{tower}_model.")) for tower in TOWERS)
    try:
        embeddings = list(model.text_model.get_input_embeddings().parameters())
    except NotImplementedError:  # CANINE hashes characters: it has no table of words
        embeddings = []
    words = sum(parameter.numel() for parameter in embeddings)
    whole = sum(counts.values())
    return {
        "vision tower": vision,
        "text tower": text - words,
        "word embeddings": words,
        "heads": whole - vision - text,
    }


def size_table(model: DSMDModel, processor, max_caption_length: int, teacher: dict | None = None) -> str:
    """A student's parameters by part, its megabytes and its speed, as a table for a terminal.

    Args:
        model: on the device to measure on.
        processor: the student's.
        max_caption_length: in tokens.
        teacher: what its dataset says of the teacher, where there is one; its `parameters` stand beside.
    """
    parts = parameters_by_part(model)
    whole, of_teacher = sum(parts.values()), (teacher or {}).get("parameters")
    speeds = latency(model, processor, max_caption_length, batches=(1,))
    rows = [["before training", "student", "teacher"]]
    rows += [[name, _millions(count)] for name, count in parts.items()]
    rows.append(["parameters", _millions(whole), _millions(of_teacher)])
    rows.append(["MB", _megabytes(whole), _megabytes(of_teacher)])
    rows += [[f"ms per {of}, batch 1", f"{speeds[f'ms_per_{of}_batch_1']:.2f}"] for of in ("image", "caption")]
    return markdown_table(rows if of_teacher else [row[:2] for row in rows])


def summary(trainer: RetrievalTrainer, args: StudentArguments) -> str:
    """What is about to be trained, in which precision and with how many images/s, and what to do instead where there
    are few images to learn it from."""
    settings, teacher = trainer.args, trainer.facts.teacher
    parts = [size_table(trainer.model, trainer.processing_class, settings.max_caption_length, teacher)]
    capability = precision.capability_of_gpus(settings.use_cpu)
    lines = [f"Precision: {precision.describe(settings.mixed_precision, settings.tf32, capability)}."]
    speed = loader_speed.measure(trainer)
    if speed is not None:
        lines.append(loader_speed.describe(speed, settings.dataloader_num_workers, settings.world_size))
    parts += ["\n".join(lines), few_pairs_hint(trainer.train_dataset, args)]
    return "\n\n".join(part for part in parts if part) + "\n"


def few_pairs_hint(rows: object, args: StudentArguments) -> str | None:
    """What to do instead, where a student's towers start from nothing and there are few images to learn from.

    Args:
        rows: the training split; of a stream the number of images is not known.
    """
    from_nothing = args.model_name_or_path is None and args.vision_config is not None
    if not from_nothing or not isinstance(rows, Sized) or len(rows) >= FEW:
        return None
    return (
        f"There are {len(rows):,} rows to learn from, and towers that start from nothing need many more: start from "
        "pre-trained ones, cut to size (recipes/few_pairs.yaml, docs/guides/few_pairs.md)."
    )


def _millions(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.2f} M"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count * BYTES / 1e6:.1f}"
