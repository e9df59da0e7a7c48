"""Training examples of a streamed dataset: pass after pass without end, shared out among processes and workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import datasets
import pyarrow as pa
import torch
from datasets.distributed import split_dataset_by_node
from transformers import TrainerCallback

from rows.checks import check_rows, row_faults
from rows.images import check_image_paths, load_rgb

from .batches import AS_THEY_ARE, Views, make_examples, undecoded_rows


HEAD_ROWS = 1000  # of a stream that are checked before training
ROWS_AT_ONCE = 32  # read from it
EMPTY_PASSES = 10  # after which a worker without a row gives up


def stream_head(stream: datasets.IterableDataset, rows: int = HEAD_ROWS) -> datasets.Dataset:
    """The first rows of a stream, in memory, with all its columns; without those that training would leave out.

    Raises:
        ValueError: where the stream does not say what columns it has.
    """
    if stream.features is None:
        raise ValueError("The stream's columns are not known: give `features=` to the `map` that made them.")
    table = next(iter(stream.take(rows).with_format("arrow").iter(rows)), stream.features.arrow_schema.empty_table())
    head = datasets.Dataset(table, info=datasets.DatasetInfo(features=stream.features))
    if not {"image", "captions", "image_id"} <= set(head.column_names):
        return head
    undecoded = head.cast_column("image", datasets.Image(decode=False)).with_format("arrow")[:]
    faults = left_out_of(undecoded)
    for row in set(range(len(undecoded))) - faults.keys():
        image = undecoded["image"][row].as_py()
        try:
            if image is not None:
                load_rgb(image)
        except ValueError:
            faults[row] = "unreadable"
    # Where none is left, the check of the rows names the first fault.
    return head.select([row for row in range(len(head)) if row not in faults] or range(len(head))) if faults else head


def left_out_of(table: pa.Table) -> dict[int, str]:
    """Rows with neither image nor captions, or whose captions or ids cannot be used: place in the table, and why."""
    return row_faults(table, table["image"].is_valid().to_numpy())


class StreamedRetrievalDataset(torch.utils.data.IterableDataset):
    """Training examples of a `datasets.IterableDataset` that follows the row contract, pass after pass without end.

    In a pass every row is read once, by one loader worker of one process; rows are drawn from a shuffle buffer, in
    another order in each pass, and decoded after it. The order derives from the seed, the pass, the numbers of
    processes and workers and the size of the buffer; captions and augmentation from (seed, pass, image_id) alone. A
    worker begins its next pass when its own share of this one ends, without waiting for the others. Nobody knows which
    texts other images will have too, so examples name those of all their captions.

    Args:
        stream: as `load_dataset(..., streaming=True)` gives it; see [`RetrievalDataset`] for its columns.
        shuffle_buffer_size: rows that each worker of each process holds, undecoded, to draw from.
        teacher_dim: width D that teacher features must have; None if they are not read.
        rank, world_size: number of this process, from 0, and of all processes.
        views: what is drawn of a row.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        shuffle_buffer_size: int,
        teacher_dim: int | None,
        rank: int = 0,
        world_size: int = 1,
        views: Views = AS_THEY_ARE,
    ):
        rows = undecoded_rows(stream, with_teacher=teacher_dim is not None)
        # A buffer fed from several shards at once makes `datasets` sleep for 5 s at the end of each pass.
        self.stream = rows.shuffle(seed=views.seed, buffer_size=shuffle_buffer_size, max_buffer_input_shards=1)
        self.teacher_dim = teacher_dim
        self.rank = rank
        self.world_size = world_size
        self.views = views
        self.batches_to_skip = 0
        self.batch_size = 1

    def skip(self, batches: int, batch_size: int) -> None:
        """Makes the examples of the loader's first batches `None`: their rows are read but not decoded."""
        self.batches_to_skip = batches
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict | None]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        part, parts = self.rank * workers + worker, self.world_size * workers
        # A part is one worker of one process. Parts form equal groups, as many as there are shards for: a group reads
        # shards of its own, and its parts take the rows of these in turn.
        groups = max(n for n in range(1, min(parts, self.stream.num_shards) + 1) if parts % n == 0)
        stream = split_dataset_by_node(self.stream, part % groups, groups, strategy="shards")
        members, member = parts // groups, part // groups
        # The loader takes batches from its workers in turn; this is what it takes from this worker.
        skipped = len(range(worker, self.batches_to_skip, workers)) * self.batch_size
        empty_passes = 0
        for epoch in itertools.count():
            stream.set_epoch(epoch)
            read = own_rows = 0
            # `iter`, since `__iter__` would share out the shards among the loader's workers once more.
            for table in stream.iter(ROWS_AT_ONCE):
                own = table.take(pa.array(range((member - read) % members, len(table), members), pa.int64()))
                read += len(table)
                own_rows += len(own)
                passed = min(skipped, len(own))
                skipped -= passed
                yield from itertools.repeat(None, passed)
                own = own.slice(passed)
                if faults := left_out_of(own):
                    ids = own["image_id"].to_pylist()
                    yield from ({"image_id": str(ids[row]), "unreadable": reason} for row, reason in faults.items())
                    own = own.filter(pa.array([row not in faults for row in range(len(own))]))
                if len(own):
                    has_image = own["image"].is_valid().to_numpy()
                    check_image_paths(own["image"].filter(own["image"].is_valid()), None)
                    check_rows(own, "streamed train", self.teacher_dim, None, has_image)
                    yield from make_examples(own, epoch, self.views, shared_texts=None)
            empty_passes = 0 if own_rows else empty_passes + 1
            if empty_passes == EMPTY_PASSES:
                raise ValueError(
                    f"The stream has had no row for worker {worker} of process {self.rank} in {EMPTY_PASSES} passes: "
                    "it has too few rows, or shards without any. Use fewer workers or processes."
                )


class SkipTrainedBatches(TrainerCallback):
    """Tells the stream of a resumed run which batches were trained on before, so that it does not decode them.

    Trainer skips the same batches by itself, but only after they were decoded.
    """

    def __init__(self, dataset: StreamedRetrievalDataset):
        self.dataset = dataset

    def on_train_begin(self, args, state, control, **kwargs):
        batches = state.global_step % state.max_steps * args.gradient_accumulation_steps
        self.dataset.skip(0 if args.ignore_data_skip else batches, args.train_batch_size)
