"""What `load_teacher` takes and refuses. Each family's features: next file."""

import json
import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_student
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher_families import SMALL, VISION
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from teachers import load_teacher
from teachers.load_teacher import _max_length


CAPTIONS = ["a cat", "", "small red dog " * 40]


@pytest.fixture
def processor():
    return make_student()[1]


def make_model(kind, processor):
    torch.manual_seed(0)
    text = {"vocab_size": 400, "max_position_embeddings": 24, **SMALL}
    if kind == "clip":
        config = CLIPConfig(vision_config=VISION, text_config={**text, "eos_token_id": 3}, projection_dim=8)
        model = CLIPModel(config)
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(vision_config=VISION, text_config={**text, "projection_size": 16}))
    elif kind == "bert":
        model = BertModel(BertConfig(**text))
    elif kind == "vit":
        model = ViTModel(ViTConfig(**VISION))
    elif kind == "blip_captioner":
        vision, text = BlipVisionConfig(**VISION), BlipTextConfig(**text, encoder_hidden_size=16)
        model = BlipForConditionalGeneration(BlipConfig(vision_config=vision.to_dict(), text_config=text.to_dict()))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture
def clip(processor, tmp_path):
    folder = tmp_path / "clip"
    make_model("clip", processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


# What is refused


@pytest.mark.parametrize(
    "kind, lacking",
    [
        ("bert", "get_image_features, get_text_features, an image processor"),
        ("vit", "get_image_features, get_text_features, a tokenizer"),
    ],
)
def test_a_single_tower_is_refused(kind, lacking, processor, tmp_path):
    make_model(kind, processor).save_pretrained(tmp_path)
    (processor.tokenizer if kind == "bert" else processor.image_processor).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"no dual encoder that can teach: it lacks {lacking}\\."):
        load_teacher(str(tmp_path))


def test_a_captioner_is_refused(processor, tmp_path):
    make_model("blip_captioner", processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing_keys.*text_projection.weight"):
        load_teacher(str(tmp_path))


def test_a_model_without_its_processor_is_refused(processor, tmp_path):
    make_model("clip", processor).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it lacks an image processor, a tokenizer"):  # not CLIP's empty one
        load_teacher(str(tmp_path))
    processor.image_processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it lacks a tokenizer"):
        load_teacher(str(tmp_path))
    processor.tokenizer.save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).dim == 8  # a repository without a processor's file is fine


