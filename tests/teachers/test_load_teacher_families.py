"""Every family of teachers, as a tiny random model of the real class with its real processor: features as by hand."""

import json
import string
from functools import partial

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import WORDS, make_student
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPProcessor,
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    GemmaTokenizer,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    Siglip2Processor,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    XLMRobertaTokenizer,
)
from transformers.models.chinese_clip.image_processing_pil_chinese_clip import ChineseCLIPImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from teachers import load_teacher
from teachers.beit3 import Beit3Config, Beit3RetrievalModel
from teachers.beit3.convert import MASK_TOKEN, POSITION_TABLES, convert, released_names


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {"image_size": 32, "patch_size": 8, **SMALL}
SQUARE = {"height": 32, "width": 32}
POSITIONS = 24
TEXTS = [
    "a cat",
    "",
    "dog " * 100,
    "A RED CAT near the Big house, 1 dog!",
    "a small cat on a blue car left",
    "一只猫 в доме",
]


def scatter(model):
    """Every parameter at random: what starts as 0 or 1 would hide a wrong padding or pooling."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


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


def clip_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=POSITIONS)


def gemma_tokenizer(cls, **settings):
    """As the converters of SigLIP 2 leave it: no limit of its own, no mask, a flag that the Gemma class ignores."""
    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("▁", "cat")]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", *string.ascii_letters, *string.digits, *map("".join, merges)]
    vocab = {token: i for i, token in enumerate(tokens)}
    return cls(
        vocab=vocab, merges=merges, padding_side="right", add_bos_token=False, add_eos_token=True,
        model_input_names=["input_ids"], **settings,
    )  # fmt: skip


def bert_tokenizer():
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *WORDS, "##t", "##g", "猫", ","]
    return BertTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, model_max_length=512)


def xlmr_tokenizer(spm, **settings):
    model = sentencepiece.SentencePieceProcessor(model_file=str(spm))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, len(model))]
    specials = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    return XLMRobertaTokenizer(vocab=[*specials, *pieces, ("<mask>", 0.0)], **settings)


def clip_images():
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)


def text_config(tokenizer, **settings):
    return {"vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS, **SMALL, **settings}


def make_clip(spm):
    tokenizer = clip_tokenizer()
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    config = CLIPConfig(vision_config=VISION, text_config=text_config(tokenizer, **special), projection_dim=8)
    return CLIPModel(config), CLIPProcessor(clip_images(), tokenizer)


def make_metaclip2(spm):
    tokenizer = xlmr_tokenizer(spm)
    special = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = MetaClip2Config(vision_config=VISION, text_config=text_config(tokenizer, **special), projection_dim=8)
    return MetaClip2Model(config), CLIPProcessor(clip_images(), tokenizer)


def make_siglip(spm):
    tokenizer = SiglipTokenizer(vocab_file=str(spm), model_input_names=["input_ids"], model_max_length=POSITIONS)
    config = SiglipConfig(vision_config=VISION, text_config=text_config(tokenizer, projection_size=16))
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer)


def make_siglip2_fixed(spm):
    tokenizer = gemma_tokenizer(GemmaTokenizer, do_lower_case=True)
    config = SiglipConfig(vision_config=VISION, text_config=text_config(tokenizer, projection_size=16))
    return SiglipModel(config), SiglipProcessor(SiglipImageProcessorPil(size=SQUARE, resample=2), tokenizer)


def make_siglip2_naflex(spm):
    tokenizer = gemma_tokenizer(Siglip2Tokenizer)
    vision = {"patch_size": 8, "num_patches": 16, **SMALL}
    config = Siglip2Config(vision_config=vision, text_config=text_config(tokenizer, projection_size=16))
    return Siglip2Model(config), Siglip2Processor(
        Siglip2ImageProcessorPil(patch_size=8, max_num_patches=20), tokenizer
    )


def make_align(spm):
    tokenizer = bert_tokenizer()
    vision = {
        "image_size": 32, "kernel_sizes": [3, 3], "in_channels": [32, 16], "out_channels": [16, 24], "strides": [1, 2],
        "num_block_repeats": [1, 1], "expand_ratios": [1, 2], "depthwise_padding": [], "initializer_range": 0.3,
    }  # fmt: skip
    text = text_config(tokenizer, max_position_embeddings=512)
    config = AlignConfig(vision_config=vision, text_config=text, projection_dim=48)  # twice the last out_channels
    images = EfficientNetImageProcessorPil(
        size={"height": 38, "width": 38}, do_center_crop=True, crop_size=SQUARE, include_top=False
    )
    return AlignModel(config), AlignProcessor(images, tokenizer)


def make_altclip(spm):
    tokenizer = xlmr_tokenizer(spm)
    # XLM-R's positions start behind the padding's, at 2.
    text = text_config(tokenizer, max_position_embeddings=POSITIONS + 2, pad_token_id=1, project_dim=12)
    config = AltCLIPConfig(vision_config=VISION, text_config=text, projection_dim=8)
    return AltCLIPModel(config), AltCLIPProcessor(clip_images(), tokenizer)


def make_chinese_clip(spm):
    tokenizer = bert_tokenizer()
    config = ChineseCLIPConfig(vision_config=VISION, text_config=text_config(tokenizer), projection_dim=8)
    images = ChineseCLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
    return ChineseCLIPModel(config), ChineseCLIPProcessor(images, tokenizer)


def make_vision_text_dual_encoder(spm):
    tokenizer = bert_tokenizer()
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), BertConfig(**text_config(tokenizer)), projection_dim=8
    )
    images = ViTImageProcessorPil(size=SQUARE)
    return VisionTextDualEncoderModel(config), VisionTextDualEncoderProcessor(images, tokenizer)


def save(make, folder, spm):
    torch.manual_seed(0)
    model, processor = make(spm)
    scatter(model).save_pretrained(folder)
    processor.save_pretrained(folder)


def save_student(folder, spm):
    save(lambda _: make_student(), folder, spm)


def save_sentence_transformers(folder, spm):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Dense, Transformer

    save(make_clip, folder.parent / "clip", spm)
    encoder = Transformer(str(folder.parent / "clip"))
    dense = Dense(8, 6, activation_function=torch.nn.Tanh(), module_input_name="sentence_embedding")
    model = SentenceTransformer(modules=[encoder, scatter(dense)], device="cpu")
    model.save_pretrained(str(folder))


def save_beit3(folder, spm):
    torch.manual_seed(0)
    config = Beit3Config(
        projection_dim=16, image_size=32, patch_size=8, vocab_size=110, max_position_embeddings=70, **SMALL
    )
    ours, names = Beit3RetrievalModel(config).state_dict(), released_names(2)
    state = {theirs: torch.randn(ours[name].shape) * 0.5 for name, theirs in names.items()}
    for table in POSITION_TABLES:
        state[names[table]] = torch.randn(len(ours[table]) + 2, 16)
    checkpoint = folder.parent / "beit3.pth"
    torch.save({"model": {**state, MASK_TOKEN: torch.zeros(1, 1, 16)}}, checkpoint)
    convert(checkpoint, spm, folder, num_attention_heads=2)


def lower(texts):
    return [text.lower() for text in texts]


# How a folder of the family is made, how its texts are to be padded and cut, and what to do to them before.
FIXED = {"padding": "max_length", "max_length": POSITIONS}
FAMILIES = {
    "clip": (partial(save, make_clip), {"max_length": POSITIONS}, list),
    "metaclip2": (partial(save, make_metaclip2), {"max_length": POSITIONS}, list),
    "siglip": (partial(save, make_siglip), FIXED, list),
    "siglip2_fixed": (partial(save, make_siglip2_fixed), FIXED, lower),
    "siglip2_naflex": (partial(save, make_siglip2_naflex), FIXED, lower),
    "align": (partial(save, make_align), {"padding": "max_length", "max_length": 64}, list),
    "altclip": (partial(save, make_altclip), {"max_length": POSITIONS}, list),
    "chinese_clip": (partial(save, make_chinese_clip), {"max_length": POSITIONS}, list),
    "vision_text_dual_encoder": (partial(save, make_vision_text_dual_encoder), {"max_length": POSITIONS}, list),
    "student": (save_student, {"max_length": 512}, list),
    "beit3": (save_beit3, {"max_length": 64}, list),
    "sentence_transformers": (save_sentence_transformers, {"max_length": POSITIONS}, list),
}


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
