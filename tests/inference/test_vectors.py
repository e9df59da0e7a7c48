"""Folders of vectors are searched: against a plain computation, by their own model alone, by labelled queries."""

import csv
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import DIM, make_rows
from image_files import encoded, picture
from vector_folders import COUNT, assert_close, contents, expected, of_folder, run

from inference import search, vectors
from inference.queries import rank_of, read_queries
from inference.vectors import Result, VectorIndex, read_facts, read_shard
from teachers import load_teacher
from trainers.teacher_pca import save_pca


def found(capsys) -> list[tuple[str, float]]:
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.endswith("images:"))
    return [(line.split()[1], float(line.split()[0])) for line in lines[first + 1 :] if line.startswith("  ")]


@pytest.mark.parametrize("width", [None, 5])
def test_search_of_vectors_is_a_plain_computation(models, images, tmp_path, capsys, width):
    run(models / "clip_alone", images, tmp_path / "vectors")
    more = [] if width is None else ["--truncate_dim", str(width)]
    arguments = ["--model_name_or_path", str(models / "clip_alone"), "--index", str(tmp_path / "vectors"), "a cat"]
    capsys.readouterr()
    search.main([*arguments, "--k", "4", *more])
    results = found(capsys)
    own = expected(models / "clip_alone", of_folder(images))
    own = {k: v[:width] / np.linalg.norm(v[:width]) for k, v in own.items()}
    query = expected(models / "clip_alone", {"q": "a cat"}, "text")["q"][:width]
    query = query / np.linalg.norm(query)
    scores = {name: float(row @ query) for name, row in own.items()}
    assert [score for _, score in results] == pytest.approx(sorted(scores.values(), reverse=True)[:4], abs=2e-3)
    assert all(scores[name] == pytest.approx(score, abs=2e-3) for name, score in results)


def test_search_brings_the_index_up_to_date_where_images_are_given(models, images, tmp_path, capsys):
    run(models / "student", images, tmp_path / "vectors")
    (images / "new.png").write_bytes(encoded(picture(99), "PNG"))
    (images / "0.png").unlink()
    names = ["--model_name_or_path", str(models / "student"), "--index", str(tmp_path / "vectors")]
    search.main([*names, "--images", str(images), "a", "--k", "99", "--grid", str(tmp_path / "grid.png")])
    assert {name for name, _ in found(capsys)} == {str(path.relative_to(images)) for path in images.rglob("*.png")}
    assert (tmp_path / "grid.png").is_file()


