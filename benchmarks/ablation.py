"""Trains variants of a recipe, each at its own best learning rate over several seeds, and prints them as tables.

python -m benchmarks.ablation --config recipes/ablation_icons.yaml         # trains what is missing, prints the tables
python -m benchmarks.ablation --config recipes/ablation_icons.yaml --test  # at the very end: opens the test split

A run is one line of JSON in the study's `results` file. A run that has a line is not made again; one that was stopped
goes on from its last checkpoint. Every choice (learning rate, best of the random vectors, best epoch) is made on the
validation split.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml

from trainers.run.checkpoints import of_run
from trainers.run.distributed import usable_cores

from .common import machine


# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom.
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


@dataclasses.dataclass
class Ablation:
    """A study, as described by its YAML file.

    Attributes:
        recipe: the recipe of `train.py` that every variant starts from.
        results: the file of JSON lines, one for each run.
        runs: the folder in which the students are kept.
        seeds: seeds with which each variant is trained.
        learning_rates: the sweep of each variant on the first seed. A variant that sets a `learning_rate` itself has
            no sweep; one that sets a list has that one.
        settings: settings of every run, in place of the recipe's.
        questions: name of a question to its variants; name of a variant to the settings that it changes.
        random_vectors: `{"question": where the best one becomes a variant, "count": 20, "seed": 0, "centres": [n],
            "decades": 1.0}`: fixed weights of the n losses, drawn log-uniformly up to so many decades around the
            centres; each is trained once.
    """

    recipe: str
    results: Path
    runs: Path
    seeds: list[int]
    learning_rates: list[float]
    questions: dict[str, dict[str, dict]]
    settings: dict = dataclasses.field(default_factory=dict)
    random_vectors: dict | None = None

    @classmethod
    def read(cls, path: Path) -> Ablation:
        """Reads the YAML file.

        Raises: ValueError for a key that is unknown or missing, for too many seeds, and for random vectors whose
            question does not exist.
        """
        content = yaml.safe_load(path.read_text()) or {}
        known = {field.name for field in dataclasses.fields(cls)}
        required = known - {"settings", "random_vectors"}
        if set(content) - known or required - set(content):
            raise ValueError(
                f"{path} has the keys {sorted(content)}; expected {sorted(required)}, and none but {sorted(known)}"
            )
        if not 1 <= len(content["seeds"]) <= len(T_975) + 1:
            raise ValueError(f"{path} has {len(content['seeds'])} seeds; expected 1 to {len(T_975) + 1}")
        vectors = content.get("random_vectors")
        if vectors is not None and vectors["question"] not in content["questions"]:
            raise ValueError(f"{path} has random_vectors for {vectors['question']!r}; expected one of its questions")
        return cls(**content | {"results": Path(content["results"]), "runs": Path(content["runs"])})

    def vectors(self) -> list[dict]:
        """The settings of `train.py` for each random vector of weights; none if the study has none."""
        if self.random_vectors is None:
            return []
        rng, decades = random.Random(self.random_vectors["seed"]), self.random_vectors["decades"]
        draws = [
            [centre * 10 ** rng.uniform(-decades, decades) for centre in self.random_vectors["centres"]]
            for _ in range(self.random_vectors["count"])
        ]
        return [{"balancer": "fixed", "loss_weights": [float(f"{w:.3g}") for w in draw]} for draw in draws]


def key_of(settings: dict) -> str:
    """The name of a run in lines and folders: a hash of all its settings, the recipe's included.

    The licence that a recipe states changes no run, and is no part of it.
    """
    settings = {name: value for name, value in settings.items() if name != "license"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def read_lines(path: Path) -> list[dict]:
    """The lines of a results file; none if there is no file.

    Raises: ValueError for a line that is cut short, for example because the machine lost power while writing it.
    """
    lines = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is no JSON ({error}): delete it, its run is made again") from None
    return lines


def train_one(recipe: str, settings: dict, folder: Path, threads: int) -> dict:
    """Trains a student into `folder`, from its last checkpoint if it has one, and evaluates it on validation alone.

    Returns: validation figures, parameters, steps, and the seconds and threads of this process.
    """
    from train import prepare
    from trainers.recipe import as_options

    options = as_options(settings | {"output_dir": str(folder), "report_to": "none", "disable_tqdm": True})
    trainer, _, checkpoint, _ = prepare(["--config", recipe, "--resume_from_checkpoint", "last", *options])
    torch.set_num_threads(threads)
    began = time.monotonic()
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.interruption.agreed:
        sys.exit("interrupted; the same command goes on")
    metrics = trainer.evaluate()
    trainer.save_model(_internal_call=True)
    figures = {
        name: value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.startswith(("eval_samples", "eval_run"))
    }
    return figures | {
        "parameters": trainer.model.num_parameters(),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - began),
        "threads": threads,
    }


def test_one(recipe: str, settings: dict, folder: Path) -> dict:
    """RSUM and share of the teacher of a trained student on the test split."""
    from train import prepare
    from trainers.recipe import as_options

    options = as_options(settings | {"model_name_or_path": str(folder), "report_to": "none", "disable_tqdm": True})
    trainer, rows, _, data_args = prepare(["--config", recipe, "--do_train", "False", *options])
    metrics = trainer.evaluate(rows["test"], None, "test", data_args.test_fold_size)
    return {name: value for name, value in metrics.items() if name in ("test_rsum", "test_share_of_teacher")}


def commit() -> str:
    """The commit of the working tree, with `-dirty` if tracked files other than results differ; "" without git."""
    if shutil.which("git") is None:
        return ""
    head, changes = (
        subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()
        for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "-uno", "--", ".", ":!*.jsonl"])
    )
    return f"{head}-dirty" if changes else head


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t), which is infinite for one value."""
    if len(values) < 2:
        return values[0], math.inf
    return statistics.mean(values), T_975[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def shown(values: list[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.1f}" if math.isinf(half) else f"{mean:.1f} ± {half:.1f}"


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Spearman's correlation of two figures of the same runs; of equal values each has their mean rank."""
    ranks = [
        [sum(other < value for other in values) + sum(other == value for other in values) / 2 for value in values]
        for values in (first, second)
    ]
    return statistics.correlation(*ranks)


class Study:
    """The runs of an ablation: finds those that have a line, and makes those that have none.

    Args:
        train: whether runs are to be made.
        jobs: how many runs are made at once.
    """

    def __init__(self, ablation: Ablation, train: bool, jobs: int = 1):
        self.ablation = ablation
        self.train = train
        self.jobs = jobs
        self.failed = False
        self.recipe = yaml.safe_load(Path(ablation.recipe).read_text())
        self.lines = {line["key"]: line for line in read_lines(ablation.results)}

    def settings_of(self, variant: dict, seed: int, learning_rate: float | None) -> dict:
        return self.ablation.settings | variant | {"seed": seed, "learning_rate": learning_rate}

    def line(self, variant: dict, seed: int, learning_rate: float | None) -> dict | None:
        """The line of a run; None if it has not been made."""
        return self.lines.get(key_of(self.recipe | self.settings_of(variant, seed, learning_rate)))

    def run(self, variant: dict, seed: int, learning_rate: float) -> None:
        """Makes a run, unless it has a line, no runs are to be made, or one has failed.

        Raises: RuntimeError if the run fails.
        """
        if self.line(variant, seed, learning_rate) is not None or not self.train or self.failed:
            return
        settings = self.settings_of(variant, seed, learning_rate)
        print(f"{datetime.datetime.now():%H:%M} {settings}", file=sys.stderr, flush=True)
        key, code = key_of(self.recipe | settings), commit()
        folder = self.ablation.runs / key
        call = [sys.executable, "-m", "benchmarks.ablation", "--one", json.dumps(settings)]
        call += ["--recipe", self.ablation.recipe, "--folder", str(folder)]
        call += ["--threads", str(max(1, usable_cores() // self.jobs))]
        output = subprocess.run(call, stdout=subprocess.PIPE, text=True)
        if output.returncode:
            self.failed = True
            raise RuntimeError(f"The run of {settings} failed: see above. The same command goes on with it.")
        figures = json.loads(output.stdout.splitlines()[-1])
        self.add({"key": key, "settings": settings, **figures, "commit": code, "machine": machine()})
        for checkpoint in of_run(folder):  # only now: until its line is there a run may be resumed
            shutil.rmtree(checkpoint)

    def run_all(self, runs: list[tuple[dict, int, float]]) -> None:
        """Makes runs of (variant, seed, learning rate), `jobs` at once."""
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda run: self.run(*run), runs))

    def add(self, line: dict) -> None:
        self.lines[line["key"]] = line
        self.ablation.results.parent.mkdir(parents=True, exist_ok=True)
        with self.ablation.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rates_of(self, variant: dict) -> list[float]:
        rates = variant.get("learning_rate", self.ablation.learning_rates)
        return rates if isinstance(rates, list) else [rates]

    def best_rate(self, variant: dict) -> float | None:
        """The learning rate of the variant's sweep with the largest validation RSUM; None before all have run."""
        lines = {rate: self.line(variant, self.ablation.seeds[0], rate) for rate in self.rates_of(variant)}
        return None if None in lines.values() else max(lines, key=lambda rate: lines[rate]["eval_rsum"])

    def lines_of(self, variants: list[dict]) -> list[list[dict]]:
        """For each variant the lines of its seeds at its best learning rate; none before its sweep is complete."""
        first, seeds = self.ablation.seeds[0], self.ablation.seeds
        self.run_all([(variant, first, rate) for variant in variants for rate in self.rates_of(variant)])
        best = [(variant, self.best_rate(variant)) for variant in variants]
        self.run_all([(variant, seed, rate) for variant, rate in best if rate is not None for seed in seeds])
        return [[line for seed in seeds if (line := self.line(variant, seed, rate))] for variant, rate in best]

    def best_vector(self) -> dict | None:
        """The random vector with the largest validation RSUM at the middle learning rate; None before all have run."""
        first, rates, vectors = self.ablation.seeds[0], self.ablation.learning_rates, self.ablation.vectors()
        rate = rates[len(rates) // 2]
        self.run_all([(vector, first, rate) for vector in vectors])
        lines = [self.line(vector, first, rate) for vector in vectors]
        if None in lines:
            return None
        return max(zip(lines, vectors), key=lambda pair: pair[0]["eval_rsum"])[1]

    def lines_by_variant(self, question: str) -> dict[str, list[dict]]:
        """The lines of each variant of a question; the best random vector comes last.

        That vector, and every learning rate, was chosen by its value on the first seed, which is part of its mean:
        the best of many vectors looks better than it is.
        """
        variants = self.ablation.questions[question]
        found = dict(zip(variants, self.lines_of(list(variants.values()))))
        if self.ablation.random_vectors is not None and self.ablation.random_vectors["question"] == question:
            best = self.best_vector()
            if best is not None:
                name = f"best of {len(self.ablation.vectors())} random vectors, {best['loss_weights']}"
                (found[name],) = self.lines_of([best])
        return found

    def table(self, question: str) -> str:
        """The Markdown table of a question. Differences to its first variant are taken seed by seed."""
        rows, first = [], None
        for name, lines in self.lines_by_variant(question).items():
            by_seed = {line["settings"]["seed"]: line for line in lines}
            first = by_seed if first is None else first
            common = [seed for seed in by_seed if seed in first]
            gains = [by_seed[seed]["eval_rsum"] - first[seed]["eval_rsum"] for seed in common]
            columns = [shown([line[figure] for line in lines if figure in line]) for figure in FIGURES]
            rate = lines[0]["settings"]["learning_rate"] if lines else "-"
            rows.append(f"| {name} | {rate} | {len(lines)} | {' | '.join(columns)} | {shown(gains)} |")
        return "\n".join([f"### {question}\n", *HEADER, *rows, *self.agreement_beside_recall(question)])

    def agreement_beside_recall(self, question: str) -> list[str]:
        """A line on how agreement with the teacher orders the question's runs beside RSUM, where three have both."""
        lines = [
            line for lines in self.lines_by_variant(question).values() for line in lines if "eval_agreement" in line
        ]
        figures = [[line[figure] for line in lines] for figure in ("eval_agreement", "eval_rsum")]
        if len(lines) < 3 or any(len(set(values)) == 1 for values in figures):
            return []
        spearman = rank_correlation(*figures)
        return [f"\nAgreement with the teacher and RSUM on validation, {len(lines)} runs: Spearman's {spearman:.2f}"]

    def open_test(self, questions: Iterable[str]) -> None:
        """Adds the test figures of every variant's runs to their lines."""
        code = commit()
        for question in questions:
            for lines in self.lines_by_variant(question).values():
                for line in lines:
                    if "test_rsum" not in line:
                        folder = self.ablation.runs / line["key"]
                        figures = test_one(self.ablation.recipe, line["settings"], folder)
                        self.add(line | figures | {"test_commit": code})


def study_to_draw(doc: str, argv: list[str]) -> tuple[Study, argparse.Namespace]:
    """The study, of the runs that there are, and the options of a program that draws it: `config`, `output`.

    Args:
        doc: the program's docstring.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="an ablation whose questions are the curves")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    args = parser.parse_args(argv)
    return Study(Ablation.read(args.config), train=False), args


FIGURES = ("eval_rsum", "eval_share_of_teacher", "test_rsum", "test_share_of_teacher")
HEADER = (
    "| variant | learning rate | seeds | validation RSUM | % of the teacher's | test RSUM | % of the teacher's | "
    "validation RSUM less the first row's |",
    "|---|---|---|---|---|---|---|---|",
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--questions", nargs="+", help="names of the questions to answer; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs made at once, which share the cores; default: 1")
    parser.add_argument("--tables", action="store_true", help="train nothing; print the tables of the runs there are")
    parser.add_argument("--test", action="store_true", help="train nothing; open the test split for the tables' runs")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)  # a run, in a process of its own
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one is not None:
        print(json.dumps(train_one(args.recipe, args.one, args.folder, args.threads)))
        return
    if args.config is None:
        parser.error("--config is missing, e.g. recipes/ablation_icons.yaml")
    ablation = Ablation.read(args.config)
    questions = args.questions or list(ablation.questions)
    if unknown := sorted(set(questions) - set(ablation.questions)):
        parser.error(f"--questions {' '.join(unknown)}: expected some of {', '.join(ablation.questions)}")
    study = Study(ablation, train=not args.tables and not args.test, jobs=args.jobs)
    if args.test:
        study.open_test(questions)
    for question in questions:
        print(study.table(question), flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main(sys.argv[1:])
