"""Cut towers compute what the whole ones do with their other layers left out, and load from what is saved of them."""

import pytest
import tiny_towers
import torch
from tiny_towers import assert_clean, assert_same, make, make_inputs, run, scatter
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    MPNetConfig,
    RegNetConfig,
    ResNetConfig,
    SiglipVisionConfig,
)

from modeling_dsmd import DSMDConfig, DSMDModel
from trainers.tower_layers import OF_THE_DEPTH, cut_student, depth_of, evenly_spaced, kept_layers


DEEP = {**tiny_towers.SMALL, "num_hidden_layers": 5}
PICTURE = {"image_size": 32, "patch_size": 8}
WORDS = {"vocab_size": 60, "max_position_embeddings": 34}


def deep(config):
    """A configuration of tiny_towers, its tower five layers deep."""
    fields = {name: value for name, value in config().to_dict().items() if name not in (*OF_THE_DEPTH, "layer_types")}
    count = config().attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return type(config()).from_dict({**fields, count: 5})


VISION = {
    "vit": lambda: deep(tiny_towers.vit),
    "deit": lambda: deep(tiny_towers.deit),
    "dinov2": lambda: deep(tiny_towers.dinov2),
    "clip": lambda: CLIPVisionConfig(**PICTURE, **DEEP),
    "siglip": lambda: SiglipVisionConfig(**PICTURE, **DEEP),
}
TEXT = {
    "bert": lambda: deep(tiny_towers.bert),
    "distilbert": lambda: deep(tiny_towers.distilbert),
    "roberta": lambda: deep(tiny_towers.roberta),
    "modernbert": lambda: deep(tiny_towers.modernbert),
    "mpnet": lambda: MPNetConfig(**WORDS, **DEEP, **tiny_towers.NO_DROPOUT),
    "clip": lambda: CLIPTextConfig(**WORDS, **DEEP, eos_token_id=2, bos_token_id=1),
}
PAIRS = [*((vision, "bert") for vision in VISION), *(("vit", text) for text in TEXT if text != "bert")]


def without_layers(tower, kept):
    """The tower itself, with the list of its layers shortened: what is expected of one that is cut."""
    [path] = [name for name, of in tower.named_modules() if isinstance(of, nn.ModuleList) and len(of) == 5]
    parent, _, name = path.rpartition(".")
    layers = tower.get_submodule(path)
    setattr(tower.get_submodule(parent), name, nn.ModuleList([layers[i] for i in kept]))
    for place in ("num_hidden_layers", "layer_types"):  # some read these as they run
        if place == "layer_types" and getattr(tower.config, place, None):
            tower.config.layer_types = [tower.config.layer_types[i] for i in kept]
        elif place == "num_hidden_layers":
            tower.config.num_hidden_layers = len(kept)


@pytest.mark.parametrize("vision, text", PAIRS)
def test_a_cut_student_is_the_whole_one_with_layers_left_out(tmp_path, vision, text):
    kept = {"vision": [0, 2, 4], "text": [0, 3]}
    whole, inputs = make(VISION[vision], TEXT[text]), make_inputs()
    small = cut_student(whole, kept)
    assert not any(parameter.is_meta for parameter in small.parameters())
    small.save_pretrained(tmp_path)
    without_layers(whole.vision_model, kept["vision"])
    without_layers(whole.text_model, kept["text"])
    expected = run(whole, inputs)
    assert_same(run(small, inputs), expected)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert depth_of(loaded.config.vision_config) == 3 and depth_of(loaded.config.text_config) == 2
    assert_same(run(loaded.eval(), inputs), expected)


