"""The picture of sizes: its points are the study's lines, timed on towers built as their settings say."""

import json

import pytest
import yaml
from PIL import Image
from tiny_runs import SETTINGS, VISION, write_data

from benchmarks import size_picture
from benchmarks.ablation import key_of


def test_points_and_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = write_data(tmp_path / "data") / "mapped"
    recipe = {**SETTINGS, "vision_config": VISION["vit"], "dataset_name": str(data), "output_dir": "runs"}
    recipe["text_config"] = json.loads(SETTINGS["text_config"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    wide = {**VISION["vit"], "hidden_size": 32}
    questions = {
        "with": {"small": {}, "wide": {"vision_config": wide}, "not run": {"queue_size": 2}},
        "without": {"small": {"method": "contrastive"}},
    }
    study = {"recipe": "recipe.yaml", "results": "lines.jsonl", "runs": "runs", "seeds": [1, 2]}
    study |= {"learning_rates": [0.1], "questions": questions}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    with open("lines.jsonl", "w") as file:
        for variant, shares in (
            (questions["with"]["small"], (90.0, 94.0)),
            (questions["with"]["wide"], (95.0,)),
            (questions["without"]["small"], (50.0, 50.0)),
        ):
            for seed, share in zip((1, 2), shares):
                settings = {**variant, "seed": seed, "learning_rate": 0.1}
                line = {"key": key_of({**recipe, **settings}), "settings": settings}
                line["parameters"] = 3_500_000 if "vision_config" in variant else 2_500_000
                file.write(json.dumps({**line, "eval_rsum": share, "eval_share_of_teacher": share}) + "\n")

    timed = []

    def latency(model, processor, max_length):
        timed.append(model)
        assert processor.image_processor.size["height"] == 32
        return {"ms_per_image_batch_1": float(model.config.vision_config.hidden_size)}

    monkeypatch.setattr(size_picture, "latency", latency)
    drawn = {}
    draw = size_picture.draw
    monkeypatch.setattr(size_picture, "draw", lambda curves, path: (drawn.update(curves), draw(curves, path)))
    size_picture.main(["--config", "study.yaml", "--output", "sizes.png"])
    point = {"parameters": 2.5, "milliseconds": 16.0, "share": 92.0, "half": pytest.approx(25.4, abs=0.1)}
    small = {**point, "shares": [90.0, 94.0]}
    wide = {**point, "parameters": 3.5, "milliseconds": 32.0, "share": 95.0, "half": 0.0, "shares": [95.0]}
    assert len(timed) == 2  # a tower once
    assert drawn == {"with": [small, wide], "without": [{**small, "share": 50.0, "half": 0.0, "shares": [50.0, 50.0]}]}
    printed = capsys.readouterr()
    assert "| with | 2.50 | 16.00 | 92.0 ± 25.4 |" in printed.out and "with, not run: no runs yet" in printed.err
    assert Image.open("sizes.png").size[0] > 500 and [path.name for path in tmp_path.glob("*.png")] == ["sizes.png"]
    assert not (tmp_path / "runs").exists()
