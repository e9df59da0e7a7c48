"""Tiny towers of the real classes, students of them, and how outputs are compared; shared by tests."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    DeiTConfig,
    Dinov2Config,
    DistilBertConfig,
    MobileViTConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    SwinConfig,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessorPil,
)

from modeling_dsmd import DSMDModel


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CAPTIONS = ["arrow left", "a big red square on a blue ground"]


def vit():
    return ViTConfig(image_size=32, patch_size=8, **SMALL)


def convnext():
    return ConvNextConfig(hidden_sizes=[4, 6, 8, 12], depths=[1, 1, 1, 1], layer_scale_init_value=0.5)


def bert():
    return BertConfig(vocab_size=60, max_position_embeddings=32, **SMALL, **NO_DROPOUT)


def distilbert():
    return DistilBertConfig(
        vocab_size=60, max_position_embeddings=32, dim=20, n_layers=2, n_heads=2, hidden_dim=24,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip


def deit():
    return DeiTConfig(image_size=32, patch_size=8, **SMALL)


def dinov2():
    return Dinov2Config(
        image_size=32, patch_size=8, mlp_ratio=2, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
    )


def swin():  # two stages, the second of shifted windows too
    return SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=2, drop_path_rate=0.0
    )


def mobilevit():
    return MobileViTConfig(
        image_size=32, hidden_sizes=[8, 12, 16], neck_hidden_sizes=[4, 4, 8, 8, 12, 16, 20], num_attention_heads=2
    )


def minilm():  # a BERT with narrow heads
    return BertConfig(
        vocab_size=60, max_position_embeddings=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
        intermediate_size=96, **NO_DROPOUT,
    )  # fmt: skip


def roberta():  # 32 positions: the first two are not used
    return RobertaConfig(vocab_size=60, max_position_embeddings=34, **SMALL, **NO_DROPOUT)


def modernbert():  # one layer of all tokens, one of the two nearest on each side
    return ModernBertConfig(vocab_size=60, pad_token_id=0, global_attn_every_n_layers=2, local_attention=4, **SMALL)


def clip():
    config = CLIPConfig(
        vision_config={"image_size": 32, "patch_size": 8, **SMALL},
        text_config={"vocab_size": 60, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1, **SMALL},
        projection_dim=8,
    )
    return scatter(CLIPModel(config).eval())


def scatter(model):
    """Every parameter at random, those too that start as 0 or 1: a lost or swapped one then shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def small_run(folder):
    """Options that make a recipe's run a tiny one, with pre-trained towers that are written to `folder`."""
    folder, processor = Path(folder), make_processor()
    text = BertConfig(vocab_size=len(processor.tokenizer), max_position_embeddings=64, **SMALL)
    for name, config, part in (("vit", vit(), processor.image_processor), ("bert", text, processor.tokenizer)):
        AutoModel.from_config(config).save_pretrained(folder / name)
        part.save_pretrained(folder / name)
    options = {
        "vision_model_name_or_path": folder / "vit",
        "text_model_name_or_path": folder / "bert",
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "queue_size": 8,
        "dataloader_num_workers": 0,
        "dataloader_persistent_workers": False,
        "report_to": "none",
        "use_cpu": True,
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def make(vision=vit, text=bert, vision_pooling="mean", text_pooling="mean", projection_dim=8):
    torch.manual_seed(0)
    model = DSMDModel.from_vision_text_configs(
        vision(), text(), projection_dim=projection_dim, vision_pooling=vision_pooling, text_pooling=text_pooling
    )
    return scatter(model).eval()


def make_inputs():
    generator = torch.Generator().manual_seed(1)
    return {
        "pixel_values": torch.randn(3, 3, 32, 32, generator=generator),
        "input_ids": torch.randint(5, 60, (3, 7), generator=generator),
        "attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5]),
    }


def run(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def assert_same(output, expected, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 1e-6}  # the same weights elsewhere in memory may round differently
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), **tolerance)


def assert_clean(info):
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info


def make_processor():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in CAPTIONS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return VisionTextDualEncoderProcessor(
        ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
            model_input_names=["input_ids", "attention_mask"],
        ),
    )  # fmt: skip


TOWERS = [
    (vit, bert),
    (vit, distilbert),
    (convnext, bert),
    (convnext, distilbert),
    (deit, roberta),
    (dinov2, minilm),
    (swin, modernbert),
    (mobilevit, modernbert),
]
# Every pooling that a tower has.
POOLINGS = {
    **dict.fromkeys((vit, deit, dinov2, bert, minilm, roberta), ("cls", "mean", "pooler")),
    **dict.fromkeys((convnext, swin, mobilevit), ("mean", "pooler")),
    **dict.fromkeys((distilbert, modernbert), ("cls", "mean")),
}
# Each of them once, beside any of the other tower's: neither knows of the other.
ALL = [
    (vision, text, POOLINGS[vision][i % len(POOLINGS[vision])], POOLINGS[text][i % len(POOLINGS[text])])
    for vision, text in TOWERS
    for i in range(max(len(POOLINGS[vision]), len(POOLINGS[text])))
]
