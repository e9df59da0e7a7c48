"""Turns a released BEiT-3 retrieval checkpoint into a folder that transformers loads.

python -m teachers.beit3.convert beit3_base_patch16_384_coco_retrieval.pth beit3.spm OUT_DIR
"""

import argparse
import functools
import math
import os
import pickle
import re
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast, VisionTextDualEncoderProcessor
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from model_cards.tables import as_code, as_text
from rows.command_line import run_program
from rows.files import write_beside

from . import Beit3Config, Beit3RetrievalModel


HEAD_DIM = 64  # of every released model; the checkpoint does not store it
MAX_TEXT_LENGTH = 64  # with <s> and </s>, as in the published fine-tuning
NORMAL_PIECE = 1  # sentencepiece_model.proto, ModelProto.SentencePiece.Type
UNIGRAM_MODEL = 1  # sentencepiece_model.proto, TrainerSpec.ModelType

CARD = """\
---
license: mit
library_name: transformers
tags:
- image-text-retrieval
- beit3
---

# BEiT-3 for image-text retrieval: {name}

The two towers of a BEiT-3 model for retrieval (Wang et al., [Image as a Foreign
Language](https://arxiv.org/abs/2208.10442); [code and weights](https://github.com/microsoft/unilm/tree/master/beit3)
under the MIT licence), converted from the released checkpoint without changing a weight.

| | |
|---|---|
| checkpoint | {checkpoint}, sha256 `{checkpoint_sha256}` |
| tokenizer | {tokenizer}, sha256 `{tokenizer_sha256}` |
| image | {image_size}x{image_size} pixels, bicubic, no crop, mean = std = 0.5 |
| text | at most {max_length} tokens with `<s>` and `</s>` |
| layers, width, heads | {layers}, {width}, {heads} |
| features | {features} |
| parameters | {parameters:,} ({dtype}) |

```python
import torch
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(path, trust_remote_code=True, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(path, backend="pil")  # the resize of the published code
inputs = processor(text=captions, images=images, padding=True, truncation=True, return_tensors="pt")
similarity = model(**inputs).logits_per_image
```

Needs transformers 5 or later.
"""


def released_names(num_layers: int) -> dict[str, str]:
    """Name of each weight of [`Beit3RetrievalModel`] to its name in a released checkpoint (A: images, B: texts)."""
    names = {
        "logit_scale": "logit_scale",
        "visual_projection.weight": "vision_head.weight",
        "text_projection.weight": "language_head.weight",
        "vision_model.cls_token": "beit3.vision_embed.cls_token",
        "vision_model.patch_embedding.weight": "beit3.vision_embed.proj.weight",
        "vision_model.patch_embedding.bias": "beit3.vision_embed.proj.bias",
        "vision_model.position_embedding.weight": "beit3.encoder.embed_positions.A.weight",
        "text_model.token_embedding.weight": "beit3.text_embed.weight",
        "text_model.position_embedding.weight": "beit3.encoder.embed_positions.B.weight",
    }
    for tower, expert in (("vision_model", "A"), ("text_model", "B")):
        modules = {"layer_norm": f"layer_norm.{expert}"}
        for i in range(num_layers):
            for ours, released in {
                "attention_layer_norm": f"self_attn_layer_norm.{expert}",
                "attention.q_proj": f"self_attn.q_proj.{expert}",
                "attention.k_proj": f"self_attn.k_proj.{expert}",
                "attention.v_proj": f"self_attn.v_proj.{expert}",
                "attention.inner_layer_norm": f"self_attn.inner_attn_ln.{expert}",
                "attention.out_proj": f"self_attn.out_proj.{expert}",
                "mlp_layer_norm": f"final_layer_norm.{expert}",
                "mlp.fc1": f"ffn.{expert}.fc1",
                "mlp.inner_layer_norm": f"ffn.{expert}.ffn_layernorm",
                "mlp.fc2": f"ffn.{expert}.fc2",
            }.items():
                modules[f"layers.{i}.{ours}"] = f"layers.{i}.{released}"
        for ours, released in modules.items():
            for part in ("weight", "bias"):
                names[f"{tower}.encoder.{ours}.{part}"] = f"beit3.encoder.{released}.{part}"
    return names


