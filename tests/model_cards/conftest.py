"""The data, and the two finished runs on it, whose cards are read."""

import json

import datasets
import pytest
from card_checks import run
from conftest import make_rows


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    parts = {"train": make_rows(48), "validation": make_rows(12, seed=1), "test": make_rows(12, seed=2)}
    teacher = json.dumps({"id": "user/teacher", "revision": "abc", "parameters": 27_000_000})
    for split, part in parts.items():
        parts[split] = part.add_column("teacher", [teacher] * len(part))
    parts["train"].info.license = "cc0-1.0"
    folder = tmp_path_factory.mktemp("private") / "data"
    datasets.DatasetDict(parts).save_to_disk(folder)
    return folder


@pytest.fixture(scope="session")
def contrastive(data):
    return run(data.parent / "plain", data, method="contrastive", learning_rate=1e-4)


@pytest.fixture(scope="session")
def distilled(data, contrastive):
    settings = {"license": "apache-2.0", "language": ["en", "de"], "test_fold_size": 4}
    return run(data.parent / "student", data, baseline_results=str(contrastive / "all_results.json"), **settings)
