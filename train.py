"""Distils a student, trains one without a teacher, or evaluates a saved one.

accelerate launch -q train.py --config recipes/icons.yaml [--any_field value]
accelerate launch -q train.py --dataset_name icons --do_train False --do_eval --model_name_or_path runs/icons
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import os
import pickle
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path


# Read when torch is loaded. A thread that waits must not take the core from a loader's worker or another program: with
# one worker on two shared cores, a step of the quickstart took 0.9 s this way, and 4.3 s with threads that spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import datasets
import torch
from transformers import HfArgumentParser, TrainingArguments, set_seed

from datasets_scripts.data_loading import (
    DataArguments,
    data_facts,
    load_data,
    read_baseline,
    settings_that_count,
    training_captions,
)
from datasets_scripts.opening import license_of
from datasets_scripts.projection import principal_components, teacher_projection
from model_cards import RunFacts
from rows.columns import Splits
from rows.files import shown_name
from rows.teacher_columns import teacher_description, teacher_width
from trainers import ContrastiveTrainer, DSMDTrainer, DSMDTrainingArguments, RetrievalTrainingArguments
from trainers.argument_checks import check_held_out, check_processes, check_student
from trainers.base_trainer import RetrievalTrainer
from trainers.batches import RetrievalCollator
from trainers.dry_run import check_embeds, check_text_pooling, tiny_batch
from trainers.inherited import Source, describe_origin, license_of_teacher, teacher_source, tower_source
from trainers.recipe import as_options, option, read_recipe, without_none
from trainers.report import RUN_FILES, pin_revision, report, say_next, say_what_a_push_shows
from trainers.run.checkpoints import DISK_ERRORS, NOT_THE_DISKS, NotResumable, discard_replaced
from trainers.run.distributed import rank_is_first, run_launched, use_the_cores
from trainers.run.output_dir import (
    FINISHED,
    INTERRUPTED,
    digest_of,
    enter,
    last_checkpoint,
    note_finished,
    prepare_output_dir,
)
from trainers.run.run_identity import rows_fingerprint
from trainers.student import build_student, set_caption_length
from trainers.student_arguments import StudentArguments
from trainers.student_size import summary
from trainers.temperature import fit_temperature
from trainers.widths import rotate


# Of transformers' settings those that most runs set.
MOST_USED = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "weight_decay", "warmup_steps", "bf16", "eval_strategy", "save_strategy", "load_best_model_at_end",
    "dataloader_num_workers", "resume_from_checkpoint", "push_to_hub", "hub_model_id", "report_to", "seed",
)  # fmt: skip
OF_NEW_TOWERS = ("vision_layers", "vision_layer_indices", "text_layers", "text_layer_indices", "trim_vocabulary")
OF_TEACHERS = ("teacher_model_name_or_path", "teacher_revision", "teacher_weights")
NO_PICKLES = (
    "error: a file of weights or of a checkpoint is damaged, or a pickle of more than tensors, which can run any "
    "code: it was not read."
)


def parse_arguments(argv: list[str]) -> tuple[StudentArguments, DataArguments, RetrievalTrainingArguments]:
    """The settings of a recipe, then those of the command line, which win.

    With --method contrastive a recipe's settings of the distillation are passed over, and a line says so.

    Raises:
        ValueError: for a key that is no field, naming the nearest one; without a teacher, for a setting of the
            distillation on the command line.
    """
    config_parser = argparse.ArgumentParser(add_help=False)
    config_parser.add_argument("--config", type=Path)
    known, rest = config_parser.parse_known_args(argv)
    rest, unset = without_none(rest)
    recipe = {**({} if known.config is None else read_recipe(known.config)), **unset}
    method = option(rest, "method") or recipe.get("method", "distillation")
    settings = RetrievalTrainingArguments if method == "contrastive" else DSMDTrainingArguments
    if method == "contrastive":
        recipe = without_distillation(recipe, rest)
    parser = HfArgumentParser(
        (StudentArguments, DataArguments, settings), description=__doc__, allow_abbrev=False, add_help=False
    )
    if "-h" in rest or "--help" in rest:
        show_help(parser, settings, whole="all" in rest)
    parser.add_argument("--config", type=Path, help="A recipe: a YAML file whose keys are the settings below.")
    parser.set_defaults(do_train=True)
    names = {action.dest for action in parser._actions} - {"config"}
    for key in recipe:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "`python train.py --help` lists the settings."
            raise ValueError(f"{'--' if key in unset else f'{known.config}: '}{key!r} is not a setting. {hint}")
    parser.set_defaults(**{key: None for key, value in recipe.items() if value is None})
    named = [name for name in OF_TEACHERS if option(rest, name) is not None]
    others = OF_TEACHERS[0] in named or OF_TEACHERS[0] in unset
    for name in OF_TEACHERS if others else named:  # they take the place of the recipe's
        recipe.pop(name, None)
    # An evaluation leaves its results with the student it evaluates, unless told otherwise.
    student_dir = option(rest, "model_name_or_path")
    if student_dir is not None and recipe.get("output_dir") is None:
        parser.set_defaults(output_dir=student_dir)
    try:
        student, data, training, _ = parser.parse_args_into_dataclasses(
            as_options(recipe) + rest, look_for_args_file=False
        )
    except ValueError:
        raise
    except Exception as error:  # Trainer's own checks of its settings have no common type
        raise ValueError(f"These settings are refused: {type(error).__name__}: {error}") from error
    named = [f"--{name}" for name in OF_NEW_TOWERS if option(rest, name) is not None]
    if student.model_name_or_path is not None and training.do_train and named:
        raise ValueError(f"--model_name_or_path takes a saved student as it is: leave out {', '.join(named)}.")
    return student, data, training


def show_help(parser: HfArgumentParser, settings: type[RetrievalTrainingArguments], whole: bool) -> None:
    """Prints the settings in groups and ends: ours, with `whole` also those of transformers' `TrainingArguments`."""
    of_transformers = {setting.name for setting in fields(TrainingArguments)}
    shared = {setting.name for setting in fields(RetrievalTrainingArguments)}
    groups = {
        "data": {setting.name for setting in fields(DataArguments)},
        "student": {setting.name for setting in fields(StudentArguments)},
        "method": {setting.name for setting in fields(settings)} - shared,
        # Those that our class names again are here too: their defaults are ours.
        "training": shared & RetrievalTrainingArguments.__annotations__.keys() | {"output_dir", *MOST_USED},
    }
    if whole:
        groups["training, all of transformers' TrainingArguments"] = of_transformers - groups["training"]
    formatter = argparse.HelpFormatter(prog="accelerate launch train.py", max_help_position=32)
    formatter.add_text(__doc__.splitlines()[0])
    print(formatter.format_help() + "\n" + "\n".join(f"  {line}" for line in __doc__.splitlines()[2:]) + "\n")
    for title, names in groups.items():
        formatter = argparse.HelpFormatter(prog="train.py", max_help_position=32, width=110)
        formatter.start_section(title)
        for action in parser._actions:
            negates = action.option_strings[0].startswith("--no_")
            if not negates and (action.dest in names or (title == "data" and action.dest == "config")):
                action.option_strings = action.option_strings[:1]
                formatter.add_argument(action)
        formatter.end_section()
        print(formatter.format_help())
    print("" if whole else "All settings of transformers' TrainingArguments can be given too: --help all lists them.")
    sys.exit()


