"""The masks of text towers in training: transformers' own attention, without a question to the device."""

import pytest
import torch
from tiny_towers import make, make_inputs, scatter
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING

from modeling_dsmd.text_masks import BIDIRECTIONAL, CAUSAL, WINDOWED, training_mask


SIZES = {"vocab_size": 60, "max_position_embeddings": 32, "pad_token_id": 0, "intermediate_size": 24}
SIZES |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OWN_SIZES = {
    "albert": {"embedding_size": 16},
    "clip_text_model": {"bos_token_id": 1, "eos_token_id": 2},
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0
    },
    "electra": {"embedding_size": 16},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 1},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 4, **dict.fromkeys(
        ("attention_dropout", "embedding_dropout", "mlp_dropout"), 0.0)},
}  # fmt: skip
KNOWN = [*BIDIRECTIONAL, *CAUSAL, *WINDOWED]


def config_of(kind):
    return CONFIG_MAPPING[kind](**SIZES | WITHOUT_DROPOUT | OWN_SIZES.get(kind, {}))


def make_student(kind, attention):
    model = scatter(make(text=lambda: config_of(kind)))
    model.text_model.set_attn_implementation(attention)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class ScalarReads(TorchDispatchMode):
    """Counts how often Python asks for a tensor's value, which on a GPU waits for all that was launched before."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KNOWN)
def test_captions_are_embedded_in_training_as_in_evaluation(kind, attention):
    """In evaluation transformers makes the masks."""
    model, inputs = make_student(kind, attention), make_inputs()
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = {}
    for training in (False, True):
        model.train(training).zero_grad()
        embeds = model(**texts).text_embeds
        (embeds * torch.arange(embeds.numel()).view_as(embeds)).sum().backward()
        grads = {name: value.grad for name, value in model.text_model.named_parameters() if value.grad is not None}
        found[training] = {"": embeds.detach()} | grads
    assert found[True].keys() == found[False].keys()
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KNOWN)
def test_training_reads_no_value_of_a_mask(kind, attention):
    model, inputs = make_student(kind, attention).train(), make_inputs()
    with ScalarReads() as reads:
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert reads.count == 0


def test_the_counter_sees_what_transformers_reads():
    model, inputs = make_student("bert", "sdpa").eval(), make_inputs()
    with ScalarReads() as reads:
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert reads.count > 0


def test_masks_by_hand():
    mask = torch.tensor([[1, 1, 1, 0]])
    config = config_of("modernbert")
    config._attn_implementation = "sdpa"
    made = training_mask(config, mask, torch.float32)
    assert made["full_attention"].tolist() == [[[[True, True, True, False]]]]
    config.local_attention = 2  # one token on each side
    window = training_mask(config, mask, torch.float32)["sliding_attention"][0, 0]
    assert window.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 1, 0]]
    config = config_of("clip_text_model")
    config._attn_implementation = "eager"
    made = training_mask(config, mask, torch.bfloat16)
    assert made.dtype == torch.bfloat16
    assert (made == 0)[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert made.min() == torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize(("kind", "attention"), [("bert", "flash_attention_2"), ("deberta-v2", "eager")])
def test_what_is_not_known_is_left_to_transformers(kind, attention):
    config, mask = config_of(kind), torch.ones(2, 3, dtype=torch.long)
    config._attn_implementation = attention
    assert training_mask(config, mask, torch.float32) is mask
