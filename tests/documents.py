"""The commands and the Python of the Markdown files, and a folder in which they run in small.

A block that must not run has an HTML comment before it, with the reason: `<!-- not run: needs eight GPUs -->`. Of its
commands the options are parsed all the same.
"""

import os
import re
import runpy
import shlex
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import tiny_towers
import torch
from conftest import WORDS, make_student
from huggingface_hub import HfApi
from markdown_it import MarkdownIt
from PIL import Image
from transformers import AutoModel

import train
from trainers.student import train_tokenizer


ROOT = Path(train.__file__).parent
NOT_RUN = re.compile(r"<!--\s*not run: (\S.*?)\s*-->", re.DOTALL)
# What a test adds to a command: nothing of the flow.
SMALL = {
    "train.py": "--use_cpu --num_train_epochs 1 --dataloader_num_workers 0 --dataloader_persistent_workers False "
    "--per_device_train_batch_size 8 --learning_rate 1e-3 --report_to none --disable_tqdm True",
    "datasets_scripts.add_teacher_features": "--num_workers 0 --shard_rows 4",
}


@dataclass
class Block:
    """A fenced or indented block: its language, its text, the line it begins at, and why it must not run, if so."""

    language: str
    text: str
    line: int
    not_run: str | None


def documents() -> list[Path]:
    """The Markdown that users read, the README first; paths from the repository's root."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    found += [ROOT / "inference/space/README.md", ROOT / "model_cards/example/README.md"]
    return [path.relative_to(ROOT) for path in found]


def blocks(text: str) -> list[Block]:
    """The blocks of code, as a reader of Markdown sees them."""
    found, reason = [], None
    for token in MarkdownIt().enable("table").parse(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)):
        if token.type in ("fence", "code_block"):
            language = token.info.split()[0] if token.info.strip() else ""
            found.append(Block(language, token.content, token.map[0] + 1, reason))
        said = NOT_RUN.search(token.content) if token.type == "html_block" else None
        reason = said and said[1]
    return found


def inline_code(text: str) -> list[str]:
    """What stands in backticks in sentences and tables."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    tokens = [child for token in MarkdownIt().enable("table").parse(text) for child in token.children or ()]
    return [token.content for token in tokens if token.type == "code_inline"]


def command_lines(block: Block) -> list[str]:
    """The commands of a block, one each; those of a line that `&&` joins are several."""
    lines = block.text.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"\s+#\s.*$", "", line).strip() for line in lines if not line.lstrip().startswith("#")]
    return [part.strip() for line in lines for part in line.split(" && ") if part.strip()]


def commands(*parts: str) -> list[list[str]]:
    """The commands of all documents in which all of `parts` stand, in words."""
    texts = [(ROOT / path).read_text(encoding="utf-8") for path in documents()]
    lines = [line for text in texts for block in blocks(text) if is_shell(block) for line in command_lines(block)]
    found = [shlex.split(line) for line in lines if all(part in line for part in parts)]
    assert found, f"no document has a command with {parts}"
    return found


def is_shell(block: Block) -> bool:
    indented = block.language == "" and re.match(r"(python|accelerate|make|pip|hf|rm) ", block.text)
    return block.language in ("bash", "sh", "shell", "console") or bool(indented)


def run(command: list[str], *more: str) -> None:
    """A command in this process: `accelerate launch [-m] PROGRAM ...` or `python -m PROGRAM ...`."""
    program, *arguments = [part for part in command[1:] if part not in ("launch", "-q", "-m")]
    arguments += [*SMALL.get(program, "").split(), *more]
    if program == "train.py":
        return train.main(arguments)
    sys.argv = [program, *arguments]
    if program == "-c":
        exec(compile(arguments[0], "the command", "exec"), {"__name__": "__main__"})
    elif program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")


def save_teacher(folder: Path, seed: int) -> Path:
    model, processor = make_student()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_models(folder: Path) -> Path:
    """What the recipes and the documents name: the teachers and the student's towers, tiny ones of these names."""
    save_teacher(folder / "google" / "siglip2-base-patch16-256", 1)
    save_teacher(folder / "beit3_base_coco", 2)
    vision, text = folder / "facebook" / "dinov2-small", folder / "nreimers" / "MiniLM-L6-H384-uncased"
    AutoModel.from_config(tiny_towers.dinov2()).save_pretrained(vision)
    tiny_towers.make_processor().image_processor.save_pretrained(vision)
    tokenizer = train_tokenizer(WORDS, 400)
    sizes = {**tiny_towers.bert().to_dict(), "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    AutoModel.from_config(type(tiny_towers.bert())(**sizes)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    return folder


def write_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Images, each with a .txt of one or two captions beside it."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{seed}_{i:03}.png")
        captions = [" ".join(rng.choice(WORDS, size=4)) + f" {seed} {i}" for _ in range(1 + i % 2)]
        (folder / f"{seed}_{i:03}.txt").write_text("\n".join(captions))
    return folder


def write_tars(folder: Path, photos: Path) -> None:
    """A webdataset of a training split alone, in three tars."""
    folder.mkdir(parents=True)
    files = sorted(photos.iterdir())
    for number in range(3):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for path in files[number * len(files) // 3 : (number + 1) * len(files) // 3]:
                tar.add(path, path.name)


def enter_place(folder: Path, models: Path, monkeypatch) -> Path:
    """A working folder as the documents take it, with the recipes and a teacher, and the Hub with its models."""
    for model in (*models.glob("google/*"), *models.glob("facebook/*"), *models.glob("nreimers/*")):
        name = model.relative_to(models).as_posix()
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=model)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr(sys, "argv", sys.argv)
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    (folder / "data" / "beit3_base_coco").symlink_to(models / "beit3_base_coco")
    return folder


def expanded(words: list[str]) -> list[str]:
    """As the shell would: `~` is the home folder, and `NAME=value` before a command is no part of it."""
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return [os.path.expanduser(word) if word.startswith("~") else word for word in words]
