import subprocess
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, DistilBertConfig, ViTConfig

import modeling_dsmd
from modeling_dsmd import DSMDConfig


@pytest.mark.parametrize("field", ["vision_pooling", "text_pooling"])
def test_unknown_pooling_is_refused(field):
    with pytest.raises(ValueError, match=f"{field}='max'.*cls, mean, pooler"):
        DSMDConfig(**{field: "max"})


@pytest.mark.parametrize("width", [0, -4, "8", 8.0, None])
def test_a_projection_dim_that_is_no_width_is_refused(width):
    with pytest.raises(ValueError, match="projection_dim"):
        DSMDConfig(projection_dim=width)


def test_a_saved_config_comes_back(tmp_path):
    config = DSMDConfig(
        vision_config={"model_type": "vit", "hidden_size": 16},
        text_config={"model_type": "distilbert", "dim": 24},
        projection_dim=8,
        vision_pooling="cls",
        text_pooling="pooler",
        logit_scale_init_value=1.5,
    )
    assert type(config.vision_config) is ViTConfig and type(config.text_config) is DistilBertConfig
    config.save_pretrained(tmp_path)
    loaded = DSMDConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == {**config.to_dict(), "transformers_version": loaded.transformers_version}
    assert (loaded.vision_config.hidden_size, loaded.text_config.hidden_size) == (16, 24)
    assert (loaded.projection_dim, loaded.vision_pooling, loaded.text_pooling) == (8, "cls", "pooler")
    assert loaded.logit_scale_init_value == 1.5


def test_the_origin_of_a_tower_is_not_saved(tmp_path):
    towers = []
    for config_class in (ViTConfig, BertConfig):
        towers.append(config_class())
        towers[-1]._name_or_path = str(tmp_path / config_class.model_type)  # as loading a model does
    DSMDConfig(vision_config=towers[0], text_config=towers[1]).save_pretrained(tmp_path / "student")
    assert str(tmp_path) not in (tmp_path / "student" / "config.json").read_text()


def imported_under(version: str, folder: Path) -> str:
    """What importing the configuration ends with, in a process with a transformers that has its version alone."""
    (folder / "transformers.py").write_text(f"__version__ = {version!r}\n")
    (folder / "configuration_dsmd.py").write_bytes(
        Path(modeling_dsmd.__file__).with_name("configuration_dsmd.py").read_bytes()
    )
    result = subprocess.run(
        [sys.executable, "-c", "import configuration_dsmd"], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode != 0
    return result.stderr.splitlines()[-1]


@pytest.mark.parametrize("version", ["4.40.0", "4.57.6", "5.0.0rc1", "5.8.1"])
def test_an_old_transformers_is_named(version, tmp_path):
    message = imported_under(version, tmp_path)
    assert "needs transformers 5.9 or later" in message and version in message and "pip install" in message


@pytest.mark.parametrize("version", ["5.9.0", "5.10.0.dev0", "5.24.0", "6.0.0"])
def test_a_newer_transformers_is_taken(version, tmp_path):
    assert "cannot import name" in imported_under(version, tmp_path)  # the stand-in has no classes
