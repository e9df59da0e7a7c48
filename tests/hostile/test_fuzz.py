"""Whatever a file holds: what it says, or an error of ours that names it; no traceback, no hang, nothing half-written.

Seeded: 500 examples in all here, 10,000 in `make soak`.
"""

import io
import json
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
import yaml
from conftest import make_rows
from hostile.fuzzing import NASTY, TEXT, TIMES, VALUES, fuzz, mutations
from hypothesis import strategies as st
from image_files import encoded, picture
from PIL import Image
from safetensors.numpy import save_file
from tiny_trainer import make_trainer
from transformers import HfArgumentParser

import train
from datasets_scripts import coco, import_teacher_features, own_data
from datasets_scripts.data_loading import DataArguments
from datasets_scripts.feature_files import read_features
from datasets_scripts.opening import open_dataset
from rows.checks import check_dataset
from rows.images import load_rgb
from trainers import DSMDTrainingArguments
from trainers.run import checkpoints
from trainers.student import StudentArguments


pytestmark = pytest.mark.parametrize("times", TIMES)
FIELDS = sorted(
    action.dest for action in HfArgumentParser((StudentArguments, DataArguments, DSMDTrainingArguments))._actions
)
# Of Trainer, which would start other programs or ask other hosts for a file.
FIELDS = [name for name in FIELDS if name not in ("help", "deepspeed", "fsdp", "fsdp_config", "output_dir")]
WAYS = ["flip", "cut", "add", "gone"]
IMAGES = [
    *(encoded(picture(0, size=(24, 16)), name) for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF")),
    encoded(picture(0, "CMYK", (24, 16)), "JPEG", progressive=True),
    encoded(picture(0, "P", (24, 16)), "PNG", transparency=0),
    encoded(picture(0, size=(24, 16)), "TIFF", compression="tiff_lzw"),
    encoded(picture(0, size=(24, 16)), "AVIF", save_all=True, append_images=[picture(1, size=(24, 16))]),
    encoded(picture(0, size=(24, 16)), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
]


def build(tmp_path, main, arguments: list) -> None:
    """Runs a builder: an output that `check_dataset` takes, or an error of ours and no trace of an output."""
    output = tmp_path / "out"
    before = {*os.listdir(tmp_path)}
    try:
        main([*map(str, arguments), "--output_dir", str(output)])
    except (FileNotFoundError, ValueError) as error:
        assert str(error)
    except SystemExit as stop:
        assert str(stop.code).startswith("error: ")
    else:
        for split, part in open_dataset(str(output)).items():
            check_dataset(part, split, None)
        shutil.rmtree(output)
    assert {*os.listdir(tmp_path)} - before <= {"out.broken.txt"}


def test_images(times):
    @fuzz(150 * times, data=mutations(IMAGES))
    def check(data):
        try:
            image = load_rgb({"bytes": data, "path": None})
        except ValueError as error:
            assert str(error).startswith("unreadable image: ")
        else:
            assert image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS


def test_recipes_of_any_value(times, tmp_path):
    @fuzz(60 * times, recipe=st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
    def check(recipe):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=False))
        parsed(tmp_path)


def test_recipes_of_any_bytes(times, tmp_path):
    lines = b"learning_rate: 1e-3\nlosses: [feature]\nvision_config: {model_type: vit}\ndataset_name: &a x\n"

    @fuzz(30 * times, data=mutations([lines]) | st.binary(max_size=60) | VALUES.map(lambda v: json.dumps(v).encode()))
    def check(data):
        (tmp_path / "recipe.yaml").write_bytes(data)
        parsed(tmp_path)


def parsed(folder) -> None:
    arguments = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "run"), "--use_cpu", "True"]
    try:
        train.parse_arguments(arguments)
    except ValueError as error:
        assert str(error)
    except SystemExit as stop:
        assert stop.code == 2  # argparse has said which setting and why
    assert not (folder / "run").exists()


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.png").write_bytes(encoded(picture(i, size=(8, 8)), "PNG"))
    return folder


NAMES = st.sampled_from([f"{i}.png" for i in range(12)])
CELLS = st.fixed_dictionaries(
    {"file_name": NAMES | VALUES, "captions": st.lists(TEXT, max_size=3) | VALUES},
    optional={"image_id": VALUES, "group_id": VALUES, "split": st.sampled_from(["train", "test"]) | VALUES},
)


def test_metadata(times, tmp_path, source):
    whole = [{"file_name": f"{i}.png", "captions": [f"a {i}"]} for i in range(12)]

    @fuzz(50 * times, rows=st.lists(CELLS, min_size=1, max_size=6), padded=st.booleans())
    def check(rows, padded):
        lines = map(json.dumps, rows + whole * padded)
        (source / "metadata.jsonl").write_text("\n".join(lines))
        build(tmp_path, own_data.main, [source])


def test_bytes_of_metadata(times, tmp_path, source):
    whole = "\n".join(json.dumps({"file_name": f"{i}.png", "captions": [f"a {i}", "ü"]}) for i in range(12)).encode()

    @fuzz(30 * times, data=mutations([whole]))
    def check(data):
        (source / "metadata.jsonl").write_bytes(data)
        build(tmp_path, own_data.main, [source])


