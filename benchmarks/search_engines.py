"""A million vectors in FAISS, LanceDB and Qdrant: time to build, memory, milliseconds a query and recall at 10.

    pip install -e ".[engines]"
    python -m benchmarks.search_engines --rows 1000000

Vectors are made up: centres whose spectrum falls, and a hundred rows around each; queries lie near rows. Each engine
runs embedded, in a process of its own, and takes turns with a plain product of all rows: a busy machine slows both.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from model_cards.tables import markdown_table
from trainers.timing import machine, seconds_of


AROUND, BLOCK, K, OVERSAMPLED = 100, 50_000, 10, 10
HEADER = [
    "engine", "kind", "build, s", "memory, MB", "on disk, MB", "ms a query", "plain product, ms", "recall at 10"
]  # fmt: skip
Search = Callable[[np.ndarray], np.ndarray]  # [D] -> ids [K], best first


def make_vectors(rows: int, dim: int, queries: int, file: Path) -> np.ndarray:
    """Writes float32 unit rows `[rows, dim]` as .npy; returns queries `[queries, dim]`."""
    rng = np.random.default_rng(0)
    spectrum = (1 + np.arange(dim)) ** -0.5
    # With few rows around a centre the ten best would be strangers to each other, which no code of few bits can order.
    number = max(1, rows // AROUND)
    centres = rng.normal(size=(number, dim)) * spectrum
    out = np.lib.format.open_memmap(file, "w+", np.float32, (rows, dim))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        block = centres[rng.integers(0, number, count)] + 0.5 * rng.normal(size=(count, dim)) * spectrum
        out[start : start + count] = block / np.linalg.norm(block, axis=1, keepdims=True)
    out.flush()
    near = out[rng.integers(0, rows, queries)] + 0.4 * rng.normal(size=(queries, dim)) * spectrum / np.sqrt(dim) * 4
    return (near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32)


def plain(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The ids of the K best rows, by comparing with all."""
    scores = vectors @ query
    best = np.argpartition(-scores, K)[:K]
    return best[np.argsort(-scores[best])]


def build_faiss(vectors: np.ndarray, kind: str, folder: Path) -> Search:
    import faiss

    dim, cells = vectors.shape[1], int(len(vectors) ** 0.5)
    sample = vectors[np.sort(np.random.default_rng(0).permutation(len(vectors))[: 50 * cells])]
    if kind == "binary":  # the signs; the best of them are compared again by their floats
        rows = np.packbits(vectors > 0, axis=1)
        index = faiss.IndexBinaryFlat(dim)
        index.add(rows)
        faiss.write_index_binary(index, str(folder / "index"))

        def search(query: np.ndarray) -> np.ndarray:
            _, found = index.search(np.packbits(query > 0)[None], K * OVERSAMPLED)
            return found[0][plain(vectors[found[0]], query)]

        return search
    index = faiss.index_factory(dim, f"IVF{cells},{'Flat' if kind == 'float' else 'SQ8'}", faiss.METRIC_INNER_PRODUCT)
    index.train(sample)
    for start in range(0, len(vectors), BLOCK):
        index.add(vectors[start : start + BLOCK])
    index.nprobe = 32
    faiss.write_index(index, str(folder / "index"))
    return lambda query: index.search(query[None], K)[1][0]


def build_lancedb(vectors: np.ndarray, kind: str, folder: Path) -> Search:
    import lancedb
    import pyarrow as pa
    from lancedb.index import IvfFlat, IvfRq, IvfSq

    def batches():
        for start in range(0, len(vectors), BLOCK):
            block = vectors[start : start + BLOCK]
            column = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), block.shape[1])
            yield pa.record_batch({"id": pa.array(range(start, start + len(block))), "vector": column})

    first = next(batches())
    table = lancedb.connect(folder).create_table(
        "images", pa.RecordBatchReader.from_batches(first.schema, batches()), mode="overwrite"
    )
    cells = int(len(vectors) ** 0.5)
    kinds = {"float": IvfFlat, "int8": IvfSq, "binary": IvfRq}
    table.create_index("vector", config=kinds[kind](distance_type="dot", num_partitions=cells))

    def search(query: np.ndarray) -> np.ndarray:
        request = table.search(query).distance_type("dot").nprobes(32).limit(K).select(["id", "_distance"])
        if kind == "binary":
            request = request.refine_factor(OVERSAMPLED)
        return np.array(request.to_arrow()["id"])

    return search


