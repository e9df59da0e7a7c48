"""Tests of teachers of open_clip, run by test_open_clip_teacher.py in a process that has open_clip on its path.

Tiny random models of open_clip's real classes, saved as its repositories are, against open_clip called directly.
"""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import timm
import torch
from conftest import make_rows
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from teacher_families import TEXTS, gemma_tokenizer
from test_load_teacher_families import odd_images
from timm.models.eva import Eva
from timm.models.fastvit import FastVit
from tiny_towers import small_run
from transformers import GemmaTokenizer

import train
from datasets_scripts import add_teacher_features
from datasets_scripts.feature_job import teacher_fingerprint
from rows.teacher_columns import TEACHER_COLUMNS
from teachers import load_teacher
from teachers.open_clip_teacher import CONFIG, OpenClipTeacher


ROOT = Path(__file__).parents[2]
WEIGHTS = "open_clip_model.safetensors"
TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}


@timm.models.register_model
def tiny_fastvit(pretrained=False, **settings):
    """The class of MobileCLIP 2's image towers."""
    sizes = {"layers": (1, 1, 1, 1), "embed_dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, 2, 2)}
    settings = {"token_mixers": ("repmixer",) * 4, **sizes, **settings}
    return timm.models.build_model_with_cfg(FastVit, "tiny_fastvit", pretrained, **settings)


@timm.models.register_model
def tiny_eva02(pretrained=False, **settings):
    """The class of EVA-02's image towers, with its rotary positions."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    eva02 = {"mlp_ratio": 2, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True}
    settings = {**sizes, **eva02, "ref_feat_shape": (4, 4), **settings}
    return timm.models.build_model_with_cfg(Eva, "tiny_eva02", pretrained, **settings)


def native(**more):
    """CLIP, DFN and MetaCLIP: open_clip's own towers."""
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    return {"embed_dim": 8, "vision_cfg": vision, "text_cfg": TEXT, **more}


def of_timm(name, text=None, **vision):
    towers = {
        "vision_cfg": {"timm_model_name": name, "image_size": 32, **vision},
        "text_cfg": {**TEXT, **(text or {})},
    }
    return {"embed_dim": 8, "custom_text": True, **towers}


SIGLIP2_TEXT = {
    "vocab_size": 400, "hf_tokenizer_name": "timm/some-siglip2", "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "width": 64,
}  # fmt: skip
# model_cfg and preprocess_cfg, as in the published configs but for the sizes.
MODELS = {
    "dfn": (native(quick_gelu=True), {"resize_mode": "shortest"}),
    "metaclip": (native(), {"mean": [0.48, 0.45, 0.41], "std": [0.27, 0.26, 0.28]}),
    "mobileclip2": (
        of_timm("tiny_fastvit", {"no_causal_mask": True}, timm_pool="avg", timm_proj=None),
        {"mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear", "resize_mode": "shortest"},
    ),
    "eva02": (of_timm("tiny_eva02", timm_pool="token", timm_proj=None), {}),
    "siglip2": (
        {
            **of_timm("test_vit", SIGLIP2_TEXT, timm_pool="map", timm_proj="none", image_size=160),
            "embed_dim": 64, "init_logit_bias": -10,
        },
        {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    ),
}  # fmt: skip


def save_open_clip(name: str, folder: Path) -> Path:
    """A folder as open_clip's `save_for_hf` writes it, every parameter and statistic at random."""
    config, preprocessing = MODELS[name]
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}))
    if "hf_tokenizer_name" in config["text_cfg"]:
        gemma_tokenizer(GemmaTokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in state.items():
        if value.is_floating_point():
            value.add_(torch.randn(value.shape).abs() if "running_var" in key else torch.randn(value.shape), alpha=0.3)
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    return save_open_clip(request.param, tmp_path_factory.mktemp(request.param) / "teacher")


@pytest.fixture
def dfn(tmp_path):
    return save_open_clip("dfn", tmp_path / "dfn")


def close(features, expected):
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def directly(folder, images, texts):
    """Features of RGB arrays and texts by open_clip alone, one at a time."""
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        images = [transform(Image.fromarray(np.ascontiguousarray(image)))[None] for image in images]
        return (
            torch.cat([model.encode_image(image) for image in images]),
            torch.cat([model.encode_text(tokenizer([text])) for text in texts]),
        )


def test_features_are_those_of_a_direct_call(saved):
    teacher = load_teacher(str(saved))
    assert type(teacher) is OpenClipTeacher and teacher.source == {"id": "teacher", "revision": None}
    images, seen = zip(*odd_images())
    for embed, inputs, expected in zip(
        (teacher.embed_images, teacher.embed_texts), (list(images), TEXTS), directly(saved, seen, TEXTS)
    ):
        together = embed(inputs)
        assert together.dtype == torch.float32 and together.shape == (len(inputs), teacher.dim)
        close(together, expected)
        close(torch.cat([embed([one]) for one in inputs]), expected)
        assert (torch.pdist(together) > 1e-3 * together.norm(dim=1).max()).float().mean() > 0.8
        assert (together.norm(dim=1) - 1).abs().max() > 0.05  # raw features, as those of other teachers


def test_what_it_says_of_itself(saved):
    described = load_teacher(str(saved)).describe()
    assert json.loads(json.dumps(described)) == described
    config = json.loads((saved / CONFIG).read_text())
    image, text = described["preprocessing"]["image"], described["preprocessing"]["text"]
    for name, value in config["preprocess_cfg"].items():
        assert image[name] == value, name
    assert image["size"] in (config["model_cfg"]["vision_cfg"]["image_size"], [32, 32], [160, 160])
    assert text == {"max_length": 24, "padding": "max_length", "lower_case": True}
    assert described["dim"] == config["model_cfg"]["embed_dim"] and described["dtype"] == "float32"


def test_half_precision(saved):
    exact, half = load_teacher(str(saved)), load_teacher(str(saved), dtype=torch.bfloat16)
    images = [image for image, _ in odd_images()[:3]]
    for embed, inputs in (("embed_images", images), ("embed_texts", TEXTS[:3])):
        features = getattr(half, embed)(inputs)
        assert features.dtype == torch.float32
        assert (torch.cosine_similarity(features, getattr(exact, embed)(inputs)) > 0.98).all()


def test_a_loaders_worker_prepares_without_the_model(saved):
    teacher = load_teacher(str(saved))
    worker = pickle.loads(pickle.dumps(teacher))
    assert worker.model is None
    images = [image for image, _ in odd_images()[:2]]
    assert torch.equal(teacher.image_features(worker.prepare_images(images)), teacher.embed_images(images))
    assert torch.equal(teacher.text_features(worker.prepare_texts(TEXTS)), teacher.embed_texts(TEXTS))


def test_of_the_hub_by_either_name_and_at_its_commit(dfn, hub):
    api = HfApi()
    api.create_repo("user/dfn")
    (dfn / "open_clip_pytorch_model.bin").write_bytes(b"a pickle of 4 GB")
    first = api.upload_folder(repo_id="user/dfn", folder_path=dfn).oid
    expected = load_teacher(str(dfn)).embed_texts(TEXTS)
    weights = load_file(dfn / WEIGHTS)
    save_file({**weights, "text_projection": weights["text_projection"] + 1}, dfn / WEIGHTS)
    second = api.upload_folder(repo_id="user/dfn", folder_path=dfn).oid
    for name in ("user/dfn", "hf-hub:user/dfn"):
        for revision, commit in ((None, second), (first, first)):
            teacher = load_teacher(name, revision=revision)
            assert teacher.source == {"id": name, "revision": commit}
            assert torch.equal(teacher.embed_texts(TEXTS), expected) == (commit == first)
    assert teacher_fingerprint("hf-hub:user/dfn", first) == teacher_fingerprint("user/dfn", first)
    cache = Path(os.environ["HF_HUB_CACHE"]) if "HF_HUB_CACHE" in os.environ else Path(os.environ["HF_HOME"]) / "hub"
    fetched = {path.name for path in (cache / "models--user--dfn").rglob("snapshots/*/*")}
    assert WEIGHTS in fetched and "open_clip_pytorch_model.bin" not in fetched


def test_a_tokenizer_of_another_repository_is_fetched(tmp_path, hub):
    folder = save_open_clip("siglip2", tmp_path / "teacher")
    expected = load_teacher(str(folder)).embed_texts(TEXTS)
    api = HfApi()
    api.create_repo("timm/some-siglip2")
    (tmp_path / "other").mkdir()
    for path in folder.glob("tokenizer*"):
        path.rename(tmp_path / "other" / path.name)
    api.upload_folder(repo_id="timm/some-siglip2", folder_path=tmp_path / "other")
    assert torch.equal(load_teacher(str(folder)).embed_texts(TEXTS), expected)


def test_a_config_of_transformers_comes_first_unless_open_clip_is_named(dfn, hub):
    (dfn / "config.json").write_text(json.dumps({"architecture": "tiny", "pretrained_cfg": {}}))  # as timm's are
    assert type(load_teacher(str(dfn))) is OpenClipTeacher
    (dfn / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(OSError, match="model.safetensors"):
        load_teacher(str(dfn))
    assert type(load_teacher(f"hf-hub:{dfn}")) is OpenClipTeacher
    (dfn / CONFIG).unlink()
    with pytest.raises(ValueError, match="has no open_clip_config.json, so it is no model of open_clip"):
        load_teacher(f"hf-hub:{dfn}")


def test_pickles_are_not_read_and_the_line_of_the_docs_writes_safetensors(dfn, tmp_path):
    expected = load_teacher(str(dfn)).embed_texts(TEXTS)
    torch.save(load_file(dfn / WEIGHTS), dfn / "open_clip_pytorch_model.bin")
    (dfn / WEIGHTS).unlink()
    with pytest.raises(ValueError, match="has no open_clip_model.safetensors, .* docs/guides/teachers.md has"):
        load_teacher(str(dfn))
    line = re.search(
        r'^python -c "(.*safetensors.*)"$', (ROOT / "docs" / "guides" / "teachers.md").read_text(), re.MULTILINE
    )
    subprocess.run([sys.executable, "-c", line[1]], cwd=dfn, check=True)
    assert torch.equal(load_teacher(str(dfn)).embed_texts(TEXTS), expected)


def test_weights_must_be_exactly_the_models(dfn):
    weights = load_file(dfn / WEIGHTS)

    def load(changed):
        save_file(changed, dfn / WEIGHTS)
        load_teacher(str(dfn))

    with pytest.raises(ValueError, match="cannot be loaded by open_clip .*Missing key.*visual.proj"):
        load({key: value for key, value in weights.items() if key != "visual.proj"})
    with pytest.raises(ValueError, match="cannot be loaded by open_clip .*Unexpected key.*head.weight"):
        load({**weights, "head.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="cannot be loaded by open_clip .*size mismatch for visual.proj"):
        load({**weights, "visual.proj": torch.ones(16, 9)})
    (dfn / WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot be loaded by open_clip"):
        load_teacher(str(dfn))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "open_clip_config.json is no JSON"),
        ("[]", "holds a list: expected a config"),
        ("{}", "has no model_cfg with a text_cfg"),
        ({"model_cfg": [1]}, "has no model_cfg with a text_cfg"),
        ({"model_cfg": {"vision_cfg": [1], "text_cfg": {}, "embed_dim": 8}}, "cannot be loaded by open_clip"),
        ({"model_cfg": {"text_cfg": {}}}, "cannot be loaded by open_clip .*KeyError: 'vision_cfg'"),
        ({"model_cfg": native(text_cfg={**TEXT, "of_a_later_version": 1})}, "unexpected keyword .*of_a_later_version"),
        ({"model_cfg": of_timm("no_such_tower")}, "Unknown model .no_such_tower."),
    ],
)
def test_a_config_that_cannot_be_used_is_named(dfn, config, message):
    (dfn / CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_teacher(str(dfn))


def test_a_student_learns_from_features_made_apart_or_on_the_way(tmp_path, monkeypatch, capsys):
    """The README's commands on small data, with a folder of open_clip as the teacher: both ways give one student."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_open_clip("dfn", Path("teacher"))
    parts = {"train": make_rows(16), "validation": make_rows(8, seed=1), "test": make_rows(8, seed=2)}
    plain = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    datasets.DatasetDict(plain).save_to_disk("data/mine")
    add_teacher_features.main(
        ["--dataset_name", "data/mine", "--output_dir", "data/mine_features", "--num_workers", "0"]
        + ["--teacher_model_name_or_path", "teacher"]
    )
    results, small = {}, small_run("towers")
    for name in ("mine", "mine_features"):
        train.main(
            ["--config", str(ROOT / "recipes" / "own_data.yaml"), "--dataset_name", f"data/{name}"]
            + ["--output_dir", f"runs/{name}", "--teacher_model_name_or_path", "teacher", *small]
        )
        results[name] = json.loads(Path(f"runs/{name}/all_results.json").read_text())
        assert "teacher" in Path(f"runs/{name}/README.md").read_text()
    assert "share kept" in capsys.readouterr().out
    assert results["mine"]["teacher_test_rsum"] == results["mine_features"]["teacher_test_rsum"] > 0
    assert results["mine"]["test_rsum"] == results["mine_features"]["test_rsum"]
    described = json.loads(datasets.load_dataset("data/mine_features", split="test")[0]["teacher"])
    assert described["id"] == "teacher" and described["dim"] == 8


def test_a_config_cannot_ask_for_the_running_of_code(tmp_path, monkeypatch):
    folder = save_open_clip("siglip2", tmp_path / "teacher")
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Remote", "auto_map": {"AutoTokenizer": ["code.Remote", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "code"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_teacher(str(folder))
    assert not (tmp_path / "ran").exists()
