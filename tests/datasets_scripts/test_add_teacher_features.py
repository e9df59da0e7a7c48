"""Teacher features: those of a direct call, the same however the work was split, stopped or read."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import feature_job_worker
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import DIM, make_rows, make_student, with_names
from feature_job_worker import count_changes
from launching import command_line, environment, launch
from PIL import Image
from torch.nn.functional import cosine_similarity, normalize

from datasets_scripts import add_teacher_features as script
from datasets_scripts import feature_job
from datasets_scripts.feature_shards import Encoding, all_left_out, shard_file, write_shard
from datasets_scripts.teacher_dataset import evaluate_teacher, figures_table
from datasets_scripts.teacher_features import encode_dataset, join
from rows.checks import check_dataset
from rows.columns import rows_and_captions
from rows.teacher_columns import TEACHER_COLUMNS, teacher_features, teacher_rows
from teachers import load_teacher
from trainers import retrieval_metrics
from trainers.batches import RetrievalDataset
from trainers.teacher_pca import load_pca


def save_teacher(folder: Path, seed: int) -> Path:
    """A tiny dual encoder, as a folder. DSMDModel is one of the models that load_teacher knows."""
    model, processor = make_student()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teachers") / "tiny", 1)


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teachers") / "other", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Rows without features, saved: 23 to train on, a twin image and twin captions among them, and 12 each."""
    parts = {"train": make_rows(23), "validation": make_rows(12, seed=1), "test": make_rows(12, seed=2)}
    parts = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    examples = list(parts["train"])
    examples[5] = {**examples[5], "image": examples[2]["image"], "captions": examples[2]["captions"] + ["one more"]}
    parts["train"] = datasets.Dataset.from_list(examples, features=parts["train"].features)
    folder = tmp_path_factory.mktemp("source") / "data"
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


