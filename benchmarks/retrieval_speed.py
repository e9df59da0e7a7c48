"""
Time and memory of `trainers.retrieval.ranks` on random embeddings, beside a loop over one query at a time.

    OMP_NUM_THREADS=2 python -m benchmarks.retrieval_speed --images 5000 --captions 25010 --dim 768
"""

import argparse
import platform
import time
from pathlib import Path

import torch

from trainers.retrieval import metrics_from_ranks, ranks


def memory_mib(field: str) -> float:
    """A figure of this process from the Linux kernel, MiB: `VmRSS` is held now, `VmHWM` was the most ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark measures memory on Linux only.")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def ranks_one_by_one(
    queries: torch.Tensor, items: torch.Tensor, query_groups: torch.Tensor, item_groups: torch.Tensor
) -> torch.Tensor:
    """Ranks `[Q]` of normalised queries `[Q, D]` among items `[K, D]`: the definition, one query at a time."""
    found = []
    for query, group in zip(queries, query_groups, strict=True):
        scores = items @ query
        right = item_groups == group
        found.append(1 + int((scores[~right] >= scores[right].max()).sum()))
    return torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--captions", type=int, default=25010, help="as many as images or more")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--subsample", type=int, default=200, help="queries of each direction given to the plain loop")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not 1 <= args.images <= args.captions:
        parser.error(f"--images must be between 1 and --captions, got {args.images} and {args.captions}")

    torch.manual_seed(0)
    image_groups = torch.arange(args.images)
    text_groups = torch.arange(args.captions) % args.images
    images = torch.randn(args.images, args.dim)
    texts = torch.randn(args.captions, args.dim).add_(images[text_groups], alpha=0.12)

    # The peak of making the data must not hide that of the ranking: 5 sets the kernel's mark back to what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    held = memory_mib("VmRSS")
    seconds, cpu_seconds = [], []
    for _ in range(args.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        image_ranks, text_ranks = ranks(images, texts, image_groups, text_groups)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    extra = memory_mib("VmHWM") - held

    images, texts = (torch.nn.functional.normalize(rows, dim=1) for rows in (images, texts))
    some_images = torch.randperm(args.images)[: args.subsample]
    some_texts = torch.randperm(args.captions)[: args.subsample]
    start = time.perf_counter()
    loop_image_ranks = ranks_one_by_one(images[some_images], texts, image_groups[some_images], text_groups)
    loop_images = (time.perf_counter() - start) / len(some_images) * args.images
    start = time.perf_counter()
    loop_text_ranks = ranks_one_by_one(texts[some_texts], images, text_groups[some_texts], image_groups)
    loop_texts = (time.perf_counter() - start) / len(some_texts) * args.captions
    same = int(
        (loop_image_ranks == image_ranks[some_images]).sum() + (loop_text_ranks == text_ranks[some_texts]).sum()
    )

    queries, embeds_mib = len(some_images) + len(some_texts), (images.nbytes + texts.nbytes) / 2**20
    print(f"{args.images} images x {args.captions} captions x {args.dim}, float32")
    print(f"machine               {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"ranks, both ways      {min(seconds):.2f} s (best of {args.repeats})")
    print(f"  processor time      {min(cpu_seconds):.2f} s")
    print(f"extra peak memory     {extra:.0f} MiB (the embeddings themselves: {embeds_mib:.0f} MiB)")
    print(f"one query at a time   {loop_images + loop_texts:.1f} s (from {queries} queries)")
    print(f"same rank in both     {same} of {queries} queries (the loop does not count near-ties)")
    print(f"rsum                  {metrics_from_ranks(image_ranks, text_ranks)['rsum']:.2f}")


if __name__ == "__main__":
    main()
