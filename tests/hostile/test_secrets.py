"""HF_TOKEN and the paths of this machine: in nothing that a command writes, logs or publishes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from image_files import picture
from test_train import write_recipe
from tiny_towers import clip, make_processor


ROOT = Path(__file__).parents[2]
TOKEN = "hf_markOfThisTestAndOfNoOther"
CAPTIONS = ["red house", "small blue car", "moon", "sun and cloud"]


@pytest.fixture
def run(tmp_path, hub, monkeypatch):
    """Runs a program of the project as a user does, and keeps what it prints."""
    environment = {**os.environ, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(tmp_path / "home" / "datasets")}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_DEBUG": "1", "TRANSFORMERS_VERBOSITY": "debug"}

    def run(*arguments) -> None:
        with open(tmp_path / "printed.txt", "a") as output:
            result = subprocess.run(
                [sys.executable, *map(str, arguments)], env=environment, cwd=tmp_path, stdout=output,
                stderr=subprocess.STDOUT, timeout=300,
            )  # fmt: skip
        assert result.returncode == 0, (tmp_path / "printed.txt").read_text()[-3000:]

    return run


def test_no_token_and_no_path_is_written(tmp_path, run, hub):
    source = tmp_path / "photos"
    source.mkdir()
    lines = ["path,caption,split"]
    for i in range(24):
        picture(i, size=(32, 32)).save(source / f"{i}.png")
        lines.append(f"{i}.png,{CAPTIONS[i % 4]} {i},{('train', 'train', 'validation', 'test')[i % 4]}")
    (source / "data.csv").write_text("\n".join(lines))
    clip().save_pretrained(tmp_path / "teacher")
    make_processor().save_pretrained(tmp_path / "teacher")
    run("-m", "datasets_scripts.own_data", source / "data.csv", "--output_dir", "rows", "--push_to_hub", "user/rows")
    run(
        *(
            "-m",
            "datasets_scripts.add_teacher_features",
            "--dataset_name",
            "rows",
            "--teacher_model_name_or_path",
            "teacher",
        ),
        *("--output_dir", tmp_path / "features", "--push_to_hub", "user/features", "--num_workers", 0),
    )
    settings = {"push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "checkpoint", "max_steps": 2}
    settings |= {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"projection_dim": 4, "per_device_train_batch_size": 4}
    run(ROOT / "train.py", *write_recipe(tmp_path, tmp_path / "features", **settings))
    run("-m", "inference.export", "--model_name_or_path", tmp_path / "run", "--output_dir", "onnx")
    run("-m", "inference.search", "--model_name_or_path", tmp_path / "run", "--images", source, "red house")

    written = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(written) > 60
    published = {
        (repo, commit.message, name): content
        for repo in ("user/student", "datasets/user/rows", "datasets/user/features")
        for commit in hub.commits(repo)
        for name, content in commit.files.items()
    }
    assert {"README.md", "model.safetensors", "last-checkpoint/optimizer.pt"} <= {name for *_, name in published}
    for which, content in [*written.items(), *published.items()]:
        assert TOKEN.encode() not in content, which
    for which, content in published.items():
        assert str(tmp_path).encode() not in content and str(ROOT).encode() not in content, which
    for path, content in written.items():
        if path.is_relative_to(tmp_path / "onnx"):
            assert str(tmp_path).encode() not in content, path
