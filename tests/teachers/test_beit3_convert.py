"""The converter: tokenizer against sentencepiece, what it refuses, and the folder as a stranger loads it."""

import hashlib
import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from PIL import Image
from safetensors.torch import load_file
from torchscale_beit3 import HEADS, Reference, load_torchscale
from transformers import AutoImageProcessor, AutoTokenizer

from teachers.beit3 import Beit3Config, Beit3RetrievalModel
from teachers.beit3.convert import (
    MASK_TOKEN,
    POSITION_TABLES,
    convert,
    convert_state_dict,
    convert_tokenizer,
    main,
    released_names,
)


WORDS = [
    *"a an the red blue wooden dog cat man woman holding riding near under café naïve Straße façade 1,000 3.5".split(),
    *"½ № ﬁne ＡＢＣ １２３ 東京 привет мир مرحبا 안녕 don't it's \"quoted\" (maybe) - – — … & % 2024".split(),
    *"$5 #tag @home e-mail x.org C++ e\u0301te\u0301 man\u0303ana ☕ 🐶 👨\u200d👩\u200d👧 🇫🇷 ❤\ufe0f".split(),
]
SEPARATORS = [" "] * 8 + ["  ", "   ", "\t", "\n", "\u00a0", "\u3000", ", ", ". ", "! "]
ODD = [
    *("", " ", "  leading", "trailing  ", "龘龘 龘 unseen", "zero\u200bwidth", "so\u00adft", "a\r\nb", "▁ literal"),
    *("x" * 300, "①② ㎏ ﷺ", "ﾊﾟﾋﾟ", "👩\u200d🚀 🏳\ufe0f\u200d🌈", "हिन्दी"),
]


def make_captions(seed: int = 0) -> list[str]:
    rng = random.Random(seed)

    def word():
        # Distinct letters: "www" is w + ww or ww + w, of exactly equal score; sentencepiece's float32 sums then decide
        # differently in different sentences.
        made_up = "".join(rng.sample("abcdefghijklmnoprstuvwy", k=rng.randint(2, 8)))
        chosen = rng.choice([*WORDS, *[made_up] * 40])
        return chosen.capitalize() if rng.random() < 0.1 else chosen

    return ["".join(word() + rng.choice(SEPARATORS) for _ in range(rng.randint(1, 16))) for _ in range(1000)]


@pytest.fixture(scope="module")
def captions():
    return make_captions()


def train(folder, captions, **settings):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_prefix=str(folder / "beit3"),
        minloglevel=2,
        num_threads=1,
        **{"vocab_size": 600, "character_coverage": 0.99, **settings},
    )
    (folder / "beit3.model").rename(folder / "beit3.spm")
    return folder / "beit3.spm"


@pytest.fixture(scope="module")
def spm(tmp_path_factory, captions):
    return train(tmp_path_factory.mktemp("spm"), captions)


@pytest.fixture(scope="module")
def released():
    """A tiny state in the released layout, in float16 as the released files are."""
    torch.manual_seed(0)
    config = Beit3Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        image_size=48,
        vocab_size=610,
        max_position_embeddings=70,
    )
    ours, names = Beit3RetrievalModel(config).state_dict(), released_names(2)
    state = {theirs: torch.randn(ours[name].shape).half() for name, theirs in names.items()}
    for table in POSITION_TABLES:
        state[names[table]] = torch.randn(len(ours[table]) + 2, 16).half()
    return {**state, MASK_TOKEN: torch.zeros(1, 1, 16).half()}


def test_ids_equal_those_of_sentencepiece(spm, captions, tmp_path, monkeypatch):
    convert_tokenizer(spm).save_pretrained(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # the saved tokenizer must not need it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    unknown = 0
    for caption in captions + ODD:
        expected = [i + 1 if i else 3 for i in processor.encode(caption)]  # one special more than sentencepiece has
        assert tokenizer(caption, add_special_tokens=False)["input_ids"] == expected, caption
        unknown += 3 in expected
    assert 100 < unknown < 900  # both kinds of captions were compared
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, len(processor) + 1]) == [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        "<mask>",
    ]
    assert len(tokenizer) == len(processor) + 2


def test_texts_are_framed_truncated_and_padded(spm):
    tokenizer = convert_tokenizer(spm)
    long, short = "dog " * 100, "dog"
    piece = tokenizer(short, add_special_tokens=False)["input_ids"]
    encoded = tokenizer([long, short], padding=True, truncation=True)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["input_ids"][0] == [0, *(piece * 100)[:62], 2]
    assert encoded["input_ids"][1] == [0, *piece, 2] + [1] * (62 - len(piece))
    assert encoded["attention_mask"][1] == [1] * (len(piece) + 2) + [0] * (62 - len(piece))


