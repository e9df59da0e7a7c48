"""The icons teacher's output features, which ship with the repository, as columns of the icons dataset.

The teacher is a fine-tuned EfficientNet-Lite0 and MiniLM-L6 (`recipes/icons_teacher.yaml`, `make icons_teacher`). Its
features lie in `icons_teacher.safetensors`, int8 with a scale a row, keyed by glyph (`image_id`) and name (caption).
The command makes such a file:

    python -m datasets_scripts.icons_teacher --model_name_or_path runs/icons_teacher --output FILE
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

import modeling_dsmd  # noqa: F401  (registers the class with AutoModel)
from datasets_scripts.icons import icons_fingerprint, load_icons
from rows.columns import id_hash, rows_and_captions
from rows.command_line import Command
from rows.files import write_whole
from rows.images import load_rgb
from rows.teacher_columns import dataset_of, feature_columns, quantize
from trainers.metrics import metrics_from_ranks, ranks


def features_file() -> Path:
    """Where the shipped features lie."""
    return Path(__file__).with_name("icons_teacher.safetensors")


def add_icons_features(rows: datasets.DatasetDict, file: Path | None = None) -> datasets.DatasetDict:
    """The icons with the columns `teacher_image_embeds`, `teacher_text_embeds` and `teacher`.

    Args:
        rows: the icons, as [`load_icons`] gives them.
        file: features of another teacher of the icons; the shipped ones by default.

    Raises:
        ValueError: where the file has no feature for a row, or was made for other rows.
    """
    file = file or features_file()
    if not file.is_file():
        raise ValueError(f"There is no {file.name}: `make icons_teacher` makes it.")
    with safe_open(file, "pt") as stored:
        teacher = json.loads(stored.metadata()["teacher"])
        if teacher["rows"] != icons_fingerprint(rows):
            raise ValueError(
                f"{file.name} was made for icons with fingerprint {teacher['rows']}, these have "
                f"{icons_fingerprint(rows)}: they were drawn by another version of Pillow or of "
                "QtAwesome than the teacher learned from."
            )
        embeds, keys = {}, {}
        for kind in ("image", "text"):
            scale = stored.get_tensor(f"{kind}_scale").float()
            embeds[kind] = stored.get_tensor(f"{kind}_embeds").float() * scale[:, None]
            keys[kind] = {key: i for i, key in enumerate(stored.get_tensor(f"{kind}_keys").tolist())}

    def find(kind: str, text: str) -> int:
        if id_hash(text) not in keys[kind]:
            raise ValueError(f"{file.name} has no {kind} feature for {text!r}.")
        return keys[kind][id_hash(text)]

    result = datasets.DatasetDict()
    for split, part in rows.items():
        captions, image_ids = part["captions"][:], part["image_id"][:]  # at once: row by row takes seconds
        image = embeds["image"][[find("image", image_id) for image_id in image_ids]]
        text = embeds["text"][[find("text", caption) for row in captions for caption in row]]
        columns = feature_columns(image, text, np.array([len(row) for row in captions]), image_ids)
        columns["teacher"] = pa.array([json.dumps(teacher)] * len(part)), datasets.Value("string")
        result[split] = datasets.concatenate_datasets([part, dataset_of(columns)], axis=1)
    return result


@torch.inference_mode()
def extract(model, processor, rows: datasets.DatasetDict) -> dict[str, torch.Tensor]:
    """Raw output features of every glyph and every distinct name: `image_embeds`, `text_embeds` and their keys."""
    model.eval()
    tensors: dict[str, torch.Tensor] = {}
    everything = datasets.concatenate_datasets(list(rows.values()))
    images = everything.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    names = sorted({caption for captions in everything["captions"] for caption in captions})
    image_embeds, text_embeds = [], []
    for start in tqdm(range(0, len(images), 256), desc="images"):
        batch = [load_rgb(image) for image in images[start : start + 256]["image"]]
        inputs = processor.image_processor(images=batch, return_tensors="pt")
        image_embeds.append(model.get_image_features(inputs["pixel_values"]).pooler_output)
    for start in tqdm(range(0, len(names), 256), desc="names"):
        inputs = processor.tokenizer(names[start : start + 256], padding=True, truncation=True, return_tensors="pt")
        text_embeds.append(model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output)
    tensors["image_embeds"], tensors["text_embeds"] = torch.cat(image_embeds), torch.cat(text_embeds)
    tensors["image_keys"] = torch.tensor([id_hash(image_id) for image_id in everything["image_id"]])
    tensors["text_keys"] = torch.tensor([id_hash(name) for name in names])
    return tensors


def ranks_on(tensors: dict[str, torch.Tensor], test: datasets.Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks of the right answers on the test split, both ways, from features by key."""
    row_of = {kind: {key: i for i, key in enumerate(tensors[f"{kind}_keys"].tolist())} for kind in ("image", "text")}
    image = tensors["image_embeds"][[row_of["image"][id_hash(i)] for i in test["image_id"]]]
    text = tensors["text_embeds"][[row_of["text"][id_hash(c)] for captions in test["captions"] for c in captions]]
    groups, caption_to_image = rows_and_captions(test)
    return ranks(image, text, groups, groups[caption_to_image])