MASK_TOKEN = "beit3.vision_embed.mask_token"  # used in pre-training only: checked and dropped
# Tables whose first position is row 2, as in fairseq; rows 0 and 1 are never read.
POSITION_TABLES = ("vision_model.position_embedding.weight", "text_model.position_embedding.weight")


def convert_state_dict(
    released: dict[str, torch.Tensor], num_attention_heads: int | None = None
) -> tuple[Beit3Config, dict[str, torch.Tensor]]:
    """Weights of a released retrieval checkpoint under the names of [`Beit3RetrievalModel`], and the configuration.

    Args:
        released: the state under the checkpoint's key `model`; base or large, any resolution.
        num_attention_heads: by default one for every 64 channels, as in all released models.

    Returns:
        The configuration, every size read off the tensors, and the weights in the checkpoint's dtype.

    Raises:
        ValueError: a weight is missing, unknown or of a shape that does not fit the others (all are listed), or the
            number of heads does not follow from the width.
    """
    layers = [
        int(match[1]) for match in (re.match(r"beit3\.encoder\.layers\.(\d+)\.", key) for key in released) if match
    ]
    names = released_names(max(layers, default=0) + 1)
    expected = {*names.values(), MASK_TOKEN}
    missing, unexpected = sorted(expected - released.keys()), sorted(released.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            "This is not a BEiT-3 retrieval checkpoint (beit3_*_itc_* or beit3_*_retrieval). "
            f"Missing: {missing}. Unexpected: {unexpected}."
        )

    weights = {ours: released[theirs] for ours, theirs in names.items()}
    for table in POSITION_TABLES:
        weights[table] = weights[table][2:]

    embedding, patch = weights["text_model.token_embedding.weight"], weights["vision_model.patch_embedding.weight"]
    if embedding.ndim != 2 or patch.ndim != 4:
        raise ValueError(
            f"beit3.text_embed.weight {list(embedding.shape)} and beit3.vision_embed.proj.weight {list(patch.shape)}: "
            "expected 2 and 4 dimensions."
        )
    vocab_size, width = embedding.shape
    if num_attention_heads is None:
        if width % HEAD_DIM:
            raise ValueError(f"Width {width} is no multiple of {HEAD_DIM}: pass --num_attention_heads.")
        num_attention_heads = width // HEAD_DIM
    config = Beit3Config(
        hidden_size=width,
        intermediate_size=len(weights["text_model.encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=max(layers) + 1,
        num_attention_heads=num_attention_heads,
        projection_dim=len(weights["text_projection.weight"]),
        image_size=patch.shape[-1] * math.isqrt(max(len(weights["vision_model.position_embedding.weight"]) - 1, 0)),
        patch_size=patch.shape[-1],
        num_channels=patch.shape[1],
        vocab_size=vocab_size,
        max_position_embeddings=len(weights["text_model.position_embedding.weight"]),
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Beit3RetrievalModel(config).state_dict().items()}
    wrong = []
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            rows = " from row 2 on" if name in POSITION_TABLES else ""
            wrong.append(f"{names[name]}{rows} {list(weights[name].shape)}, expected {list(shape)}")
    if released[MASK_TOKEN].shape != (1, 1, width):
        wrong.append(f"{MASK_TOKEN} {list(released[MASK_TOKEN].shape)}, expected {[1, 1, width]}")
    if wrong:
        raise ValueError(f"Weights of the wrong shape: {'; '.join(wrong)}.")
    return config, weights


def convert_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer of a sentencepiece model as BEiT-3 uses it: XLM-R's specials, then the pieces, `<mask>` last.

    Ids are sentencepiece's plus one, apart from `<s>` 0, `<pad>` 1, `</s>` 2 and `<unk>` 3. Truncation to 64 tokens.

    The tokens can differ from sentencepiece's in two places: where two segmentations score exactly the same ("www" as
    w + ww or ww + w), and for a letter followed by three or more separate combining marks.

    Args:
        path: the released `beit3.spm`.

    Raises:
        ValueError: the file is not a unigram model with `<unk>`, `<s>`, `</s>` first and ordinary pieces after.
    """
    model = import_protobuf().ModelProto.FromString(Path(path).read_bytes())
    first, pieces = [piece.piece for piece in model.pieces[:3]], model.pieces[3:]
    odd = [piece.piece for piece in pieces if piece.type != NORMAL_PIECE]
    if model.trainer_spec.model_type != UNIGRAM_MODEL or first != ["<unk>", "<s>", "</s>"] or odd:
        raise ValueError(
            f"{Path(path).name}: expected a sentencepiece unigram model that starts with <unk>, <s>, </s> and goes on "
            f"with ordinary pieces; got model type {model.trainer_spec.model_type}, start {first}, not ordinary "
            f"{odd[:20]}."
        )
    vocab = [(special, 0.0) for special in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab += [(piece.piece, piece.score) for piece in pieces]
    vocab.append(("<mask>", 0.0))

    tokenizer = Tokenizer(Unigram(vocab, unk_id=3))
    spaces = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    charsmap = model.normalizer_spec.precompiled_charsmap
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *spaces] if charsmap else spaces)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        padding_side="right",
        truncation_side="right",
        model_max_length=MAX_TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def convert(
    checkpoint: str | os.PathLike,
    sentencepiece_model: str | os.PathLike,
    output_dir: str | os.PathLike,
    num_attention_heads: int | None = None,
) -> None:
    """Writes model, code, tokenizer, image processor and card of a released checkpoint into a new folder.

    Args:
        checkpoint: `beit3_*_itc_*.pth` or `beit3_*_retrieval.pth`; read with `torch.load(weights_only=True)`.
        sentencepiece_model: `beit3.spm`.
        output_dir: a folder that does not exist; it appears complete or not at all.
        num_attention_heads: by default one for every 64 channels.

    Raises:
        FileExistsError: `output_dir` exists.
        ValueError: a file is not what it should be.
    """
    checkpoint, sentencepiece_model, output_dir = Path(checkpoint), Path(sentencepiece_model), Path(output_dir)
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} exists: remove it or name another folder.")
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds more than tensors and was not read: a pickle can run any code. Get the released file."
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{checkpoint} cannot be read, it is cut or no checkpoint: get the released file.") from error
    if not isinstance(content, dict) or "model" not in content:
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{checkpoint} has no key 'model', but {found}: expected a released BEiT-3 file.")
    config, weights = convert_state_dict(content["model"], num_attention_heads)

    with torch.device("meta"):
        model = Beit3RetrievalModel(config)
    # Cloned, because a position table without its first two rows is a view of the whole table.
    model.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, strict=True, assign=True)
    # In transformers a model has one dtype: the widest in the checkpoint, so that no value changes.
    model.to(functools.reduce(torch.promote_types, {tensor.dtype for tensor in weights.values()}))

    tokenizer = convert_tokenizer(sentencepiece_model)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"{sentencepiece_model} has {len(tokenizer)} tokens, the checkpoint embeds only {config.vocab_size}: "
            "the two do not belong together."
        )
    image_processor = ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"height": config.image_size, "width": config.image_size},
        resample=3,  # bicubic
        image_mean=[0.5] * config.num_channels,
        image_std=[0.5] * config.num_channels,
    )
    card = CARD.format(
        name=as_text(checkpoint.stem),
        checkpoint=as_code(checkpoint.name),
        checkpoint_sha256=sha256(checkpoint),
        tokenizer=as_code(sentencepiece_model.name),
        tokenizer_sha256=sha256(sentencepiece_model),
        image_size=config.image_size,
        max_length=MAX_TEXT_LENGTH,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        features=config.projection_dim,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
    )

    with write_beside(output_dir) as beside:
        model.save_pretrained(beside)
        VisionTextDualEncoderProcessor(image_processor, tokenizer).save_pretrained(beside)
        (beside / "README.md").write_text(card, encoding="utf-8")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return sha_fileobj(file).hex()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m teachers.beit3.convert", description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT.pth", help="a released beit3_*_itc_* or beit3_*_retrieval file"
    )
    parser.add_argument("sentencepiece_model", metavar="beit3.spm", help="the released tokenizer")
    parser.add_argument("output_dir", metavar="OUT_DIR", help="a folder that does not exist yet")
    parser.add_argument(
        "--num_attention_heads", type=int, help="for sizes that were never released; default: one per 64 channels"
    )
    options = parser.parse_args()
    convert(**vars(options))
    print(f"written to {options.output_dir}")


if __name__ == "__main__":
    run_program(main)
