"""BEiT-3 against the published implementation (torchscale 0.3.0) on random weights."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchscale_beit3 import HEADS, LAYERS, VOCAB, WIDTH, Reference, load_torchscale
from transformers import AutoModel

from teachers.beit3 import Beit3Config, Beit3RetrievalModel, convert


@pytest.fixture(scope="module")
def torchscale():
    return load_torchscale()


def port(reference: Reference, **settings) -> Beit3RetrievalModel:
    config, weights = convert.convert_state_dict(reference.state_dict(), num_attention_heads=HEADS)
    model = Beit3RetrievalModel._from_config(config, **settings)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def batch(image_size=224):
    """Three images [3, 3, S, S] and four texts of different lengths, padded to the longest [4, 19]."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([19, 3, 11, 7])
    input_ids = torch.randint(4, VOCAB, (4, 19), generator=generator)
    input_ids[:, 0] = 0
    input_ids[torch.arange(4), lengths - 1] = 2
    attention_mask = (torch.arange(19) < lengths[:, None]).long()
    return {
        "pixel_values": torch.rand(3, 3, image_size, image_size, generator=generator) * 2 - 1,
        "input_ids": input_ids.masked_fill(attention_mask == 0, 1),
        "attention_mask": attention_mask,
    }


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def assert_features_match(reference, model, inputs, expected_inputs):
    """Image and text features and every hidden state, padded positions too."""
    with torch.no_grad():
        outputs = model(**inputs)
    hidden, features = reference.images(expected_inputs["pixel_values"])
    assert_same(outputs.vision_model_output.last_hidden_state, hidden)
    assert_same(outputs.image_embeds, features)
    hidden, features = reference.texts(expected_inputs["input_ids"], expected_inputs["attention_mask"])
    assert_same(outputs.text_model_output.last_hidden_state, hidden)
    assert_same(outputs.text_embeds, features)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("image_size", [224, 384])
def test_parity_with_torchscale(torchscale, image_size, attention):
    reference = Reference(torchscale, image_size)
    model = port(reference, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert model.config.image_size == image_size
    inputs = batch(image_size)
    assert_features_match(reference, model, inputs, inputs)
    similarity = (
        reference.texts(inputs["input_ids"], inputs["attention_mask"])[1]
        @ reference.images(inputs["pixel_values"])[1].T
    )
    outputs = model(**inputs)
    torch.testing.assert_close(outputs.logits_per_text, similarity * math.exp(4.0), atol=1e-3, rtol=0)
    assert torch.equal(outputs.logits_per_image, outputs.logits_per_text.T)


def inverted_padding_mask(model, inputs, released):
    inputs["attention_mask"] = 1 - inputs["attention_mask"]


def no_padding_mask(model, inputs, released):
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])


def wrong_expert(model, inputs, released):
    towers = model.vision_model, model.text_model
    towers[0].encoder, towers[1].encoder = towers[1].encoder, towers[0].encoder


def no_ffn_sub_layer_norm(model, inputs, released):
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            layer.mlp.inner_layer_norm = nn.Identity()


def no_attention_sub_layer_norm(model, inputs, released):
    for tower in (model.vision_model, model.text_model):
        for layer in tower.encoder.layers:
            layer.attention.inner_layer_norm = nn.Identity()


def text_positions_from_row_0(model, inputs, released):
    model.text_model.position_embedding.weight.data = released["beit3.encoder.embed_positions.B.weight"][:-2]


def vision_positions_from_row_0(model, inputs, released):
    model.vision_model.position_embedding.weight.data = released["beit3.encoder.embed_positions.A.weight"][:-2]


def imagenet_mean_and_std(model, inputs, released):
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    inputs["pixel_values"] = (inputs["pixel_values"] / 2 + 0.5 - mean) / std


def no_final_layer_norm(model, inputs, released):
    for tower in (model.vision_model, model.text_model):
        tower.encoder.layer_norm = nn.Identity()


BOTH = ("image_embeds", "text_embeds")


