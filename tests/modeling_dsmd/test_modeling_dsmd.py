"""What a student computes, and the interface of CLIPModel."""

import inspect
import math
import typing

import numpy as np
import pytest
import torch
from tiny_towers import (
    TOWERS,
    bert,
    clip,
    convnext,
    distilbert,
    make,
    minilm,
    modernbert,
    roberta,
    run,
    vit,
)
from torch import nn
from transformers import (
    CLIPModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_dsmd import DSMDModel, DSMDOutput


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