def test_a_shard_of_another_width_is_named(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    table, embeds = read_shard(tmp_path / "vectors" / "images-00001.parquet")
    vectors.write_shard(tmp_path / "vectors" / "images-00001.parquet", table.to_pydict(), embeds[:, :1], False)
    with pytest.raises(ValueError, match=r"images-00001.parquet holds vectors of shape \(4, 1\), not \(4, 16\)"):
        VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")


def test_results_of_a_dataset_are_drawn_from_its_rows(models, tmp_path, capsys):
    datasets.DatasetDict(test=make_rows(5)).save_to_disk(tmp_path / "rows")
    run(models / "student", tmp_path / "rows", tmp_path / "vectors")
    names = ["--model_name_or_path", str(models / "student"), "--index", str(tmp_path / "vectors")]
    search.main([*names, "--images", str(tmp_path / "rows"), "a", "--grid", str(tmp_path / "grid.png")])
    assert len(found(capsys)) == 5 and (tmp_path / "grid.png").is_file()


def test_vectors_of_another_model_are_refused(models, images, tmp_path):
    run(models / "clip_alone", images, tmp_path / "vectors")
    student = load_teacher(str(models / "student"))
    with pytest.raises(ValueError, match="vectors of clip_alone, and runs/x has other weights or preprocessing"):
        VectorIndex.open(tmp_path / "vectors", student, "runs/x")
    with pytest.raises(ValueError, match="which differ in their fingerprint, width"):
        run(models / "student", images, tmp_path / "vectors")
    with pytest.raises(ValueError, match="which differ in their width"):
        run(models / "clip_alone", images, tmp_path / "vectors", "--truncate_dim", "3")
    assert read_facts(tmp_path / "vectors")["complete"]
    shutil.copytree(models / "clip_alone", tmp_path / "another_name")
    clip = load_teacher(str(tmp_path / "another_name"))
    assert len(VectorIndex.open(tmp_path / "vectors", clip, "another_name")) == COUNT
    with torch.no_grad():
        clip.model.text_projection.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        VectorIndex.open(tmp_path / "vectors", clip, "another_name")


def test_a_fingerprint_is_of_what_makes_features(models, tmp_path):
    encoder = load_teacher(str(models / "student"))
    seen = {vectors.fingerprint(encoder)}
    encoder.model.save_pretrained(tmp_path / "copy")
    for part in (encoder.image_processor, encoder.tokenizer):
        part.save_pretrained(tmp_path / "copy")
    assert vectors.fingerprint(load_teacher(str(tmp_path / "copy"))) in seen
    changes = [
        lambda: encoder.model.logit_scale.data.add_(1e-3),
        lambda: setattr(encoder.model.config, "vision_pooling", "cls"),  # of the same weights
        lambda: setattr(encoder.model.config.vision_config, "num_attention_heads", 4),
        lambda: setattr(encoder.image_processor, "image_mean", [0.4] * 3),
        lambda: encoder.text_settings.update(max_length=3),
        lambda: encoder.model.half(),
    ]
    for i, change in enumerate(changes):
        change()
        encoder.dtype = encoder.model.dtype
        seen.add(vectors.fingerprint(encoder))
        assert len(seen) == 2 + i


def test_a_student_searches_what_its_teacher_embedded(models, images, tmp_path):
    """The teacher's features, brought to the student's space by the file that lies in the student's folder."""
    shutil.copytree(models / "student", tmp_path / "student")
    components = torch.linalg.qr(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))[0]
    save_pca(components, tmp_path / "student")
    run(models / "clip_alone", images, tmp_path / "vectors", "--student", tmp_path / "student")
    teacher = {k: v @ components.numpy() for k, v in expected(models / "clip_alone", of_folder(images)).items()}
    assert_close(contents(tmp_path / "vectors"), {k: v / np.linalg.norm(v) for k, v in teacher.items()})
    student = load_teacher(str(models / "student"))
    index = VectorIndex.open(tmp_path / "vectors", student, str(tmp_path / "student"))
    query = expected(models / "student", {"q": "a cat"}, "text")["q"][:6]
    best = index.search_text("a cat", 1)[0]
    scores = {k: float(v @ query / np.linalg.norm(v) / np.linalg.norm(query)) for k, v in teacher.items()}
    assert best.score == pytest.approx(max(scores.values()), abs=2e-3)
    with pytest.raises(ValueError, match="were brought to a student's space: search it with that student"):
        search.open_vectors(tmp_path / "vectors", load_teacher(str(models / "clip_alone")), "clip_alone", images)
    save_pca(components.flip(1).contiguous(), tmp_path / "student")
    with pytest.raises(ValueError, match="other weights"):
        VectorIndex.open(tmp_path / "vectors", student, str(tmp_path / "student"))
    with pytest.raises(ValueError, match="has no teacher_pca.safetensors"):
        run(models / "clip_alone", images, tmp_path / "v2", "--student", models / "student")
    with pytest.raises(ValueError, match=f"a teacher of 8 numbers, and .*student gives {DIM}"):
        run(models / "student", images, tmp_path / "v2", "--student", tmp_path / "student")
    assert not (tmp_path / "v2").exists()