@pytest.mark.parametrize(
    "mistake, affected",
    [
        (inverted_padding_mask, ("text_embeds",)),
        (no_padding_mask, ("text_embeds",)),
        (wrong_expert, BOTH),
        (no_ffn_sub_layer_norm, BOTH),
        (no_attention_sub_layer_norm, BOTH),
        (text_positions_from_row_0, ("text_embeds",)),
        (vision_positions_from_row_0, ("image_embeds",)),
        (imagenet_mean_and_std, ("image_embeds",)),
        (no_final_layer_norm, BOTH),
    ],
)
def test_parity_catches_each_known_mistake(torchscale, mistake, affected):
    """Each mistake a port has made breaks parity in the modalities it concerns, and only there."""
    reference, inputs = Reference(torchscale), batch()
    expected = {
        "image_embeds": reference.images(inputs["pixel_values"])[1],
        "text_embeds": reference.texts(inputs["input_ids"], inputs["attention_mask"])[1],
    }
    model = port(reference)
    mistake(model, inputs, reference.state_dict())
    with torch.no_grad():
        outputs = model(**inputs)
    for name in BOTH:
        if name in affected:
            with pytest.raises(AssertionError, match="not close"):
                # A hundred times the tolerance: caught by a wide margin.
                torch.testing.assert_close(outputs[name], expected[name], atol=1e-3, rtol=0)
        else:
            assert_same(outputs[name], expected[name])


@pytest.mark.parametrize("layers, tensors", [(12, 494), (24, 974)])
def test_released_layout_has_the_published_number_of_tensors(torchscale, layers, tensors):
    released = Reference(torchscale, width=8, heads=2, ffn=8, layers=layers).state_dict()
    assert len(released) == tensors
    assert {*convert.released_names(layers).values(), convert.MASK_TOKEN} == set(released)


@pytest.mark.parametrize(
    "sizes, published",
    [
        ({}, 222_458_881),
        (
            {
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "projection_dim": 1024,
            },
            675_188_737,
        ),
    ],
)
def test_base_and_large_have_the_published_number_of_parameters(sizes, published):
    config = Beit3Config(**sizes)
    with torch.device("meta"):
        model = Beit3RetrievalModel(config)
    dropped = 5 * config.hidden_size  # the mask token and two rows in each position table
    assert sum(parameter.numel() for parameter in model.parameters()) + dropped == published


def test_features_do_not_depend_on_the_amount_of_padding(torchscale):
    reference, inputs = Reference(torchscale), batch()
    model = port(reference)
    ids = nn.functional.pad(inputs["input_ids"], (0, 45), value=1)
    mask = nn.functional.pad(inputs["attention_mask"], (0, 45))
    expected = reference.texts(ids, mask)[1]
    with torch.no_grad():
        assert_same(
            model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds, expected
        )
        assert_same(model(input_ids=ids, attention_mask=mask).text_embeds, expected)
        # Without a mask the padding is recognised by its id.
        assert_same(model(input_ids=ids).text_embeds, expected)
        one = model(input_ids=inputs["input_ids"][1:2, :3]).text_embeds
    assert_same(one, expected[1:2])


def cubic_resize(grid: np.ndarray, size: int) -> np.ndarray:
    """[h, w, D] -> [size, size, D]: Keys' cubic convolution (a = -0.75), centres at half integers, edges held."""

    def matrix(n):
        weights = np.zeros((size, n))
        for i in range(size):
            x = (i + 0.5) * n / size - 0.5
            for j in range(math.floor(x) - 1, math.floor(x) + 3):
                d, a = abs(x - j), -0.75
                w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
                weights[i, min(max(j, 0), n - 1)] += w
        return weights

    return np.einsum("ih,jw,hwd->ijd", matrix(grid.shape[0]), matrix(grid.shape[1]), grid)


