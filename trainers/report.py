"""What a run leaves behind: a table, its figures as JSON, and the student's card with its pictures."""

from __future__ import annotations

import logging
import shlex
import threading
from pathlib import Path

import torch
from PIL import Image

from model_cards.model_card import usage_code
from model_cards.pictures import PICTURES_OF_DATA, draw_grids, plot_curves, save_query, save_samples
from model_cards.tables import SHOWN, across_table, results_table
from rows.columns import Splits
from rows.files import counted, write_json

from .base_trainer import RetrievalTrainer
from .teacher_pca import PCA_FILE
from .timing import median_seconds


logger = logging.getLogger(__name__)

# Files that a run leaves in its folder beside those of any student.
RUN_FILES = (
    PCA_FILE, "all_results.json", "eval_results.json", "assets/card.json", "assets/curves.png", *PICTURES_OF_DATA,
)  # fmt: skip


def say_what_a_push_shows(trainer: RetrievalTrainer, dataset_name: str) -> None:
    """Before training: what of the data everyone will see on the Hub, and which licence the card will state."""
    args, facts = trainer.args, trainer.facts
    if not (args.push_to_hub and trainer.is_world_process_zero()):
        return
    if args.card_images and Path(dataset_name).exists():
        repo = args.hub_model_id or Path(args.output_dir).resolve().name
        print(
            f"The card of {repo} will show pictures of {facts.dataset_name} with their captions: "
            "--card_images False leaves them out."
        )
    if facts.license is None:
        print("The card will state no licence of the student's own: --license apache-2.0 states one.")


def report(trainer: RetrievalTrainer, metrics: dict[str, float], trained: bool, rows: Splits) -> None:
    """Measures the student's speed, prints the table and writes the files of the run. Called on every process, after
    `trainer.evaluate` of the test split.

    Args:
        trainer: after training or evaluation, its model the one to report, its `facts` for the card.
        metrics: figures with their prefixes (`eval_`, `test_`, `teacher_test_`, `train_`).
        trained: whether this was a training; an evaluation writes `eval_results.json` and nothing else.
        rows: the splits; `test` fills the pictures of results, `train` gives samples.
    """
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
        count = len(trainer.unreadable)
        images = counted(count, "image could not be read and was", "images could not be read and were")
        print(f"\n{images} left out:")
        print("\n".join(f"  {line}" for line in trainer.unreadable))
    key = "test" if "test_images" in metrics else "eval"  # an evaluation may have no test split
    print("\n" + results_table(metrics, key, trainer.facts.baseline, split=trainer.facts.splits[key]))
    if across := across_table(metrics, key):
        print("\n" + across)
    if not trained:
        write_json(folder / "eval_results.json", metrics)
        return
    write_json(folder / "all_results.json", metrics)
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    plot_curves(trainer.state.log_history, assets / "curves.png")
    trainer.facts.metrics = metrics
    if trainer.args.card_images:
        grids = draw_grids(rows["test"], *trainer.last_embeds, assets, by_index=trainer.args.recall_by_index)
        trainer.facts.beside_grids = {file: [text[:SHOWN] for text in texts] for file, texts in grids.items() if texts}
        trainer.facts.samples = save_samples(rows["train"], assets)
        captions = save_query(rows["test"], assets)
        if captions:
            trainer.facts.usage = {"captions": captions, "output": run_code(usage_code(str(folder), captions))}
    else:  # a report that was cut short may have left some
        for name in PICTURES_OF_DATA:
            (folder / name).unlink(missing_ok=True)
    record = trainer.write_card(folder)
    (assets / "card.json").write_text(record.to_json(), encoding="utf-8")
    print(f"\nThe student is in {folder}: AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)")


def say_next(output_dir: str, dataset_name: str, split: str) -> None:
    """Names the one command that shows a finished student in a browser.

    Args:
        output_dir: the run's folder.
        dataset_name: as the run was given it.
        split: whose pictures to search.
    """
    parts = [
        "--model_name_or_path",
        output_dir,
        "--dataset_name",
        dataset_name,
        *(["--split", split] if split != "test" else []),
    ]
    command = shlex.join(["python", "-m", "inference.web", *parts, "--output_dir", f"{output_dir}_site", "--serve"])
    print(f"Search the pictures of {split} with it in a browser: {command}")


def pin_revision(trainer: RetrievalTrainer, repo_id: str, revision: str) -> None:
    """Writes the card again, its code now naming the commit that holds the weights; it is to be pushed once more.

    Args:
        repo_id, revision: where the run's folder was pushed to, and that commit.
    """
    trainer.facts.repo_id, trainer.facts.revision = repo_id, revision
    folder = Path(trainer.args.output_dir)
    record = trainer.write_card(folder)
    (folder / "assets" / "card.json").write_text(record.to_json(), encoding="utf-8")


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


@torch.no_grad()  # what a model keeps from inference mode could not be trained with
def latency(
    model: torch.nn.Module, processor, max_length: int, batches: tuple[int, ...] = (1, 64)
) -> dict[str, float]:
    """Milliseconds per image and per caption of the model alone (decoding and tokenising left out).

    Args:
        model: the student, on the device to measure.
        processor: gives the size of the images.
        max_length: captions have 12 tokens, or this many where it is less.
        batches: sizes of batches to measure, one after another.
    """
    was_training = model.training
    model.eval()
    pixels = processor.image_processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
    pixels = pixels.to(model.device)
    tokens = torch.full((1, min(12, max_length)), processor.tokenizer.unk_token_id or 0, device=model.device)
    figures = {}
    for batch in batches:
        images, ids = pixels.expand(batch, -1, -1, -1).contiguous(), tokens.expand(batch, -1).contiguous()
        figures[f"ms_per_image_batch_{batch}"] = 1000 * median_seconds(lambda x=images: model(pixel_values=x)) / batch
        figures[f"ms_per_caption_batch_{batch}"] = 1000 * median_seconds(lambda x=ids: model(input_ids=x)) / batch
    model.train(was_training)
    return figures
