"""A student as sentence-transformers' own modules, which load without running code of its repository."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoModel, PreTrainedModel, ProcessorMixin
from transformers.utils import ModelOutput

from model_cards.tables import as_text
from rows.images import UPRIGHT_ON_WHITE


TOLERANCE = 1e-4  # of an entry of an embedding, against the student
TEXTS = ["", "a", "a red house and a tree", "many words " * 100]  # the last is cut


def export_sentence_transformers(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Writes a student as a Router: texts go through tower, pooling and projection of the one side, images through
    those of the other, and both are normalised.

    Args:
        model: a student in float32, in evaluation mode, on the CPU.
        processor: its image processor and tokenizer.
        folder: exists.

    Raises:
        RuntimeError: what was written gives other embeddings than the student.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Router

    with tempfile.TemporaryDirectory() as beside:
        sides = {
            "text": _modules(model, "text", processor.tokenizer, Path(beside, "text")),
            "image": _modules(model, "vision", processor.image_processor, Path(beside, "image")),
        }
        routes = {(None, side): side for side in sides}
        router = Router(sides, default_route="text", route_mappings=routes)
        SentenceTransformer(modules=[router, Normalize()], device="cpu").save_pretrained(
            str(folder), create_model_card=False
        )
    print(f"Differs from the student by {_largest_difference(model, processor, folder):.0e} at most.")


def _modules(model: PreTrainedModel, modality: str, processor, folder: Path) -> list[nn.Module]:
    """Tower, pooling and projection of one side; `folder` is for the files that the tower is read from."""
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    tower, pooling = getattr(model, f"{modality}_model"), getattr(model.config, f"{modality}_pooling")
    projection = model.visual_projection if modality == "vision" else model.text_projection
    _with_every_weight(tower).save_pretrained(folder)
    processor.save_pretrained(folder)
    for file in (folder / "tokenizer_config.json", folder / "preprocessor_config.json"):
        if file.exists():  # alone it is no part of the student's processor of both
            settings = json.loads(file.read_text(encoding="utf-8"))
            settings.pop("processor_class", None)
            file.write_text(json.dumps(settings), encoding="utf-8")
    name = "pooler_output" if pooling == "pooler" else "last_hidden_state"
    dimensions = _output(tower, modality, processor)[name].ndim
    kind, key = "image" if modality == "vision" else "text", "token_embeddings"
    pool = []
    if dimensions == 2:  # [B, W]: pooled by the tower
        key = "sentence_embedding"
    else:  # [B, L, W], or a map [B, W, h, w], of which the student takes the mean in any case
        pool = [Pooling(projection.in_features, pooling_mode="mean" if dimensions == 4 else pooling)]
    transformer = Transformer(
        str(folder),
        modality_config={kind: {"method": "forward", "method_output_name": name}},
        module_output_name=key,
    )
    dense = Dense(projection.in_features, projection.out_features, bias=False, activation_function=nn.Identity())
    dense.linear.weight = nn.Parameter(projection.weight.detach().clone())
    return [transformer, *pool, dense]


def _with_every_weight(tower: PreTrainedModel) -> PreTrainedModel:
    """The tower as AutoModel builds it: with the pooler that a student leaves out, of zeros, since loading would warn
    that it is missing."""
    whole = AutoModel.from_config(tower.config)
    lacking, unexpected = whole.load_state_dict(tower.state_dict(), strict=False)
    if unexpected:
        raise RuntimeError(
            f"{type(tower).__name__} holds weights that AutoModel knows no place for: {unexpected[:3]}."
        )
    with torch.no_grad():
        for name, value in [*whole.named_parameters(), *whole.named_buffers()]:
            if name in lacking:
                value.zero_()
    return whole.eval()


@torch.no_grad()
def _output(tower: PreTrainedModel, modality: str, processor) -> ModelOutput:
    """Of any one input."""
    if modality == "text":
        return tower(**processor(["a"], return_tensors="pt"))
    return tower(**processor(images=[Image.new("RGB", (8, 8))], return_tensors="pt"))


def _largest_difference(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> float:
    """Of an entry of the embeddings of some texts and images, between the student and what is in the folder."""
    from sentence_transformers import SentenceTransformer

    written = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30 + 9 * i, 50, 3), dtype=np.uint8)) for i in range(3)]
    inputs = processor(text=TEXTS, images=images, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    worst = 0.0
    for given, embeds in ((TEXTS, expected.text_embeds), (images, expected.image_embeds)):
        difference = (written.encode(given, convert_to_tensor=True) - embeds).abs().max().item()
        if not difference <= TOLERANCE:  # NaN too
            raise RuntimeError(f"The written model differs from the student by {difference:.1e}.")
        worst = max(worst, difference)
    return worst


def sentence_transformers_readme(name: str, hub_id: str | None, repo: str, length: int) -> str:
    """The card of what was written.

    Args:
        name, hub_id: the student's name, and its Hub id where it has one.
        repo: what the written model will be loaded from.
        length: tokens, at which texts are cut.
    """
    base = yaml.safe_dump({"base_model": hub_id}) if hub_id else ""
    image = UPRIGHT_ON_WHITE.format(file='"photo.jpg"')
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags: [sentence-transformers, image-text-retrieval, dual-encoder]
{base}---
# {as_text(name)} for sentence-transformers

A small dual encoder for image-text retrieval; its licence is that of {as_text(hub_id or name)}. No code of a
repository runs when it is loaded.

```python
from PIL import Image, ImageOps
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({json.dumps(repo)})
{image}
print(model.similarity(model.encode([image]), model.encode(["a first caption", "a second caption"])))
```

Embeddings have length 1: their dot product is the cosine. The two lines for the image turn it upright and put what is
transparent on white, as in training. Texts are cut at {length} tokens.
"""