def test_a_damaged_shard_is_named(models, images, tmp_path):
    run(models / "student", images, tmp_path / "vectors")
    (tmp_path / "vectors" / "images-00001.parquet").write_bytes(b"PAR1")
    encoder = load_teacher(str(models / "student"))
    with pytest.raises(ValueError, match="images-00001.parquet is damaged"):
        VectorIndex.open(tmp_path / "vectors", encoder, "student")
    (tmp_path / "vectors" / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json cannot be read"):
        VectorIndex.open(tmp_path / "vectors", encoder, "student")


def test_the_rank_of_a_query_counts_ties_against_the_model():
    results = [Result("a", 0.9), Result("b", 0.5), Result("c", 0.5), Result("d", 0.1)]
    assert [rank_of(results, right) for right in ({"a"}, {"b"}, {"c", "d"}, {"d"}, {"a", "d"})] == [1, 3, 3, 4, 1]
    assert rank_of(results, {"e"}) == 5  # an approximate search has not found it


def test_queries_of_a_table_are_evaluated(models, images, tmp_path, capsys):
    run(models / "student", images, tmp_path / "vectors")
    index = VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")
    best = [result.path for result in index.search_text("a cat", COUNT)]
    pairs = [
        ("a cat", best[0]),
        ("a cat ", best[3]),
        ("a dog", [r.path for r in index.search_text("a dog", COUNT)][4]),
    ]
    with open(tmp_path / "labelled.csv", "w", newline="") as file:
        csv.writer(file).writerows([("query", "file"), *pairs])
    capsys.readouterr()
    names = ["--model_name_or_path", str(models / "student"), "--queries", str(tmp_path / "labelled.csv")]
    search.main([*names, "--index", str(tmp_path / "vectors")])
    said = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert cells[0][0] == f"2 queries, {COUNT} images"
    assert [row[1] for row in cells[2:]] == ["50.0 %", "100.0 %", "100.0 %", "3"]  # ranks 1 and 5
    search.main([*names, "--images", str(images), "--cache_dir", str(tmp_path / "cache")])
    assert "answered among the first 5  | 100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, message",
    [
        ("query,file\na cat,nothing.png\n", "names 1 files that the index has not: nothing.png"),
        ("text,file\na,b\n", "it has the columns text, file, expected query and file"),
        ("query,file\n", "no line with a query and a file"),
        ("", "expected query and file"),
    ],
)
def test_queries_that_cannot_be_evaluated(tmp_path, text, message):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_queries(tmp_path / "q.csv", ["a.png"])
    with pytest.raises(ValueError, match="cannot be read"):
        read_queries(tmp_path / "nothing.csv", [])


@pytest.mark.parametrize("separator", [",", ";", "\t"])  # spreadsheets in Germany write semicolons
def test_queries_of_any_spreadsheet(tmp_path, separator):
    lines = [("query", "file"), ("ein Glas, rot", "a.png"), ("ein Stuhl", "b;c.png")]
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=separator).writerows(lines)
    assert read_queries(tmp_path / "q.csv", ["a.png", "b;c.png"]) == {
        "ein Glas, rot": {"a.png"},
        "ein Stuhl": {"b;c.png"},
    }


def test_chunks_of_an_index_are_one(models, images, tmp_path, monkeypatch):
    run(models / "student", images, tmp_path / "vectors")
    index = VectorIndex.open(tmp_path / "vectors", load_teacher(str(models / "student")), "student")
    whole = index.search_text("a cat", COUNT)
    monkeypatch.setattr(vectors, "CHUNK", 3)
    chunked = index.search_text("a cat", COUNT)
    assert [result.path for result in chunked] == [result.path for result in whole]
    assert [result.score for result in chunked] == pytest.approx([result.score for result in whole], abs=1e-6)
    with pytest.raises(ValueError, match="k=0: expected at least 1"):
        index.search_text("a cat", 0)


def test_sentence_transformers_cuts_the_same_numbers(models):
    from sentence_transformers import SentenceTransformer

    whole, cut = (
        SentenceTransformer(str(models / "student"), device="cpu", trust_remote_code=True, truncate_dim=width)
        for width in (None, 5)
    )
    expected = whole.encode(["a red house", "a cat"])
    np.testing.assert_allclose(cut.encode(["a red house", "a cat"]), expected[:, :5], atol=1e-6)
    np.testing.assert_allclose(
        cut.encode(["a cat"], normalize_embeddings=True)[0],
        expected[1, :5] / np.linalg.norm(expected[1, :5]),
        atol=1e-6,
    )
