"""The picture of numbers of pairs: its points are the test figures of the study's lines, seed by seed."""

import json

import pytest
import yaml
from PIL import Image

from benchmarks import pairs_picture
from benchmarks.ablation import key_of


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"max_steps": 3}))
    questions = {
        "pairs": {"all": {"max_steps": 9}, "1,600": {"max_steps": 8}, "400": {"max_steps": 7}, "9": {"max_steps": 6}},
        "nothing yet": {"400": {"max_steps": 5}},
    }
    study = {"recipe": "recipe.yaml", "results": "lines.jsonl", "runs": "runs", "seeds": [1, 2]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({**study, "learning_rates": [0.1], "questions": questions}))

    def write(shares: dict[str, list[float | None]]) -> None:
        with open("lines.jsonl", "w") as file:
            for pairs, values in shares.items():
                for seed, share in zip((1, 2), values):
                    settings = {**questions["pairs"][pairs], "seed": seed, "learning_rate": 0.1}
                    line = {"key": key_of({"max_steps": 3, **settings}), "settings": settings, "eval_rsum": 1.0}
                    line |= {} if share is None else {"test_share_of_teacher": share}
                    file.write(json.dumps(line) + "\n")

    return write


def test_points_and_picture(study, monkeypatch, capsys):
    study({"all": [99.0], "1,600": [90.0, 94.0], "400": [50.0, 50.0], "9": [None, None]})
    drawn = {}
    draw = pairs_picture.draw
    monkeypatch.setattr(pairs_picture, "draw", lambda curves, path: (drawn.update(curves), draw(curves, path)))
    pairs_picture.main(["--config", "study.yaml", "--output", "pairs.png"])
    interval = (92.0, pytest.approx(25.4, abs=0.1))
    assert drawn == {"pairs": {"all": (99.0, 0.0), "1,600": interval, "400": (50.0, 0.0)}}
    printed = capsys.readouterr()
    assert printed.out.splitlines()[2:] == ["| 400 | 50.0 |", "| 1,600 | 92.0 |", "| all | 99.0 |"]
    assert "pairs, 9 pairs: no test figures yet" in printed.err
    assert Image.open("pairs.png").size[0] > 500


def test_without_test_figures_nothing_is_drawn(study, tmp_path):
    study({"400": [None]})
    with pytest.raises(SystemExit, match="lines.jsonl has no test figures of study.yaml"):
        pairs_picture.main(["--config", "study.yaml", "--output", "pairs.png"])
    assert not (tmp_path / "pairs.png").exists()