@pytest.mark.parametrize("settings", [{"model_type": "bpe"}, {"user_defined_symbols": ["[X]"]}, {"pad_id": 3}])
def test_other_sentencepiece_models_are_refused(settings, captions, tmp_path):
    path = train(tmp_path, captions, **settings)
    with pytest.raises(ValueError, match="beit3.spm: expected a sentencepiece unigram model"):
        convert_tokenizer(path)


def test_sizes_come_from_the_tensors(released):
    config, weights = convert_state_dict(released, num_attention_heads=2)
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers) == (16, 24, 2)
    assert (config.image_size, config.patch_size, config.num_channels, config.projection_dim) == (48, 16, 3, 16)
    assert (config.vocab_size, config.max_position_embeddings, config.layer_norm_eps) == (610, 70, 1e-5)
    table = released["beit3.encoder.embed_positions.A.weight"]
    assert torch.equal(weights["vision_model.position_embedding.weight"], table[2:])
    with pytest.raises(ValueError, match="Width 16 .* pass --num_attention_heads"):
        convert_state_dict(released)
    base = Beit3Config(num_hidden_layers=1, vocab_size=5, intermediate_size=4, image_size=16)  # 768 wide
    with torch.device("meta"):
        ours = Beit3RetrievalModel(base).state_dict()
    wide = {
        theirs: torch.empty(ours[name].shape if name not in POSITION_TABLES else (len(ours[name]) + 2, 768))
        for name, theirs in released_names(1).items()
    }
    config, _ = convert_state_dict({**wide, MASK_TOKEN: torch.empty(1, 1, 768)})
    assert config.num_attention_heads == 12 and config.image_size == 16


def test_every_single_key_counts(released):
    for key in released:
        with pytest.raises(ValueError, match=rf"Missing: \['{key}'"):
            convert_state_dict({k: v for k, v in released.items() if k != key}, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"Missing: \[\]. Unexpected: \['beit3.pooler', 'head.weight'\]"):
        convert_state_dict({**released, "head.weight": torch.ones(1), "beit3.pooler": torch.ones(1)}, 2)


def test_every_single_shape_counts(released):
    free = ("beit3.text_embed.weight", "beit3.encoder.embed_positions.B.weight")  # nothing else fixes their rows
    for key, tensor in released.items():
        wrong = [tensor[None]]
        if key not in free:
            wrong.append(torch.cat([tensor, tensor]) if tensor.ndim else tensor[None, None])
        for value in wrong:
            with pytest.raises(ValueError, match="wrong shape|dimensions"):
                convert_state_dict({**released, key: value}, num_attention_heads=2)
    two = {
        key: torch.zeros(17) for key in ("beit3.encoder.layer_norm.A.bias", "beit3.encoder.layers.1.ffn.B.fc2.bias")
    }
    with pytest.raises(ValueError) as error:
        convert_state_dict({**released, **two}, num_attention_heads=2)
    assert all(f"{key} [17], expected [16]" in str(error.value) for key in two)


def test_folder(released, spm, tmp_path):
    checkpoint = tmp_path / "beit3_tiny.pth"
    torch.save({"model": released}, checkpoint)
    out = tmp_path / "new" / "out"
    convert(checkpoint, spm, out, num_attention_heads=2)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]  # nothing left beside it
    (tmp_path / "any").touch()
    modes = {path.stat().st_mode for path in out.rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "any").stat().st_mode}  # other users can read what they can list
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "config.json",
        "configuration_beit3.py",
        "model.safetensors",
        "modeling_beit3.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model, info = Beit3RetrievalModel.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.float16} and model.dtype == torch.float16
    for name, theirs in released_names(2).items():
        expected = released[theirs][2:] if name in POSITION_TABLES else released[theirs]
        assert torch.equal(model.state_dict()[name], expected), name
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n")
    for text in ("beit3_tiny.pth", "beit3.spm", "48x48", "| 2, 16, 2 |", "float16"):
        assert text in card
    for path in (checkpoint, spm):
        assert hashlib.sha256(path.read_bytes()).hexdigest() in card
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes() and str(spm.parent).encode() not in path.read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_beit3.Beit3Config",
        "AutoModel": "modeling_beit3.Beit3RetrievalModel",
    }
    image_processor = AutoImageProcessor.from_pretrained(out, backend="pil")
    assert type(image_processor).__name__ == "ViTImageProcessorPil"
    assert dict(image_processor.size) == {"height": 48, "width": 48} and image_processor.resample == 3

    with pytest.raises(FileExistsError, match="out exists"):
        convert(checkpoint, spm, out, num_attention_heads=2)