def test_interpolated_positions(torchscale):
    """A 224-pixel model on 384 pixels equals torchscale's 384-pixel model with resized positions."""
    small, large = Reference(torchscale, 224), Reference(torchscale, 384)
    state = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    table = state["beit3.encoder.embed_positions.A.weight"]
    grid = cubic_resize(table[3:].double().numpy().reshape(14, 14, WIDTH), 24)
    state["beit3.encoder.embed_positions.A.weight"] = torch.cat(
        [table[:3], torch.from_numpy(grid).float().reshape(576, WIDTH)]
    )
    large.load_state_dict(state, strict=True)
    inputs = batch(384)
    model = port(small)
    assert_features_match(large, model, {**inputs, "interpolate_pos_encoding": True}, inputs)
    with pytest.raises(ValueError, match="384x384 pixels: the model takes 224x224"):
        model.get_image_features(inputs["pixel_values"])
    with pytest.raises(ValueError, match="multiples of 16"):
        model.get_image_features(inputs["pixel_values"][..., :100], interpolate_pos_encoding=True)
    # At the model's own size, and on a grid that is not square.
    inputs = batch(224)
    assert_features_match(small, model, {**inputs, "interpolate_pos_encoding": True}, inputs)
    wide = model.get_image_features(inputs["pixel_values"][:, :, :64], interpolate_pos_encoding=True)
    assert wide.last_hidden_state.shape == (3, 1 + 4 * 14, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(torchscale, tmp_path, dtype):
    model, inputs = port(Reference(torchscale)), batch(384)
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype and {parameter.dtype for parameter in half.parameters()} == {dtype}
    with torch.no_grad():
        expected = model(**inputs, interpolate_pos_encoding=True)
        actual = half(**inputs, interpolate_pos_encoding=True)
    for name in BOTH:
        assert actual[name].dtype == dtype
        cosine = nn.functional.cosine_similarity(actual[name].float(), expected[name])
        assert cosine.min() > 0.999, cosine


def test_gradient_checkpointing_changes_no_gradient(torchscale):
    plain, inputs = port(Reference(torchscale)).train(), batch()
    checkpointed = copy.deepcopy(plain)
    checkpointed.activation_checkpointing_enable()
    pairs = {**inputs, "input_ids": inputs["input_ids"][:3], "attention_mask": inputs["attention_mask"][:3]}
    calls = []
    for i, model in enumerate((plain, checkpointed)):
        for layer in model.vision_model.encoder.layers:
            layer.mlp.fc1.register_forward_hook(lambda *_, i=i: calls.append(i))
        model(**pairs, return_loss=True).loss.backward()
    assert calls == [0] * LAYERS + [1] * 2 * LAYERS  # with checkpointing, computed again on the way back
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, atol=1e-6, rtol=1e-5, msg=name)
        assert a.grad.abs().sum() > 0, name


def test_a_checkpoint_that_does_not_fit_is_refused(torchscale, tmp_path):
    model = port(Reference(torchscale))
    model.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    weights = load_file(tmp_path / "model.safetensors")
    name = "text_model.encoder.layers.1.mlp.inner_layer_norm.bias"
    save_file({k: v for k, v in weights.items() if k != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match=name):
        AutoModel.from_pretrained(tmp_path)
    save_file({**weights, "text_model.extra": torch.ones(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="text_model.extra"):
        AutoModel.from_pretrained(tmp_path)


def test_features_and_forward_follow_clip(torchscale):
    reference, inputs = Reference(torchscale), batch()
    model = port(reference)
    with torch.no_grad():
        image = model.get_image_features(inputs["pixel_values"])
        text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
        hidden, features = reference.images(inputs["pixel_values"])
        assert_same(image.pooler_output, reference.vision_head(hidden[:, 0]))  # projected, not normalised
        assert_same(nn.functional.normalize(text.pooler_output, dim=-1), model(inputs["input_ids"]).text_embeds)
        as_tuple = model.get_image_features(inputs["pixel_values"], return_dict=False)
        assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], image.pooler_output)
        only_image = model(pixel_values=inputs["pixel_values"])
        assert_same(only_image.image_embeds, features)
        assert only_image.text_embeds is None and only_image.logits_per_image is None
        same = {**inputs, "input_ids": inputs["input_ids"][:3], "attention_mask": inputs["attention_mask"][:3]}
        outputs = model(**same, return_loss=True)
        logits = [outputs[f"logits_per_{x}"].double().numpy() for x in ("image", "text")]
        cross_entropy = [np.log(np.exp(rows).sum(1)) - np.diag(rows) for rows in logits]
        assert outputs.loss.item() == pytest.approx(np.mean(cross_entropy), rel=1e-5)
    with pytest.raises(ValueError, match="Neither"):
        model()
    with pytest.raises(ValueError, match="as many texts as images"):
        model(**inputs, return_loss=True)
    with pytest.raises(ValueError, match="1023 tokens: the model takes at most 1022"):
        model.get_text_features(torch.full((1, 1023), 5))


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="hidden_size=30 is not a multiple of num_attention_heads=4"):
        Beit3Config(hidden_size=30, num_attention_heads=4)
    with pytest.raises(ValueError, match="image_size=100 is not a multiple of patch_size=16"):
        Beit3Config(image_size=100)
