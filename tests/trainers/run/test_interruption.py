"""SIGTERM and Ctrl-C: saved after the current step, and the resumed run is the unbroken one."""

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from test_kill import contents, differences
from tiny_runs import ROOT, VISION, arguments, start
from tiny_trainer import largest_difference, make_trainer
from transformers import TrainerCallback

import train
from trainers import DSMDTrainer
from trainers.run import resumable_trainer
from trainers.run.checkpoints import damage, last_whole
from trainers.run.interruption import StopOnSignal


@pytest.fixture(autouse=True)
def ctrl_c():
    """As in a terminal: whoever runs the tests in the background of a script has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Send(TrainerCallback):
    """Sends this process a signal in a step, or in an evaluation."""

    def __init__(self, step: int, number: int = signal.SIGTERM, event: str = "on_step_begin"):
        self.step = step
        setattr(self, event, self.send)
        self.number = number

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None  # once
            signal.raise_signal(self.number)  # to this thread: it is here when the call returns


def log_of(trainer) -> list[dict]:
    """What was logged, without times."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second"))}
        for entry in trainer.state.log_history
        if "resumed" not in entry
    ]


def assert_the_same(unbroken, resumed):
    assert largest_difference(unbroken.model.state_dict(), resumed.model.state_dict()) == 0.0
    assert largest_difference(unbroken.distillation_state(), resumed.distillation_state()) == 0.0
    states = [trainer.optimizer.state_dict()["state"] for trainer in (unbroken, resumed)]
    for name, state in states[0].items():
        assert all(torch.equal(state[key], states[1][name][key]) for key in state)
    assert log_of(unbroken) == log_of(resumed)
    assert unbroken.state.best_metric == resumed.state.best_metric
    assert unbroken.state.best_global_step == resumed.state.best_global_step


# An epoch has four steps; the signal is seen when the step after begins.
STEPS = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
EPOCHS = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
NOTHING = {"eval_strategy": "epoch", "save_strategy": "no", "logging_steps": 3}
CASES = [
    (STEPS, 1, 3),  # in mid-epoch
    (STEPS, 4, 6),  # where an evaluation is due, and no checkpoint
    (STEPS, 2, 4),  # where both are, and an epoch ends
    (EPOCHS, 1, 3),
    (EPOCHS, 2, 4),
    (EPOCHS, 8, 10),  # at the end, in mid-epoch
    (NOTHING, 1, 3),
]


@pytest.mark.parametrize(("settings", "sent", "stopped"), CASES)
def test_the_resumed_run_is_the_unbroken_one(tmp_path, rows, validation_rows, settings, sent, stopped):
    settings = {**settings, "max_steps": 10, "random_shift": 0.2, "captions_per_image": 2, "max_grad_norm": 1.0}
    settings |= {"load_best_model_at_end": settings["save_strategy"] != "no", "eval_dataset": validation_rows}
    unbroken = make_trainer(tmp_path / "unbroken", rows, **settings)
    unbroken.train()
    broken = make_trainer(tmp_path / "run", rows, callbacks=[Send(sent)], **settings)
    broken.train()
    assert broken.interruption.agreed == signal.SIGTERM and broken.state.global_step == stopped
    assert last_whole(tmp_path / "run").name == f"checkpoint-{stopped}"
    evaluations = [entry["step"] for entry in log_of(broken) if "eval_rsum" in entry]
    assert stopped not in evaluations
    resumed = make_trainer(tmp_path / "run", rows, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.interruption.agreed == 0
    assert_the_same(unbroken, resumed)
    best = [trainer.state.best_model_checkpoint for trainer in (unbroken, resumed)]
    assert best[0] == best[1] or Path(best[0]).name == Path(best[1]).name


@pytest.mark.parametrize("event", ["on_train_end", "on_log"])
def test_a_signal_after_the_last_step_stops_what_comes_after_training(tmp_path, rows, event):
    trainer = make_trainer(tmp_path, rows, callbacks=[Send(2, signal.SIGINT, event)], max_steps=2, logging_steps=2)
    trainer.train()
    assert trainer.interruption.agreed == signal.SIGINT
    assert last_whole(tmp_path).name == "checkpoint-2"


def test_handlers_are_put_back_and_a_second_ctrl_c_stops_at_once(tmp_path, rows):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = make_trainer(tmp_path, rows, callbacks=[Send(0, signal.SIGINT), Send(0, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_thread_that_is_not_the_main_one_trains_without_handlers(tmp_path, rows):
    import threading

    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def listen():
        with StopOnSignal().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [before]


def test_no_slow_push_is_waited_for(tmp_path, rows, hub, monkeypatch):
    """A push that does not end is given some seconds, then left behind."""
    monkeypatch.setattr(resumable_trainer, "PUSH_SECONDS", 0.3)
    held = []
    monkeypatch.setattr(resumable_trainer, "push_checkpoint", lambda *args: [held.append(0), time.sleep(3)])
    settings = {"push_to_hub": True, "hub_model_id": "user/student", "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, rows, callbacks=[Send(0)], max_steps=10, **settings)
    began = time.monotonic()
    trainer.train()
    assert held and trainer.push_is_unfinished and trainer.state.global_step == 2
    assert time.monotonic() - began < 3 + 20  # the steps' own time on a busy machine


def test_ctrl_c_ends_train_py_with_130(tmp_path, run_data, monkeypatch, capsys):
    begin_step = DSMDTrainer.begin_step

    def interrupted(trainer, batches):
        if trainer.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        begin_step(trainer, batches)

    monkeypatch.setattr(DSMDTrainer, "begin_step", interrupted)
    settings = {"vision_config": json.dumps(VISION["vit"]), "per_device_train_batch_size": 4}
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(tmp_path / "run", run_data, settings))
    assert stop.value.code == 130 and last_whole(tmp_path / "run").name == "checkpoint-2"
    assert "Interrupted after step 2, which is saved" in capsys.readouterr().out
    assert not (tmp_path / "run" / "all_results.json").exists()


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, 1),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.soak),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.soak),  # one of two gets it
    ],
)
def test_train_py_saves_pushes_and_leaves(tmp_path, run_data, hub, number, processes):
    push = {"push_to_hub": True, "hub_model_id": "user/student", "hub_strategy": "checkpoint"}
    settings = {"max_steps": 100_000, "logging_steps": 1, "per_device_train_batch_size": 4, **push}
    settings["vision_config"] = json.dumps(VISION["vit"])
    if processes == 2:
        settings["ddp_backend"] = "gloo"
    process = start(processes, ROOT / "train.py", *arguments(tmp_path / "run", run_data, settings))
    for line in process.stdout:
        if "'loss'" in line:
            break
    began = time.monotonic()
    os.kill(psutil.Process(process.pid).children()[-1].pid if processes == 2 else process.pid, number)
    output = process.communicate()[0]
    assert time.monotonic() - began < 30, output[-2000:]
    step = int(re.search(r"Interrupted after step (\d+), which is saved", output)[1])
    assert process.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[number], output[-3000:]
    checkpoint = last_whole(tmp_path / "run")
    assert checkpoint.name == f"checkpoint-{step}" and damage(checkpoint) is None
    assert f'"global_step": {step}' in hub.files("user/student")["last-checkpoint/trainer_state.json"].decode()