def without_distillation(recipe: dict[str, object], argv: list[str]) -> dict[str, object]:
    """The recipe without the settings that only a distillation has.

    Raises:
        ValueError: the command line has such a setting.
    """
    shared = {setting.name for setting in fields(RetrievalTrainingArguments)}
    of_distillation = {setting.name for setting in fields(DSMDTrainingArguments)} - shared
    typed = [part.split("=")[0] for part in argv if part.split("=")[0].removeprefix("--") in of_distillation]
    if typed:
        raise ValueError(f"--method contrastive has no teacher: leave out {', '.join(typed)}.")
    passed_over = [name for name in recipe if name in of_distillation]
    if passed_over and rank_is_first():
        print(f"--method contrastive has no teacher, and passes over the recipe's {', '.join(passed_over)}.")
    return {name: value for name, value in recipe.items() if name not in of_distillation}


def prepare(argv: list[str]) -> tuple[RetrievalTrainer, Splits, str | None, DataArguments]:
    """Everything before training: trainer, rows, the checkpoint to go on from, and which data was asked for.

    Raises:
        ValueError: for bad input, saying what to do.
    """
    student_args, data_args, args = parse_arguments(argv)
    prepare_output_dir(args, data_args.overwrite_output_dir, RUN_FILES)
    checkpoint = last_checkpoint(args)
    use_the_cores(args.device, args.world_size)
    rows = load_data(
        data_args,
        trust_remote_code=student_args.trust_remote_code,
        before_teacher=lambda rows: try_student(student_args, args, rows, teacher_source(data_args.teachers, None)),
        trains=args.do_train,
        teacher_is_demanded=option(argv, "teacher_model_name_or_path") is not None,
    )
    set_seed(args.seed)  # after the data: a teacher that had to be loaded must not change the student
    teacher = teacher_source(data_args.teachers, teacher_description(rows))
    captions = training_captions(next(iter(rows.values())))
    model, processor = build_student(student_args, captions, teacher_width(rows), teacher)
    settings = {
        "model": model,
        "args": args,
        "train_dataset": rows["train"] if args.do_train else None,
        "eval_dataset": rows.get("validation", rows.get("test")),  # Trainer wants one where eval_strategy is set
        "processing_class": processor,
    }
    if data_args.method == "distillation":
        saved = checkpoint or student_args.model_name_or_path
        projection = teacher_projection(rows, data_args, model.config.projection_dim, saved)
        trainer = DSMDTrainer(**settings, teacher_projection=projection)
    else:
        trainer = ContrastiveTrainer(**settings)
    starts = [student_args.model_name_or_path]
    if student_args.model_name_or_path is None:
        starts = [tower_source(student_args, modality, teacher)[0] for modality in ("vision", "text")]
    origin, inherited_license = describe_origin(student_args, teacher, model)
    trainer.facts = RunFacts(
        dataset_name=shown_name(data_args.dataset_name),
        splits={"eval": data_args.validation_split, "test": data_args.test_split},
        data=data_facts(rows, data_args) if args.do_train and args.should_save else {},  # only who saves writes a card
        data_license=data_args.data_license or license_of(rows, data_args.dataset_name),
        teacher_license=license_of_teacher(teacher, args),
        towers=[start for start in starts if start is not None and not Path(start).is_dir()],
        teacher=teacher_description(rows) if data_args.method == "distillation" else None,
        origin=origin,
        license=student_args.license or inherited_license,
        languages=student_args.language,
        baseline=read_baseline(data_args.baseline_results, len(rows.get("test", ()))),
    )
    if args.do_train:
        data = settings_that_count(data_args)
        data["fingerprint of the test split"] = rows_fingerprint(rows["test"])
        trainer.command = digest_of(trainer.identity(), asdict(student_args), data)
        found = enter(args, data_args.overwrite_output_dir, RUN_FILES, trainer.command)
        if found == FINISHED:
            say_finished(trainer)
        if found == INTERRUPTED:
            checkpoint = last_checkpoint(args, interrupted=True)
            if checkpoint is not None and trainer.is_world_process_zero():
                print(f"{args.output_dir} holds this run, interrupted: it goes on from {Path(checkpoint).name}.")
        if trainer.is_world_process_zero():
            print(summary(trainer, student_args))
        say_what_a_push_shows(trainer, data_args.dataset_name)
    return trainer, rows, checkpoint, data_args