def arguments(source, teacher, output, *more) -> list[str]:
    sizes = ["--shard_rows", "5", "--batch_size", "4", "--num_workers", "0"]
    return [
        "--dataset_name",
        str(source),
        "--teacher_model_name_or_path",
        str(teacher),
        "--output_dir",
        str(output),
        *sizes,
        *map(str, more),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def output(source, teacher_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("output") / "features"
    script.main(arguments(source, teacher_folder, folder))
    return folder


def test_the_card_names_a_dataset_that_is_no_local_path(source, teacher_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "open_dataset", lambda *_: datasets.load_from_disk(source))
    monkeypatch.setattr(script, "license_of", lambda *_: "mit")
    script.main(arguments("user/data", teacher_folder, tmp_path / "out"))
    assert "# user/data with teacher features" in (tmp_path / "out" / "README.md").read_text()


def test_features_are_those_of_a_direct_call(output, source, teacher_folder):
    teacher = load_teacher(str(teacher_folder))
    rows, before = datasets.load_dataset(str(output)), datasets.load_from_disk(source)
    assert {split: len(part) for split, part in rows.items()} == {"train": 23, "validation": 12, "test": 12}
    for split, part in rows.items():
        plain = part.remove_columns([*TEACHER_COLUMNS, "teacher"])
        for row, old in zip(plain, before[split]):
            assert np.array_equal(row.pop("image"), old.pop("image")) and row == old
        assert part.features["teacher_image_embeds"] == datasets.List(datasets.Value("float16"), length=16)
        for row in part:
            image = teacher.embed_images([row["image"]])[0]
            text = teacher.embed_texts(row["captions"])
            torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), image, rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(torch.tensor(row["teacher_text_embeds"]), text, rtol=2e-3, atol=1e-4)
        check_dataset(part, split, 16)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_have_the_rights_that_the_umask_leaves(source, teacher_folder, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        script.main(arguments(source, teacher_folder, tmp_path / "out", "--int8"))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(modes.values()) == {mode} and "teacher_pca.safetensors" in modes


def test_what_the_folder_says_of_itself(output, teacher_folder):
    card = (output / "README.md").read_text()
    assert "teacher-features" in yaml.safe_load(card.split("---")[1])["tags"]
    assert "| train | 23 |" in card and str(teacher_folder.parent) not in card
    rows = datasets.load_dataset(str(output))
    described = json.loads(rows["train"][0]["teacher"])
    assert described["id"] == "tiny" and described["dim"] == 16 and described["revision"] is None
    assert {part["teacher"] for split in rows.values() for part in split} == {rows["train"][0]["teacher"]}
    assert not (output / "settings.json").exists() and not list(output.rglob("*.part"))
    for name, content in contents(output).items():
        assert str(teacher_folder.parent).encode() not in content, name
    image, text = teacher_rows(rows["test"])
    groups, caption_to_image = rows_and_captions(rows["test"])
    assert f"| test | 12 | {retrieval_metrics(image, text, groups, groups[caption_to_image])['rsum']:.2f} |" in card


def test_a_dataset_that_is_no_folder_is_named_as_it_was_given(source, teacher_folder, tmp_path, monkeypatch):
    """A Hub id or 'icons', whose rows stand in for it here."""
    monkeypatch.setattr(script, "open_dataset", lambda name, *_: datasets.load_from_disk(source))
    script.main(arguments("name/photos", teacher_folder, tmp_path / "out", "--data_license", "mit"))
    assert "# name/photos with teacher features" in (tmp_path / "out" / "README.md").read_text()


def test_the_teachers_own_figures_count_equal_captions(tmp_path):
    parts = {"test": with_names(make_rows(20), every=1), "train": make_rows(6)}
    figures = {}
    for split, rows in parts.items():
        rows.to_parquet(shard_file(tmp_path, split, 0))
        figures[split] = evaluate_teacher(tmp_path, split, [0], None, DIM, False)
    groups, owner = rows_and_captions(parts["test"])
    names = [caption for own in parts["test"]["captions"] for caption in own]
    embeds = *teacher_rows(parts["test"]), groups, groups[owner]
    by_text, by_index = (retrieval_metrics(*embeds, text_ids=ids)["rsum"] for ids in (names, None))
    assert figures["test"] == {"images": 20, "rsum": by_text, "rsum_by_index": by_index} and by_text > by_index
    assert figures["train"].keys() == {"images", "rsum"}
    table = figures_table(figures)
    assert f"| test | 20 | {by_text:.2f} | {by_index:.2f} |" in table
    assert f"| train | 6 | {figures['train']['rsum']:.2f} |  |" in table and "| by index |" in table


def test_streamed_output_has_the_same_rows(output):
    rows = datasets.load_dataset(str(output))["train"].cast_column("image", datasets.Image(decode=False))
    stream = datasets.load_dataset(str(output), streaming=True)["train"]
    assert list(stream.cast_column("image", datasets.Image(decode=False))) == list(rows)


def test_a_streamed_source_gives_the_same_files(output, source, teacher_folder, tmp_path):
    script.main(arguments(source, teacher_folder, tmp_path / "streamed", "--streaming"))
    assert contents(tmp_path / "streamed") == contents(output)


def test_images_of_a_stream_are_stored_as_they_are(teacher_folder, tmp_path):
    """Encoded again, a JPEG would lose colours, and its size would change."""
    rows, files = make_rows(6).remove_columns(TEACHER_COLUMNS), []
    for row in rows:
        buffer = io.BytesIO()
        row["image"].save(buffer, "JPEG", quality=97)
        files.append(buffer.getvalue())
    images = [{"bytes": file, "path": None} for file in files]
    rows = datasets.Dataset.from_dict({**rows[:], "image": images}, features=rows.features)
    (tmp_path / "source" / "data").mkdir(parents=True)
    rows.to_parquet(tmp_path / "source" / "data" / "test-0.parquet")
    script.main(arguments(tmp_path / "source", teacher_folder, tmp_path / "made", "--streaming"))
    made = datasets.load_dataset(str(tmp_path / "made"), split="test").cast_column(
        "image", datasets.Image(decode=False)
    )
    assert [row["image"]["bytes"] for row in made] == files


def test_loader_workers_change_nothing(output, source, teacher_folder, tmp_path):
    script.main([*arguments(source, teacher_folder, tmp_path / "workers"), "--num_workers", "2"])
    assert contents(tmp_path / "workers") == contents(output)


def test_two_processes_give_the_files_of_one(output, source, teacher_folder, tmp_path):
    launch(2, script.__file__, *arguments(source, teacher_folder, tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(output)


def test_another_number_of_threads_changes_rounding_alone(output, source, teacher_folder, tmp_path):
    torch.set_num_threads(3)
    script.main(arguments(source, teacher_folder, tmp_path / "three"))
    one, three = (datasets.load_dataset(str(folder)) for folder in (output, tmp_path / "three"))
    for split, part in one.items():
        for got, expected in zip(teacher_rows(three[split]), teacher_rows(part)):
            torch.testing.assert_close(got, expected, rtol=2**-9, atol=2**-12)
        assert three[split].remove_columns(TEACHER_COLUMNS)[:]["captions"] == part["captions"][:]


def kill_at(moment: int, command: list[str]) -> None:
    line = command_line(1, feature_job_worker.__file__, moment, *command)
    killed = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]


@pytest.fixture
def stopped(monkeypatch):
    """Runs the program and stops it before its third file."""

    def run_to_the_third(command: list[str]) -> None:
        written = []

        def write(shard, *rest):
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(write_shard(shard, *rest))

        with monkeypatch.context() as patch:
            patch.setattr("datasets_scripts.teacher_features.write_shard", write)
            with pytest.raises(KeyboardInterrupt):
                script.main(command)

    return run_to_the_third


def old_output(folder: Path) -> Path:
    """What --overwrite_output_dir may replace."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("the old one")
    rows = make_rows(2)
    rows.add_column("teacher", ["{}"] * 2).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def changes(source, teacher_folder, tmp_path_factory):
    folder = old_output(tmp_path_factory.mktemp("changes") / "out")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree")):
            patch.setattr(module, name, getattr(module, name))  # put back at the end
        made = count_changes(-1)
        script.main(arguments(source, teacher_folder, folder, "--overwrite_output_dir"))
    return made[0]


# As a file in the first split is written, and in what follows all files: counted from the end.
@pytest.mark.parametrize("moment", [4, -1, -2, -3, -9])
def test_killed_and_started_again_it_goes_on(
    output, source, teacher_folder, tmp_path, moment, changes, monkeypatch, capsys
):
    command = arguments(source, teacher_folder, old_output(tmp_path / "again"), "--overwrite_output_dir")
    moment = moment if moment > 0 else changes + moment + 1
    old = contents(tmp_path / "again")
    kill_at(moment, command)
    if moment < changes - 1:  # until the new one has its name, the old one is whole: in its place, or aside
        place = tmp_path / "again" if (tmp_path / "again").exists() else tmp_path / "again.partial" / "replaced"
        assert contents(place) == old
    whole = len(list((tmp_path / "again.partial").glob("*.parquet")))
    assert whole == (min(max(moment - 2, 0), 11) if moment < changes else 0)  # the last removes the partial work
    encoded = []
    write = sys.modules["datasets_scripts.teacher_features"].write_shard
    monkeypatch.setattr(
        "datasets_scripts.teacher_features.write_shard", lambda shard, *rest: (encoded.append(1), write(shard, *rest))
    )
    if not (tmp_path / "again").exists():  # killed between the two last renames
        with pytest.raises(SystemExit, match="exists: name another --output"):
            script.main([part for part in command if part != "--overwrite_output_dir"])
        assert contents(tmp_path / "again") == old
    script.main(command)
    assert len(encoded) == 11 - whole
    assert contents(tmp_path / "again") == contents(output)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_other_settings_are_not_mixed_with_partial_work(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    with pytest.raises(SystemExit, match="work with another teacher"):
        script.main(arguments(source, other_folder, tmp_path / "out"))
    script.main(arguments(source, other_folder, tmp_path / "out", "--overwrite_output_dir"))
    row = datasets.load_dataset(str(tmp_path / "out"), split="train")[0]
    expected = load_teacher(str(other_folder)).embed_images([row["image"]])[0]
    torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["thesis/chapter1.txt", "notes.txt", "data/mine.parquet", "data/mine-00000-of-00001.parquet", ".git/config", "e"],
)
def test_what_this_program_did_not_write_is_never_replaced(
    output, source, teacher_folder, tmp_path, capsys, monkeypatch, name
):
    folder = Path(shutil.copytree(output, tmp_path / "out"))
    command = arguments(source, teacher_folder, folder, "--overwrite_output_dir")

    def lay_down():
        (folder / name).parent.mkdir(exist_ok=True)
        if "." not in name:
            (folder / name).mkdir()
        elif name.endswith(".parquet"):  # another's rows, under a name like ours
            datasets.Dataset.from_dict({"a": [1]}).to_parquet(folder / name)
        else:
            (folder / name).write_text("of years")

    assemble = feature_job.assemble

    def while_it_works(*args):
        lay_down()
        return assemble(*args)

    with monkeypatch.context() as patch:
        patch.setattr(feature_job, "assemble", while_it_works)
        with pytest.raises(SystemExit, match=f"holds {name}, which was not made by this program: nothing was deleted"):
            script.main(command)
    before = contents(folder)
    assert (folder / name).exists() and contents(output).items() <= before.items()
    with pytest.raises(SystemExit):
        script.main(command)
    assert f"holds {name}, which was not made by this program" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_strangers_file_among_partial_work_is_left(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    (tmp_path / "out.partial" / "notes.txt").write_text("of years")
    with pytest.raises(SystemExit, match="holds notes.txt, which this program did not write"):
        script.main(arguments(source, other_folder, tmp_path / "out", "--overwrite_output_dir"))
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "of years"


def test_finished_output_is_not_overwritten(output, source, teacher_folder, capsys):
    before = contents(output)
    with pytest.raises(SystemExit):
        script.main(arguments(source, teacher_folder, output))
    assert "exists" in capsys.readouterr().err
    assert contents(output) == before


class Counting:
    """A teacher that counts what it encodes, and can be told what to answer."""

    def __init__(self, teacher, change=lambda features: features):
        self.teacher, self.change = teacher, change
        self.encoded = {"image": 0, "text": 0}

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def image_features(self, prepared):
        features = self.teacher.image_features(prepared)
        self.encoded["image"] += len(features)
        return self.change(features)

    def text_features(self, prepared):
        features = self.teacher.text_features(prepared)
        self.encoded["text"] += len(features)
        return features


def add(rows, teachers, folder, encoding=None):
    encoding = encoding or Encoding(weights=[1 / len(teachers)] * len(teachers), batch_size=4)
    identity = script.identity_of(rows, "rows", ["x"] * len(teachers))
    feature_job.make_teacher_features(rows, teachers, identity, folder, encoding, "rows", num_workers=0)


def test_each_distinct_image_and_caption_is_encoded_once(source, teacher_folder, tmp_path):
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"]})
    teacher = Counting(load_teacher(str(teacher_folder)))
    add(rows, [teacher], tmp_path / "out")
    distinct = {caption for captions in rows["train"]["captions"] for caption in captions}
    assert teacher.encoded == {"image": 22, "text": len(distinct)}
    out = datasets.load_dataset(str(tmp_path / "out"))["train"]
    assert out[5]["teacher_image_embeds"] == out[2]["teacher_image_embeds"]


def test_images_are_stored_at_the_students_size_and_the_teacher_sees_them_whole(
    output, source, teacher_folder, tmp_path
):
    rows = datasets.load_from_disk(source)
    photo, buffer = Image.new("RGB", (64, 20), "red"), io.BytesIO()
    photo.save(buffer, "JPEG")
    jpeg = {**rows["test"][0], "image": {"bytes": buffer.getvalue(), "path": "photo.jpg"}, "image_id": "photo"}
    jpeg = datasets.Dataset.from_list([jpeg], features=rows["test"].features)
    rows["test"] = datasets.concatenate_datasets([rows["test"], jpeg])
    rows.save_to_disk(tmp_path / "rows")
    for number, (size, workers) in enumerate(((24, 0), (24, 2), (32, 0))):
        folder = tmp_path / str(number)
        options = arguments(tmp_path / "rows", teacher_folder, folder, "--image_size", size)
        script.main(options + ["--num_workers", str(workers)])
        if workers:
            assert contents(folder / "data") == contents(tmp_path / "0" / "data")
            continue
        plain, stored = datasets.load_dataset(str(output)), datasets.load_dataset(str(folder))
        assert f"no side above {size} pixels" in (folder / "README.md").read_text()
        for split, part in plain.items():
            assert stored[split]["teacher_image_embeds"][: len(part)] == part["teacher_image_embeds"][:]
            for old, new in zip(part["image"], stored[split]["image"]):
                assert np.array_equal(new, old if size == 32 else old.resize((24, 24), Image.Resampling.BICUBIC))
        new = stored["test"].cast_column("image", datasets.Image(decode=False))[12]["image"]
        assert new["bytes"][:2] == b"\xff\xd8" and new["path"] == "photo.jpg"
        assert Image.open(io.BytesIO(new["bytes"])).size == (size, 20)


def test_one_row_and_one_caption(teacher_folder, tmp_path):
    rows = datasets.DatasetDict({"train": make_rows(1).remove_columns(TEACHER_COLUMNS)})
    add(rows, [load_teacher(str(teacher_folder))], tmp_path / "out")
    assert len(datasets.load_dataset(str(tmp_path / "out"))["train"]) == 1


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.8]])
def test_a_dot_product_of_joined_features_is_the_mean_of_the_cosines(
    source, teacher_folder, other_folder, tmp_path, weights
):
    teachers = [load_teacher(str(folder)) for folder in (teacher_folder, other_folder)]
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"].select(range(6))})
    add(rows, teachers, tmp_path / "out", Encoding(weights=weights))
    joined = datasets.load_dataset(str(tmp_path / "out"))["train"]
    image, text = teacher_rows(joined)
    assert image.shape == (6, 32)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(6), rtol=1e-3, atol=0)
    first = [caption[0] for caption in joined["captions"]]
    offsets = np.cumsum([0] + [len(captions) for captions in joined["captions"]])[:-1]
    expected = sum(
        weight * cosine_similarity(teacher.embed_images(list(joined["image"])), teacher.embed_texts(first))
        for weight, teacher in zip(weights, teachers)
    )
    torch.testing.assert_close((image * text[offsets]).sum(dim=1), expected, rtol=0, atol=2e-3)
    described = json.loads(joined[0]["teacher"])
    assert described["id"] == "tiny + other" and described["weights"] == weights and described["dim"] == 32


def test_join_leaves_one_teacher_as_it_is():
    features = torch.tensor([[3.0, 4.0]])
    assert join([features], [1.0]) is features
    expected = torch.tensor([[0.6, 0.8, 0.0, 1.0]]) / 2**0.5
    torch.testing.assert_close(join([features, torch.tensor([[0.0, 2.0]])], [0.5, 0.5]), expected)


def test_int8_is_close_is_read_as_float_and_its_cost_is_shown(source, output, teacher_folder, tmp_path, capsys):
    script.main(arguments(source, teacher_folder, tmp_path / "int8", "--int8"))
    assert "before int8" in capsys.readouterr().out
    rows, exact = datasets.load_dataset(str(tmp_path / "int8")), datasets.load_dataset(str(output))
    assert rows["train"].features["teacher_image_embeds"].feature == datasets.Value("int8")
    assert not (tmp_path / "int8" / "exact").exists()
    for split in rows:
        check_dataset(rows[split], split, 16)
        for got, expected in zip(teacher_rows(rows[split]), teacher_rows(exact[split])):
            assert not torch.equal(got, expected)
            assert (cosine_similarity(got, expected) > 0.9999).all()
            assert (got - expected).abs().max() <= expected.abs().max() / 127
    examples = RetrievalDataset(rows["train"], with_teacher=True).__getitems__([3, 1])
    image, text = teacher_rows(rows["train"].select([3, 1]))
    assert np.array_equal(np.stack([example["teacher_image"] for example in examples]), image.numpy())
    assert np.array_equal(np.concatenate([example["teacher_text"] for example in examples]), text.numpy())
    assert (tmp_path / "int8" / "README.md").read_text().count("before int8") == 1


@pytest.mark.parametrize("value", [float("nan"), 0.0, 1e6])
def test_features_that_are_none_name_their_rows(source, teacher_folder, tmp_path, value):
    def change(features):
        features = features.clone()
        features[1:2] = value
        return features

    teacher = Counting(load_teacher(str(teacher_folder)), change)
    rows = datasets.DatasetDict({"train": datasets.load_from_disk(source)["train"].select(range(3))})
    with pytest.raises(ValueError, match="train split: 1 image features are NaN.*image_id '0/1'"):
        add(rows, [teacher], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_cannot_be_encoded_are_named(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)["train"].cast_column("image", datasets.Image(decode=False))
    teacher = load_teacher(str(teacher_folder))

    def with_row(index, **values):
        examples = [{**row, **(values if i == index else {})} for i, row in enumerate(rows)]
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(examples, features=rows.features)})

    for i, (values, message) in enumerate(
        (
            ({"image": {"bytes": b"no image", "path": None}}, "image_id '0/9': unreadable image"),
            ({"captions": []}, r"Row 9 .*\(image_id '0/9'\): it has captions"),
            ({"captions": ["a", " "]}, r"Row 9 .*\(image_id '0/9'\): it has an empty caption"),
            (
                {"image": {"bytes": None, "path": "no/there.png"}},
                "image_id '0/9': its image file cannot be read: .*there.png",
            ),
        )
    ):
        with pytest.raises(ValueError, match=f"{message}.*--skip_broken"):
            add(with_row(9, **values), [teacher], tmp_path / str(i))
    with pytest.raises(ValueError, match="no column captions .*own_data"):
        add(datasets.DatasetDict({"train": rows.rename_column("captions", "text")}), [teacher], tmp_path / "new")


@pytest.fixture(scope="module")
def broken_source(source, tmp_path_factory):
    """Of each split rows that cannot be used: a cut JPEG, no image, a text, no caption; one more has an empty one.

    The rows of train's second file, 5 to 9, are all such.
    """
    rows = {split: list(part) for split, part in datasets.load_from_disk(source).items()}
    features = datasets.load_from_disk(source)["train"].features
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "JPEG")
    cut = {"bytes": buffer.getvalue()[:200], "path": None}
    faults = [{"image": cut}, {"image": None}, {"image": {"bytes": b"text", "path": None}}, {"captions": []}]
    faults += [{"captions": [" ", ""]}]
    for i, fault in enumerate(faults):
        rows["train"][5 + i] = {**rows["train"][5 + i], **fault}
    rows["train"][12]["captions"] = [*rows["train"][12]["captions"], " "]
    rows["test"][0]["image"] = cut
    rows["validation"][11]["captions"] = []
    folder = tmp_path_factory.mktemp("broken")
    encoded = datasets.Features({**features, "image": datasets.Image(decode=False)})
    parts = {split: datasets.Dataset.from_list(as_bytes(part), encoded) for split, part in rows.items()}
    datasets.DatasetDict({split: part.cast(features) for split, part in parts.items()}).save_to_disk(folder / "data")
    return folder / "data"


def as_bytes(rows: list[dict]) -> list[dict]:
    """Rows whose decoded images are files."""
    result = []
    for row in rows:
        if isinstance(row["image"], Image.Image):
            buffer = io.BytesIO()
            row["image"].save(buffer, "PNG")
            row = {**row, "image": {"bytes": buffer.getvalue(), "path": None}}
        result.append(row)
    return result


BROKEN = {"train 0/5", "train 0/6", "train 0/7", "train 0/8", "train 0/9", "test 2/0", "validation 1/11"}


def test_broken_rows_are_left_out_listed_and_counted(broken_source, output, teacher_folder, tmp_path, capsys):
    command = [*arguments(broken_source, teacher_folder, tmp_path / "out"), "--skip_broken"]
    too_many = r"14.9 % of the rows cannot be used, expected 10 % at most \(--max_skipped\)"
    with pytest.raises(SystemExit, match=too_many):
        script.main([*command, "--max_skipped", "0.1"])
    script.main([*command, "--max_skipped", "0.15"])  # takes up what was made
    said = capsys.readouterr().out
    assert "7 rows are left out" in said and "1 empty captions dropped" in said
    listed = (tmp_path / "out.broken.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in listed} == BROKEN and len(listed) == 7
    assert any("test 2/0: unreadable image: " in line for line in listed)
    made, whole = datasets.load_dataset(str(tmp_path / "out")), datasets.load_dataset(str(output))
    assert {split: len(part) for split, part in made.items()} == {"train": 18, "validation": 11, "test": 11}
    for split, part in made.items():
        check_dataset(part, split, 16)
        rows = {row["image_id"]: row for row in whole[split]}
        for row in part:
            expected = rows[row["image_id"]]
            assert row["captions"] == expected["captions"]
            for name in TEACHER_COLUMNS:
                np.testing.assert_allclose(row[name], expected[name], rtol=1e-2, atol=1e-3)
    # A file of which nothing is left is none, and the others are numbered without it.
    names = {path.name for path in (tmp_path / "out" / "data").glob("train-*")}
    assert names == {f"train-{i:05d}-of-00004.parquet" for i in range(4)}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "left out" in card and "| train | 18 |" in card


@pytest.mark.parametrize("how", ["streamed", "resized", "int8", "two processes", "resumed"])
def test_the_same_are_left_out_whatever_the_way(broken_source, teacher_folder, tmp_path, how, stopped):
    command = [*arguments(broken_source, teacher_folder, tmp_path / "out"), "--skip_broken"]
    if how == "two processes":
        launch(2, script.__file__, *command)
    elif how == "resumed":
        with pytest.raises(SystemExit, match="--skip_broken"):  # at the first that is broken
            script.main(command[:-1])
        assert not (tmp_path / "out").exists()
        stopped(command)
        script.main(command)
    else:
        more = {"streamed": ["--streaming"], "resized": ["--image_size", "24"], "int8": ["--int8"]}[how]
        script.main([*command, *more])
    made = datasets.load_dataset(str(tmp_path / "out"))
    assert {split: len(part) for split, part in made.items()} == {"train": 18, "validation": 11, "test": 11}
    listed = (tmp_path / "out.broken.txt").read_text().splitlines()
    assert {line.split(":")[0] for line in listed} == BROKEN and len(listed) == 7
    teacher = load_teacher(str(teacher_folder))
    for row in made["test"] if how == "resized" else made["train"]:
        text = teacher.embed_texts(row["captions"])
        scale = torch.tensor(row["teacher_text_scale"])[:, None] if how == "int8" else 1
        torch.testing.assert_close(torch.tensor(row["teacher_text_embeds"]) * scale, text, rtol=2e-2, atol=2e-2)
        if how == "resized":
            assert row["image"].size == (24, 24)


def test_a_file_that_is_missing_is_left_out_too(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)["train"].select(range(4)).cast_column("image", datasets.Image(decode=False))
    examples = list(rows)
    examples[2]["image"] = {"bytes": None, "path": "no/there.png"}
    rows = datasets.DatasetDict({"train": datasets.Dataset.from_list(examples, features=rows.features)})
    (tmp_path / "made").mkdir()
    teacher = load_teacher(str(teacher_folder))
    files = encode_dataset(rows, [teacher], "{}", Encoding(), tmp_path / "made", 0, skip_broken=True)
    lines, images, dropped = all_left_out(tmp_path / "made", files)
    assert not lines and not dropped and len(images) == 1
    assert images[0].startswith("train 0/2: ") and "no/there.png" in images[0]
    assert pq.read_table(tmp_path / "made" / "train-00000.parquet")["image_id"].to_pylist() == ["0/0", "0/1", "0/3"]


def test_a_split_of_which_nothing_is_left_is_named(broken_source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(broken_source)
    rows = datasets.DatasetDict({"train": rows["train"], "test": rows["train"].select(range(5, 10))})
    rows.save_to_disk(tmp_path / "rows")
    command = [*arguments(tmp_path / "rows", teacher_folder, tmp_path / "out"), "--skip_broken"]
    with pytest.raises(SystemExit, match="no row is left of the test split: all are listed in .*out.broken.txt"):
        script.main(command)


def test_files_outside_the_dataset_are_brought_in_without_their_path(teacher_folder, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    rows = datasets.Dataset.from_dict(
        {"image": [str(tmp_path / "red.png")], "captions": [["red"]], "image_id": ["a"]}
    ).cast_column("image", datasets.Image())
    add(datasets.DatasetDict({"train": rows}), [load_teacher(str(teacher_folder))], tmp_path / "out")
    stored = datasets.load_dataset(str(tmp_path / "out"))["train"].cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"]["bytes"] == (tmp_path / "red.png").read_bytes()
    for content in contents(tmp_path / "out").values():
        assert str(tmp_path).encode() not in content
    assert stored[0]["image"]["path"] in (None, "red.png")


def test_features_of_another_teacher_are_replaced(output, other_folder, tmp_path):
    script.main(arguments(output, other_folder, tmp_path / "new"))
    row = datasets.load_dataset(str(tmp_path / "new"))["train"][0]
    expected = load_teacher(str(other_folder)).embed_images([row["image"]])[0]
    torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)
    assert json.loads(row["teacher"])["id"] == "other"


def test_the_projection_is_fitted_on_the_training_features(output):
    components = load_pca(output)
    image, text = teacher_rows(datasets.load_dataset(str(output))["train"])
    rows = np.concatenate(
        [normalize(part, dim=1).double().numpy() / len(part) ** 0.5 for part in (image, text)]
    )  # each modality counts the same
    _, _, expected = np.linalg.svd(rows)
    for k in (1, 4, 9):
        ours = components[:, :k].double().numpy()
        assert np.allclose(ours @ ours.T, expected[:k].T @ expected[:k], atol=1e-5)


def test_weights_and_revisions_must_be_one_a_teacher(source, teacher_folder, tmp_path, capsys):
    for more in (
        ["--teacher_weights", "1", "2"],
        ["--teacher_weights", "-1"],
        ["--teacher_revision", "a", "--teacher_revision", "b"],
    ):
        with pytest.raises(SystemExit):
            script.main(arguments(source, teacher_folder, tmp_path / "out", *more))
        assert more[0] in capsys.readouterr().err


@pytest.mark.parametrize("num_workers", [0, 2])
def test_memory_holds_what_the_loader_reads_ahead(teacher_folder, tmp_path, monkeypatch, num_workers):
    """However many rows there are: few files are planned and not yet written at any time."""
    alive, most = set(), [0]
    plan = sys.modules["datasets_scripts.teacher_features"].plan
    write = sys.modules["datasets_scripts.teacher_features"].write_shard

    def counted_plan(split, number, *rest):
        alive.add(number)
        most[0] = max(most[0], len(alive))
        return plan(split, number, *rest)

    def counted_write(shard, *rest):
        write(shard, *rest)
        alive.discard(shard.number)

    monkeypatch.setattr("datasets_scripts.teacher_features.plan", counted_plan)
    monkeypatch.setattr("datasets_scripts.teacher_features.write_shard", counted_write)
    rows = datasets.DatasetDict({"train": make_rows(96).remove_columns(TEACHER_COLUMNS)})
    (tmp_path / "out").mkdir()
    encoding = Encoding(batch_size=4, shard_rows=16)  # five batches a file or more; the loader holds eight
    files = encode_dataset(rows, [load_teacher(str(teacher_folder))], "{}", encoding, tmp_path / "out", num_workers)
    assert files == {"train": 6} and most[0] <= 4


def test_teacher_features_reads_what_was_stored():
    with pytest.raises(ValueError, match="no teacher_image_scale"):
        teacher_features(
            datasets.Dataset.from_dict(
                {"teacher_image_embeds": [[1, 2]]},
                features=datasets.Features({"teacher_image_embeds": datasets.List(datasets.Value("int8"), length=2)}),
            ).with_format("arrow")[:],
            "teacher_image_embeds",
        )


def test_folders_of_one_name_are_not_taken_for_each_other(teacher_folder, tmp_path):
    """`datasets` caches a local folder by its name alone where its card names the data files: ours must not."""
    for place, count in (("a", 3), ("b", 5)):
        (tmp_path / place).mkdir()
        rows = datasets.DatasetDict({"dev": make_rows(count).remove_columns(TEACHER_COLUMNS)})
        add(rows, [load_teacher(str(teacher_folder))], tmp_path / place / "same")
        loaded = datasets.load_dataset(str(tmp_path / place / "same"))
        assert {split: len(part) for split, part in loaded.items()} == {"dev": count}


def test_pushed_to_the_hub_it_loads_and_streams(output, source, teacher_folder, tmp_path, hub):
    script.main(arguments(source, teacher_folder, tmp_path / "again", "--push_to_hub", "user/features"))
    assert set(hub.files("datasets/user/features")) >= set(contents(output))
    rows = datasets.load_dataset("user/features").cast_column("image", datasets.Image(decode=False))
    local = datasets.load_dataset(str(output)).cast_column("image", datasets.Image(decode=False))
    for split in local:
        assert list(rows[split]) == list(local[split])
    stream = datasets.load_dataset("user/features", streaming=True)["train"]
    assert [row["image_id"] for row in stream] == local["train"]["image_id"]
    script.main(arguments("user/features", teacher_folder, tmp_path / "of_hub"))  # from the Hub, too
    assert "# user/features with teacher features" in (tmp_path / "of_hub" / "README.md").read_text()
    for content in hub.files("datasets/user/features").values():
        assert str(tmp_path).encode() not in content


def test_a_webdataset_is_read_as_a_stream(teacher_folder, tmp_path):
    """Keys that start again in every tar, captions in txt or json."""
    rows = make_rows(6)
    for split in ("train", "test"):
        for shard in range(2):
            (tmp_path / "tars").mkdir(exist_ok=True)
            with tarfile.open(tmp_path / "tars" / f"{split}-{shard:04d}.tar", "w") as tar:
                for i in range(3):
                    row = rows[3 * shard + i]
                    buffer = io.BytesIO()
                    row["image"].save(buffer, "PNG")
                    captions = json.dumps({"captions": row["captions"]})
                    for name, content in ((f"{i}.png", buffer.getvalue()), (f"{i}.json", captions.encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    script.main(arguments(tmp_path / "tars", teacher_folder, tmp_path / "out", "--streaming"))
    out = datasets.load_dataset(str(tmp_path / "out"))
    teacher = load_teacher(str(teacher_folder))
    for split, part in out.items():
        check_dataset(part, split, 16)
        assert part["image_id"] == [f"{split}-{shard:04d}/{i}" for shard in range(2) for i in range(3)]
        assert part["captions"] == rows["captions"]
        for row, old in zip(part, rows):
            expected = teacher.embed_images([old["image"]])[0]
            torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)


def test_a_stream_that_has_changed_is_not_mixed_with_partial_work(teacher_folder, tmp_path, stopped):
    for place in ("a", "b"):
        rows = datasets.DatasetDict({"train": make_rows(12, seed=ord(place)).remove_columns(TEACHER_COLUMNS)})
        rows.save_to_disk(tmp_path / place / "data")
    options = ["--streaming"]
    stopped(arguments(tmp_path / "a" / "data", teacher_folder, tmp_path / "out", *options))
    with pytest.raises(SystemExit, match="work with another rows"):
        script.main(arguments(tmp_path / "b" / "data", teacher_folder, tmp_path / "out", *options))


def begun_before_fingerprints(partial: Path, teacher: Path) -> None:
    """Makes partial work what it would have been then."""
    settings = json.loads((partial / "settings.json").read_text())
    del settings["teacher"]["fingerprint"]
    settings["teacher files"] = [feature_job.earlier_fingerprint(str(teacher), None)]
    (partial / "settings.json").write_text(json.dumps(settings))


def test_a_moved_teacher_goes_on_and_another_of_its_name_does_not(
    output, source, teacher_folder, other_folder, tmp_path, stopped
):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    moved = shutil.copytree(teacher_folder, tmp_path / "moved")
    (Path(moved) / "README.md").write_text("edited")
    namesake = shutil.copytree(other_folder, tmp_path / "elsewhere" / teacher_folder.name)
    with pytest.raises(SystemExit, match="work with another teacher files"):
        script.main(arguments(source, namesake, tmp_path / "out"))
    script.main(arguments(source, moved, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(output)


def test_work_that_was_begun_before_fingerprints_goes_on(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    begun_before_fingerprints(tmp_path / "out.partial", teacher_folder)
    with pytest.raises(SystemExit, match="work with another teacher files"):
        script.main(arguments(source, other_folder, tmp_path / "out"))
    script.main(arguments(source, teacher_folder, tmp_path / "out"))
    rows = datasets.load_dataset(str(tmp_path / "out"))
    assert "fingerprint" not in json.loads(rows["test"][0]["teacher"])  # all rows say one thing, as it was begun


def test_two_processes_do_not_write_one_folder(source, teacher_folder, tmp_path):
    with feature_job._alone(tmp_path / "out.partial"):
        with pytest.raises(SystemExit, match="Another process is at work"):
            script.main(arguments(source, teacher_folder, tmp_path / "out"))


def test_what_is_in_the_way_is_left_alone(source, teacher_folder, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is in the way"):
        script.main(arguments(source, teacher_folder, tmp_path / "out", "--overwrite_output_dir"))
    with pytest.raises(SystemExit):
        script.main(arguments(source, teacher_folder, tmp_path, "--overwrite_output_dir"))
    assert "was not made by this program" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_an_empty_split_and_ids_of_another_type_are_named(source, teacher_folder, tmp_path):
    rows = datasets.load_from_disk(source)
    teacher = load_teacher(str(teacher_folder))
    with pytest.raises(ValueError, match="test split is empty"):
        add(datasets.DatasetDict({"train": rows["train"], "test": rows["test"].select([])}), [teacher], tmp_path / "a")
    numbers = rows["train"].remove_columns("image_id").add_column("image_id", list(range(23)))
    with pytest.raises(ValueError, match="image_id of the train split is .*int64.*cast"):
        add(datasets.DatasetDict({"train": numbers}), [teacher], tmp_path / "b")


def test_a_second_push_leaves_no_files_of_the_first(output, source, teacher_folder, tmp_path, hub):
    first = arguments(source, teacher_folder, tmp_path / "out", "--push_to_hub", "user/features")
    first[first.index("--shard_rows") + 1] = "3"
    script.main(first)
    script.main(
        arguments(source, teacher_folder, tmp_path / "out", "--overwrite_output_dir", "--push_to_hub", "user/features")
    )
    files = {name for name in hub.files("datasets/user/features") if name.startswith("data/")}
    assert files == {name for name in contents(output) if name.startswith("data/")}
    before = hub.commits("datasets/user/features")
    script.main([*first, "--push_to_hub", "user/other"])  # what is there is pushed, not made again
    assert hub.files("datasets/user/other").keys() >= files
    assert hub.commits("datasets/user/features") == before


def test_killed_while_partial_work_is_removed_it_goes_on(source, teacher_folder, output, tmp_path, monkeypatch):
    command = arguments(source, teacher_folder, tmp_path / "out")
    remove = shutil.rmtree

    def half(path, *args, **kwargs):
        if Path(path).name == ".out.partial.removed" and Path(path).exists():
            (Path(path) / "settings.json").unlink()
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            script.main(command)
    assert contents(tmp_path / "out") == contents(output)
    script.main([*command, "--overwrite_output_dir"])
    assert contents(tmp_path / "out") == contents(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_is_only_pushed_as_what_it_is(output, source, other_folder, hub, tmp_path):
    with pytest.raises(SystemExit, match="has features of tiny, not of other: it is not pushed"):
        script.main(arguments(source, other_folder, output, "--push_to_hub", "user/features"))
    namesake = shutil.copytree(other_folder, tmp_path / "tiny")
    with pytest.raises(SystemExit, match="has features of another tiny than this one: .*: it is not pushed"):
        script.main(arguments(source, namesake, output, "--push_to_hub", "user/features"))
    assert not [name for name in hub.files("datasets/user/features") if name.startswith("data/")]


def test_images_in_several_chunks(output, source, teacher_folder, tmp_path):
    """More than 2 GB of images in one file have several; they are never one array."""
    parts = datasets.load_from_disk(source)
    joined = {
        split: datasets.concatenate_datasets([part.select(range(2)), part.select(range(2, len(part)))])
        for split, part in parts.items()
    }
    assert len(joined["train"].with_format("arrow")[:5]["image"].chunks) == 2
    add(datasets.DatasetDict(joined), [load_teacher(str(teacher_folder))], tmp_path / "out")
    whole = datasets.load_dataset(str(output))
    for split, part in datasets.load_dataset(str(tmp_path / "out")).items():
        assert part["image_id"][:] == whole[split]["image_id"][:]
        for name in TEACHER_COLUMNS:
            for got, expected in zip(part[name], whole[split][name]):
                np.testing.assert_allclose(got, expected, rtol=1e-2, atol=1e-3)


def test_a_dataset_of_the_hub_is_named_on_the_card(teacher_folder, tmp_path, hub):
    datasets.DatasetDict({"train": make_rows(3).remove_columns(TEACHER_COLUMNS)}).push_to_hub("user/photos")
    script.main(arguments("user/photos", teacher_folder, tmp_path / "out"))
    assert "# user/photos with teacher features" in (tmp_path / "out" / "README.md").read_text()


def test_a_mistyped_dataset_is_named(teacher_folder, tmp_path):
    with pytest.raises(SystemExit, match="error: .*no-such-data"):
        script.main(arguments(tmp_path / "no-such-data", teacher_folder, tmp_path / "out"))
    assert not list(tmp_path.iterdir())
