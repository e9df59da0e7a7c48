"""What a run leaves behind: a table, its figures as JSON, and the student's card with its pictures."""

from __future__ import annotations

import logging
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import torch
from PIL import Image

from model_cards.model_card import usage_code
from model_cards.tables import SHOWN, across_table, results_table
from rows.columns import Splits, rows_and_captions
from rows.files import write_json
from rows.images import load_rgb

from .card import write_card
from .retrieval_trainer import RetrievalTrainer


logger = logging.getLogger(__name__)


def report(trainer: RetrievalTrainer, metrics: dict[str, float], trained: bool, rows: Splits) -> None:
    """Measures the student's speed, prints the table and writes the files of the run. Called on every process.

    Args:
        trainer: after training or evaluation, its model the one to report, its `facts` for the card.
        metrics: figures with their prefixes (`eval_`, `test_`, `teacher_test_`, `train_`).
        trained: whether this was a training; an evaluation writes `eval_results.json` and nothing else.
        rows: the splits; `test` fills the pictures of results, `train` gives samples.
    """
    embeds = trainer.encode(rows["test"]) if trained else None
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model
    if trained and trainer.is_fsdp_enabled:  # a sharded model's forward is one of all processes
        model = trainer.model_class.from_pretrained(folder).to(trainer.args.device)
    metrics = {
        **metrics,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **latency(model, trainer.processing_class, trainer.args.max_caption_length),
    }
    if "test_share_of_teacher" in metrics:
        metrics["share_of_teacher"] = metrics["test_share_of_teacher"]
    if trainer.unreadable:
        metrics["unreadable_images"] = len(trainer.unreadable)
        print(f"\n{len(trainer.unreadable)} images could not be read and were left out:")
        print("\n".join(f"  {line}" for line in trainer.unreadable))
    print("\n" + results_table(metrics, baseline=trainer.facts.baseline))
    if across := across_table(metrics):
        print("\n" + across)
    if not trained:
        write_json(folder / "eval_results.json", metrics)
        return
    write_json(folder / "all_results.json", metrics)
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    plot_curves(trainer.state.log_history, trainer.args.losses, assets / "curves.png")
    draw_grids(rows["test"], *embeds, assets)
    trainer.facts.metrics = metrics
    trainer.facts.samples = save_samples(rows["train"], assets)
    captions = save_query(rows["test"], assets)
    trainer.facts.usage = {"captions": captions, "output": run_code(usage_code(str(folder), captions))}
    record = write_card(trainer, folder)
    (assets / "card.json").write_text(record.to_json(), encoding="utf-8")
    print(f"\nThe student is in {folder}: AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)")


def pin_revision(trainer: RetrievalTrainer, repo_id: str, revision: str) -> None:
    """Writes the card again with the code on it of the commit that holds the weights; to be pushed once more.

    Args:
        repo_id, revision: where the run's folder was pushed to, and that commit.
    """
    trainer.facts.repo_id, trainer.facts.revision = repo_id, revision
    folder = Path(trainer.args.output_dir)
    record = write_card(trainer, folder)
    (folder / "assets" / "card.json").write_text(record.to_json(), encoding="utf-8")


def draw_grids(rows: datasets.Dataset, image_embeds: torch.Tensor, text_embeds: torch.Tensor, folder: Path) -> None:
    """Pictures of what a few queries find among all rows, as many of those that miss as of those that hit.

    Args:
        rows: of the split that the embeddings are of.
        image_embeds: L2-normalised `[N, D]`.
        text_embeds: L2-normalised `[C, D]`, row by row.
        folder: gets `text_to_image.png` and `image_to_text.png`.
    """
    from inference.grid import Cell, result_grid  # it needs matplotlib

    groups, caption_to_image = (ids.to(image_embeds.device) for ids in rows_and_captions(rows))
    captions = [caption for own in rows["captions"] for caption in own]
    text_groups = groups[caption_to_image]
    undecoded = _undecoded(rows, ["image"])

    def image(i: int) -> Image.Image:
        return load_rgb(undecoded[i]["image"])

    def caption(i: int) -> str:
        return captions[i]

    ways = {
        "text_to_image": (caption, text_embeds, text_groups, image, image_embeds, groups),
        "image_to_text": (image, image_embeds, groups, caption, text_embeds, text_groups),
    }
    for way, (query, queries, own_groups, answer, index, index_groups) in ways.items():
        tried = torch.tensor(evenly(range(len(queries)), 200), device=index.device)
        found = (queries[tried] @ index.T).topk(min(5, len(index)))
        right = index_groups[found.indices] == own_groups[tried, None]
        hits, misses = ([i for i, hit in enumerate(right[:, 0].tolist()) if hit is wanted] for wanted in (True, False))
        chosen = evenly(hits, 2) + evenly(misses, 2)
        cells = [
            [
                Cell(answer(i), f"{score:.2f}", is_right)
                for i, score, is_right in zip(*(of[row].tolist() for of in (found.indices, found.values, right)))
            ]
            for row in chosen
        ]
        result_grid([query(i) for i in tried[chosen].tolist()], cells, folder / f"{way}.png")


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, at even distances."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def save_samples(rows: datasets.Dataset | datasets.IterableDataset, folder: Path) -> list[list[str]]:
    """Three images as `sample_1.png`, ... in `folder`, if readable; returns at most five captions of each."""
    part = rows.select(evenly(range(len(rows)), 3)) if isinstance(rows, datasets.Dataset) else rows.take(3)
    captions = []
    for row in _undecoded(part, ["image", "captions"]):
        try:
            image = load_rgb(row["image"])
        except ValueError:  # training left it out too
            continue
        captions.append([caption[:SHOWN] for caption in row["captions"][:5]])
        _save_small(image, folder / f"sample_{len(captions)}.png", 128)
    return captions


def save_query(rows: datasets.Dataset, folder: Path) -> list[str]:
    """An image as `query.png` in `folder`; returns a caption of it and captions of two others."""
    first, *others = evenly(range(len(rows)), 3)
    part = _undecoded(rows, ["image", "captions"])
    _save_small(load_rgb(part[first]["image"]), folder / "query.png", 256)
    return [" ".join(part[i]["captions"][0].split())[:SHOWN] for i in (first, *others)]


def _undecoded(rows, columns: list[str]):
    return rows.select_columns(columns).cast_column("image", datasets.Image(decode=False))


def _save_small(image: Image.Image, path: Path, side: int) -> None:
    image.thumbnail((side, side))
    image.save(path.with_suffix(".part"), format="PNG", optimize=True)
    os.replace(path.with_suffix(".part"), path)


def run_code(code: str, seconds: float = 120) -> str | None:
    """What the code prints; None, with a warning, where it fails or takes longer: the student is saved anyway."""
    printed, failures = [], []

    def run() -> None:
        try:
            exec(code, {"print": lambda line: printed.append(str(line))})
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures or thread.is_alive():
        reason = failures[0] if failures else f"it takes more than {seconds} seconds"
        logger.warning(f"The code on the card does not run, its output is left out: {reason}")
        return None
    return "\n".join(printed)


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
