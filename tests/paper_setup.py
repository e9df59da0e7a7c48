"""The paper's set-up in small: Karpathy's files, a BEiT-3 checkpoint as released, towers of the student.

`python tests/paper_setup.py FOLDER [images of train, restval, val, test]` makes them to try the README's commands on.
"""

import json
import os
import random
import sys
from pathlib import Path

import sentencepiece
import torch
from PIL import Image, ImageDraw
from torchscale_beit3 import VOCAB, Reference, load_torchscale
from transformers import BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

from trainers.student import train_tokenizer


COLORS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "pink", "brown"]
PLACES = ["left", "right", "top", "bottom", "middle"]
SIDE = 32  # of BEiT-3's and the student's images


def make_karpathy(folder: Path, counts: dict[str, int]) -> list[str]:
    """COCO in Karpathy's form: a coloured spot on a coloured ground, and five to seven captions. Returns these."""
    rng, entries, captions = random.Random(0), [], []
    for split, count in counts.items():
        part = "train2014" if split == "train" else "val2014"
        (folder / "images" / part).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            ground, spot = rng.sample(COLORS, 2)
            place, number = rng.choice(PLACES), len(entries)
            image = Image.new("RGB", (64, 48), ground)
            x, y = {"left": (4, 14), "right": (40, 14), "top": (22, 2), "bottom": (22, 26)}.get(place, (22, 14))
            ImageDraw.Draw(image).ellipse((x, y, x + 18, y + 18), fill=spot)
            name = f"COCO_{part}_{number:012d}.jpg"
            image.save(folder / "images" / part / name)
            texts = [
                rng.choice(
                    [f"a {spot} spot on {ground}", f"{ground} ground, {spot} in the {place}", f"{place} {spot}"]
                )
                + f" {rng.choice('abcdefgh')}{number % 100}\n"
                for _ in range(5 + number % 3)
            ]
            captions += texts
            entries.append(
                {
                    **{"filepath": part, "filename": name, "imgid": number, "cocoid": number, "split": split},
                    "sentences": [{"raw": text, "imgid": number} for text in texts],
                }
            )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return captions


def make_beit3(folder: Path, captions: list[str]) -> Reference:
    """`beit3_coco.pth`, the state of torchscale's model under the key "model", and `beit3.spm`."""
    reference = Reference(load_torchscale(), image_size=SIDE)
    torch.save({"model": reference.state_dict()}, folder / "beit3_coco.pth")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "beit3"),
        vocab_size=VOCAB - 20,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    os.replace(folder / "beit3.model", folder / "beit3.spm")
    return reference


def make_towers(folder: Path, captions: list[str]) -> None:
    """`vit` and `bert`, as a Hub repository has them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **sizes)).save_pretrained(folder / "vit")
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder / "vit")
    tokenizer = train_tokenizer(captions, 400)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        folder / "bert"
    )
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder / "bert")


def make(folder: Path, counts: dict[str, int]) -> Reference:
    captions = make_karpathy(folder, counts)
    make_towers(folder, captions)
    return make_beit3(folder, captions)


if __name__ == "__main__":
    sizes = map(int, sys.argv[2:] or [2000, 500, 300, 5000])
    Path(sys.argv[1]).mkdir(parents=True)
    make(Path(sys.argv[1]), dict(zip(("train", "restval", "val", "test"), sizes)))
