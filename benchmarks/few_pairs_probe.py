"""How much of a teacher can be read out of frozen pre-trained towers, by the number of pairs that it is learned from.

python -m benchmarks.few_pairs_probe --dataset_name icons --towers runs/icons_towers

Ridge regression from each tower's pooled features to the teacher's, on the training images whose ids have the smallest
hashes, then RSUM on the test split: of the images against the teacher's own captions, of the captions against the
teacher's own images, and of both. No tower is cut and none is trained, so what it lacks is not lost by cutting. The
strength of the regression is the best of three on the validation split, by the last of the three figures.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import datasets
import torch
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from datasets_scripts.data_loading import DataArguments, load_data
from rows.columns import rows_and_captions, text_ids
from rows.images import load_rgb
from rows.teacher_columns import teacher_rows
from trainers import retrieval_metrics

from .common import machine
from .few_pairs import few_of


STRENGTHS = (0.03, 0.1, 0.3)  # of the regression, as a share of the features' number
BATCH = 64


@torch.inference_mode()
def frozen_features(rows: datasets.Dataset, towers: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled features of two pre-trained towers: of the images `[N, V]`, of the captions row by row `[C, T]`."""
    vision, text = (AutoModel.from_pretrained(towers / of).eval() for of in ("vision", "text"))
    vision = vision.to(memory_format=torch.channels_last)
    processor = AutoImageProcessor.from_pretrained(towers / "vision", backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(towers / "text")
    images, captions = [], [caption for of in rows["captions"] for caption in of]
    for batch in rows.cast_column("image", datasets.Image(decode=False)).iter(BATCH):
        pixels = processor(images=[load_rgb(image) for image in batch["image"]], return_tensors="pt")["pixel_values"]
        images.append(vision(pixels.contiguous(memory_format=torch.channels_last)).pooler_output.flatten(1))
    texts = []
    for start in range(0, len(captions), BATCH):
        tokens = tokenizer(
            captions[start : start + BATCH], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        mask = tokens["attention_mask"][..., None]
        texts.append((text(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return torch.cat(images), torch.cat(texts)


def ridge(inputs: torch.Tensor, targets: torch.Tensor, strength: float):
    """Ridge regression of targets `[N, D]` on standardised inputs `[N, P]`, in its dual form: a function of inputs."""
    mean, deviation, middle = inputs.mean(0), inputs.std(0) + 1e-6, targets.mean(0)
    known = (inputs - mean) / deviation
    dual = torch.linalg.solve(known @ known.T + strength * known.shape[1] * torch.eye(len(known)), targets - middle)
    weights = known.T @ dual
    return lambda new: (new - mean) / deviation @ weights + middle


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="'icons', or a dataset with teacher features")
    parser.add_argument("--towers", type=Path, required=True, help="folder of teachers.icons_towers")
    parser.add_argument(
        "--pairs", type=int, nargs="+", default=[400, 1000, 3000], help="training images to learn from"
    )
    args = parser.parse_args(argv)
    rows = load_data(DataArguments(dataset_name=args.dataset_name))
    rows = {**rows, "train": few_of(rows["train"], max(args.pairs))}
    found = {split: frozen_features(part, args.towers) for split, part in rows.items()}
    taught = {split: tuple(normalize(of, dim=1) for of in teacher_rows(part)) for split, part in rows.items()}
    _, caption_to_image = rows_and_captions(rows["train"])

    def figures(split: str, pairs: int, strength: float) -> tuple[float, float, float]:
        captions = caption_to_image < pairs
        image = ridge(found["train"][0][:pairs], taught["train"][0][:pairs], strength)(found[split][0])
        text = ridge(found["train"][1][captions], taught["train"][1][captions], strength)(found[split][1])
        groups, owners = rows_and_captions(rows[split])
        rsum = partial(
            retrieval_metrics,
            image_groups=groups,
            text_groups=groups[owners],
            text_ids=text_ids(rows[split]),
        )
        image, text = normalize(image, dim=1), normalize(text, dim=1)
        whole_image, whole_text = taught[split]
        return tuple(rsum(*of)["rsum"] for of in ((image, whole_text), (whole_image, text), (image, text)))

    print("| pairs | strength | images on the teacher's captions | captions on the teacher's images | both |")
    print("|---|---|---|---|---|")
    for pairs in args.pairs:
        best = max(STRENGTHS, key=lambda strength: figures("validation", pairs, strength)[2])
        print(f"| {pairs:,} | {best} | {' | '.join(f'{of:.1f}' for of in figures('test', pairs, best))} |", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
