"""The engines of docs/guides/search.md, by its snippets, on vectors that inference.embed wrote; the benchmark's."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from tiny_towers import scatter

from benchmarks import search_engines
from inference import embed


ROOT = Path(__file__).parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/guides/search.md").read_text(encoding="utf-8"), re.DOTALL)
ENGINES = {
    "plain": "vectors @ query))[:10]",
    "faiss": "index_factory",
    "bits": "IndexBinaryFlat",
    "lancedb": "import lancedb",
    "qdrant": "import qdrant_edge",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    for part in (scatter(make_student()[0]), make_student()[1]):
        part.save_pretrained(folder / "student")
    (folder / "images").mkdir()
    for i, image in enumerate(make_rows(30)["image"]):
        image.save(folder / "images" / f"{i}.png")
    names = ["--model_name_or_path", str(folder / "student"), "--images", str(folder / "images")]
    embed.main([*names, "--output_dir", str(folder / "vectors"), "--shard_rows", "8"])
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_a_snippet_finds_what_a_plain_product_finds(place, engine, monkeypatch):
    monkeypatch.chdir(place)
    names = {}
    exec(SNIPPETS[0], names)
    assert len(names["ids"]) == 30 and names["vectors"].shape == (30, 16)
    np.testing.assert_allclose(np.linalg.norm(names["vectors"], axis=1), 1, atol=1e-3)
    query = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    names["query"] = query.numpy()
    (snippet,) = [snippet for snippet in SNIPPETS if ENGINES[engine] in snippet]
    exec(snippet, names)
    scores = {own: float(vector @ names["query"]) for own, vector in zip(names["ids"], names["vectors"])}
    right = sorted(scores, key=scores.get, reverse=True)[:10]
    assert [scores[own] for own in names["found"]] == pytest.approx([scores[own] for own in right], abs=1e-5)


@pytest.mark.parametrize("kind", search_engines.KINDS)
def test_the_benchmark_measures_an_engine(tmp_path, monkeypatch, kind):
    def seconds_of(call) -> float:
        """As many as make the median's place in the row plain: the build, then engine and product in turns."""
        call()
        called.append(call)
        return 3.0 if len(called) == 1 else (0.25, 0.5)[len(called) % 2]

    called = []
    monkeypatch.setattr(search_engines, "seconds_of", seconds_of)
    queries = search_engines.make_vectors(1000, 16, 5, tmp_path / "v.npy")
    row = search_engines.measure("FAISS", kind, tmp_path / "v.npy", queries, tmp_path)
    assert len(row) == len(search_engines.HEADER) and row[:2] == ["FAISS", kind]
    assert 1 >= float(row[-1]) > (0.9 if kind != "binary" else 0.5)
    assert [row[2], *row[5:7]] == ["3", "250.0", "500.0"] and len(called) == 1 + 2 * len(queries)
    assert [path.name for path in tmp_path.iterdir()] == ["v.npy"]
