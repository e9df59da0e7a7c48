"""Every configuration is one that accelerate takes; all for several processes are launched as far as a CPU can."""

import json
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import make_rows, make_student
from launching import environment
from safetensors.torch import load_file
from tiny_trainer import largest_difference

from modeling_dsmd import DSMDModel
from trainers.teacher_pca import load_pca


ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
RECIPE = {
    "vision_config": {"model_type": "vit", "patch_size": 16, **SIZES, **NO_DROPOUT},
    "text_config": {"model_type": "bert", **SIZES, **NO_DROPOUT},
    "image_size": 32,
    "vocab_size": 400,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "captions_per_image": 2,
    "random_shift": 0.1,
    "logging_steps": 1,
    "queue_size": 40,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "ddp_backend": "gloo",
}


def documented_command(config: Path) -> list[str]:
    """The arguments of `accelerate launch` in a configuration's comments."""
    comments = [line[1:].strip() for line in config.read_text().splitlines() if line.startswith("#")]
    text = " ".join(comments).replace("\\ ", "")
    return shlex.split(text[text.index("accelerate launch ") :])[2:]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_the_configuration_and_its_command(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    args = launch_command_parser().parse_args(documented_command(config))
    assert args.config_file == f"accelerate_configs/{config.name}"
    assert args.training_script == "train.py" and args.training_script_args[0] == "--config"
    assert Path(args.training_script_args[1]).is_file()
    known = vars(args).keys()
    settings = load_config_from_file(str(config))  # an unknown key of the first level is an error
    for name, value in yaml.safe_load(config.read_text()).items():
        if isinstance(value, dict):
            assert {key if key.startswith("fsdp") else key for key in value} <= known, name
    launched = []
    for launcher in ("simple", "multi_gpu"):
        monkeypatch.setattr(
            f"accelerate.commands.launch.{launcher}_launcher", lambda args, by=launcher: launched.append((by, args))
        )
    launch_command(args)
    [(by, args)] = launched
    if by == "simple":
        assert config.stem == "one_gpu" and args.num_processes == 1
        _, environment = prepare_simple_launcher_cmd_env(args)
    else:
        environment = prepare_multi_gpu_env(args)
        assert args.nproc_per_node == "8"
    if config.stem == "fsdp2":
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    if config.stem == "several_nodes":
        assert (args.nnodes, args.node_rank, args.rdzv_endpoint) == ("2", 0, "10.0.0.1:29500")
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16" == settings.mixed_precision


def test_an_unknown_key_is_seen(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIGS[0].read_text() + "num_process: 2\n")
    with pytest.raises(ValueError, match="num_process"):
        load_config_from_file(str(config))


def launch(config: str, folder: Path, machines: int = 1) -> Path:
    """Runs `launched_worker.py` on two processes, of one machine or of two, which are this one."""
    folder.mkdir()
    parts = {"train": make_rows(24), "validation": make_rows(5, seed=1), "test": make_rows(3, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(folder / "data")
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "dataset_name": str(folder / "data")}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / f"{config}.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    if machines == 1:
        command += ["--rdzv_backend", "c10d", "--main_process_port", "0"]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command += [
            "--num_machines",
            str(machines),
            "--main_process_ip",
            "127.0.0.1",
            "--main_process_port",
            str(port),
        ]
    worker = [str(Path(__file__).with_name("launched_worker.py")), str(folder), str(folder / "recipe.yaml")]
    launchers = [
        subprocess.Popen(
            [*command, *(["--machine_rank", str(rank)] if machines > 1 else []), *worker],
            env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(machines)
    ]  # fmt: skip
    said = [launcher.communicate()[0] for launcher in launchers]
    assert not any(launcher.returncode for launcher in launchers), "\n".join(text[-6000:] for text in said)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    return launch("several_gpus", tmp_path_factory.mktemp("launched") / "ddp")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    return launch("fsdp2", tmp_path_factory.mktemp("launched") / "fsdp")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> Path:
    return launch("several_nodes", tmp_path_factory.mktemp("launched") / "nodes", machines=2)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model.safetensors")


METHODS = ("distillation", "contrastive")


@pytest.mark.parametrize("method", [*METHODS, "frozen"])
def test_a_run_on_two_machines_is_that_on_two_gpus_of_one(ddp, nodes, method):
    one, other = (weights(folder / method / "unbroken/checkpoint-4") for folder in (ddp, nodes))
    assert largest_difference(one, other) < 1e-6
    results = [json.loads((folder / method / "unbroken/all_results.json").read_text()) for folder in (ddp, nodes)]
    assert results[0]["test_rsum"] == results[1]["test_rsum"]


def test_a_frozen_tower_stays_and_is_sharded_as_the_rest(ddp, fsdp):
    one, other = (weights(folder / "frozen/unbroken/checkpoint-4") for folder in (ddp, fsdp))
    assert largest_difference(one, other) < 1e-5
    before = weights(ddp / "frozen/unbroken/checkpoint-2")
    moved = {name.split(".")[0] for name in one if not torch.equal(before[name], one[name])}
    assert moved == {"text_model", "text_projection", "visual_projection"}
    resumed = weights(fsdp / "frozen/resumed/checkpoint-4")
    assert largest_difference(other, resumed) == 0.0


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_run_is_that_of_ddp(ddp, fsdp, method):
    for step in ("checkpoint-2", "checkpoint-4", "."):
        one, other = (weights(folder / method / "unbroken" / step) for folder in (ddp, fsdp))
        assert largest_difference(one, other) < 1e-5
    assert max(tensor.abs().max() for tensor in one.values()) < 5  # the first process's, not off by 1 nor a mixture
    start = make_student()[0].logit_scale
    one = weights(ddp / method / "unbroken" / "checkpoint-4")  # a finished one has been given a temperature
    assert (one["logit_scale"] != start) == (method == "contrastive")
    results = [json.loads((folder / method / "unbroken/all_results.json").read_text()) for folder in (ddp, fsdp)]
    for name in ("test_rsum", "eval_rsum", "parameters", "test_images", "test_captions"):
        assert results[0][name] == pytest.approx(results[1][name], abs=1e-6), name


def last_losses(run: Path) -> list[float]:
    log = json.loads((run / "trainer_state.json").read_text())["log_history"]
    [entry] = [entry for entry in log if "loss" in entry and entry["step"] == log[-1]["step"]]
    return [value for name, value in entry.items() if name.startswith("loss")]


def test_a_sharded_run_in_bf16_is_nearly_that_in_float32(fsdp):
    exact, rounded = (fsdp / run / "checkpoint-2" for run in ("distillation/unbroken", "bf16"))
    assert all(tensor.dtype == torch.float32 for tensor in weights(rounded).values())
    assert largest_difference(weights(exact), weights(rounded)) > 1e-5
    assert last_losses(exact) == pytest.approx(last_losses(rounded), rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_run_resumed_is_the_unbroken_one(fsdp, method):
    unbroken, resumed = (fsdp / method / name / "checkpoint-4" for name in ("unbroken", "resumed"))
    assert largest_difference(weights(unbroken), weights(resumed)) == 0.0
    assert largest_difference(weights(unbroken.with_name("checkpoint-2")), weights(resumed)) > 1e-4
    if method == "distillation":
        states = (load_file(run / "_distillation_state.safetensors") for run in (unbroken, resumed))
        assert largest_difference(*states) == 0.0
    assert last_losses(unbroken) == last_losses(resumed)


@pytest.mark.parametrize("run", ["unbroken", "unbroken/checkpoint-4"])
def test_a_sharded_run_leaves_the_files_of_any_other(ddp, fsdp, run):
    one, other = (folder / "distillation" / run for folder in (ddp, fsdp))
    names = [{path.name.replace(".bin", ".pt") for path in folder.iterdir()} for folder in (one, other)]
    assert names[0] == names[1] and "modeling_dsmd.py" in names[0]
    for name in ("config.json", "modeling_dsmd.py", "processor_config.json"):
        assert (one / name).read_text() == (other / name).read_text()
    student, info = DSMDModel.from_pretrained(other, output_loading_info=True)
    assert not any(info.values())
    state = json.loads((fsdp / "distillation/unbroken/checkpoint-4/trainer_state.json").read_text())
    step = fsdp / "distillation" / "unbroken" / f"checkpoint-{4 if 'checkpoint' in run else state['best_global_step']}"
    states = [student.state_dict(), DSMDModel.from_pretrained(step).state_dict()]
    temperatures = [state.pop("logit_scale").item() for state in states]  # fitted in the finished student alone
    assert (temperatures[0] == temperatures[1]) == ("checkpoint" in run)
    rotation = load_pca(other)  # of the finished student alone
    assert (rotation is None) == ("checkpoint" in run)
    for name in ("visual_projection.weight", "text_projection.weight") if rotation is not None else ():
        states[1][name] = (rotation.double().T @ states[1][name].double()).float()
    assert largest_difference(*states) == 0.0
