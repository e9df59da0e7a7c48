"""Every family of teachers, as a tiny random model of the real class with its real processor: features as by hand."""

import json
import string
from functools import partial

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import WORDS
from PIL import Image
from teacher_families import FAMILIES, TEXTS, make_clip, save
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
)

from teachers import load_teacher


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A sentencepiece unigram model, as SigLIP, XLM-R and BEiT-3 have one."""
    path = tmp_path_factory.mktemp("spm") / "beit3.spm"
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(WORDS, size=6)) for _ in range(300)]
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*sentences, string.ascii_letters]),
            model_writer=file,
            vocab_size=100,
            hard_vocab_limit=False,
            minloglevel=2,
            num_threads=1,
        )
    return path


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, spm, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "teacher"
    make, settings, prepare = FAMILIES[request.param]
    make(folder, spm)
    return request.param, folder, settings, prepare


@pytest.fixture(scope="module")
def teacher(family):
    return load_teacher(str(family[1]))


def odd_images():
    """Images of every mode, each with what a person sees in it as uint8 RGB `[H, W, 3]`."""
    rng = np.random.default_rng(3)
    rgb = rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)
    grey = rng.integers(0, 256, (33, 20), dtype=np.uint8)
    deep = grey.astype(np.uint16) * 257
    ink = rng.choice([0, 255], size=(50, 30, 4)).astype(np.uint8)  # full ink or none: no doubt how to convert it
    seen_ink = 255 - np.maximum(ink[..., :3], ink[..., 3:])
    palette = rng.integers(0, 256, (4, 3), dtype=np.uint8)
    index = rng.integers(0, 4, (24, 70), dtype=np.uint8)
    paletted = Image.fromarray(index, mode="P")
    paletted.putpalette(palette.tobytes())
    clear = paletted.copy()
    clear.info["transparency"] = 2
    on_white = palette.copy()
    on_white[2] = 255
    alpha = rng.choice([0, 255], size=(40, 56, 1)).astype(np.uint8)
    turned = Image.fromarray(rgb)
    turned.getexif()[0x0112] = 6  # shown after a quarter turn to the right
    return [
        (Image.fromarray(rgb), rgb),
        (Image.fromarray(grey), np.stack([grey] * 3, -1)),
        (Image.fromarray(deep), np.stack([grey] * 3, -1)),
        (Image.fromarray(ink, mode="CMYK"), seen_ink),
        (paletted, palette[index]),
        (clear, on_white[index]),
        (Image.fromarray(np.concatenate([rgb, alpha], -1)), np.where(alpha == 255, rgb, 255)),
        (turned, np.rot90(rgb, -1)),
        (Image.fromarray(rgb[:3]), rgb[:3]),  # three rows are no channels
        (Image.fromarray(rgb[:1, :1]), rgb[:1, :1]),
    ]


def by_hand(name, folder, settings, prepare, images, texts):
    """Features of RGB arrays and texts, one at a time, without the module's code."""
    images = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    if name == "sentence_transformers":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), device="cpu")
        encode = partial(model.encode, batch_size=1, convert_to_tensor=True)
        return encode(images), encode(texts)
    model = AutoModel.from_pretrained(folder).eval()
    image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        image = [
            model.get_image_features(**image_processor(images=image, return_tensors="pt")).pooler_output
            for image in images
        ]
        text = []
        for caption in prepare(texts):
            inputs = tokenizer([caption], truncation=True, return_tensors="pt", **settings)
            text.append(model.get_text_features(**inputs).pooler_output)
    return torch.cat(image), torch.cat(text)


