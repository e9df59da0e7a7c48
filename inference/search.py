"""Search a folder of images with a student, by text or by an image.

    python -m inference.search --model_name_or_path runs/icons --images ~/Pictures "a cup of coffee"
    python -m inference.search --model_name_or_path runs/icons --images ~/Pictures --image cup.jpg

The folder is only read. Its index is kept in the cache of the Hub's libraries (`HF_HOME`), so that folders one may not
write to, or that are synced, can be searched too; a later call embeds only what is new or has changed. `--index`
searches the vectors that inference.embed wrote, of any dual encoder; they can be copied, with the images or without.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock
from PIL import Image
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

import modeling_dsmd  # noqa: F401  AutoModel then knows the student without running code of its repository
from inference.dual_encoders import load_encoder
from inference.embed import open_vectors
from inference.image_files import SUFFIXES, list_images, read_image
from inference.queries import evaluate_queries, read_queries
from inference.vectors import Result, VectorIndex, read_weights
from model_cards.grid import Cell, check_replaceable, result_grid
from rows.command_line import Command, run_program
from rows.files import printable, write_whole
from rows.images import to_rgb
from rows.teacher_columns import rows_to_numpy
from rows.texts import cut


DECODERS = 8  # images decoded at a time, at most: a large one takes half a gigabyte
PART = 512  # images embedded between two writes: what a killed run loses, at most
CHUNK = 16_384  # rows that are written, and later searched, at a time
FAISS_FROM = 1_000_000  # images; up to there, comparing with all of them takes a second or so and is exact
FAISS_PROBES = 32  # cells that are searched; there are about the square root of the number of images
# Fields of configurations, at any depth, that tell where a model came from; its dtype is that of the weights.
ORIGIN = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")


class Index:
    """The embeddings of a folder's images, memory-mapped, and the student that searches them; see [`index_folder`].

    `rows` is a `datasets.Dataset` with the columns `path` (relative), `size`, `mtime_ns` and `embeds` (float16 [D],
    normalised); `skipped` tells why files were left out.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, folder: Path, file: Path, skipped: dict[str, str]
    ):
        self.model, self.processor, self.folder, self.skipped = model, processor, folder, skipped
        self.rows, self.file, self.width = datasets.Dataset.from_file(str(file)), file, None
        self.uses_faiss = len(self.rows) >= FAISS_FROM
        if self.uses_faiss:
            self._load_or_build_faiss(file.with_suffix(".faiss"))

    def __len__(self) -> int:
        return len(self.rows)

    @torch.inference_mode()
    def search_text(self, query: str, k: int = 10) -> list[Result]:
        """The k images most similar to a text, best first; fewer where there are fewer."""
        inputs = self.processor(text=[cut(query)], padding=True, truncation=True, return_tensors="pt")
        return self._search(self.model.get_text_features(**inputs.to(self.model.device)).pooler_output, k)

    @torch.inference_mode()
    def search_image(self, image: Image.Image, k: int = 10) -> list[Result]:
        """The same for an image of any mode."""
        inputs = self.processor(images=[to_rgb(image)], return_tensors="pt").to(self.model.device)
        return self._search(self.model.get_image_features(**inputs).pooler_output, k)

    @property
    def ids(self) -> list[str]:
        """The images' paths."""
        return self.rows.data["path"].to_pylist()

    def truncate(self, width: int) -> None:
        """From now on the first `width` numbers are compared, of a length of 1 again.

        Raises:
            ValueError: there are not as many, or FAISS searches the images.
        """
        if width > self.rows.features["embeds"].length or self.uses_faiss:
            raise ValueError(f"--truncate_dim {width}: the index has {self.rows.features['embeds'].length} numbers.")
        self.width = width

    def read_image(self, result: Result) -> Image.Image:
        """The image of a result, in RGB."""
        return read_image(self.folder / result.path)

    def _search(self, features: torch.Tensor, k: int) -> list[Result]:
        if k < 1:
            raise ValueError(f"k={k}: expected at least 1.")
        query = normalize(features.float(), dim=-1)[0].cpu()  # [D]
        if self.uses_faiss:
            scores, found = self.rows.search("embeds", query.numpy(), k=min(k, len(self)))
        else:
            chunks = (torch.tensor(rows_to_numpy(chunk)) for chunk in self.rows.data["embeds"].chunks)
            if self.width is not None:
                query = normalize(query[: self.width], dim=0)
                chunks = (normalize(chunk[:, : self.width].float(), dim=1) for chunk in chunks)
            scores = torch.cat([chunk.float() @ query for chunk in chunks])  # [N]
            scores, found = (values[:k].tolist() for values in scores.sort(descending=True, stable=True))
        paths = self.rows.data["path"]
        # FAISS gives -1 where the cells it searched held fewer than k.
        return [Result(paths[int(i)].as_py(), float(score)) for i, score in zip(found, scores) if i >= 0]

    def _load_or_build_faiss(self, file: Path) -> None:
        if not file.exists():
            import faiss

            cells = int(len(self) ** 0.5)
            dim = self.rows.features["embeds"].length
            index = faiss.index_factory(dim, f"IVF{cells},SQfp16", faiss.METRIC_INNER_PRODUCT)
            # Neighbours in a folder are alike, so not the first rows: faiss asks for 39 to 256 a cell.
            sample = np.sort(np.random.default_rng(0).permutation(len(self))[: 100 * cells])
            index.train(rows_to_numpy(self.rows.data["embeds"].take(pa.array(sample))).astype(np.float32))
            self.rows.add_faiss_index("embeds", custom_index=index, batch_size=CHUNK)
            with write_whole(file) as beside:
                self.rows.save_faiss_index("embeds", beside)
        else:
            self.rows.load_faiss_index("embeds", file)
        self.rows.get_index("embeds").faiss_index.nprobe = FAISS_PROBES


