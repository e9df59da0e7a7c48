"""Students whose towers are cut from others, the teacher's among them, from folders as the Hub has them."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make_student
from huggingface_hub import HfApi
from tiny_tokenizers import LEARNED, TRAINING, full
from tiny_towers import NO_DROPOUT, SMALL, assert_clean, assert_same, clip, make_processor, run, scatter
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer, BertConfig, ViTConfig

import teachers.beit3  # noqa: F401  (registers the class)
from teachers.beit3.configuration_beit3 import Beit3Config
from trainers import inherited
from trainers.inherited import describe_origin, model_license, take_projections, teacher_source
from trainers.student import build_student
from trainers.student_arguments import StudentArguments


DEEP = {**SMALL, "num_hidden_layers": 6}
TEXTS = {"vision_model_name_or_path": "{0}/vision", "text_model_name_or_path": "{0}/text"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six layers each, the text tower with a WordPiece tokenizer; and two dual encoders that could be teachers."""
    folder = tmp_path_factory.mktemp("towers")
    torch.manual_seed(0)
    tokenizer = full("wordpiece")
    bert = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **DEEP, **NO_DROPOUT)
    scatter(AutoModel.from_config(ViTConfig(image_size=32, patch_size=8, **DEEP))).save_pretrained(folder / "vision")
    scatter(AutoModel.from_config(bert)).save_pretrained(folder / "text")
    make_processor().image_processor.save_pretrained(folder / "vision")
    tokenizer.save_pretrained(folder / "text")
    clip().save_pretrained(folder / "clip")
    make_processor().save_pretrained(folder / "clip")
    (folder / "clip/README.md").write_text("---\nlicense: other\nlicense_name: apple-amlr\n---\n# A teacher\n")
    model, processor = make_student()
    scatter(model).save_pretrained(folder / "dsmd")
    processor.save_pretrained(folder / "dsmd")
    (folder / "dsmd/README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def arguments(folder, **settings):
    names = {name: value.format(folder) for name, value in TEXTS.items()}
    return StudentArguments(**{**names, **settings})


def test_a_student_cut_to_size_loads_as_any(tmp_path, folder):
    args = arguments(folder, vision_layers=3, text_layer_indices=[0, 2], trim_vocabulary=250)
    whole, wide = build_student(arguments(folder), [], 8)
    torch.manual_seed(1)
    model, processor = build_student(args, iter(TRAINING), 8)
    assert model.config.vision_config.num_hidden_layers == 3 and model.config.text_config.num_hidden_layers == 2
    for new, old in ((0, 0), (1, 2), (2, 5)):
        for one, other in zip(
            model.vision_model.layers[new].parameters(), whole.vision_model.layers[old].parameters(), strict=True
        ):
            assert torch.equal(one, other)
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.text_config.vocab_size == 250 < len(wide.tokenizer)
    assert tokenizer.model_max_length == 32 and model.config.text_config.pad_token_id == tokenizer.pad_token_id
    words = model.text_model.get_input_embeddings().weight
    for piece in ("<sep>", "a", "##s"):
        row = whole.text_model.get_input_embeddings().weight[wide.tokenizer.convert_tokens_to_ids(piece)]
        assert torch.equal(words[tokenizer.convert_tokens_to_ids(piece)], row)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert_clean(info)
    again = AutoProcessor.from_pretrained(tmp_path).tokenizer
    inputs = {"pixel_values": torch.rand(5, 3, 32, 32), **again(LEARNED[:5], padding=True, return_tensors="pt")}
    assert inputs["input_ids"].tolist() == tokenizer(LEARNED[:5], padding=True)["input_ids"]
    assert_same(run(loaded.eval(), inputs), run(model.eval(), inputs))


def test_a_student_that_is_not_cut_is_as_before(folder):
    torch.manual_seed(1)
    plain = build_student(arguments(folder), [], 8)[0].state_dict()
    torch.manual_seed(1)
    all_kept = arguments(folder, vision_layers=6, text_layer_indices=[0, 1, 2, 3, 4, 5])
    state = build_student(all_kept, [], 8)[0].state_dict()
    assert plain.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in plain.items())


