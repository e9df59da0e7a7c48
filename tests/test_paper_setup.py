"""The paper's set-up end to end, by the README's commands: Karpathy's files, BEiT-3 as released, ViT + BERT."""

import json
import subprocess

import datasets
import numpy as np
import paper_setup
import pytest
import torch
from launching import command_line, environment
from PIL import Image

from datasets_scripts.teacher_dataset import join_columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("paper")


@pytest.fixture(scope="module")
def reference(folder):
    return paper_setup.make(folder, {"train": 24, "restval": 8, "val": 8, "test": 12})


def run(folder, *command):
    """A command of the README, in a folder of its own, with the project on the path as `pip install -e .` puts it."""
    variables = environment(HF_DATASETS_CACHE=str(folder / "cache"))
    result = subprocess.run(command_line(1, *command), cwd=folder, env=variables, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_from_karpathys_files_and_a_released_checkpoint_to_the_tables(folder, reference, request):
    project = request.config.rootpath
    run(folder, "-m", "teachers.beit3.convert", "beit3_coco.pth", "beit3.spm", "data/beit3_base_coco",
        "--num_attention_heads", "4")  # fmt: skip
    printed = run(folder, "-m", "datasets_scripts.coco", "--karpathy", "dataset_coco.json", "--images", "images",
                  "--output_dir", "data/coco", "--allow_other_counts")  # fmt: skip
    assert "COCO train: 32 images" in printed  # restval among them
    towers = ["--vision_model_name_or_path", "vit", "--text_model_name_or_path", "bert"]
    small = ["--num_train_epochs", "1", "--per_device_train_batch_size", "8", "--test_fold_size", "4"]
    machine = ["--use_cpu", "--dataloader_num_workers", "0", "--dataloader_persistent_workers", "False"]
    table = run(folder, project / "train.py", "--config", project / "recipes" / "coco_beit3.yaml", *towers, *small,
                *machine, "--bf16", "False")  # fmt: skip
    assert "test split, 12 images" in table and "| 4 rsum" in table and "student on teacher's index" in table
    results = json.loads((folder / "runs" / "coco_beit3" / "all_results.json").read_text())
    assert results["test_images"] == 12 and results["test_captions"] == 72

    # The stored features are those of the published model on the published preprocessing.
    (made,) = (path for path in (folder / "cache" / "dsmd_teacher_features").iterdir() if path.is_dir())
    row = join_columns(datasets.load_from_disk(folder / "data" / "coco"), made)["test"][3]
    image = row["image"].resize((paper_setup.SIDE, paper_setup.SIDE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 * 2 - 1
    expected = torch.nn.functional.normalize(torch.tensor(row["teacher_image_embeds"]), dim=-1)
    torch.testing.assert_close(reference.images(pixels)[1][0], expected, atol=1e-3, rtol=0)
    pieces = paper_setup.sentencepiece.SentencePieceProcessor(model_file=str(folder / "beit3.spm"))
    for caption, features in zip(row["captions"], row["teacher_text_embeds"]):
        ids = [0, *(piece + 1 if piece else 3 for piece in pieces.encode(caption)), 2]
        text = reference.texts(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))[1][0]
        expected = torch.nn.functional.normalize(torch.tensor(features), dim=-1)
        torch.testing.assert_close(text, expected, atol=1e-3, rtol=0)
