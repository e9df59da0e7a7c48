"""Features that other programs made: keyed by id, or of the published scripts by row; or refused."""

import json
import pickle
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_rows
from safetensors.numpy import save_file
from tiny_towers import small_run

import train
from datasets_scripts import import_teacher_features as script
from rows.checks import check_dataset
from rows.teacher_columns import TEACHER_COLUMNS, teacher_rows
from trainers.teacher_pca import load_pca


DOCS = Path(script.__file__).parents[1] / "docs" / "guides" / "teachers.md"


@pytest.fixture
def made(tmp_path):
    """Rows of two splits, and their features as the published scripts save them."""
    parts = {"train": make_rows(9), "test": make_rows(4, seed=1)}
    options = [
        "--dataset_name",
        str(tmp_path / "data"),
        "--teacher_model_name_or_path",
        "BEiT-3",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    for split, part in parts.items():
        counts = [len(captions) for captions in part["captions"]]
        image = torch.tensor(part["teacher_image_embeds"]).repeat_interleave(torch.tensor(counts), dim=0)
        text = torch.cat([torch.tensor(rows) for rows in part["teacher_text_embeds"]])
        torch.save(image, tmp_path / f"{split}-image.pt")
        torch.save(text, tmp_path / f"{split}-text.pt")
        options += ["--features", split, str(tmp_path / f"{split}-image.pt"), str(tmp_path / f"{split}-text.pt")]
    plain = {split: part.remove_columns(TEACHER_COLUMNS) for split, part in parts.items()}
    datasets.DatasetDict(plain).save_to_disk(tmp_path / "data")
    return tmp_path, parts, options


def check(folder, parts):
    out = datasets.load_dataset(str(folder))
    assert list(out) == list(parts)
    for split, part in parts.items():
        check_dataset(out[split], split, 16)
        for got, expected in zip(out[split], part):
            for name in ("image_id", "group_id", "captions", *TEACHER_COLUMNS):
                assert got[name] == expected[name], name
            assert np.array_equal(got["image"], expected["image"])


def test_features_are_keyed(made):
    folder, parts, options = made
    script.main(options)
    check(folder / "out", parts)
    assert '"id": "BEiT-3"' in datasets.load_dataset(str(folder / "out"))["train"][0]["teacher"]


# Keyed files


@pytest.fixture
def keyed(made):
    """The same features by image_id and by caption, in another order, and how to write and import them."""
    folder, parts, options = made
    image, text, by_image = {}, {}, {}
    for part in parts.values():
        for row in part:
            image[row["image_id"]] = row["teacher_image_embeds"]
            text.update(zip(row["captions"], row["teacher_text_embeds"]))
    for split, part in parts.items():  # some captions stand twice
        embeds = [[text[caption] for caption in captions] for captions in part["captions"]]
        by_image.update(zip(part["image_id"], embeds))
        parts[split] = datasets.Dataset.from_dict({**part[:], "teacher_text_embeds": embeds}, features=part.features)
    rng = np.random.default_rng(0)

    def shuffled(features):
        return {name: features[name] for name in rng.permutation(list(features)).tolist()}

    return folder, parts, options[:6], shuffled(image), shuffled(text), shuffled(by_image)


def write(path, key, ids, features, dtype=np.float32):
    features = np.array(features, dtype)
    if path.suffix == ".parquet":
        pq.write_table(pa.table({key: ids, "score": [1.0] * len(ids), "embedding": features.tolist()}), path)
        return path
    np.save(path, features) if path.suffix == ".npy" else save_file({"embeddings": features}, path)
    path.with_suffix(".json").write_text(json.dumps({key: list(ids)}))
    return path


def command(options, image, text):
    paths = [[str(path) for path in (part if isinstance(part, list) else [part])] for part in (image, text)]
    return [*options, "--image_features", *paths[0], "--text_features", *paths[1]]


@pytest.mark.parametrize("form", [".npy", ".safetensors", ".parquet"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_features_of_any_form_by_image_id_and_caption(keyed, form, dtype):
    folder, parts, options, image, text, _ = keyed
    files = [
        write(folder / f"{key}{form}", key, list(features), list(features.values()), dtype)
        for key, features in (("image_id", image), ("caption", text))
    ]
    script.main(command(options, *files))
    check(folder / "out", parts)


def test_captions_by_image_id_in_several_files(keyed):
    folder, parts, options, image, _, by_image = keyed
    ids = [image_id for image_id, features in by_image.items() for _ in features]
    features = [row for rows in by_image.values() for row in rows]
    images = write(folder / "image.npy", "image_id", list(image), list(image.values()))
    texts = [
        write(folder / f"text-{i}{form}", "image_id", ids[start:stop], features[start:stop])
        for i, (form, start, stop) in enumerate(((".npy", 0, 7), (".parquet", 7, 8), (".safetensors", 8, len(ids))))
    ]
    script.main(command(options, images, texts))
    check(folder / "out", parts)


def test_many_rows_are_written_in_several_files(keyed, monkeypatch):
    folder, parts, options, image, text, _ = keyed
    monkeypatch.setattr(script, "SHARD_ROWS", 4)
    monkeypatch.setattr("datasets_scripts.feature_files.ROWS_AT_ONCE", 3)
    images = write(folder / "image.npy", "image_id", list(image), list(image.values()))
    texts = write(folder / "text.npy", "caption", list(text), list(text.values()))
    script.main(command(options, images, texts))
    check(folder / "out", parts)
    assert sum(1 for _ in (folder / "out" / "data").glob("train-*.parquet")) == 3


def test_the_output_is_that_of_add_teacher_features(keyed, hub):
    folder, parts, options, image, text, _ = keyed
    images = write(folder / "image.npy", "image_id", list(image), list(image.values()))
    texts = write(folder / "text.npy", "caption", list(text), list(text.values()))
    script.main([*command(options, images, texts), "--push_to_hub", "user/imported"])
    assert {path.name for path in (folder / "out").iterdir()} == {"data", "README.md", "teacher_pca.safetensors"}
    card = (folder / "out" / "README.md").read_text()
    assert "| test | 4 |" in card and "BEiT-3" in card and str(folder) not in card
    image_rows, text_rows = teacher_rows(datasets.load_dataset(str(folder / "out"))["train"])
    assert load_pca(folder / "out").shape == (image_rows.shape[1], text_rows.shape[1])
    check("user/imported", parts)


def test_ids_that_are_missing_unknown_or_named_twice(keyed):
    folder, _, options, image, text, by_image = keyed
    images, texts = (list(image), list(image.values())), (list(text), list(text.values()))

    def message(images, texts, key="caption"):
        files = write(folder / "i.npy", "image_id", *images), write(folder / "t.parquet", key, *texts)
        with pytest.raises(SystemExit) as stop:
            script.main(command(options, *files))
        assert not (folder / "out").exists() and not list(folder.glob(".out*"))
        return stop.value.code

    def without(part, *places):
        return tuple([value for i, value in enumerate(values) if i not in places] for values in part)

    def with_one(part, name):
        return [*part[0], name], [*part[1], part[1][0]]

    for part, key, option in ((images, "image_id", "--image_features"), (texts, "caption", "--text_features")):

        def say(changed, option=option):
            return message(changed, texts) if option == "--image_features" else message(images, changed)

        assert re.fullmatch(
            rf"error: {option} have no row of {key} '.*' of the t\w+ split: each needs one.", say(without(part, 3))
        )
        assert "and 8 more of the train split" in say((["x"], part[1][:1])) or key == "caption"
        assert f"{option} name the {key} 'nobody', which no row of the dataset has" in say(with_one(part, "nobody"))
        assert f"{option} name the {key} {part[0][5]!r} twice" in say(with_one(part, part[0][5]))
    ids = [image_id for image_id, features in by_image.items() for _ in features]
    rows = [row for rows in by_image.values() for row in rows]
    count = ids.count(ids[0])
    said = message(images, ([*ids, ids[0]], [*rows, rows[0]]), "image_id")
    assert f"--text_features have {count + 1} rows of image_id {ids[0]!r} for its {count} captions" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, 1e-9, 1e5])
def test_features_that_are_none_name_their_file_and_id(keyed, value):
    folder, _, options, image, text, _ = keyed
    features = np.array(list(text.values()), np.float32)
    features[4] = value
    images = write(folder / "image.npy", "image_id", list(image), list(image.values()))
    refused(
        command(options, images, write(folder / "text.npy", "caption", list(text), features)),
        f"text.npy: the feature of caption {list(text)[4]!r} is NaN, infinite or zero in float16",
    )


def test_files_that_are_none_are_refused(keyed):
    folder, _, options, image, text, _ = keyed
    ids, features = list(image), np.array(list(image.values()), np.float32)
    texts = write(folder / "text.npy", "caption", list(text), list(text.values()))

    def say(path, message):
        refused(command(options, path, texts), message)

    say(folder / "none.npy", "none.npy cannot be read as an array of numpy: .*No such file")
    say(folder / "none.safetensors", "none.safetensors cannot be read as safetensors")
    say(folder / "none.parquet", "none.parquet cannot be read as parquet")
    say(folder / "features.csv", "features.csv: expected a file of features that ends in .npy, .safetensors, .parquet")
    for name in ("broken.npy", "broken.safetensors", "broken.parquet"):
        (folder / name).write_bytes(b"PAR1 no features")
        say(folder / name, f"{name} cannot be read as")
    np.save(folder / "objects.npy", np.array([Mark()], object), allow_pickle=True)
    say(folder / "objects.npy", "objects.npy cannot be read as an array of numpy")
    for wrong in (features[0], features[None], features.astype(np.int64), features[:0]):
        say(
            write(folder / "wrong.npy", "image_id", ids, wrong, wrong.dtype),
            r"wrong.npy holds .*: expected features as",
        )
    say(write(folder / "narrow.npy", "image_id", ids, features[:, :8]), "8 wide, text features 16")
    np.save(folder / "alone.npy", features)
    say(folder / "alone.npy", 'alone.npy has no ids: write them to alone.json beside it, as {"image_id": ')
    path = write(folder / "images.npy", "image_id", ids, features)
    for content, message in (
        ("{", "images.json cannot be read"),
        (json.dumps(ids), 'expected ids as {"image_id": '),
        (json.dumps({"caption": ids}), 'expected ids as {"image_id": '),
        (json.dumps({"image_id": ids[1:]}), "12 under 'image_id' for 13 rows of features"),
        (json.dumps({"image_id": "a"}), "str under 'image_id' for 13 rows"),
        (json.dumps({"image_id": [*ids[1:], 7]}), "7 under 'image_id' is no string"),
        (json.dumps({"image_id": [*ids[1:], None]}), "None under 'image_id' is no string"),
    ):
        path.with_suffix(".json").write_text(content)
        say(path, re.escape(message).replace("'", "."))
    save_file({"a": features, "b": features}, folder / "two.safetensors")
    say(folder / "two.safetensors", "two.safetensors holds 2 tensors .a, b.: expected one")
    for table, message in (
        ({"caption": ids, "e": features.tolist()}, "has the columns caption, e: expected image_id"),
        (
            {"image_id": ids, "e": features.tolist(), "f": features.tolist()},
            "expected image_id, and one column of lists",
        ),
        ({"image_id": ids, "e": [[1.0]] * 12 + [[1.0, 2.0]]}, "expected lists of one length, found lists of 1 to 2"),
        ({"image_id": ids, "e": [[1.0]] * 12 + [None]}, "expected lists of one length, found lists of 0 to 1"),
        ({"image_id": ids, "e": [[1.0, None]] * 13}, "column e: a number is missing"),
        ({"image_id": list(range(13)), "e": features.tolist()}, "0 under .image_id. is no string"),
    ):
        pq.write_table(pa.table(table), folder / "wrong.parquet")
        say(folder / "wrong.parquet", message)
    several = [write(folder / "a.npy", "image_id", ids[:5], features[:5])]
    several.append(write(folder / "b.npy", "image_id", ids[5:], features[5:, :8]))
    say(several, "b.npy is 8 wide, and .*a.npy 16")
    say([several[0]], "have no row of image_id .* of the train split")


def test_files_keyed_in_two_ways_are_refused(keyed):
    folder, _, options, image, text, _ = keyed
    images = write(folder / "image.npy", "image_id", list(image), list(image.values()))
    one = write(folder / "one.npy", "caption", list(text), list(text.values()))
    other = write(folder / "other.npy", "image_id", list(image), list(image.values()))
    refused(command(options, images, [one, other]), "other.npy is keyed by image_id, and .*one.npy by caption")


def test_the_two_ways_do_not_mix(made, capsys):
    _, _, options = made
    for wrong in (options[:6], [*options[:6], "--image_features", "a.npy"], [*options, "--text_features", "a.npy"]):
        with pytest.raises(SystemExit):
            script.main(wrong)
        assert "give --image_features and --text_features, or --features" in capsys.readouterr().err


def test_the_docs_example_and_commands_end_in_a_student(keyed, monkeypatch):
    folder, parts, *_ = keyed
    (folder / "data").rename(folder / "mine")
    (folder / "data").mkdir()
    (folder / "mine").rename(folder / "data" / "mine")
    monkeypatch.chdir(folder)
    section = DOCS.read_text().split("## Features from any program")[1]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    commands = re.search(
        r"```bash\npython -m datasets_scripts.import_teacher_features (.*)\naccelerate launch train.py (.*)\n```",
        section,
        re.DOTALL,
    )
    imports, trains = commands.groups()
    known = {np.asarray(row["image"]).tobytes(): row for part in parts.values() for row in part}
    texts = {t: f for row in known.values() for t, f in zip(row["captions"], row["teacher_text_embeds"])}
    embed = {
        "embed_image": lambda image: np.array(known[np.asarray(image).tobytes()]["teacher_image_embeds"]),
        "embed_text": lambda text: np.array(texts[text]),
    }
    exec(example, embed)
    script.main(shlex.split(imports.replace("\\\n", " ")))
    check(folder / "data" / "mine_features", parts)
    # Split names: these rows have no validation split.
    command = shlex.split(trains.replace("\\\n", " ").replace("recipes", str(DOCS.parents[2] / "recipes")))
    train.main([*command, "--validation_split", "test", *small_run("towers")])
    results = json.loads(Path("runs/mine/all_results.json").read_text())
    assert results["test_images"] == 4 and results["teacher_test_rsum"] > 0
    assert "distilled from my encoder" in Path("runs/mine/README.md").read_text()


# The published scripts' files


def refused(options, message):
    with pytest.raises(SystemExit, match=message):
        script.main(options)


def test_other_counts_and_orders_are_refused(made):
    folder, _, options = made
    image = torch.load(folder / "train-image.pt", weights_only=True)
    torch.save(image[:-1], folder / "train-image.pt")
    refused(options, "image features for the .* captions of the train split")
    torch.save(image.roll(1, dims=0), folder / "train-image.pt")
    refused(options, "train split, row .* not in the order")
    torch.save(image[:, :8], folder / "train-image.pt")
    refused(options, "8 wide, text features 16")
    part = datasets.load_from_disk(folder / "data")["train"]
    image[: len(part[0]["captions"])] = float("nan")
    torch.save(image, folder / "train-image.pt")
    refused(options, "train-image.pt: the feature of image_id .0/0. is NaN, infinite or zero in float16")
    assert not (folder / "out").exists()


def test_half_precision_noise_among_an_images_rows_is_accepted(made):
    folder, parts, options = made
    image = torch.load(folder / "train-image.pt", weights_only=True)
    torch.save(image + 1e-3 * torch.randn_like(image), folder / "train-image.pt")
    script.main(options)
    got = datasets.load_dataset(str(folder / "out"))["train"]["teacher_image_embeds"][:]
    assert np.allclose(got, parts["train"]["teacher_image_embeds"][:], atol=1e-2)


class Mark:
    def __reduce__(self):
        return (print, ("this ran",))


def test_a_pickle_that_would_run_code_is_refused(made, capsys):
    folder, _, options = made
    for save in (lambda path: torch.save(Mark(), path), lambda path: path.write_bytes(pickle.dumps(Mark()))):
        save(folder / "train-image.pt")
        refused(options, "was not read")
        assert "this ran" not in capsys.readouterr().out
    torch.save({"features": torch.ones(2, 2)}, folder / "train-image.pt")
    refused(options, "holds dict")


def test_each_split_needs_its_features(made):
    _, _, options = made
    refused(options[:-4], "the dataset has train, test")
    refused([*options, *options[-4:]], "names train, test, test; the dataset has train, test. Give each once")


def test_a_row_without_captions_is_named(made):
    folder, _, options = made
    rows = datasets.load_from_disk(folder / "data")
    emptied = rows["train"].map(lambda row, i: {"captions": [] if i == 8 else row["captions"]}, with_indices=True)
    datasets.DatasetDict({"train": emptied, "test": rows["test"]}).save_to_disk(folder / "emptied")
    options[options.index("--dataset_name") + 1] = str(folder / "emptied")
    refused(options, "1 rows of the train split .* have no captions, or no image")