@pytest.mark.parametrize("name", ["clip", "dsmd"])
def test_the_teachers_own_towers(tmp_path, folder, name):
    of_teacher = dict.fromkeys(TEXTS, "teacher")
    args = arguments(folder, **of_teacher, vision_layers=1, text_layers=1)
    teacher = (str(folder / name), None)
    model, processor = build_student(args, [], 8, teacher)
    whole = AutoModel.from_pretrained(folder / name)
    for modality in ("vision", "text"):
        own = getattr(model, f"{modality}_model").state_dict()
        its = getattr(whole, f"{modality}_model").state_dict()
        assert 5 < len(own) < len(its) and all(torch.equal(value, its[key]) for key, value in own.items())
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    assert processor.tokenizer("a star")["input_ids"] == tokenizer("a star")["input_ids"]
    sentences, licence = describe_origin(args, teacher, model)
    assert str(folder) not in " ".join(sentences) and licence == {"clip": "other", "dsmd": "mit"}[name]
    cut = f"The vision tower was cut from the teacher's, {name}: of its 2 layers it has 0 (counted from 0)."
    assert sentences[0] == cut
    assert len(sentences) == 3  # the licence once
    assert ("research or non-commercial use only" in sentences[-1]) == (name == "clip")
    assert f"The licence of {name} is {'apple-amlr' if name == 'clip' else 'mit'};" in sentences[-1]
    model.save_pretrained(tmp_path)
    assert_clean(AutoModel.from_pretrained(tmp_path, output_loading_info=True)[1])


def test_the_card_says_what_was_cut_from_what(folder):
    args = arguments(folder, text_layers=0, trim_vocabulary=260)
    model = build_student(args, TRAINING, 8)[0]
    pieces = len(full("wordpiece"))
    assert describe_origin(args, None, model) == (
        [
            "The text tower was cut from text: of its 6 layers it has none, the embeddings alone.",
            f"Of the {pieces} word pieces of text 260 were kept.",
        ],
        None,
    )
    assert describe_origin(arguments(folder), None, model) == ([], None)
    assert describe_origin(StudentArguments(model_name_or_path="a", text_layers=1), None, model) == ([], None)