def close(features, expected):
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_features_are_those_of_a_direct_call(family, teacher):
    images, seen = zip(*odd_images())
    expected_images, expected_texts = by_hand(*family, seen, TEXTS)
    for embed, inputs, expected in (
        (teacher.embed_images, list(images), expected_images),
        (teacher.embed_texts, TEXTS, expected_texts),
    ):
        together = embed(inputs)
        assert together.dtype == torch.float32 and together.shape == (len(inputs), teacher.dim)
        assert torch.isfinite(together).all()
        close(together, expected)
        close(torch.cat([embed([one]) for one in inputs]), expected)
        close(embed(inputs[::-1]).flip(0), expected)
        close(embed(inputs[1:3]), expected[1:3])
        # No two alike, but for what the tokenizer or the resizing makes the same: a constant would pass all of this.
        assert (torch.pdist(together) > 1e-3 * together.norm(dim=1).max()).float().mean() > 0.8


def test_nothing_in_gives_nothing_out(teacher):
    assert teacher.embed_images([]).shape == teacher.embed_texts([]).shape == (0, teacher.dim)


def test_half_precision(family, teacher):
    half = load_teacher(str(family[1]), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert half.describe() == {**teacher.describe(), "dtype": "bfloat16"}
    images = [image for image, _ in odd_images()[:2]]
    for features, expected in (
        (half.embed_images(images), teacher.embed_images(images)),
        (half.embed_texts(["a cat", "a red dog"]), teacher.embed_texts(["a cat", "a red dog"])),
    ):
        assert features.dtype == torch.float32
        assert torch.cosine_similarity(features, expected).min() > 0.98


def test_description(family, teacher, tmp_path_factory):
    name, folder, settings, prepare = family
    described = teacher.describe()
    assert json.loads(json.dumps(described)) == described
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps(described)
    assert described["id"] == "teacher" and described["revision"] is None and described["dim"] == teacher.dim
    assert described["parameters"] == sum(parameter.numel() for parameter in teacher.model.parameters())
    text, image = described["preprocessing"]["text"], described["preprocessing"]["image"]
    assert text["max_length"] == settings["max_length"]
    assert text["padding"] == settings.get("padding", "longest")
    cased = ("metaclip2", "altclip", "beit3")
    assert text["lower_case"] == (name not in cased)
    assert len(image["image_mean"]) == len(image["image_std"]) == 3
    assert image["resample"] in ("bicubic", "bilinear", "nearest") and image["transparent"] == "white"
    assert (image["max_num_patches"] == 20) if name == "siglip2_naflex" else image["size"]


@pytest.mark.parametrize("name", ["siglip", "siglip2_fixed", "siglip2_naflex"])
def test_these_models_need_their_padding(name, spm, tmp_path):
    """What the comparison above must be able to see: without the family's padding the features are others."""
    FAMILIES[name][0](tmp_path / "teacher", spm)
    teacher = load_teacher(str(tmp_path / "teacher"))
    expected = teacher.embed_texts(TEXTS)
    teacher.text_settings["padding"] = True
    wrong = torch.cat([teacher.embed_texts([text]) for text in TEXTS])
    assert (torch.cosine_similarity(wrong, expected)[:2] < 0.99).all()  # the two short ones
    close(wrong[2], expected[2])  # the long one has no padding


def test_lower_case_matters(spm, tmp_path):
    FAMILIES["siglip2_fixed"][0](tmp_path / "teacher", spm)
    teacher = load_teacher(str(tmp_path / "teacher"))
    small, capital = teacher.embed_texts(["a red cat", "A RED CAT"])
    close(small, capital)
    teacher.lower_case = False
    assert torch.cosine_similarity(small, teacher.embed_texts(["A RED CAT"])[0], dim=0) < 0.99


def test_pooled_token_matters(spm, tmp_path):
    """CLIP pools the first end of text: a text cut off without its end would pool another position."""
    save(make_clip, tmp_path / "teacher", spm)
    teacher = load_teacher(str(tmp_path / "teacher"))
    prepared = teacher.prepare_texts([TEXTS[2]])
    assert prepared["input_ids"][0, -1] == teacher.tokenizer.eos_token_id
    cut = {name: value[:, :-1] for name, value in prepared.items()}
    features = teacher.text_features(prepared), teacher.text_features(cut)
    assert torch.cosine_similarity(*features) < 0.99