def try_student(
    student_args: StudentArguments, args: RetrievalTrainingArguments, rows: datasets.DatasetDict, teacher: Source
) -> int | None:
    """Builds the student that a run will build later, and throws it away: what is wrong with it or its settings is
    better said before a teacher has run for hours.

    Args:
        rows: the splits.
        teacher: the one that is to run, which the student may have a tower of.

    Returns:
        The student's width, where it does not follow the teacher's and learns from it.

    Raises:
        ValueError, OSError: as the run would later.
    """
    check_held_out(rows)
    captions = itertools.islice(training_captions(rows["train"]), 1000)
    model, processor = build_student(student_args, captions, None, teacher)
    check_student(model)
    set_caption_length(model, processor.tokenizer, args, trains=True)
    check_processes(len(rows["train"]), args)
    batch = tiny_batch(RetrievalCollator(processor, args.max_caption_length), torch.device("cpu"))
    check_embeds(model, batch)
    check_text_pooling(model, batch)
    told = student_args.model_name_or_path is not None or student_args.projection_dim is not None
    return model.config.projection_dim if told and isinstance(args, DSMDTrainingArguments) else None


def say_finished(trainer: RetrievalTrainer) -> None:
    """Ends a command that has been carried out already: exit status 0."""
    if trainer.is_world_process_zero():
        folder = trainer.args.output_dir
        print(
            f"{folder} holds this run, finished: search with it (python -m inference.search --model_name_or_path "
            f'{folder} --images FOLDER "a query"), evaluate it (the same command with --do_train False '
            f"--model_name_or_path {folder}), or train it anew (with --overwrite_output_dir)."
        )
    sys.exit(0)


