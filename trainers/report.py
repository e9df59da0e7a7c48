"""What a run leaves behind: a table, its figures as JSON, curves, and the student's card."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from model_cards.model_card import write_model_card

from .retrieval_trainer import RetrievalTrainer, write_json


RECALLS = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))


def report(trainer: RetrievalTrainer, metrics: dict[str, float], trained: bool, facts: dict) -> None:
    """Measures the student's speed, prints the table and writes the files of the run.

    Args:
        trainer: after training or evaluation, its model the one to report.
        metrics: figures with their prefixes (`eval_`, `test_`, `teacher_test_`, `train_`).
        trained: whether this was a training; an evaluation writes `eval_results.json` and nothing else.
        facts: what the card says of data, teacher and towers; see [`write_model_card`].
    """
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {
        **metrics,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        **latency(trainer.model, trainer.processing_class, trainer.args.max_caption_length),
    }
    if "test_share_of_teacher" in metrics:
        metrics["share_of_teacher"] = metrics["test_share_of_teacher"]
    if trainer.unreadable:
        metrics["unreadable_images"] = len(trainer.unreadable)
        print(f"\n{len(trainer.unreadable)} images could not be read and were left out:")
        print("\n".join(f"  {line}" for line in trainer.unreadable))
    table = results_table(metrics)
    print("\n" + table)
    if not trained:
        write_json(folder / "eval_results.json", metrics)
        return
    write_json(folder / "all_results.json", metrics)
    plot_curves(trainer.state.log_history, trainer.args.losses, folder / "curves.png")
    write_model_card(folder, metrics=metrics, results_table=table, **facts)
    print(f"\nThe student is in {folder}: AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)")


def results_table(metrics: dict[str, float], split: str = "test") -> str:
    """A Markdown table that reads well as plain text: recalls of student and teacher, size and speed."""
    has_teacher = f"teacher_{split}_rsum" in metrics
    has_across = f"teacher_index_{split}_rsum" in metrics
    header = [f"{split} split, {metrics[f'{split}_images']:,} images", "student"]
    header += ["teacher", "share kept"] if has_teacher else []
    header += ["student on teacher's index", "teacher on student's index"] if has_across else []
    rows = [header]
    blank = [""] * (len(header) - 2)
    # "" for the whole split, and "1k_" where folds of 1,000 were evaluated too.
    prefixes = [name[len(split) + 1 : -len("rsum")] for name in metrics if re.fullmatch(rf"{split}_(\w+_)?rsum", name)]
    for name in (prefix + name for prefix in prefixes for name in (*RECALLS, "rsum")):
        student = metrics[f"{split}_{name}"]
        row = [name.replace("_", " "), f"{student:.1f}"]
        if has_teacher:
            teacher = metrics[f"teacher_{split}_{name}"]
            row += [f"{teacher:.1f}", f"{100 * student / teacher:.1f} %" if teacher else "-"]
        for index in ("teacher", "student") if has_across else ():
            across = metrics.get(f"{index}_index_{split}_{name}")
            row.append("" if across is None else f"{across:.1f}")
        rows.append(row)
    if f"teacher_reduced_{split}_rsum" in metrics:
        rows.append(["rsum at the student's width", "", f"{metrics[f'teacher_reduced_{split}_rsum']:.1f}", *blank[1:]])
    rows.append(["parameters", f"{metrics['parameters'] / 1e6:.2f} M", *blank])
    for name, label in (("image", "image"), ("caption", "caption")):
        for batch in (1, 64):
            rows.append([f"ms per {label}, batch {batch}", f"{metrics[f'ms_per_{name}_batch_{batch}']:.2f}", *blank])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


@torch.inference_mode()
def latency(model: torch.nn.Module, processor, max_length: int) -> dict[str, float]:
    """Milliseconds per image and per caption of the model alone (decoding and tokenising left out), batch 1 and 64.

    Args:
        model: the student, on the device to measure.
        processor: gives the size of the images.
        max_length: captions have 12 tokens, or this many where it is less.
    """
    was_training = model.training
    model.eval()
    pixels = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    pixels = pixels.to(model.device)
    tokens = torch.full((1, min(12, max_length)), processor.tokenizer.unk_token_id or 0, device=model.device)
    figures = {}
    for batch in (1, 64):
        images, ids = pixels.expand(batch, -1, -1, -1).contiguous(), tokens.expand(batch, -1).contiguous()
        figures[f"ms_per_image_batch_{batch}"] = 1000 * _seconds(lambda x=images: model(pixel_values=x)) / batch
        figures[f"ms_per_caption_batch_{batch}"] = 1000 * _seconds(lambda x=ids: model(input_ids=x)) / batch
    model.train(was_training)
    return figures


def _seconds(call: Callable[[], object], runs: int = 10) -> float:
    """Median of some runs after two that warm up."""
    times = []
    for _ in range(runs + 2):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[2:])


def plot_curves(log_history: list[dict], losses: list[str], path: Path) -> None:
    """Each loss, each weight and the validation RSUM over the steps, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def series(name: str) -> tuple[list[int], list[float]]:
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        return [step for step, _ in points], [value for _, value in points]

    names = [name for name in losses if series(f"loss_{name}")[0]]
    panels = ["losses", "weights", "validation RSUM"] if names else ["loss", "validation RSUM"]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained")
    for axis, title in zip(axes, panels):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    if names:
        for name in names:
            axes[0].plot(*series(f"loss_{name}"), label=name.replace("_", " "))
            axes[1].plot(*series(f"weight_{name}"), label=name.replace("_", " "))
        axes[1].set_yscale("log")
        axes[0].set_yscale("log")
        axes[0].legend(fontsize="small")
    else:
        axes[0].plot(*series("loss"))
    axes[-1].plot(*series("eval_rsum"), marker="o", markersize=3, label="student")
    teacher = series("teacher_eval_rsum")[1]
    if teacher:
        axes[-1].axhline(teacher[-1], linestyle="--", color="grey", label="teacher")
        axes[-1].legend(fontsize="small")
    axes[-1].set_ylim(bottom=0)
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=110, metadata={"Software": None})
    plt.close(figure)
    os.replace(beside, path)
