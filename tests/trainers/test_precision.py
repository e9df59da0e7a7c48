"""Which precision a run is trained in: what was said stays, and a GPU that has bf16 and TF32 is used as it can be."""

import itertools

import pytest
import torch
import yaml
from tiny_trainer import make_trainer
from transformers import HfArgumentParser

import trainers.precision
from trainers import DSMDTrainingArguments, precision
from trainers.run import distributed


AMPERE, VOLTA = (8, 0), (7, 0)


@pytest.mark.parametrize(
    "said, capability, chosen",
    [
        ({}, AMPERE, (True, True)),
        ({}, (9, 0), (True, True)),
        ({}, VOLTA, (False, None)),
        ({}, None, (False, None)),  # CPU, MPS
        ({"bf16": False}, AMPERE, (False, None)),
        ({"bf16": True}, AMPERE, (True, True)),
        ({"bf16": True}, VOLTA, (True, None)),  # refused by transformers, which says why
        ({"bf16": True}, None, (True, None)),
        ({"fp16": True}, AMPERE, (False, None)),
        ({"tf32": False}, AMPERE, (True, False)),
        ({"tf32": True, "bf16": False}, AMPERE, (False, True)),
        ({"of_accelerate": "no"}, AMPERE, (False, None)),
        ({"of_accelerate": "fp16"}, AMPERE, (False, None)),
        ({"of_accelerate": "bf16"}, AMPERE, (True, True)),
        ({"of_accelerate": "bf16"}, None, (False, None)),  # the setting stays: accelerate's makes it bf16
        ({"of_accelerate": "bf16", "bf16": False}, AMPERE, (False, None)),
        ({"of_accelerate": "no", "bf16": True}, AMPERE, (True, True)),
    ],
)
def test_what_was_said_stays_and_else_the_gpu_decides(said, capability, chosen):
    nothing = {"bf16": None, "fp16": False, "tf32": None, "of_accelerate": None}
    assert precision.choose(**{**nothing, **said}, capability=capability) == chosen


def test_no_other_device_than_a_new_gpu_changes_anything():
    for bf16, fp16, tf32, of_accelerate in itertools.product(
        (None, False, True), (False, True), (None, False, True), (None, "no", "bf16", "fp16")
    ):
        for capability in (None, (6, 1), VOLTA, (7, 5)):
            assert precision.choose(bf16, fp16, tf32, of_accelerate, capability) == (bool(bf16), tf32)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends that there are GPUs of these compute capabilities."""

    def pretend(*capabilities, cuda="13.0"):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: capabilities[number])

    return pretend


def test_the_oldest_gpu_of_a_machine_decides_for_all_ranks(gpus, monkeypatch):
    gpus((9, 0), (7, 0), (8, 6))
    assert precision.capability_of_gpus(use_cpu=False) == (7, 0)
    assert precision.capability_of_gpus(use_cpu=True) is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert precision.capability_of_gpus(use_cpu=False) is None
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    gpus((9, 4), cuda=None)  # ROCm has no TF32
    assert precision.capability_of_gpus(use_cpu=False) is None
    gpus()
    assert precision.capability_of_gpus(use_cpu=False) is None


LAUNCH = ["python", "/bin/accelerate", "launch", "-q"]
SCRIPT = ["train.py", "--config", "recipes/icons.yaml", ""]


@pytest.mark.parametrize(
    "told, launcher, config, said",
    [
        (None, None, None, None),
        ("bf16", LAUNCH + SCRIPT, None, "bf16"),
        ("no", None, None, "no"),  # the user's own variable
        ("no", LAUNCH + SCRIPT, None, None),  # the launcher's, which was told nothing
        ("no", [*LAUNCH, "--mixed_precision", "no", *SCRIPT], None, "no"),
        ("no", [*LAUNCH, "--mixed-precision=no", *SCRIPT], None, "no"),
        ("no", LAUNCH + SCRIPT, {"mixed_precision": "no"}, "no"),
        ("no", LAUNCH + SCRIPT, {}, None),
        ("no", [*LAUNCH, "--config_file", "FILE", *SCRIPT], {"mixed_precision": "no"}, "no"),
        ("no", [*LAUNCH, "--config-file=FILE", *SCRIPT], {}, None),
    ],
)
def test_accelerates_no_counts_where_somebody_said_it(told, launcher, config, said, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    if config is not None:
        path.write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 1, **config}))
    by_name = launcher is not None and any("FILE" in word for word in launcher)
    default = str(tmp_path / "none.yaml" if by_name else path)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", default)
    monkeypatch.setattr(trainers.precision, "default_config_file", default)
    words = launcher and [word.replace("FILE", str(path)) for word in launcher]
    environment = {} if told is None else {"ACCELERATE_MIXED_PRECISION": told}
    assert precision.said_to_accelerate(environment, words) == said


def test_the_command_line_of_a_launcher_is_known_by_its_name(monkeypatch):
    for line, launched in ((b"python\0/bin/accelerate\0launch\0", True), (b"python\0train.py\0accelerate.txt", False)):
        monkeypatch.setattr(distributed.Path, "read_bytes", lambda self, line=line: line)
        assert (distributed.launchers_words() is not None) == launched


@pytest.mark.parametrize(
    "options, chosen",
    [
        ([], (True, True)),
        (["--bf16"], (True, True)),
        (["--bf16", "False"], (False, None)),
        (["--fp16", "False"], (True, True)),
        (["--tf32", "False"], (True, False)),
    ],
)
def test_the_settings_take_what_is_chosen(options, chosen, monkeypatch, tmp_path):
    """On the GPU's side of transformers' own checks: its `__post_init__` is left out."""
    monkeypatch.setattr(precision, "capability_of_gpus", lambda use_cpu: AMPERE)
    monkeypatch.setattr(precision, "of_this_process", lambda: None)

    def post_init(self):
        self.mixed_precision = "no"

    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", post_init)
    command = ["--output_dir", str(tmp_path), "--accelerator_config", "{}", *options]
    (args,) = HfArgumentParser(DSMDTrainingArguments).parse_args_into_dataclasses(command)
    assert (args.bf16, args.tf32) == chosen


@pytest.mark.parametrize(
    "variable, settings, holds",
    [(None, {}, "no"), ("bf16", {}, "bf16"), ("bf16", {"bf16": False}, "no"), ("no", {"bf16": True}, "bf16")],
)
def test_the_identity_of_a_run_has_the_precision_that_holds(variable, settings, holds, rows, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if variable is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
    trainer = make_trainer(tmp_path, rows, **settings)
    assert trainer.args.mixed_precision == trainer.accelerator.mixed_precision == holds
    identity = trainer.identity()
    assert (identity["bf16"], identity["fp16"], identity["tf32"]) == (holds == "bf16", False, None)


def test_it_is_said_in_words():
    assert precision.describe("no", None, None) == "float32"
    text = "bf16 autocast of float32 weights, float32 products in TF32 (compute capability 9.0)"
    assert precision.describe("bf16", True, (9, 0)) == text
    assert "not in TF32" in precision.describe("no", False, AMPERE)
