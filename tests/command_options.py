"""Whether a command has only options that its program has, found out by the program itself, which does no more."""

import argparse
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tomllib
from accelerate.commands.launch import launch_command_parser
from documents import ROOT, expanded
from huggingface_hub.cli.hf import app as hf

import train


# What a program that reads options calls, itself or of a module that reads them for it.
READS_OPTIONS = re.compile(r"parse_args\(|rows\.command_line|study_to_draw\(")


class Parsed(Exception):
    """A program has read its options, by the parser that this holds."""


def check_options(line: str, complete: bool = True) -> None:
    """Raises, or ends as the program would, where the command has an option or a target that is not there.

    Args:
        line: the command.
        complete: what the program demands has to be given; a command within a sentence names only what it is about.
    """
    program, *words = [word.replace("$(BIN)/", "") for word in expanded(shlex.split(line))]
    program = Path(program).name
    if program == "make":
        targets = re.findall(r"^([a-z_]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words and set(words) <= set(targets), f"{line}: no such target"
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        named = [name for extras in re.findall(r"\.\[([\w,-]+)\]", line) for name in extras.split(",")]
        assert set(named) <= set(project["optional-dependencies"]), f"{line}: no such extra"
    elif program == "hf":
        _check_click(hf, words)
    elif program == "accelerate":
        assert words[0] == "launch", line
        if not complete and not any(word.endswith(".py") or word == "-m" for word in words):
            return
        launched = launch_command_parser().parse_args(words[1:])
        assert not launched.config_file or (ROOT / launched.config_file).is_file(), f"{line}: no such configuration"
        _check_program(launched.training_script, launched.training_script_args, line, complete)
    elif program == "python":
        if words[0] == "-c":
            compile(words[1], line, "exec")
        else:
            _check_program(*((words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])), line, complete)
    elif program == "train.py":
        _check_program(program, words, line, complete)
    else:
        raise AssertionError(f"{line}: a program that this test does not know")


def options_of(module: str) -> set[str]:
    """The names of a program's options."""
    try:
        _parse(module, [])
    except Parsed as parsed:
        return set(parsed.args[0]._option_string_actions)
    return set()


def programs() -> list[str]:
    """The modules of the project that `python -m` runs."""
    found = []
    for folder in ("benchmarks", "datasets_scripts", "inference", "model_cards", "teachers"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "__main__" in path.read_text(encoding="utf-8") and "space" not in path.parts:
                found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return found


def _check_program(program: str, words: list[str], line: str, complete: bool) -> None:
    if program == "train.py":
        if not {"-h", "--help"} & set(words):
            output = [] if "--output_dir" in words else ["--output_dir", "runs/x"]
            train.parse_arguments([*words, *output, "--use_cpu"])  # else --bf16 is refused where there is no GPU
        return
    if Path(program).name == "onnx_search.py":  # that of an exported folder, which takes no options
        assert not [word for word in words if word.startswith("-")], line
        return
    module = program.removesuffix(".py").replace("/", ".")
    assert find_spec(module), f"{line}: there is no program {program}"
    try:
        _parse(module, words)
    except Parsed:
        return
    except argparse.ArgumentError as error:
        demanded = "required" in str(error)
        assert demanded and not complete, f"{line}: {error}"
        return
    assert not words, f"{line}: {program} takes no options"


def _parse(module: str, words: list[str]) -> None:
    """Runs a program up to where it has read its options; not at all where it reads none."""
    spec = find_spec(module)
    name = f"{module}.__main__" if spec.submodule_search_locations else module
    source = Path(find_spec(name).origin).read_text(encoding="utf-8")
    if not READS_OPTIONS.search(source):
        return
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *args, **kwargs):
        parser.exit_on_error = False
        if not words:
            raise Parsed(parser)
        parse_args(parser, *args, **kwargs)
        raise Parsed(parser)

    def refuse(parser, message):
        raise argparse.ArgumentError(None, message)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        patch.setattr(sys, "argv", [module, *words])
        runpy.run_module(name, run_name="__main__")
    raise AssertionError(f"{module} has not read its options")


def _check_click(command, words: list[str]) -> None:
    name = "hf"
    while True:
        context = command.make_context(name, list(words))
        if not hasattr(command, "resolve_command"):
            return
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