def leave(trainer: RetrievalTrainer) -> None:
    """Ends an interrupted run: exit status 0 after SIGTERM, 130 after Ctrl-C."""
    if trainer.is_world_process_zero():
        print(
            f"\nInterrupted after step {trainer.state.global_step}, which is saved. The same command with "
            "--resume_from_checkpoint last goes on."
        )
        if trainer.push_is_unfinished:
            print("Its push to the Hub was not finished: the next one brings the same.")
    status = 130 if trainer.interruption.agreed == signal.SIGINT else 0
    if trainer.push_is_unfinished:
        sys.stdout.flush()
        os._exit(status)  # the push's thread would be waited for
    sys.exit(status)


def main(argv: list[str]) -> None:
    try:
        trainer, rows, checkpoint, data_args = prepare(argv)
    except (ImportError, OSError, ValueError) as error:  # a tower or teacher may need what is not installed
        sys.exit(f"error: {error}")  # bad input: the message says what to do, a traceback would hide it
    except pickle.UnpicklingError:
        sys.exit(NO_PICKLES)
    metrics = {}
    if trainer.args.do_train:
        try:
            metrics.update(trainer.train(resume_from_checkpoint=checkpoint).metrics)
        except NotResumable as error:
            sys.exit(f"error: {error}")
        except pickle.UnpicklingError:
            sys.exit(f"{NO_PICKLES} It is in {checkpoint}.")
        if trainer.interruption.agreed:
            leave(trainer)
    try:
        if trainer.args.do_train:
            if isinstance(trainer, DSMDTrainer):  # without a teacher the loss has trained it
                trainer.facts.temperature = fit_temperature(trainer, rows["validation"])
                rotate(trainer, lambda: principal_components(rows, data_args))
            trainer.save_model(_internal_call=True)  # pushed at the end, with its card, and not now
            if trainer.is_world_process_zero():
                discard_replaced(Path(trainer.args.output_dir))  # where no checkpoint was saved
        if "validation" in rows:
            metrics.update(trainer.evaluate())
        if "test" in rows:
            metrics.update(trainer.evaluate(rows["test"], None, "test", data_args.test_fold_size))
        report(trainer, metrics, trained=trainer.args.do_train, rows=rows)
        if trainer.args.do_train and trainer.is_world_process_zero():
            note_finished(trainer.args, trainer.command)
            say_next(trainer.args.output_dir, data_args.dataset_name, data_args.test_split)
    except NOT_THE_DISKS:
        raise
    except DISK_ERRORS as error:
        more = " with --resume_from_checkpoint last" * trainer.args.do_train
        raise OSError(
            f"{error}\nNothing that was written is lost: mend this, then the same command{more} completes "
            f"{trainer.args.output_dir}."
        ) from error
    if trainer.args.do_train and trainer.args.push_to_hub:
        if (commit := trainer.push_to_hub()) is not None:  # only now can the code on the card name the weights' commit
            pin_revision(trainer, commit.repo_url.repo_id, commit.oid)
            trainer.push_to_hub("The card names the weights' revision")


if __name__ == "__main__":
    # Tokenizers must not start threads in a process that forks loader workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run_launched(lambda: main(sys.argv[1:]))
