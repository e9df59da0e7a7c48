import ast
import inspect
import json
import math
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_towers import (
    CAPTIONS,
    SMALL,
    assert_clean,
    assert_same,
    bert,
    clip,
    convnext,
    deit,
    dinov2,
    distilbert,
    make,
    make_inputs,
    make_processor,
    minilm,
    mobilevit,
    modernbert,
    roberta,
    run,
    scatter,
    swin,
    vit,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoProcessor,
    BertForPreTraining,
    BertModel,
    CLIPModel,
    DeiTForImageClassificationWithTeacher,
    Dinov2ForImageClassification,
    MobileNetV2Config,
    MobileViTForImageClassification,
    ModernBertForMaskedLM,
    ResNetConfig,
    RobertaForMaskedLM,
    SiglipVisionConfig,
    SwinForImageClassification,
    T5Config,
    VisionTextDualEncoderProcessor,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

import modeling_dsmd
from modeling_dsmd import DSMDConfig, DSMDModel, DSMDOutput


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


@pytest.fixture(scope="module")
def inputs():
    return make_inputs()


# --- what a student computes -----------------------------------------------------------------------------------------


def test_forward_normalises_and_scales(inputs):
    model = make()
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
        output = run(model, inputs)
        image = model.get_image_features(inputs["pixel_values"]).pooler_output.numpy().astype(np.float64)
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output.numpy()
    assert abs(np.linalg.norm(image, axis=1) - 1).max() > 0.05  # the features are not normalised
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text = text.astype(np.float64) / np.linalg.norm(text, axis=1, keepdims=True)
    np.testing.assert_allclose(output.image_embeds.numpy(), image, atol=1e-6)
    np.testing.assert_allclose(output.text_embeds.numpy(), text, atol=1e-6)
    np.testing.assert_allclose(output.logits_per_image.numpy(), math.e * image @ text.T, atol=1e-5)
    np.testing.assert_allclose(output.logits_per_text.numpy(), math.e * text @ image.T, atol=1e-5)
    assert output.loss is None


@pytest.mark.parametrize("vision_pooling", ["cls", "mean", "pooler"])
@pytest.mark.parametrize("text_pooling", ["cls", "mean", "pooler"])
def test_poolings_of_transformers(inputs, vision_pooling, text_pooling):
    model = make(vit, bert, vision_pooling, text_pooling)
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        tower_image = model.vision_model(inputs["pixel_values"])
        tower_text = model.text_model(inputs["input_ids"], inputs["attention_mask"])
    hidden = tower_image.last_hidden_state  # [N, 1 + 16, W]
    expected = {"cls": hidden[:, 0], "mean": sum(hidden.unbind(1)) / 17, "pooler": tower_image.pooler_output}
    torch.testing.assert_close(image.pooler_output, expected[vision_pooling] @ model.visual_projection.weight.T)
    torch.testing.assert_close(image.last_hidden_state, hidden)
    hidden = tower_text.last_hidden_state  # [C, L, W]
    mean = torch.stack([hidden[0].mean(0), hidden[1, :4].mean(0), hidden[2, :2].mean(0)])
    expected = {"cls": hidden[:, 0], "mean": mean, "pooler": tower_text.pooler_output}
    torch.testing.assert_close(text.pooler_output, expected[text_pooling] @ model.text_projection.weight.T)
    torch.testing.assert_close(text.last_hidden_state, hidden)


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_poolings_of_feature_maps(inputs, pooling):
    model = make(convnext, bert, pooling)
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"])
        maps = model.vision_model(inputs["pixel_values"]).last_hidden_state  # [N, W, H', W']
        pooled = maps.flatten(2).mean(2)
        if pooling == "pooler":
            pooled = model.vision_model.layernorm(pooled)
    assert maps.shape[:2] == (3, 12) and isinstance(model.vision_model.layernorm, nn.Identity) == (pooling == "mean")
    torch.testing.assert_close(image.pooler_output, pooled @ model.visual_projection.weight.T)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", [bert, distilbert, minilm, roberta, modernbert])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_does_not_change_a_caption(inputs, text, pooling, attention):
    model = make(text=text, text_pooling=pooling)
    model.set_attn_implementation(attention)
    batch = run(model, {name: inputs[name] for name in ("input_ids", "attention_mask")}).text_embeds
    for row, length in enumerate((7, 4, 2)):
        alone = run(model, {"input_ids": inputs["input_ids"][row : row + 1, :length]}).text_embeds[0]
        torch.testing.assert_close(alone, batch[row], rtol=1e-5, atol=1e-6)
    changed = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 3)  # other tokens in the padding
    again = run(model, {"input_ids": changed, "attention_mask": inputs["attention_mask"]}).text_embeds
    torch.testing.assert_close(again, batch, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [bert, distilbert, minilm, roberta, modernbert])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_captions_in_buckets_are_the_same_captions(inputs, text, pooling):
    model = make(text=text, text_pooling=pooling)
    whole = run(model, inputs)
    for buckets in ([(3, 7)], [(1, 7), (2, 4)], [(1, 7), (1, 4), (1, 2)]):
        output = run(model, {**inputs, "text_buckets": buckets})
        torch.testing.assert_close(output.text_embeds, whole.text_embeds, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(output.logits_per_image, whole.logits_per_image, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"text_buckets \[\(2, 7\)\] are not of the 3 captions"):
        run(model, {**inputs, "text_buckets": [(2, 7)]})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("text", [bert, distilbert, minilm, roberta, modernbert])
def test_captions_are_the_same_in_training(inputs, text, attention):
    """Their mask is another: see `MASKED_BY_KEY`."""
    model = make(text=text)
    model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    evaluated = run(model, inputs).text_embeds
    for config in (model.config.text_config, model.text_model.config):
        for name in ("attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(config, name):
                setattr(config, name, 0.0)
    with torch.no_grad():
        trained = model.train()(**inputs).text_embeds
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [bert, distilbert, roberta, modernbert])
def test_a_caption_without_tokens_is_finite(inputs, text):
    model = make(text=text)
    output = run(model, {**inputs, "attention_mask": torch.zeros(3, 7, dtype=torch.long)})
    assert output.logits_per_text.isfinite().all()


def test_the_loss_is_the_symmetric_cross_entropy(inputs):
    model = make()
    output = run(model, inputs, return_loss=True)
    logits = output.logits_per_image.double().numpy()
    rows = np.diag(logits) - np.log(np.exp(logits).sum(1))
    columns = np.diag(logits) - np.log(np.exp(logits).sum(0))
    assert output.loss.item() == pytest.approx(-(rows.mean() + columns.mean()) / 2, abs=1e-5)
    assert run(model, inputs, return_loss=False).loss is None


def test_the_loss_needs_pairs(inputs):
    model = make()
    with pytest.raises(ValueError, match="2 images and 3 captions"):
        run(model, {**inputs, "pixel_values": inputs["pixel_values"][:2]}, return_loss=True)
    with pytest.raises(ValueError, match="3 images and 0 captions"):
        run(model, {"pixel_values": inputs["pixel_values"]}, return_loss=True)
    output = run(model, {**inputs, "pixel_values": inputs["pixel_values"][:1]})  # 1 image and 3 labels: no loss asked
    assert output.logits_per_image.shape == (1, 3) and output.logits_per_text.shape == (3, 1)


def test_the_temperature_is_clamped_at_100(inputs):
    model = make()
    model.logit_scale.data.fill_(50.0)
    output = run(model, inputs)
    cosines = output.image_embeds @ output.text_embeds.T
    torch.testing.assert_close(output.logits_per_image, 100 * cosines, rtol=1e-5, atol=1e-4)


# --- the interface of CLIPModel --------------------------------------------------------------------------------------


def test_either_modality_alone(inputs):
    model = make()
    both = run(model, inputs)
    image = run(model, {"pixel_values": inputs["pixel_values"]})
    text = run(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
    assert list(image) == ["image_embeds", "vision_model_output"]
    assert list(text) == ["text_embeds", "text_model_output"]
    assert torch.equal(image.image_embeds, both.image_embeds) and torch.equal(text.text_embeds, both.text_embeds)
    with pytest.raises(ValueError, match="input_ids, pixel_values or both"):
        model()


def test_return_dict_false_gives_nested_tuples(inputs):
    model = make()
    expected = run(model, inputs, return_loss=True)
    as_tuple = run(model, inputs, return_loss=True, return_dict=False)
    model.config.return_dict = False
    by_config = run(model, inputs, return_loss=True)
    for output in (as_tuple, by_config):
        assert type(output) is tuple and len(output) == len(expected) == 7
        for value, name in zip(output[:5], expected, strict=False):
            assert torch.equal(value, expected[name])
        assert all(type(tower) is tuple for tower in output[5:])
    features = model.get_image_features(inputs["pixel_values"], return_dict=False)
    assert type(features) is tuple and torch.equal(features[1], expected.vision_model_output.pooler_output)


def test_outputs_defaults_and_annotations_are_those_of_clip(inputs):
    # Pipelines and sentence-transformers decide by these.
    for name in ("get_image_features", "get_text_features"):
        annotation = inspect.signature(getattr(DSMDModel, name)).return_annotation
        assert annotation == inspect.signature(getattr(CLIPModel, name)).return_annotation
        assert BaseModelOutputWithPooling in typing.get_args(annotation)
    signature = inspect.signature(DSMDModel.forward)
    assert DSMDOutput in typing.get_args(signature.return_annotation)
    for name in ("input_ids", "pixel_values", "attention_mask", "return_loss"):
        assert signature.parameters[name].default is None
    model = make()
    output = run(model, inputs)
    assert type(output) is DSMDOutput and set(DSMDOutput.__dataclass_fields__) == set(
        inspect.get_annotations(type(run(clip(), {name: inputs[name] for name in ("input_ids", "pixel_values")})))
    )
    assert type(output.vision_model_output) is type(output.text_model_output) is BaseModelOutputWithPooling
    assert next(iter(output)) == "image_embeds"  # what image-feature-extraction returns of an image


@pytest.mark.parametrize("vision, text", TOWERS)
def test_arguments_of_the_towers_reach_them(inputs, vision, text):
    model = make(vision, text)
    model.set_attn_implementation("eager")
    output = run(model, inputs, output_hidden_states=True, output_attentions=True)
    assert len(output.text_model_output.hidden_states) == 3 and len(output.text_model_output.attentions) == 2
    assert output.vision_model_output.hidden_states is not None
    plain = run(model, inputs)
    assert plain.text_model_output.hidden_states is None and plain.text_model_output.attentions is None


def test_token_types_change_the_text(inputs):
    model = make()
    other = run(model, inputs, token_type_ids=torch.ones(3, 7, dtype=torch.long))
    plain = run(model, inputs)
    assert torch.equal(other.image_embeds, plain.image_embeds)
    assert (other.text_embeds - plain.text_embeds).abs().max() > 1e-3


def test_images_of_another_size(inputs):
    large = {"pixel_values": torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(2))}
    model = make()
    with pytest.raises(ValueError, match="doesn't match model"):
        run(model, large)
    output = run(model, large, interpolate_pos_encoding=True)
    assert output.vision_model_output.last_hidden_state.shape == (2, 37, 16)
    assert run(make(convnext), large).image_embeds.shape == (2, 8)


# --- towers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision, text, vision_pooling, text_pooling", ALL)
def test_unused_poolers_are_not_built(inputs, vision, text, vision_pooling, text_pooling):
    model = make(vision, text, vision_pooling, text_pooling)
    model(**inputs, return_loss=True).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize(
    "config",
    [
        SiglipVisionConfig(image_size=32, patch_size=8, **SMALL),
        clip().config.vision_config,
        ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8, 12], depths=[1, 1, 1, 1], layer_type="basic"),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_other_vision_towers_save_load_and_train_every_parameter(inputs, config, pooling, tmp_path):
    model = make(lambda: type(config).from_dict(config.to_dict()), vision_pooling=pooling)
    model.save_pretrained(tmp_path)
    loaded, info = DSMDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    assert_same(run(loaded, inputs), run(model, inputs))
    loaded(**inputs, return_loss=True).loss.backward()
    assert [name for name, p in loaded.named_parameters() if p.requires_grad and p.grad is None] == []


def test_poolings_that_a_tower_has_not(inputs):
    with pytest.raises(ValueError, match="no pooler: use 'cls' or 'mean'"):
        run(make(text=distilbert, text_pooling="pooler"), inputs)
    for tower in (convnext, swin, mobilevit):
        with pytest.raises(ValueError, match="no class token: use 'mean' or 'pooler'"):
            make(tower, vision_pooling="cls")


def test_towers_in_the_wrong_place_and_unknown_fields_are_refused():
    with pytest.raises(ValueError, match="BertModel takes input_ids: the vision tower"):
        DSMDModel.from_vision_text_configs(bert(), bert())
    with pytest.raises(ValueError, match="ViTModel takes pixel_values: the text tower"):
        DSMDModel.from_vision_text_configs(vit(), vit())
    with pytest.raises(TypeError, match="vision_poling: no field of DSMDConfig"):
        DSMDModel.from_vision_text_configs(vit(), bert(), vision_poling="cls")
    with pytest.raises(ValueError, match="MobileNetV2Config has none of"):
        DSMDModel.from_vision_text_configs(MobileNetV2Config(depth_multiplier=0.25), bert())


def test_towers_as_dicts_are_those_of_objects(inputs):
    objects, dicts = make(), make(lambda: vit().to_dict(), lambda: bert().to_dict())
    assert_same(run(dicts, inputs), run(objects, inputs))


@pytest.fixture(scope="module")
def tower_folders(tmp_path_factory):
    """Pre-trained towers: all weights away from their initial values, poolers among them where there are any."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(3)
    for tower in POOLINGS:
        scatter(AutoModel.from_config(tower())).save_pretrained(root / tower.__name__)
    BertModel(bert(), add_pooling_layer=False).save_pretrained(root / "bert_without_pooler")
    return root


@pytest.mark.parametrize("vision, text, vision_pooling, text_pooling", ALL)
def test_pretrained_towers_are_kept_bit_for_bit(tower_folders, vision, text, vision_pooling, text_pooling, inputs):
    torch.manual_seed(4)
    vision_folder, text_folder = tower_folders / vision.__name__, tower_folders / text.__name__
    model = DSMDModel.from_vision_text_pretrained(
        vision_folder, text_folder, projection_dim=6, vision_pooling=vision_pooling, text_pooling=text_pooling
    )
    for tower, folder, pooling in (
        (model.vision_model, vision_folder, vision_pooling),
        (model.text_model, text_folder, text_pooling),
    ):
        expected = AutoModel.from_pretrained(folder).state_dict()
        state = tower.state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())
        left_out = set(expected) - set(state)
        assert all(name.startswith(("pooler.", "layernorm.", "embeddings.mask_token")) for name in left_out)
        assert pooling != "pooler" or left_out <= {"embeddings.mask_token"}
    assert model.visual_projection.weight.shape[0] == model.text_projection.weight.shape[0] == 6
    assert 0.01 < model.visual_projection.weight.std() < 0.04
    assert run(model.eval(), inputs).logits_per_image.shape == (3, 3)


@pytest.mark.parametrize(
    "vision, text",
    [
        (DeiTForImageClassificationWithTeacher(deit()), BertForPreTraining(minilm())),
        (Dinov2ForImageClassification(dinov2()), RobertaForMaskedLM(roberta())),
        (SwinForImageClassification(swin()), ModernBertForMaskedLM(modernbert())),
        (MobileViTForImageClassification(mobilevit()), ModernBertForMaskedLM(modernbert())),
    ],
    ids=lambda model: model.config.model_type,
)
def test_towers_inside_a_model_with_a_head(tmp_path, vision, text):  # as most are on the Hub
    scatter(vision).save_pretrained(tmp_path / "vision")
    scatter(text).save_pretrained(tmp_path / "text")
    student = DSMDModel.from_vision_text_pretrained(tmp_path / "vision", tmp_path / "text")
    for tower, checkpoint in ((student.vision_model, vision), (student.text_model, text)):
        expected = checkpoint.base_model.state_dict()
        state = tower.state_dict()
        assert len(state) > 10 and all(torch.equal(value, expected[name]) for name, value in state.items())


def test_no_local_path_is_published(tower_folders, tmp_path):
    model = DSMDModel.from_vision_text_pretrained(tower_folders / "vit", tower_folders / "bert", projection_dim=8)
    model.save_pretrained(tmp_path / "student")
    AutoModel.from_pretrained(tmp_path / "student").save_pretrained(tmp_path / "again")
    for folder in ("student", "again"):
        text = (tmp_path / folder / "config.json").read_text()
        assert str(tower_folders) not in text and str(tmp_path) not in text and "_name_or_path" not in text


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_towers_of_a_clip_checkpoint(tmp_path, inputs, pooling):
    teacher = clip()
    teacher.save_pretrained(tmp_path / "clip")
    student = DSMDModel.from_vision_text_pretrained(
        tmp_path / "clip", tmp_path / "clip", projection_dim=8, vision_pooling=pooling, text_pooling=pooling
    ).eval()
    for modality in ("vision", "text"):
        tower = getattr(student, f"{modality}_model").state_dict()
        expected = {
            name.removeprefix(f"{modality}_model."): value
            for name, value in teacher.state_dict().items()
            if name.startswith(f"{modality}_model.")
        }
        left_out = set(expected) - set(tower)
        assert left_out == (
            {"post_layernorm.weight", "post_layernorm.bias"} if (modality, pooling) == ("vision", "mean") else set()
        )
        assert len(tower) > 20 and all(torch.equal(value, expected[name]) for name, value in tower.items())
    if pooling == "pooler":  # with CLIP's projections too, the student is CLIP
        student.visual_projection.load_state_dict(teacher.visual_projection.state_dict())
        student.text_projection.load_state_dict(teacher.text_projection.state_dict())
        student.logit_scale.data.copy_(teacher.logit_scale.data)
        ids = inputs["input_ids"].clone()
        ids[:, -1] = 2  # the end of text, where CLIP pools
        pair = {"input_ids": ids, "pixel_values": inputs["pixel_values"]}
        assert_same(run(student, pair, return_loss=True), run(teacher, pair, return_loss=True), rtol=1e-4, atol=1e-5)
    student.save_pretrained(tmp_path / "student")
    loaded, info = DSMDModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert_clean(info)
    assert_same(run(loaded, inputs), run(student, inputs))


def test_a_checkpoint_without_all_weights_is_refused(tower_folders, tmp_path):
    with pytest.raises(ValueError, match=r"2 parameters of its text tower.*pooler.*another text_pooling"):
        DSMDModel.from_vision_text_pretrained(
            tower_folders / "vit", tower_folders / "bert_without_pooler", text_pooling="pooler"
        )
    DSMDModel.from_vision_text_pretrained(tower_folders / "vit", tower_folders / "bert_without_pooler")
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_bytes((tower_folders / "vit" / "config.json").read_bytes())
    weights = load_file(tower_folders / "vit" / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("layernorm_before.weight"))
    del weights[dropped]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 parameters of its vision tower.*layernorm_before.weight"):
        DSMDModel.from_vision_text_pretrained(folder, tower_folders / "bert")


def test_towers_that_do_not_fit_are_refused(tower_folders, tmp_path):
    with pytest.raises(ValueError, match="BertModel takes input_ids: the vision tower"):
        DSMDModel.from_vision_text_pretrained(tower_folders / "bert", tower_folders / "bert")
    with pytest.raises(TypeError, match="projection: no field"):
        DSMDModel.from_vision_text_pretrained(tower_folders / "vit", tower_folders / "bert", projection=8)
    with pytest.raises(ValueError, match="text_pooling='last'"):
        DSMDModel.from_vision_text_pretrained(tower_folders / "vit", tower_folders / "bert", text_pooling="last")
    with pytest.raises(ValueError, match="encoder-decoder"):
        DSMDModel.from_vision_text_configs(vit(), T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def test_a_tower_written_in_a_repository_of_its_own_is_refused(tower_folders, tmp_path):
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import PreTrainedConfig\nclass OwnConfig(PreTrainedConfig):\n    model_type = 'own'\n"
    )
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    with pytest.raises(ValueError, match="no class for the text tower's OwnConfig"):
        DSMDModel.from_vision_text_pretrained(tower_folders / "vit", tmp_path, trust_remote_code=True)


# --- save and load ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vision, text, vision_pooling, text_pooling", ALL)
def test_save_and_load(tmp_path, inputs, vision, text, vision_pooling, text_pooling):
    model = make(vision, text, vision_pooling, text_pooling)
    model.logit_scale.data.fill_(1.25)
    model.save_pretrained(tmp_path)
    for loader in (DSMDModel, AutoModel):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is DSMDModel
        assert_clean(info)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
        assert_same(run(loaded, inputs), run(model, inputs))


@pytest.mark.parametrize("vision, text", TOWERS)
def test_sdpa_and_eager_agree(tmp_path, inputs, vision, text):
    make(vision, text).save_pretrained(tmp_path)
    outputs = {}
    for attention in ("sdpa", "eager"):
        model = DSMDModel.from_pretrained(tmp_path, attn_implementation=attention)
        assert model.text_model.config._attn_implementation == attention
        if vision not in (convnext, mobilevit):  # which have no attention, or one of their own
            assert model.vision_model.config._attn_implementation == attention
        outputs[attention] = run(model, inputs)
    assert_same(outputs["sdpa"], outputs["eager"], rtol=1e-4, atol=1e-5)
    model.set_attn_implementation({"text_config": "sdpa"})
    assert model.text_model.config._attn_implementation == "sdpa" == model.config.text_config._attn_implementation


@pytest.mark.parametrize("vision, text", TOWERS)
def test_bfloat16(tmp_path, inputs, vision, text):
    model = make(vision, text)
    model.save_pretrained(tmp_path / "float32")
    half = DSMDModel.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "bfloat16")
    again, info = AutoModel.from_pretrained(tmp_path / "bfloat16", output_loading_info=True)
    assert_clean(info)
    pixels = {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    for loaded in (half, again):
        # All of it: one float32 parameter would make model.dtype, and the next saved config.dtype, float32.
        assert loaded.dtype == torch.bfloat16 and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        output = run(loaded, pixels, return_loss=True)
        assert output.logits_per_image.dtype == torch.bfloat16
        expected = run(model, inputs)
        assert nn.functional.cosine_similarity(output.image_embeds.float(), expected.image_embeds).min() > 0.999
        assert nn.functional.cosine_similarity(output.text_embeds.float(), expected.text_embeds).min() > 0.999
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"
    assert DSMDModel.from_pretrained(tmp_path / "bfloat16", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("missing", ["logit_scale", "visual_projection.weight", "text_projection.weight"])
def test_a_parameter_missing_from_the_file_is_initialised(tmp_path, missing):
    make().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[missing]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = DSMDModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {missing}
    value = loaded.get_parameter(missing)
    if missing == "logit_scale":
        assert value.item() == pytest.approx(math.log(1 / 0.07), abs=1e-4)
    else:
        assert 0.01 < value.std() < 0.04 and value.abs().max() < 0.2


def test_the_temperature_starts_where_the_config_says():
    model = DSMDModel.from_vision_text_configs(vit(), bert(), logit_scale_init_value=0.5)
    assert model.logit_scale.item() == 0.5
    assert make().config.logit_scale_init_value == pytest.approx(math.log(1 / 0.07), abs=1e-4)


@pytest.mark.parametrize("vision, text", TOWERS)
def test_gradient_checkpointing_gives_the_same_gradients(inputs, vision, text):
    gradients = []
    for checkpointing in (False, True):
        model = make(vision, text).train()
        if checkpointing:
            model.activation_checkpointing_enable()
            for tower in [model.text_model] + [model.vision_model] * (vision is not convnext):  # it cannot
                assert any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
        model(**inputs, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients[0].values()) > 1e-3


# --- from the saved folder alone -------------------------------------------------------------------------------------


ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "modeling_dsmd":
            raise ModuleNotFoundError("No module named 'modeling_dsmd'", name=name)

sys.meta_path.insert(0, Absent())
from PIL import Image
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

for student in sys.argv[1:]:
    try:
        AutoModel.from_pretrained(student, trust_remote_code=False)
    except ValueError as error:
        assert "custom code" in str(error) or "trust_remote_code" in str(error), error
    else:
        raise AssertionError("loaded without the code")
    processor = AutoProcessor.from_pretrained(student)  # no remote code
    inputs = processor(text=%r, images=[Image.open("image.png")], return_tensors="pt", padding=True)
    model, info = AutoModel.from_pretrained(student, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        output = model(**inputs)
    tensors = {"logits": output.logits_per_image, "images": output.image_embeds, "texts": output.text_embeds}
    save_file(tensors, student + "/out.safetensors")
    model.save_pretrained(student + "/again")
"""


def test_model_and_processor_load_where_the_package_is_not(tmp_path, monkeypatch):
    students = {f"student_{i}": make(vision, text) for i, (vision, text) in enumerate(TOWERS)}
    processor = make_processor()
    for name, model in students.items():
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # also where the remote code is kept
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    command = [sys.executable, "-c", ELSEWHERE % CAPTIONS, *students]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]
    inputs = processor(text=CAPTIONS, images=[Image.fromarray(pixels)], return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 10] and inputs["pixel_values"].shape == (1, 3, 32, 32)
    for name, model in students.items():
        elsewhere = load_file(tmp_path / name / "out.safetensors")
        output = run(model, inputs)
        assert output.logits_per_image.shape == (1, 2)
        torch.testing.assert_close(elsewhere["logits"], output.logits_per_image, rtol=0, atol=1e-5)
        torch.testing.assert_close(elsewhere["images"], output.image_embeds, rtol=0, atol=1e-6)
        torch.testing.assert_close(elsewhere["texts"], output.text_embeds, rtol=0, atol=1e-6)
        again, info = DSMDModel.from_pretrained(tmp_path / name / "again", output_loading_info=True)
        assert_clean(info)
        assert_same(run(again, inputs), output, rtol=0, atol=1e-5)
    for folder in (tmp_path / "student_0", tmp_path / "student_0" / "again"):
        for name in ("configuration_dsmd.py", "modeling_dsmd.py"):  # what was loaded from code carries it on
            assert (folder / name).read_bytes() == Path(modeling_dsmd.__file__).with_name(name).read_bytes()
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == {
            "AutoConfig": "configuration_dsmd.DSMDConfig",
            "AutoModel": "modeling_dsmd.DSMDModel",
            "AutoModelForZeroShotImageClassification": "modeling_dsmd.DSMDModel",
        }
    assert type(AutoProcessor.from_pretrained(tmp_path / "student_0")) is VisionTextDualEncoderProcessor


def test_the_files_of_the_package_are_flat_and_self_contained():
    folder = Path(modeling_dsmd.__file__).parent
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {
        "__init__.py", "configuration_dsmd.py", "modeling_dsmd.py", "py.typed"
    }  # fmt: skip
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] in allowed for alias in node.names), (path.name, ast.unparse(node))
            if isinstance(node, ast.ImportFrom):
                if node.level == 0:
                    assert node.module.split(".")[0] in allowed, (path.name, ast.unparse(node))
                else:  # transformers copies what `from .name import` names, and nothing else
                    assert node.level == 1 and node.module and "." not in node.module, (path.name, ast.unparse(node))
                    assert (folder / f"{node.module}.py").exists()


def test_the_default_config_is_a_student():
    config = DSMDConfig()
    assert (config.vision_config.model_type, config.text_config.model_type) == ("vit", "bert")
