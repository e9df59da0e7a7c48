"""Options under one name in every command; their old names still work and name the new ones."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rows.command_line import RENAMED, Command


ROOT = Path(__file__).parents[2]
COMMANDS = {  # module -> the options that once had another name
    "datasets_scripts.add_teacher_features": set(RENAMED) - {"--model"},
    "datasets_scripts.coco": {"--output", "--license"},
    "datasets_scripts.emoji": {"--output"},
    "datasets_scripts.flickr30k": {"--output", "--license"},
    "datasets_scripts.icons": {"--output"},
    "datasets_scripts.import_teacher_features": {"--dataset", "--teacher", "--output"},
    "datasets_scripts.own_data": {"--dataset", "--output", "--license"},
    "inference.compare": {"--output", "--dataset"},
    "inference.embed": {"--model", "--output"},
    "inference.export": {"--model", "--output", "--dataset"},
    "inference.search": {"--model"},
    "teachers.icons_towers": {"--output"},
}


@pytest.fixture
def command():
    parser = Command("a.b", "What it does.\n\n    python -m a.b --output_dir D")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--model_name_or_path", action="append")
    parser.add_flag("--streaming", help="Read as a stream.")
    return parser


@pytest.mark.parametrize("given", [["--output", "D"], ["--output=D"], ["--output_dir", "D"], ["--output_dir=D"]])
def test_an_old_name_works_and_names_the_new(command, given, capsys):
    assert command.parse_args(given).output_dir == "D"
    said = capsys.readouterr().err
    assert said == ("--output is called --output_dir now.\n" if given[0].split("=")[0] == "--output" else "")


def test_values_that_look_like_old_names_stay(command):
    assert command.parse_args(["--output_dir=--output", "--model", "--x=1"[2:]]).output_dir == "--output"


def test_names_are_not_abbreviated(command, capsys):
    for given in ("--output_d", "--outp", "--mod"):
        with pytest.raises(SystemExit):
            command.parse_args(["--output_dir", "D", given, "D"])
        assert f"unrecognized arguments: {given}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "value"),
    [([], False), (["--streaming"], True), (["--streaming", "True"], True), (["--streaming", "false"], False)],
)
def test_a_flag_is_given_alone_or_with_its_value(command, given, value):
    assert command.parse_args(["--output_dir", "D", *given]).streaming is value


def test_a_flag_of_another_value_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        command.parse_args(["--output_dir", "D", "--streaming", "yes"])
    assert "argument --streaming: 'yes': expected True or False" in capsys.readouterr().err


@pytest.mark.parametrize("module", COMMANDS)
def test_each_command_has_the_new_names_and_an_example(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert shown.stdout.startswith(f"usage: python -m {module} ")
    usage, _, options = shown.stdout.partition("options:")
    assert f"-m {module} --" in usage.partition("\n\n")[2]  # an example
    assert max(map(len, usage.splitlines())) <= 119  # a line that ends in a single backslash swallows the next
    for old in COMMANDS[module]:
        assert re.search(rf"^  {RENAMED[old]}\b", options, re.MULTILINE), (old, options)
    for old in RENAMED:
        assert not re.search(rf"^  {old}\b", options, re.MULTILINE) or (module, old) in {("inference.search", "")}


def test_the_docs_table_has_every_renamed_option():
    table = (ROOT / "docs/reference/command_line.md").read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        assert re.search(rf"^\| `{new}` \|.*`{old}`", table, re.MULTILINE), new
