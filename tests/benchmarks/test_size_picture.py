"""The picture of sizes: its points are the study's lines and what the students' folders weigh."""

import json

import pytest
import yaml
from conftest import make_student
from PIL import Image

from benchmarks import size_picture
from benchmarks.ablation import key_of


def test_points_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("num_train_epochs: 6\n")
    variants = {"small": {"queue_size": 1}, "not run": {"queue_size": 2}}
    study = {
        "recipe": "recipe.yaml",
        "results": "lines.jsonl",
        "runs": "runs",
        "seeds": [1, 2],
        "learning_rates": [0.1],
    }
    study["questions"] = {"with": variants, "without": {"small": {"queue_size": 1, "method": "contrastive"}}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    model, processor = make_student()
    with open("lines.jsonl", "w") as file:
        for variant, shares in (
            (variants["small"], (90.0, 94.0)),
            (study["questions"]["without"]["small"], (50.0, 50.0)),
        ):
            for seed, share in zip((1, 2), shares):
                key = key_of({"num_train_epochs": 6, **variant, "seed": seed, "learning_rate": 0.1})
                settings = {**variant, "seed": seed, "learning_rate": 0.1}
                line = {"key": key, "settings": settings, "parameters": 2_500_000, "eval_rsum": share}
                file.write(json.dumps({**line, "eval_share_of_teacher": share}) + "\n")
                model.save_pretrained(tmp_path / "runs" / key)
                processor.save_pretrained(tmp_path / "runs" / key)
    monkeypatch.setattr(size_picture, "latency", lambda *args, **kwargs: {"ms_per_image_batch_1": 4.0})
    drawn = {}
    draw = size_picture.draw
    monkeypatch.setattr(size_picture, "draw", lambda curves, path: (drawn.update(curves), draw(curves, path)))
    size_picture.main(["--config", "study.yaml", "--output", "sizes.png"])
    point = {"parameters": 2.5, "milliseconds": 4.0, "share": 92.0, "half": pytest.approx(25.4, abs=0.1)}
    point["shares"] = [90.0, 94.0]
    assert drawn == {"with": [point], "without": [{**point, "share": 50.0, "half": 0.0, "shares": [50.0, 50.0]}]}
    printed = capsys.readouterr()
    assert "| with | 2.50 | 4.00 | 92.0 ± 25.4 |" in printed.out and "with, not run: no runs yet" in printed.err
    assert Image.open("sizes.png").size[0] > 500 and [path.name for path in tmp_path.glob("*.png")] == ["sizes.png"]