def group_case(number, moment, at, workers, context=None, streamed=False, processes=1):
    settings = {"max_steps": 8, "logging_steps": 3, "per_device_train_batch_size": 4 // processes}
    settings |= {"eval_strategy": "steps", "eval_steps": 4, "dataloader_num_workers": workers}
    settings |= {"vision_config": json.dumps(VISION["vit"]), "random_shift": 0.2, "captions_per_image": 2}
    if context is not None:
        settings |= {"dataloader_multiprocessing_context": context}
    if streamed:
        settings |= {"streaming": True, "shuffle_buffer_size": 5}
    if processes > 1:
        settings["ddp_backend"] = "gloo"
    name = f"{number.name}-{moment}{at}-{workers}{context or ''}{'-streamed' * streamed}-{processes}"
    return pytest.param(number, moment, at, processes, settings, id=name)


def in_soak(case):
    return pytest.param(*case.values, id=case.id, marks=pytest.mark.soak)


GROUP_CASES = [
    group_case(signal.SIGTERM, "step", 2, 2),
    *map(
        in_soak,
        [
            group_case(signal.SIGTERM, "step", 2, 0),
            group_case(signal.SIGINT, "step", 5, 2),
            group_case(signal.SIGTERM, "start", 4, 2),  # the last of an evaluation's
            group_case(signal.SIGTERM, "start", 6, 2, "spawn"),  # and of the second epoch's
            group_case(signal.SIGTERM, "step", 2, 2, "fork", streamed=True),
            *(
                group_case(number, moment, at, 2, context, streamed)
                for context in ("spawn", "forkserver")
                for streamed in (False, True)
                for number, moment, at in ((signal.SIGINT, "start", 2), (signal.SIGTERM, "step", 2))
            ),
            group_case(signal.SIGTERM, "start", 4, 2, "forkserver"),
            group_case(signal.SIGTERM, "step", 2, 2, processes=2),
        ],
    ),
]


@pytest.mark.parametrize(("number", "moment", "at", "processes", "settings"), GROUP_CASES)
def test_a_signal_to_the_whole_group_loses_nothing(tmp_path, run_data, number, moment, at, processes, settings):
    """As schedulers and terminals send it: to loader workers, fork servers and launchers too."""
    unbroken, broken = (arguments(tmp_path / name, run_data, settings) for name in ("unbroken", "broken"))
    order = {"unbroken": unbroken, "broken": broken, "number": number, "moment": moment, "at": at}
    worker = Path(__file__).with_name("signal_worker.py")
    process = start(processes, worker, json.dumps(order), start_new_session=True)
    output = process.communicate()[0]
    step = int(re.search(r"Interrupted after step (\d+), which is saved", output)[1])
    assert 0 < step < 8 and last_whole(tmp_path / "broken").name == f"checkpoint-{step}"
    if processes == 1:  # torchrun calls it a failure whatever its processes say
        assert process.returncode == {signal.SIGTERM: 0, signal.SIGINT: 130}[number], output[-3000:]
    assert not left_of(tmp_path)
    more = arguments(tmp_path / "broken", run_data, settings)
    process = start(processes, ROOT / "train.py", *more, "--resume_from_checkpoint", "last")
    output = process.communicate()[0]
    assert process.returncode == 0, output[-5000:]
    assert not differences(contents(tmp_path / "unbroken"), contents(tmp_path / "broken"))


def left_of(folder: Path) -> list[psutil.Process]:
    """Processes of runs in a folder that have not left after some seconds."""
    running = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and str(folder) in " ".join([*process.cmdline(), *process.environ()]):
                running.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            pass
    return psutil.wait_procs(running, timeout=20)[1]
