"""BEiT-3 as published (torchscale 0.3.0) with random weights: what ours is compared with and converted from."""

import sys
import types

import pytest
import torch
from torch import nn


VOCAB, WIDTH, HEADS, FFN, LAYERS = 320, 32, 4, 80, 2


def load_torchscale():
    """torchscale's BEiT3 and its config; what it imports of fairscale and timm plays no part in retrieval."""
    stubs = {name: types.ModuleType(name) for name in ("fairscale", "timm", "timm.models")}
    stubs["fairscale.nn"] = types.ModuleType("fairscale.nn")
    stubs["fairscale.nn"].checkpoint_wrapper = stubs["fairscale.nn"].wrap = None
    stubs["timm.models.layers"] = types.ModuleType("timm.models.layers")
    stubs["timm.models.layers"].drop_path = None
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        from torchscale.architecture.config import EncoderConfig
        from torchscale.model.BEiT3 import BEiT3
    return BEiT3, EncoderConfig


class Reference(nn.Module):
    """The published retrieval model: torchscale's BEiT3, two heads and a scale; its state has the released layout."""

    def __init__(self, torchscale, image_size=224, width=WIDTH, heads=HEADS, ffn=FFN, layers=LAYERS):
        super().__init__()
        BEiT3, EncoderConfig = torchscale
        self.beit3 = BEiT3(
            EncoderConfig(
                img_size=image_size,
                patch_size=16,
                vocab_size=VOCAB,
                multiway=True,
                layernorm_embedding=False,
                normalize_output=True,
                no_output_layer=True,
                encoder_embed_dim=width,
                encoder_attention_heads=heads,
                encoder_ffn_embed_dim=ffn,
                encoder_layers=layers,
            )
        )
        self.language_head = nn.Linear(width, width, bias=False)
        self.vision_head = nn.Linear(width, width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(4.0))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():  # every weight random, layer norms, biases and CLS too, so that no mistake can hide
            for name, parameter in self.named_parameters():
                if name != "logit_scale":
                    noise = torch.randn(parameter.shape, generator=generator)
                    is_norm = parameter.ndim == 1 and name.endswith("weight")
                    parameter.copy_(1 + 0.3 * noise if is_norm else 0.3 * noise)
        self.eval()

    @torch.no_grad()
    def images(self, pixel_values):
        hidden = self.beit3(visual_tokens=pixel_values)["encoder_out"]
        return hidden, nn.functional.normalize(self.vision_head(hidden[:, 0]), dim=-1)

    @torch.no_grad()
    def texts(self, input_ids, attention_mask):
        padding = attention_mask == 0
        hidden = self.beit3(textual_tokens=input_ids, text_padding_position=padding)["encoder_out"]
        return hidden, nn.functional.normalize(self.language_head(hidden[:, 0]), dim=-1)