def index_folder(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | Path,
    cache_dir: str | Path | None = None,
    batch_size: int = 64,
) -> Index:
    """Brings the index of a folder of images up to date: embeds what is new or changed, drops what is gone.

    Sub-folders are searched too; links and names that start with a dot are not followed. Stopped at any moment, the
    next call goes on. Each model has an index of its own.

    Args:
        model: a student, on the device to use; it is set to eval mode.
        processor: its processor.
        folder: of JPEG, PNG, WebP, GIF (the first frame), BMP and TIFF files.
        cache_dir: where indexes are kept; default `HF_HOME/dsmd_indexes`.
        batch_size: images embedded at a time.

    Raises:
        NotADirectoryError: `folder` is no folder.
        ValueError: it holds no image that can be read, or the model gives embeddings that are not numbers.
        ImportError: for folders of over a million images where FAISS is missing.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder.")
    files, skipped = list_images(folder)
    if len(files) >= FAISS_FROM and find_spec("faiss") is None:
        raise ImportError(
            f"{folder} holds {len(files):,} images: from {FAISS_FROM:,} on FAISS searches them, and it is not "
            'installed: pip install -e ".[faiss]", or pip install faiss-cpu.'
        )
    place = hashlib.blake2b(str(folder).encode(errors="surrogateescape"), digest_size=8).hexdigest()
    cache = Path(cache_dir or Path(HF_HOME, "dsmd_indexes"), place, student_fingerprint(model, processor))
    cache.mkdir(parents=True, exist_ok=True)
    model.eval()
    with WeakFileLock(cache / ".lock"):
        for left in cache.glob("*.part"):  # of a run that was killed
            left.unlink()
        index = cache / "index.arrow"
        sources = sorted(cache.glob("*.arrow"))  # parts too, of a run that was killed
        pending, current, is_stale = dict(files), [], False
        for batch in (batch for source in sources for batch in _read(source).to_batches()):
            columns = (batch[name].to_pylist() for name in ("path", "size", "mtime_ns"))
            keep = [pending.get(path) == seen and bool(pending.pop(path)) for path, *seen in zip(*columns)]
            is_stale |= not all(keep)
            current.append(batch if all(keep) else batch.filter(pa.array(keep)))
        new = list(pending)
        with tqdm(total=len(new), desc=f"indexing {folder.name}", unit="image", disable=not new) as bar:
            for start in range(0, len(new), PART):
                paths = new[start : start + PART]
                embeds, reasons = _embed(model, processor, [folder / path for path in paths], batch_size, bar)
                skipped |= {path: reason for path, reason in zip(paths, reasons) if reason}
                seen = [(path, *pending[path]) for path, reason in zip(paths, reasons) if not reason]
                if seen:
                    sources.append(cache / f"part-{uuid.uuid4().hex}.arrow")
                    _write(_table(seen, embeds), sources[-1])
                    current += _read(sources[-1]).to_batches()
        if not sum(map(len, current)):
            reasons = "".join(f"\n  {printable(path)}: {reason}" for path, reason in list(skipped.items())[:5])
            raise ValueError(f"{folder} holds no image that can be read ({', '.join(SUFFIXES)}).{reasons}")
        if is_stale or sources != [index]:
            index.with_suffix(".faiss").unlink(missing_ok=True)
            _write(pa.Table.from_batches(current), index)
            for source in set(sources) - {index}:
                source.unlink()
        return Index(model, processor, folder, index, skipped)


def cut_of(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """How much of a text the student reads, in a sentence; None where it reads the whole."""
    tokens, most = len(tokenizer(cut(text), verbose=False)["input_ids"]), tokenizer.model_max_length
    return f"The text has {tokens} tokens, of which the student reads the first {most}." if tokens > most else None


def student_fingerprint(model: PreTrainedModel, processor: ProcessorMixin) -> str:
    """What an image's embedding depends on, hashed: weights, configuration and the settings of the images."""

    def without_origin(values: dict) -> dict:
        return {name: value for name, value in sorted(values.items()) if name not in ORIGIN}

    settings = (model.config.to_json_string(use_diff=False), processor.image_processor.to_json_string())
    settings = [json.loads(text, object_hook=without_origin) for text in settings]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    read_weights(model, digest)
    return digest.hexdigest()


