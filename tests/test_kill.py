"""A run that dies by `kill -9` at a random moment, then the same command with `--resume_from_checkpoint last`: bit for
bit the unbroken run. Four moments in CI; `make soak` has all.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, STEPS, VISION, arguments, start
from transformers.trainer_pt_utils import safe_globals

from trainers.run.checkpoints import damage, of_run


KINDS = ("save", "step", "push", "evaluation", "clock", "end")
TIMES = ("runtime", "per_second", "ms_per")


def moment(number: int) -> dict:
    """The settings of a run and when it is killed. Each kind of moment meets each kind of run as numbers go on."""
    rng = random.Random(number)
    processes = 2 if number % 4 == 1 and number > 4 else 1
    accumulation = rng.choice([1, 2])
    streamed = number % 5 in (1, 4)
    kind = KINDS[number % len(KINDS)]
    by_steps = streamed or rng.random() < 0.5
    settings = {
        "vision_config": json.dumps(list(VISION.values())[number % len(VISION)]),
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation // processes,
        "dataloader_num_workers": rng.choice([0, 2]),
        "eval_strategy": "steps" if by_steps else "epoch",
        "save_strategy": "steps" if by_steps else "epoch",
        "load_best_model_at_end": rng.choice([True, False]),
        "random_shift": rng.choice([0.0, 0.2]),
        "random_zoom": rng.choice([0.0, 0.2]),
        "method": "contrastive" if number % 7 == 5 else "distillation",
    }
    if by_steps:  # three are in mid-epoch
        settings["save_steps"] = settings["eval_steps"] = rng.choice([2, 3])
    if rng.random() < 0.5:
        settings["captions_per_image"] = 2
    if streamed:
        settings |= {"streaming": True, "shuffle_buffer_size": 5}
    if processes > 1:
        settings["ddp_backend"] = "gloo"
    if kind == "push":
        settings |= {"push_to_hub": True, "hub_strategy": "checkpoint", "hub_always_push": True}
    return {
        "kind": kind,
        "place": rng.random(),
        "rank": rng.randrange(processes) if kind in ("step", "evaluation") else 0,
        "processes": processes,
        "settings": settings,
    }


def contents(folder: Path) -> dict[str, object]:
    """What is left of a finished run: weights, state of the last checkpoint, logged figures and results."""
    last = of_run(folder)[-1]
    found = {f"weights/{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    for file in last.glob("*.safetensors"):
        found |= {f"{file.name}/{name}": tensor for name, tensor in load_file(file).items()}
    with safe_globals():
        for file in [*last.glob("*.pt"), *last.glob("*.pth")]:
            found |= leaves(file.name, torch.load(file, weights_only=True))
    state = json.loads((last / "trainer_state.json").read_text())
    found |= leaves("log", [entry for entry in state["log_history"] if "resumed" not in entry])
    found |= {name: state[name] for name in ("best_metric", "best_global_step", "epoch", "global_step")}
    found |= leaves("results", json.loads((folder / "all_results.json").read_text()))
    assert all(damage(checkpoint) is None for checkpoint in of_run(folder))
    return {name: value for name, value in found.items() if not any(time in name for time in TIMES)}


def leaves(prefix: str, value: object) -> dict[str, object]:
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {name: leaf for key, part in items for name, leaf in leaves(f"{prefix}/{key}", part).items()}
    return {prefix: value}


def differences(unbroken: dict[str, object], resumed: dict[str, object]) -> list[str]:
    differing = sorted(unbroken.keys() ^ resumed.keys())
    for name in unbroken.keys() & resumed.keys():
        a, b = (
            part[name] if not hasattr(part[name], "tobytes") else part[name].tobytes() for part in (unbroken, resumed)
        )
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a and b != b):
            differing.append(f"{name}: {a} and {b}")
    return differing


def run_and_kill(folder: Path, data: Path, kind: str, place: float, rank: int, processes: int, settings: dict) -> str:
    """A run without a break in `folder/unbroken`, then one in `folder/broken` that is killed; returns their output."""
    unbroken, broken = (
        arguments(folder / name, data, settings, hub_model_id=f"user/{name}") for name in ("unbroken", "broken")
    )
    notes = folder / "notes.json"
    order = {"unbroken": unbroken, "broken": broken, "kind": kind, "place": place, "rank": rank, "notes": str(notes)}
    process = start(processes, Path(__file__).with_name("kill_worker.py"), json.dumps(order))
    if kind == "clock":
        while not notes.exists() and process.poll() is None:
            time.sleep(0.01)
        note = json.loads(notes.read_text())
        time.sleep(0.9 * place * note["seconds"])
        os.kill(note["process"], signal.SIGKILL)
    output = process.communicate()[0]
    killed = -signal.SIGKILL if processes == 1 else 1
    assert process.returncode == killed, output[-5000:]
    return output


@pytest.mark.parametrize("number", [*range(4), *(pytest.param(n, marks=pytest.mark.soak) for n in range(4, 34))])
def test_a_run_that_was_killed_goes_on_as_if_nothing_had_been(tmp_path, run_data, hub, number):
    at = moment(number)
    run_and_kill(tmp_path, run_data, **at)
    print(f"moment {number}: {at['kind']}, {at['processes']} processes, {at['settings']}")
    more = arguments(tmp_path / "broken", run_data, at["settings"], hub_model_id="user/broken")
    process = start(at["processes"], ROOT / "train.py", *more, "--resume_from_checkpoint", "last")
    output = process.communicate()[0]
    assert process.returncode == 0, output[-5000:]
    unbroken, resumed = (contents(tmp_path / name) for name in ("unbroken", "broken"))
    assert not differences(unbroken, resumed)
    assert unbroken["global_step"] == STEPS and sum(name.startswith("log/") for name in unbroken) > 10
    assert {path.name for path in (tmp_path / "broken").glob("_*")} == {
        "_lock",
        "_command.json",
    }
    if at["kind"] == "push":
        files = [hub.files(f"user/{name}") for name in ("unbroken", "broken")]
        assert files[0]["model.safetensors"] == files[1]["model.safetensors"]
