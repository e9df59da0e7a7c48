"""Run by test_loader_workers, which kills it: two loader workers, each in the midst of a row that does not end."""

import os
import sys
import time

import torch
from torch.utils.data import DataLoader

from trainers.run.loader_workers import shielded


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        time.sleep(10_000 * (index // 2))
        return os.getpid()


if __name__ == "__main__":
    batches = iter(shielded(DataLoader(Slow(), batch_size=None, num_workers=2, multiprocessing_context=sys.argv[1])))
    print(next(batches), next(batches), flush=True)
    next(batches)