@pytest.mark.parametrize("text", [text for text in TEXT if text != "modernbert"])
def test_of_no_layers_the_embeddings_are_left(tmp_path, text):
    small, inputs = cut_student(make(text=TEXT[text]), {"text": []}), make_inputs()
    assert depth_of(small.text_model.config) == 0 and not any(
        "query" in name or "q_lin" in name or "q_proj" in name for name, _ in small.text_model.named_parameters()
    )
    small.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    output = run(loaded.eval(), inputs)
    assert_same(output, run(small, inputs))
    changed = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    assert not torch.allclose(run(loaded, changed).text_embeds, output.text_embeds, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        lambda: ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 2, 1], layer_type="basic"),
        lambda: RegNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 2, 1], groups_width=2),
        tiny_towers.convnext,
    ],
    ids=["resnet", "regnet", "convnext"],
)
def test_of_a_convolutional_tower_the_first_stages_are_kept(tmp_path, config):
    whole, inputs = make(config), make_inputs()
    with torch.no_grad():
        hidden = whole.vision_model(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states
    small = cut_student(whole, {"vision": [0, 1]})
    small.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    with torch.no_grad():
        found = loaded.eval().vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    torch.testing.assert_close(found, hidden[2], rtol=0, atol=1e-6)
    assert loaded.visual_projection.weight.shape == (8, hidden[2].shape[1])
    assert torch.equal(loaded.text_projection.weight, whole.text_projection.weight)


def test_the_projection_of_a_tower_that_keeps_its_width_stays():
    whole = make(VISION["vit"])
    small = cut_student(whole, {"vision": [1, 4]})
    assert torch.equal(small.visual_projection.weight, whole.visual_projection.weight)
    assert torch.equal(small.logit_scale, whole.logit_scale)


def test_layers_are_evenly_spaced():
    assert evenly_spaced(6, 12) == [0, 2, 4, 7, 9, 11]  # DistilBERT's
    assert evenly_spaced(1, 6) == [0] and evenly_spaced(0, 6) == [] and evenly_spaced(2, 6) == [0, 5]
    for count in range(1, 40):
        for kept in range(count + 1):
            layers = evenly_spaced(kept, count)
            assert len(set(layers)) == kept and layers == sorted(layers) and set(layers) <= set(range(count))
        assert evenly_spaced(count, count) == list(range(count))


def on_meta(vision, text):
    with torch.device("meta"):
        return DSMDModel(DSMDConfig(vision_config=vision, text_config=text))


def test_a_student_on_another_device_is_cut_there():
    whole = on_meta(VISION["dinov2"](), TEXT["modernbert"]())
    small = cut_student(whole, {"vision": [0], "text": [0, 4]})
    assert all(parameter.is_meta for parameter in small.parameters())
    with pytest.raises(ValueError, match="ModernBertModel cannot be cut so: .*attn_norm.*Keep layer 0"):
        cut_student(whole, {"text": [1, 2]})  # layer 0 alone has no norm before its attention
    with pytest.raises(ValueError, match="ModernBertModel cannot have 0 of its layers alone"):
        cut_student(whole, {"text": []})  # its rotations are those of its layers' kinds


@pytest.mark.parametrize(
    "vision, text, layers, message",
    [
        (tiny_towers.vit, lambda: AlbertConfig(**WORDS, **DEEP), {"text": [0]}, "AlbertModel cannot be found"),
        (tiny_towers.swin, tiny_towers.bert, {"vision": [0]}, "SwinModel cannot (be cut|have 1)"),
        (tiny_towers.mobilevit, tiny_towers.bert, {"vision": [0]}, "MobileViTConfig does not say how many layers"),
    ],
)
def test_a_tower_that_cannot_be_cut_is_refused(vision, text, layers, message):
    with pytest.raises(ValueError, match=message):
        cut_student(on_meta(vision(), text()), layers)


def test_layers_that_a_tower_has_not_are_refused():
    bert, convnext = TEXT["bert"](), tiny_towers.convnext()
    assert kept_layers(bert, "text", 2, None) == [0, 4] and kept_layers(bert, "text", None, [1, 3]) == [1, 3]
    assert kept_layers(convnext, "vision", 2, None) == [0, 1]
    for config, number, indices, message in (
        (bert, 6, None, "text_layers=6: BertConfig has 5 layers"),
        (bert, None, [0, 5], r"text_layer_indices=\[0, 5\]: the layers of BertConfig are 0 to 4, without 5"),
        (convnext, 5, None, "ConvNextConfig has 4 stages"),
        (convnext, None, [0, 2], "only its first stages"),
    ):
        with pytest.raises(ValueError, match=message):
            kept_layers(config, "text" if config is bert else "vision", number, indices)


def test_the_whole_student_is_left_as_it_was():
    whole, inputs = make(VISION["vit"], TEXT["bert"]), make_inputs()
    before = run(whole, inputs)
    scatter(cut_student(whole, {"vision": [0], "text": [0]}))
    assert_same(run(whole, inputs), before)
    assert depth_of(whole.config.text_config) == 5
