"""Students of many towers, saved under one version of transformers and loaded under another: are the embeddings equal?

python tests/saved_students.py save FOLDER
python tests/saved_students.py load FOLDER  (needs torch and transformers alone, and not this project)
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VISION = {
    "beit": {"image_size": 32, "patch_size": 8, **SMALL, **NO_DROPOUT},
    "clip_vision_model": {"image_size": 32, "patch_size": 8, **SMALL},
    "convnext": {"hidden_sizes": [4, 6, 8, 12], "depths": [1, 1, 1, 1]},
    "convnextv2": {"hidden_sizes": [4, 6, 8, 12], "depths": [1, 1, 1, 1]},
    "deit": {"image_size": 32, "patch_size": 8, **SMALL, **NO_DROPOUT},
    "dinov2": {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "dinov3_vit": {"image_size": 32, "patch_size": 8, **SMALL},
    "mobilevit": {
        "image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 12, 16, 20],
        "num_attention_heads": 2,
    },
    "resnet": {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
    "siglip_vision_model": {"image_size": 32, "patch_size": 8, **SMALL},
    "swin": {
        "image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2,
    },
    "vit": {"image_size": 32, "patch_size": 8, **SMALL, **NO_DROPOUT},
}  # fmt: skip
TEXT = {
    "albert": {"embedding_size": 16, **SMALL, **NO_DROPOUT},
    "bert": {**SMALL, **NO_DROPOUT},
    "clip_text_model": {"bos_token_id": 1, "eos_token_id": 2, **SMALL},
    "deberta-v2": {**SMALL, **NO_DROPOUT},
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0,
    },
    "electra": {"embedding_size": 16, **SMALL, **NO_DROPOUT},
    "modernbert": {"pad_token_id": 0, **SMALL},
    "mpnet": {**SMALL, **NO_DROPOUT},
    "roberta": {**SMALL, **NO_DROPOUT},
    "xlm-roberta": {**SMALL, **NO_DROPOUT},
}  # fmt: skip
PAIRS = [*((vision, "bert") for vision in VISION), *(("vit", text) for text in TEXT if text != "bert")]


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(5, 60, (3, 7), generator=generator),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5]),
    }


def embeds(model) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        output = model.eval()(**inputs())
    return {"image": output.image_embeds.contiguous(), "text": output.text_embeds.contiguous()}


def save(folder: Path) -> None:
    from tiny_towers import scatter

    from modeling_dsmd import DSMDModel

    for vision, text in PAIRS:
        torch.manual_seed(0)
        towers = {"model_type": vision, **VISION[vision]}, {"model_type": text, "vocab_size": 60, **TEXT[text]}
        model = scatter(DSMDModel.from_vision_text_configs(*towers, projection_dim=8))
        path = folder / f"{vision}_{text}".replace("-", "_")
        model.save_pretrained(path)
        save_file(embeds(model), path / "expected.safetensors")


def load(folder: Path) -> list[str]:
    """The names of the students whose embeddings are not those that they were saved with."""
    wrong = []
    for path in sorted(path.parent for path in folder.glob("*/expected.safetensors")):
        expected, found = load_file(path / "expected.safetensors"), None
        try:
            found = embeds(AutoModel.from_pretrained(path, trust_remote_code=True))
        except Exception as error:  # each is one to report
            print(f"{path.name}: {type(error).__name__}: {error}")
        close = found and all(torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected)
        wrong += [] if close else [path.name]
    return wrong


if __name__ == "__main__":
    command, folder = sys.argv[1], Path(sys.argv[2])
    if command == "save":
        sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        save(folder)
    else:
        sys.path.remove(str(Path(__file__).parent))
        wrong = load(folder)
        same = f"{len(PAIRS) - len(wrong)} of {len(PAIRS)} students give the same embeddings"
        print(f"transformers {transformers.__version__}: {same}.")
        sys.exit(f"Not the same: {', '.join(wrong)}." if wrong else 0)