def bootstrap(image_ranks: torch.Tensor, text_ranks: torch.Tensor, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of RSUM when the queries of each direction are drawn again with replacement."""
    generator = torch.Generator().manual_seed(0)

    def redraw(values: torch.Tensor) -> torch.Tensor:
        return values[torch.randint(len(values), (len(values),), generator=generator)]

    rsums = sorted(metrics_from_ranks(redraw(image_ranks), redraw(text_ranks))["rsum"] for _ in range(draws))
    return rsums[int(0.025 * draws)], rsums[int(0.975 * draws)]


def main() -> None:
    parser = Command("datasets_scripts.icons_teacher", __doc__)
    parser.add_argument(
        "--model_name_or_path", type=Path, required=True, help="Folder of the icons teacher, a DSMDModel."
    )
    parser.add_argument("--output", type=Path, required=True, help="Safetensors file to write.")
    options = parser.parse_args()
    folder = options.model_name_or_path
    if options.output.exists():
        parser.error(f"{options.output} exists: remove it first, or name another file.")
    rows = load_icons()
    model, processor = (
        AutoModel.from_pretrained(folder),
        AutoProcessor.from_pretrained(folder, backend="pil"),
    )
    exact = extract(model, processor, rows)
    stored = {name: tensor for name, tensor in exact.items() if name.endswith("_keys")}
    restored = dict(stored)
    for kind in ("image", "text"):
        stored[f"{kind}_embeds"], stored[f"{kind}_scale"] = quantize(exact[f"{kind}_embeds"])
        restored[f"{kind}_embeds"] = stored[f"{kind}_embeds"].float() * stored[f"{kind}_scale"].float()[:, None]
    found = ranks_on(restored, rows["test"])
    low, high = bootstrap(*found)
    rsum = metrics_from_ranks(*found)["rsum"]
    rsum_exact = metrics_from_ranks(*ranks_on(exact, rows["test"]))["rsum"]
    teacher = {
        "id": "icons teacher (EfficientNet-Lite0 + MiniLM-L6, recipes/icons_teacher.yaml)",
        "revision": "1",
        "dim": model.config.projection_dim,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "preprocessing": f"{processor.image_processor.size.height} px",
        "test_rsum": round(rsum, 2),
        "test_rsum_95": [round(low, 1), round(high, 1)],
        "test_rsum_before_int8": round(rsum_exact, 2),
        "rows": icons_fingerprint(rows),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    with write_whole(options.output) as beside:
        save_file(tensors, beside, {"teacher": json.dumps(teacher)})
    print(f"{options.output}: {options.output.stat().st_size / 1e6:.1f} MB")
    print(f"test RSUM {rsum:.2f} (95 % bootstrap {low:.1f} to {high:.1f}); before int8 {rsum_exact:.2f}")


if __name__ == "__main__":
    main()
