"""Every family of teachers as a tiny random model of the real class with its real processor, saved as a folder."""

import string
from functools import partial

import sentencepiece
import torch
from conftest import WORDS, make_student
from tokenizers import pre_tokenizers
from transformers import (
    AlignConfig,
    AlignModel,
    AlignProcessor,
    AltCLIPConfig,
    AltCLIPModel,
    AltCLIPProcessor,
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