@torch.inference_mode()
def _embed(
    model: PreTrainedModel, processor: ProcessorMixin, files: list[Path], batch_size: int, bar: tqdm
) -> tuple[np.ndarray, list[str | None]]:
    """Embeddings of the images that can be read, float16 `[n, D]`, and for each file why it cannot, or None."""

    def prepare(file: Path) -> torch.Tensor | str:
        try:
            return processor.image_processor(images=[read_image(file)], return_tensors="pt")["pixel_values"]
        except Exception as error:  # PIL raises many types on broken files
            return f"{type(error).__name__}: {error}"

    embeds, reasons = [], []
    with ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1)) as pool:
        for start in range(0, len(files), batch_size):
            prepared = list(pool.map(prepare, files[start : start + batch_size]))
            reasons += [item if isinstance(item, str) else None for item in prepared]
            pixels = [item for item in prepared if not isinstance(item, str)]
            if pixels:
                features = model.get_image_features(torch.cat(pixels).to(model.device)).pooler_output
                embeds.append(normalize(features.float(), dim=-1).half().cpu().numpy())
                if not np.isfinite(embeds[-1]).all():
                    raise ValueError(f"The model gives embeddings that are not numbers, near {files[start]}.")
            bar.update(len(prepared))
    return np.concatenate(embeds) if embeds else np.empty((0, 0), np.float16), reasons


def _table(seen: list[tuple[str, int, int]], embeds: np.ndarray) -> pa.Table:
    paths, sizes, times = zip(*seen)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(embeds.ravel()), embeds.shape[1])
    columns = {"path": paths, "size": sizes, "mtime_ns": times}
    return pa.table({name: pa.array(values) for name, values in columns.items()} | {"embeds": vectors})


