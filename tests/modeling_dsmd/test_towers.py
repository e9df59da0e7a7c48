"""The towers of a student: which fit, what of them is built, and their pre-trained weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_towers import (
    ALL,
    POOLINGS,
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
    minilm,
    mobilevit,
    modernbert,
    roberta,
    run,
    scatter,
    swin,
    vit,
)
from transformers import (
    AutoModel,
    BertForPreTraining,
    BertModel,
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
)

from modeling_dsmd import DSMDModel


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