def test_a_licence_is_read_off_the_card(tmp_path):
    assert model_license(str(tmp_path), None) == (None, None)
    for metadata, expected in (
        ("license: mit", ("mit", "mit")),
        ("license: other\nlicense_name: ours", ("other", "ours")),
        ("license: other", ("other", "other")),
        ("license: [mit, apache-2.0]", ("other", "mit, apache-2.0")),  # the Hub takes one of its list
        ("license: [", (None, None)),
        ("- a", (None, None)),
        ("language: en", (None, None)),
    ):
        (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n")
        assert model_license(str(tmp_path), None) == expected


@pytest.mark.parametrize(
    "settings, teacher, message",
    [
        ({"vision_layers": 7}, None, "vision_layers=7: ViTConfig has 6 layers"),
        ({"text_layer_indices": [1, 6]}, None, "the layers of BertConfig are 0 to 5, without 6"),
        ({"trim_vocabulary": 20}, None, r"trim_vocabulary=20: .* Give at least \d+"),
        ({"text_model_name_or_path": "{0}/clip", "trim_vocabulary": 9}, None, "a WordLevel tokenizer"),
        ({"vision_model_name_or_path": "teacher", "vision_layers": 1}, "beit3", "has no vision tower of its own"),
        ({"vision_model_name_or_path": "teacher", "vision_layers": 1}, "one + other", "is not found as a model"),
        ({"vision_model_name_or_path": "teacher", "vision_layers": 3}, "clip", "CLIPVisionConfig has 2 layers"),
    ],
)
def test_what_cannot_be_cut_is_refused(folder, settings, teacher, message):
    if teacher == "beit3":
        (folder / "beit3").mkdir(exist_ok=True)
        (folder / "beit3/config.json").write_text(json.dumps(Beit3Config().to_dict()))
    settings = {name: value.format(folder) if isinstance(value, str) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        build_student(arguments(folder, **settings), [], 8, teacher and (str(folder / teacher), None))


@pytest.mark.parametrize(("name", "pooling"), [("dsmd", "mean"), ("clip", "pooler")])
def test_whole_towers_of_the_teacher_give_its_features_at_once(folder, name, pooling):
    whole = AutoModel.from_pretrained(folder / name).eval()
    args = arguments(folder, **dict.fromkeys(TEXTS, "teacher"), vision_pooling=pooling, text_pooling=pooling)
    width = whole.config.projection_dim
    model, processor = build_student(args, [], width, (str(folder / name), None))
    inputs = {
        "pixel_values": torch.rand(3, 3, 32, 32),
        **processor.tokenizer(["a b", "b"], return_tensors="pt", padding=True),
    }
    inputs = {key: inputs[key] for key in ("pixel_values", "input_ids", "attention_mask")}
    own, theirs = run(model.eval(), inputs), run(whole, inputs)
    assert torch.allclose(own.image_embeds, theirs.image_embeds, atol=1e-5)
    assert torch.allclose(own.text_embeds, theirs.text_embeds, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings", "width"), [("dsmd", {}, 7), ("clip", {}, None), ("dsmd", {"vision_pooling": "cls"}, None)]
)
def test_a_projection_that_does_not_fit_is_a_new_one(folder, name, settings, width):
    teacher = (str(folder / name), None)
    whole = AutoModel.from_pretrained(folder / name)
    args = arguments(folder, **dict.fromkeys(TEXTS, "teacher"), **settings)
    model, _ = build_student(args, [], width or whole.config.projection_dim, teacher)
    own, theirs = model.visual_projection.weight, whole.visual_projection.weight
    assert own.shape != theirs.shape or not torch.equal(own, theirs)


def test_weights_are_read_only_of_a_teacher_whose_projection_may_fit(folder, monkeypatch):
    width = AutoConfig.from_pretrained(folder / "clip").projection_dim
    pooled = arguments(folder, **dict.fromkeys(TEXTS, "teacher"), vision_pooling="pooler", text_pooling="pooler")
    models = {dim: build_student(pooled, [], dim, (str(folder / "clip"), None))[0] for dim in (width, width + 1)}
    read, load = [], inherited.AutoModel.from_pretrained
    monkeypatch.setattr(
        inherited,
        "AutoModel",
        SimpleNamespace(from_pretrained=lambda *of, **more: read.append(of) or load(*of, **more)),
    )
    of_means = arguments(folder, **dict.fromkeys(TEXTS, "teacher"))
    assert take_projections(models[width], of_means, (str(folder / "clip"), None)) == []
    assert take_projections(models[width + 1], pooled, (str(folder / "clip"), None)) == []
    assert take_projections(models[width], pooled, (str(folder / "dsmd"), None)) == []  # which takes means
    assert not read
    half = arguments(folder, **dict.fromkeys(TEXTS, "teacher"), text_pooling="pooler")
    assert take_projections(models[width], half, (str(folder / "clip"), None)) == ["text"]
    assert take_projections(models[width], pooled, (str(folder / "clip"), None)) == ["vision", "text"]
    assert len(read) == 2


def test_the_teacher_is_the_one_of_the_features():
    of_features = {"id": "mine", "revision": "abc"}
    assert teacher_source([], None) is None and teacher_source([("a", None), ("b", None)], None) is None
    assert teacher_source([("a", "v1")], None) == ("a", "v1")
    assert teacher_source([], of_features) == teacher_source([("a", "v1")], of_features) == ("mine", "abc")
    assert teacher_source([("mine", "v1")], of_features) == ("mine", "v1")


def test_a_run_without_a_teacher_has_no_tower_of_its(folder):
    with pytest.raises(ValueError, match="vision_model_name_or_path=teacher: this run has not one teacher"):
        build_student(arguments(folder, vision_model_name_or_path="teacher"), [], 8)


def test_a_teacher_on_the_hub_is_taken_at_its_revision(tmp_path, folder, hub):
    api = HfApi()
    api.create_repo("user/teacher")
    first = api.upload_folder(repo_id="user/teacher", folder_path=folder / "dsmd").oid
    scatter(AutoModel.from_pretrained(folder / "dsmd")).save_pretrained(tmp_path / "later")
    (tmp_path / "later/README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    api.upload_folder(repo_id="user/teacher", folder_path=tmp_path / "later")
    args = arguments(folder, text_model_name_or_path="teacher")
    found = {}
    for revision in (first, None):
        model = build_student(args, [], 8, ("user/teacher", revision))[0]
        found[revision] = model.text_model.get_input_embeddings().weight
        sentences, licence = describe_origin(args, ("user/teacher", revision), model)
        assert licence == ("mit" if revision else "cc-by-nc-4.0")
        assert sentences[0] == "The text tower started as the teacher's, user/teacher."
    for revision, of in ((first, folder / "dsmd"), (None, tmp_path / "later")):
        assert torch.equal(found[revision], AutoModel.from_pretrained(of).get_input_embeddings().weight)