def test_tables(times, tmp_path, source):
    rows = "".join(f'{i}.png,"a {i}"\n' for i in range(12))
    csv, tsv = f"path,caption\n{rows}", f"path\tcaption\n{rows.replace(',', chr(9))}"

    @fuzz(40 * times, data=mutations([csv.encode(), tsv.encode()]), suffix=st.sampled_from(["csv", "tsv"]))
    def check(data, suffix):
        (source / f"data.{suffix}").write_bytes(data)
        build(tmp_path, own_data.main, [source / f"data.{suffix}"])


def test_tars(times, tmp_path):
    import tarfile

    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for i in range(12):
            image = encoded(picture(i, size=(8, 8)), "PNG")
            for name, data in ((f"{i}.png", image), (f"{i}.json", b'{"captions": ["a"]}')):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))

    @fuzz(20 * times, data=mutations([whole.getvalue()]))
    def check(data):
        (tmp_path / "data.tar").write_bytes(data)
        build(tmp_path, own_data.main, [tmp_path / "data.tar"])


def test_karpathy(times, tmp_path, source):
    sentences = st.lists(st.fixed_dictionaries({"raw": TEXT | VALUES}), max_size=2) | VALUES
    split = st.sampled_from(["train", "restval", "val", "test"])
    entry = st.fixed_dictionaries(
        {"filename": NAMES | NASTY, "filepath": st.just("."), "split": split | VALUES, "sentences": sentences},
        optional={"imgid": st.integers(0, 9) | VALUES, "cocoid": st.integers(0, 9) | VALUES},
    )

    @fuzz(40 * times, content=st.fixed_dictionaries({"images": st.lists(entry | VALUES, max_size=5)}) | VALUES)
    def check(content):
        (tmp_path / "split.json").write_text(json.dumps(content))
        arguments = ["--karpathy", tmp_path / "split.json", "--images", source, "--allow_other_counts"]
        build(tmp_path, coco.main, arguments)


def test_feature_files(times, tmp_path):
    rows = make_rows(6).select_columns(["image", "captions", "image_id"])
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "rows")
    count = sum(map(len, rows["captions"]))
    buffer = io.BytesIO()
    torch.save(torch.ones(count, 4), buffer)

    @fuzz(30 * times, data=mutations([buffer.getvalue()]) | st.binary(max_size=100))
    def check(data):
        (tmp_path / "features.pt").write_bytes(data)
        which = ["--features", "train", tmp_path / "features.pt", tmp_path / "features.pt"]
        arguments = ["--dataset_name", tmp_path / "rows", *which, "--teacher_model_name_or_path", "any"]
        build(tmp_path, import_teacher_features.main, arguments)


@pytest.mark.parametrize("form", [".npy", ".safetensors", ".parquet"])
def test_keyed_feature_files(times, tmp_path, form):
    ids, features = [f"image {i}" for i in range(6)], np.ones((6, 4), np.float32)
    whole = tmp_path / f"whole{form}"
    if form == ".parquet":
        datasets.Dataset.from_dict({"image_id": ids, "features": features}).to_parquet(whole)
    else:
        np.save(whole, features) if form == ".npy" else save_file({"features": features}, whole)

    @fuzz(20 * times, data=mutations([whole.read_bytes()]), named=mutations([json.dumps({"image_id": ids}).encode()]))
    def check(data, named):
        (tmp_path / f"data{form}").write_bytes(data)
        (tmp_path / "data.json").write_bytes(named)
        try:
            read_features([tmp_path / f"data{form}"], ["image_id"])
        except ValueError as error:
            assert str(error)


def test_parquet(times, tmp_path, monkeypatch):
    """Of features, and as a source of own data."""
    make_rows(6).to_parquet(tmp_path / "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()

    @fuzz(20 * times, data=mutations([whole]))
    def check(data):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        (folder / "train.parquet").write_bytes(data)
        try:
            for split, part in open_dataset(str(folder)).items():
                check_dataset(part, split, 16)
        except ValueError as error:
            assert str(error)
        build(tmp_path, own_data.main, [folder / "train.parquet"])


def test_checkpoints(times, tmp_path):
    trainer = make_trainer(tmp_path, make_rows(16), save_strategy="steps", save_steps=1)
    trainer.train()
    (folder,) = checkpoints.of_run(tmp_path)
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    @fuzz(
        30 * times,
        path=st.sampled_from(list(files)),
        at=st.floats(0, 1),
        how=st.sampled_from("flip cut add gone".split()),
    )
    def check(path, at, how):
        data = files[path]
        place = min(int(at * len(data)), len(data) - 1)
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        changed = {"flip": flipped, "cut": data[:place], "add": data + b"x", "gone": None}[how]
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        try:
            wrong = checkpoints.damage(folder)
            if path.name == checkpoints.MANIFEST and wrong is None:
                json.loads(changed)  # blanks, say: it still names the same
            elif path.name != checkpoints.MANIFEST:
                assert path.name in wrong
            if wrong is not None:
                with pytest.raises(ValueError, match="is damaged"):
                    trainer.train(resume_from_checkpoint=str(folder))
                assert checkpoints.last_whole(tmp_path) is None
        finally:
            path.write_bytes(data)