def test_nothing_is_left_of_a_conversion_that_fails(released, spm, captions, tmp_path, monkeypatch):
    checkpoint, out = tmp_path / "beit3_tiny.pth", tmp_path / "out"
    torch.save({"model": released}, checkpoint)
    before = sorted(os.listdir(tmp_path))

    def full_disk(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("transformers.VisionTextDualEncoderProcessor.save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            convert(checkpoint, spm, out, num_attention_heads=2)
    assert sorted(os.listdir(tmp_path)) == before

    (tmp_path / "big").mkdir()
    larger = train(tmp_path / "big", captions, vocab_size=700)
    with pytest.raises(ValueError, match="has 702 tokens, the checkpoint embeds only 610"):
        convert(checkpoint, larger, out, num_attention_heads=2)
    assert not out.exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_is_never_unpickled(released, spm, tmp_path):
    torch.save({"model": released, "extra": Malicious(str(tmp_path / "ran"))}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="more than tensors"):
        convert(tmp_path / "bad.pth", spm, tmp_path / "out", num_attention_heads=2)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    torch.save({"module": released}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"no key 'model', but \['module'\]"):
        convert(tmp_path / "bad.pth", spm, tmp_path / "out", num_attention_heads=2)


LOAD_ELSEWHERE = """
import sys
sys.modules["sentencepiece"] = None  # not needed once converted
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor
folder, output, captions, images = sys.argv[1], sys.argv[2], sys.argv[3].split("|"), sys.argv[4].split("|")
processor = AutoProcessor.from_pretrained(folder, backend="pil")
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert "teachers" not in sys.modules
inputs = processor(text=captions, images=[Image.open(i) for i in images], padding=True, truncation=True,
                   return_tensors="pt")
outputs = model(**inputs)
save_file({"ids": inputs["input_ids"], "pixels": inputs["pixel_values"].contiguous(),
           "image": outputs.image_embeds.detach(), "text": outputs.text_embeds.detach()}, output)
"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file.*released.pth"),
        (b"PK\x03\x04cut", "released.pth cannot be read, it is cut or no checkpoint"),
        (b"", "released.pth cannot be read, it is cut or no checkpoint"),
    ],
)
def test_a_file_that_cannot_be_read_ends_in_a_sentence(tmp_path, monkeypatch, content, message):
    if content is not None:
        (tmp_path / "released.pth").write_bytes(content)
    arguments = [str(tmp_path / name) for name in ("released.pth", "beit3.spm", "out")]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments])
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        runpy.run_module("teachers.beit3.convert", run_name="__main__")
    assert not (tmp_path / "out").exists()


def test_converted_folder_gives_the_published_features_elsewhere(tmp_path, monkeypatch):
    """Released file and .spm -> folder -> a fresh process without this repository, from raw images and strings."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeghilnorst"), rng.integers(2, 7))) for _ in range(150)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(rng.choice(words, 6)) for _ in range(300)),
        model_prefix=str(tmp_path / "beit3"),
        vocab_size=150,
        minloglevel=2,
        num_threads=1,
    )
    (tmp_path / "beit3.model").rename(tmp_path / "beit3.spm")
    reference = Reference(load_torchscale())
    torch.save({"model": reference.state_dict()}, tmp_path / "released.pth")
    arguments = [str(tmp_path / "released.pth"), str(tmp_path / "beit3.spm"), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["convert", *arguments, "--num_attention_heads", str(HEADS)])
    main()

    captions = [" ".join(words[:4]), words[5], "  double  " + words[7] + " ?!"]
    images = {"a.png": ("RGB", (300, 201, 3)), "b.png": ("L", (90, 240)), "c.png": ("RGBA", (224, 224, 4))}
    for name, (mode, shape) in images.items():
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode).save(tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "code")}
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = [sys.executable, "-c", LOAD_ELSEWHERE, "../out", "features.safetensors", "|".join(captions)]
    command.append("|".join(f"../{name}" for name in images))
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    actual = load_file(elsewhere / "features.safetensors")

    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "beit3.spm"))
    rows = [[0, *(i + 1 if i else 3 for i in processor.encode(caption)), 2] for caption in captions]
    ids = torch.tensor([row + [1] * (max(map(len, rows)) - len(row)) for row in rows])
    assert torch.equal(actual["ids"], ids)
    pixels = []
    for name in images:
        image = Image.open(tmp_path / name)
        if image.mode == "RGBA":  # transparent becomes white, as transformers has it
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(image) / 127.5 - 1)
    pixels = torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2)
    torch.testing.assert_close(actual["pixels"], pixels, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual["image"], reference.images(pixels)[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(actual["text"], reference.texts(ids, (ids != 1).long())[1], atol=1e-5, rtol=0)
    for path in Path(tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path
