"""What the project's commands have in common: one name for one thing, `train.py`'s."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


# Options that once had another name, which still works.
RENAMED = {
    "--dataset": "--dataset_name",
    "--license": "--data_license",
    "--model": "--model_name_or_path",
    "--output": "--output_dir",
    "--overwrite": "--overwrite_output_dir",
    "--teacher": "--teacher_model_name_or_path",
    "--weights": "--teacher_weights",
}


class Command(argparse.ArgumentParser):
    """The arguments of `python -m module`; an option's old name works, and a line on stderr names the new one.

    Options are never abbreviated: `--output` would be taken for `--output_dir` in silence.

    Args:
        module: the module's full name, for the usage line.
        doc: its docstring, with an example; shown by `--help` as it is written.
    """

    def __init__(self, module: str, doc: str):
        super().__init__(
            prog=f"python -m {module}",
            description=doc,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def add_flag(self, name: str, help: str) -> None:
        """Adds an option that is off unless given, alone or with True or False, as in `train.py`."""
        self.add_argument(name, nargs="?", const=True, default=False, type=_as_bool, metavar="True", help=help)

    def parse_known_args(self, args=None, namespace=None):
        args = [self._under_its_new_name(part) for part in (sys.argv[1:] if args is None else args)]
        return super().parse_known_args(args, namespace)

    def _under_its_new_name(self, part: str) -> str:
        name, equals, value = str(part).partition("=")
        known = self._option_string_actions
        if name in known or RENAMED.get(name) not in known:
            return part
        print(f"{name} is called {RENAMED[name]} now.", file=sys.stderr)
        return f"{RENAMED[name]}{equals}{value}"


def _as_bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() == "true"


def run_program(main: Callable[[], None]) -> None:
    """Runs a command; what is wrong with its input ends it in one sentence, without a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