def test_weights_must_be_exactly_the_models(clip):
    weights = load_file(clip / "model.safetensors")

    def load(changed):
        save_file(changed, clip / "model.safetensors", {"format": "pt"})
        return load_teacher(str(clip))

    name = "text_projection.weight"
    with pytest.raises(ValueError, match=r"{'missing_keys': \['text_projection.weight'\]}"):
        load({key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=r"no place for, so it is another model: \['head.weight'\]"):
        load({**weights, "head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"{'mismatched_keys': .*text_projection.weight"):
        load({**weights, name: torch.ones(8, 17)})
    # Old checkpoints hold this buffer, which transformers declares harmless.
    assert load({**weights, "text_model.embeddings.position_ids": torch.arange(24)[None]}).dim == 8


def test_the_longest_text(clip):
    def longest():
        teacher = load_teacher(str(clip))
        ids = teacher.prepare_texts(["small red dog " * 40])["input_ids"]
        assert ids.shape == (1, teacher.describe()["preprocessing"]["text"]["max_length"])
        return ids.shape[1]

    assert longest() == 24  # the model's positions; its tokenizer says 512
    settings = json.loads((clip / "tokenizer_config.json").read_text())
    (clip / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 20}))
    assert longest() == 20
    (clip / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": 10**30}))
    assert longest() == 24
    model = torch.nn.Module()
    model.config = SimpleNamespace(get_text_config=SimpleNamespace)  # of relative positions
    with pytest.raises(ValueError, match="set model_max_length in tokenizer_config.json"):
        _max_length(model, SimpleNamespace(model_max_length=10**30), {})


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_old_weights_are_read_but_never_unpickled(clip):
    expected = load_teacher(str(clip)).embed_texts(CAPTIONS)
    weights = load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    torch.save(weights, clip / "pytorch_model.bin")
    assert torch.equal(load_teacher(str(clip)).embed_texts(CAPTIONS), expected)
    torch.save({**weights, "extra": Malicious(str(clip / "ran"))}, clip / "pytorch_model.bin")
    with pytest.raises(pickle.UnpicklingError):
        load_teacher(str(clip))
    assert not (clip / "ran").exists()


# Remote code and return styles

REMOTE = """
import torch
from transformers import CLIPConfig, CLIPModel


class RemoteConfig(CLIPConfig):
    model_type = "remote_clip"


class RemoteModel(CLIPModel):
    config_class = RemoteConfig

    def get_image_features(self, pixel_values):
        return style(super().get_image_features(pixel_values))

    def get_text_features(self, input_ids, attention_mask):
        return style(super().get_text_features(input_ids, attention_mask))


def style(output):
    return {style}
"""


def make_remote(clip, style):
    (clip / "remote.py").write_text(REMOTE.replace("{style}", style))
    config = json.loads((clip / "config.json").read_text())
    config |= {"model_type": "remote_clip", "architectures": ["RemoteModel"]}
    config["auto_map"] = {"AutoConfig": "remote.RemoteConfig", "AutoModel": "remote.RemoteModel"}
    (clip / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((clip / "tokenizer_config.json").read_text())
    tokenizer["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # more than the model takes
    (clip / "tokenizer_config.json").write_text(json.dumps(tokenizer))


@pytest.fixture
def remote_code(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.parametrize("style", ["output.pooler_output", "output.to_tuple()", "output"])
def test_every_return_style_gives_the_same(style, clip, remote_code):
    plain = load_teacher(str(clip))
    make_remote(clip, style)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(str(clip))
    remote = load_teacher(str(clip), trust_remote_code=True)
    assert type(remote.model).__name__ == "RemoteModel"
    assert torch.equal(remote.embed_texts(CAPTIONS), plain.embed_texts(CAPTIONS))
    assert torch.equal(remote.embed_images([picture()]), plain.embed_images([picture()]))


@pytest.mark.parametrize(
    "style, message",
    [
        ("output.last_hidden_state", r"Expected features \[N, D\] from the teacher, got \[1, "),
        ("{'features': output.pooler_output}", "got dict"),
        ("output.pooler_output[:, : 8 - (output.last_hidden_state.shape[1] == 17)]", "images have 7 .*, texts 8"),
    ],
)
def test_other_outputs_are_refused(style, message, clip, remote_code):
    make_remote(clip, style)
    with pytest.raises(ValueError, match=message):
        load_teacher(str(clip), trust_remote_code=True)


# Where it runs and what it says


def test_prepared_inputs_need_no_model(clip):
    teacher = load_teacher(str(clip))
    worker = pickle.loads(pickle.dumps(teacher))
    assert worker.model is None and teacher.model is not None
    images = worker.prepare_images([picture(), picture("L")])
    texts = worker.prepare_texts(CAPTIONS)
    assert all(value.device.type == "cpu" for value in (*images.values(), *texts.values()))
    assert torch.equal(teacher.image_features(images), teacher.embed_images([picture(), picture("L")]))
    assert torch.equal(teacher.text_features(texts), teacher.embed_texts(CAPTIONS))


def test_inference_only(clip):
    teacher = load_teacher(str(clip), dtype=torch.float16)
    assert not teacher.model.training
    for features in (teacher.embed_texts(CAPTIONS), teacher.embed_images([picture()])):
        assert features.dtype == torch.float32 and not features.requires_grad
    assert teacher.describe()["dtype"] == "float16"


def test_revision_is_the_commit(clip, hub):
    api = HfApi()
    api.create_repo("user/clip")
    first = api.upload_folder(repo_id="user/clip", folder_path=clip).oid
    plain = load_teacher(str(clip)).embed_texts(CAPTIONS)
    weights = load_file(clip / "model.safetensors")
    weights["text_projection.weight"] += 1
    save_file(weights, clip / "model.safetensors", {"format": "pt"})
    second = api.upload_folder(repo_id="user/clip", folder_path=clip).oid
    api.create_branch("user/clip", branch="v1", revision=first)
    for revision, commit in ((None, second), ("main", second), ("v1", first), (first, first)):
        teacher = load_teacher("user/clip", revision=revision)
        described = teacher.describe()
        assert (described["id"], described["revision"]) == ("user/clip", commit)
        assert torch.equal(teacher.embed_texts(CAPTIONS), plain) == (commit == first)
    with pytest.raises(OSError, match="user/nothing is not a local folder and is not a valid model identifier"):
        load_teacher("user/nothing")


def test_a_folder_is_named_by_its_last_part(clip, monkeypatch):
    monkeypatch.chdir(clip)
    for name in (".", f"{clip}/", "../clip"):
        assert load_teacher(name).describe()["id"] == "clip"


def test_our_own_folders_need_no_remote_code(clip, tmp_path):
    """In a process that imports nothing else; nor does the interface load what only some teachers need."""
    model, processor = make_student()
    model.save_pretrained(tmp_path / "student")
    processor.save_pretrained(tmp_path / "student")
    script = """
import sys
from teachers import load_teacher
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
assert not {"sentence_transformers", "matplotlib"} & set(sys.modules)
assert "beit3_retrieval" in CONFIG_MAPPING
print(load_teacher(sys.argv[1]).dim)
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "student")], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "16\n", done.stderr


# sentence-transformers


@pytest.fixture
def sentence_transformer(processor, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    def make(kind, **settings):
        make_model(kind, processor).save_pretrained(tmp_path / kind)
        (processor.tokenizer if kind == "bert" else processor).save_pretrained(tmp_path / kind)
        model = SentenceTransformer(modules=[Transformer(str(tmp_path / kind))], device="cpu", **settings)
        model.save_pretrained(str(tmp_path / "st"))
        return tmp_path / "st"

    return make


def test_a_text_model_is_refused(sentence_transformer):
    with pytest.raises(ValueError, match="this sentence-transformers model embeds text, not image"):
        load_teacher(str(sentence_transformer("bert")))


def test_sentence_transformers_missing(sentence_transformer, monkeypatch):
    folder = sentence_transformer("clip")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[sentence-transformers\]'"):
        load_teacher(str(folder))


def test_its_weights_are_checked_too(sentence_transformer):
    folder = sentence_transformer("clip")
    weights = load_file(folder / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"{'missing_keys': \['text_projection.weight'\]}"):
        load_teacher(str(folder))


def test_padding_and_prompt_of_sentence_transformers(sentence_transformer, tmp_path):
    """SigLIP pools the last position: without its padding `encode` gives a text another feature in each batch."""
    folder = sentence_transformer("siglip", prompts={"caption": "a photo of "}, default_prompt_name="caption")
    teacher, plain = load_teacher(str(folder)), load_teacher(str(tmp_path / "siglip"))
    expected = plain.embed_texts(["a photo of " + caption for caption in CAPTIONS])
    torch.testing.assert_close(teacher.embed_texts(CAPTIONS), expected, rtol=1e-6, atol=1e-6)
    alone = torch.cat([teacher.embed_texts([caption]) for caption in CAPTIONS])
    torch.testing.assert_close(alone, expected, rtol=1e-6, atol=1e-6)
    images = [picture(), picture("CMYK")]
    torch.testing.assert_close(teacher.embed_images(images), plain.embed_images(images), rtol=1e-6, atol=1e-6)
    text = teacher.describe()["preprocessing"]["text"]
    assert (text["prompt"], text["padding"], text["max_length"]) == ("a photo of ", "max_length", 24)