def _read(file: Path) -> pa.Table:
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def _write(table: pa.Table, file: Path) -> None:
    with (
        write_whole(file) as beside,
        pa.OSFile(str(beside), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as writer,
    ):
        for start in range(0, len(table), CHUNK):
            writer.write_table(table.slice(start, CHUNK).combine_chunks())


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, str | Image.Image | None]:
    """The options, and the query."""
    parser = Command("inference.search", __doc__)
    parser.add_argument("query", nargs="?", help="A text to search for.")
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the student.")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="Folder of the images to search.")
    parser.add_argument(
        "--index", type=Path, metavar="FOLDER", help="Vectors of inference.embed; with --images, brought up to date."
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="An image to search for, in place of a text.")
    parser.add_argument(
        "--queries",
        type=Path,
        metavar="CSV",
        help="Columns query and file: how many are answered (instead of a text).",
    )
    parser.add_argument("--k", type=int, default=10, help="How many results to show (default: %(default)s).")
    parser.add_argument("--truncate_dim", type=int, metavar="K", help="Compare the first K numbers only.")
    parser.add_argument(
        "--grid", type=Path, default="results.png", help="Picture of the results to write (default: %(default)s)."
    )
    parser.add_argument("--cache_dir", type=Path, help="Where indexes are kept (default: HF_HOME/dsmd_indexes).")
    options = parser.parse_args(arguments)
    if sum(given is not None for given in (options.query, options.image, options.queries)) != 1:
        parser.error("give a text or --image FILE, or --queries CSV, and not both")
    for name in ("k", "truncate_dim"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    if options.images is None and options.index is None:
        parser.error("give --images FOLDER, --index FOLDER, or both")
    if options.images is not None and not options.images.expanduser().is_dir():
        parser.error(f"--images {options.images} is not a folder")
    place = options.grid.resolve().parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        parser.error(f"--grid {options.grid}: {place} is no folder that can be written to")
    try:
        check_replaceable(options.grid)
    except ValueError as error:
        parser.error(f"--grid {error}")
    try:
        query = options.query if options.image is None else read_image(options.image)
    except Exception as error:  # PIL raises many types on broken files
        parser.error(f"--image {options.image} cannot be read: {error}")
    return options, query


def open_index(options: argparse.Namespace) -> tuple[Index | VectorIndex, PreTrainedTokenizerBase]:
    """What is searched, up to date, and the model's tokenizer; what was left out is printed."""
    device, name = "cuda" if torch.cuda.is_available() else "cpu", options.model_name_or_path
    if options.index is not None:
        index = open_vectors(options.index, load_encoder(name, device), name, options.images)
        tokenizer = index.encoder.tokenizer
    else:
        try:
            model = AutoModel.from_pretrained(name, trust_remote_code=False)
            processor = AutoProcessor.from_pretrained(name, backend="pil", trust_remote_code=False)
        except (OSError, ValueError, pickle.UnpicklingError) as error:
            sys.exit(f"error: {name} is no student that can be read: {error}")
        try:
            index = index_folder(model.to(device), processor, options.images, options.cache_dir)
        except ImportError as error:
            sys.exit(f"error: {error}")
        tokenizer = processor.tokenizer
        print(f"The index of {options.images} is kept in {index.file.parent}; `rm -r` it to clear it.")
    if index.skipped:
        print(f"{len(index.skipped)} files were left out:")
        print("\n".join(f"  {printable(path)}: {reason}" for path, reason in index.skipped.items()))
    if options.truncate_dim is not None:
        index.truncate(options.truncate_dim)
    return index, tokenizer


def main(arguments: list[str] | None = None) -> None:
    options, query = parse(arguments)
    index, tokenizer = open_index(options)
    if options.queries is not None:
        queries = read_queries(options.queries, index.ids)
        print(evaluate_queries(index.search_text, queries, len(index)))
        return
    # sentence-transformers and open_clip have tokenizers of their own kinds, which cut in silence
    if options.image is None and isinstance(tokenizer, PreTrainedTokenizerBase) and (cut := cut_of(tokenizer, query)):
        print(cut)
    search = index.search_text if options.image is None else index.search_image
    results = search(query, options.k)
    print(f"{len(results)} of {len(index):,} images:")
    print("\n".join(f"  {result.score:.3f}  {printable(result.path)}" for result in results))
    if options.images is None:
        return
    cells = [Cell(index.read_image(result), f"{result.score:.3f}  {Path(result.path).name}") for result in results]
    left_out = result_grid([query], [cells], options.grid)
    print(f"A picture of the results: {options.grid}")
    if left_out:
        print("It has no letters for all of these names and texts: numbers in it are places in this list.")


if __name__ == "__main__":
    run_program(main)