def build_qdrant(vectors: np.ndarray, kind: str, folder: Path) -> Search:
    import qdrant_edge as qdrant

    quantization = {
        "float": None,
        "int8": qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, always_ram=True),
        "binary": qdrant.BinaryQuantizationConfig(always_ram=True),
    }[kind]
    hnsw = qdrant.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10_000)
    params = qdrant.EdgeVectorParams(vectors.shape[1], qdrant.Distance.Dot, on_disk=kind != "float")
    config = qdrant.EdgeConfig(vectors=params, hnsw_config=hnsw, quantization_config=quantization)
    shard = qdrant.EdgeShard.create(str(folder), config)
    for start in range(0, len(vectors), 10_000):
        block = vectors[start : start + 10_000]
        points = [qdrant.Point(start + i, row.tolist()) for i, row in enumerate(block)]
        shard.update(qdrant.UpdateOperation.upsert_points(points))
    shard.optimize()
    again = qdrant.QuantizationSearchParams(rescore=True, oversampling=3.0 if kind == "int8" else float(OVERSAMPLED))
    how = qdrant.SearchParams(hnsw_ef=128, quantization=None if kind == "float" else again)

    def search(query: np.ndarray) -> np.ndarray:
        request = qdrant.SearchRequest(qdrant.Query.Nearest(query.tolist()), K, params=how)
        return np.array([point.id for point in shard.search(request)])

    return search


ENGINES = {"FAISS": build_faiss, "LanceDB": build_lancedb, "Qdrant Edge": build_qdrant}
KINDS = ("float", "int8", "binary")


def _fill(found: list[int], way: Search, query: np.ndarray) -> None:
    found += way(query).tolist()


def memory_mb() -> float:
    """What this process holds beside mapped files, in MB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon:"))


def measure(engine: str, kind: str, file: Path, queries: np.ndarray, scratch: Path) -> list[str]:
    """A row of the table."""
    vectors, before, built = np.load(file, mmap_mode="r", allow_pickle=False), memory_mb(), []
    folder = Path(tempfile.mkdtemp(dir=scratch))
    seconds = seconds_of(lambda: built.append(ENGINES[engine](vectors, kind, folder)))
    (search,), times, hits = built, {"engine": [], "plain": []}, 0
    search(queries[0])  # what is loaded on first use
    memory = memory_mb() - before
    for query in queries:
        found = {"engine": [], "plain": []}
        for name, way in (("engine", search), ("plain", partial(plain, vectors))):
            times[name].append(seconds_of(partial(_fill, found[name], way, query)))
        hits += len(set(found["engine"]) & set(found["plain"]))
    disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    shutil.rmtree(folder)
    milliseconds = [f"{1000 * statistics.median(times[name]):.1f}" for name in ("engine", "plain")]
    return [
        engine,
        kind,
        f"{seconds:.0f}",
        f"{memory:.0f}",
        f"{disk:.0f}",
        *milliseconds,
        f"{hits / K / len(queries):.3f}",
    ]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--scratch", type=Path, help="folder for the vectors and the indexes, some GB")
    options = parser.parse_args(argv)
    fork, rows = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        file = Path(scratch, "vectors.npy")
        queries = make_vectors(options.rows, options.dim, options.queries, file)
        for engine in options.engines:
            for kind in KINDS:
                with ProcessPoolExecutor(1, mp_context=fork) as process:
                    rows.append(process.submit(measure, engine, kind, file, queries, Path(scratch)).result())
                print(*rows[-1], file=sys.stderr, flush=True)
    print(markdown_table([HEADER, *rows]))
    print(f"\n{options.rows:,} rows of {options.dim} numbers, {options.queries} queries. {machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
