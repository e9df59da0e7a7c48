"""What the README, the docs and the cards show runs: their Python as it is written, and their commands on small data.
Of the commands that cannot run here every option is one that their program has.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click import UsageError
from command_options import check_options, options_of, programs
from conftest import WORDS, make_student
from documents import (
    ROOT,
    blocks,
    command_lines,
    documents,
    enter_place,
    expanded,
    inline_code,
    is_shell,
    run,
    save_models,
    write_photos,
    write_tars,
)
from huggingface_hub import HfApi
from PIL import Image
from transformers import HfArgumentParser

from datasets_scripts.data_loading import DataArguments
from model_cards.model_card import usage_code
from rows.command_line import RENAMED
from trainers import DSMDTrainingArguments
from trainers.student_arguments import StudentArguments


# What is put in place of a value, so that a command runs on small data.
INSTEAD = {
    ("--dataset_name", "icons"): "data/mine_features",
    ("--dataset_name", "SOURCE"): "my_photos",
    ("--truncate_dim", "64"): "8",
    ("--max_steps", "10000"): "2",
    ("--eval_steps", "1000"): "1",
    ("--save_steps", "1000"): "1",
}
# Of the commands with these words the options are parsed alone, and why.
PARSED = {
    r"^make ": "other tests run what it runs",
    r"^pip ": "installs",
    r"^hf ": "needs an account",
    r"benchmarks\.": "hours of training, or minutes of measuring",
    r"accelerate_configs/": "several GPUs or machines; tests/test_accelerate_configs.py runs the same on CPU",
    r"datasets_scripts\.(flickr30k|coco) |recipes/(flickr30k|coco)_": "pictures that do not ship",
    r"recipes/icons": "the quickstart and its teacher: minutes",
    r"teachers\.icons_towers": "weights of the teacher extra; tests/teachers/test_icons_towers.py runs it",
    r"teachers\.beit3\.convert": "released weights; tests/teachers/test_beit3_convert.py runs it",
    r"icons_onnx/onnx_search": "an export; tests/inference/test_export.py runs it",
    r"timm/": "a model of the Hub; tests/teachers/test_open_clip_teacher.py runs the same",
}
# Commands that are not looked at, and why.
PASSED_OVER = {r"^rm ": "deletes", r"^(tensorboard|git|cd|sudo|apt-get|docker) ": "not our program"}
# What the text around a page's Python gives it, where the page has these words.
AROUND = {
    "Image.open(file)": "from PIL import Image, ImageOps; file = 'arrow.png'",
    "vectors @ query": "query = np.eye(1, 16, dtype=np.float32)[0]",
    "embed_image(": "embed_image = lambda image: np.asarray(image.resize((4, 4)).convert('L')).reshape(-1) + 1.0\n"
    "embed_text = lambda text: np.random.default_rng(len(text)).normal(size=16)",
}
A_COMMAND = re.compile(r"(python|accelerate|make|pip|hf|train\.py) [^.…]")
# Options that sentences name, of accelerate and of tests/lower_bounds.py; and --config, which train.py reads first.
OF_OTHERS = {"--mixed_precision", "--config", "--num_processes", "--ends"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, models):
    """What a reader of any page has: photos, a student, a dataset with and without a teacher's features, tars."""
    folder = tmp_path_factory.mktemp("prepared")
    photos = write_photos(folder / "my_photos", 24)
    shutil.copytree(photos, folder / "Pictures", ignore=shutil.ignore_patterns("*.txt"))
    (folder / "queries.txt").write_text("".join(f"a {word}\n" for word in WORDS))
    some = sorted(path.name for path in (folder / "Pictures").iterdir())[:3]
    (folder / "labelled.csv").write_text("query,file\n" + "".join(f"a picture,{name}\n" for name in some))
    Image.fromarray(np.arange(40 * 48 * 4, dtype=np.uint8).reshape(40, 48, 4)).save(folder / "arrow.png")
    for part in make_student():
        part.save_pretrained(folder / "runs" / "icons")
    (folder / "runs/icons/assets").mkdir()
    shutil.copy(folder / "arrow.png", folder / "runs/icons/assets/query.png")
    write_tars(folder / "data" / "tars", write_photos(folder / "more_photos", 12, seed=1))
    torch.save({"a": torch.ones(2)}, folder / "open_clip_pytorch_model.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", sys.argv)
        run(shlex.split("python -m datasets_scripts.own_data --dataset_name my_photos --output_dir data/mine"))
        run(shlex.split("python -m datasets_scripts.own_data --dataset_name more_photos --output_dir data/other"))
        features = "python -m datasets_scripts.add_teacher_features --dataset_name data/mine --output_dir"
        teacher = ["data/mine_features", "--teacher_model_name_or_path", str(models / "beit3_base_coco")]
        run([*shlex.split(features), *teacher])
    return folder


@pytest.fixture
def place(tmp_path, models, prepared, hub, monkeypatch):
    """A folder with the prepared things, which is the home folder too; the Hub has the models and the student."""
    folder = tmp_path / "place"
    folder.mkdir()
    enter_place(folder, models, monkeypatch)
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    (folder / "icons").symlink_to("runs/icons")  # the repository of the example's code
    for name in ("name/student", "user/student"):
        HfApi().create_repo(name)
        HfApi().upload_folder(repo_id=name, folder_path=folder / "runs" / "icons")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def found(line: str, table: dict[str, str]) -> bool:
    return any(re.search(part, line) for part in table)


def run_in_small(line: str, place: Path) -> None:
    words = expanded(shlex.split(line))
    words = [INSTEAD.get((option, word), word) for option, word in zip(["", *words], words)]
    for option, value in zip(words, words[1:]):
        if (
            option == "--output_dir" and (place / value).exists()
        ):  # of what was prepared, or of the page's last command
            (place / value).rename(place / f"before_{len(list(place.glob('before_*')))}")
    try:
        run(words)
    except SystemExit as end:
        assert end.code in (None, 0), f"{line}: {end.code}"


@pytest.mark.parametrize("path", documents(), ids=str)
def test_a_page_runs_from_its_top_to_its_end(path, place):
    names = {"np": np, "__name__": "__main__"}
    text = (ROOT / path).read_text(encoding="utf-8")
    for words, code in AROUND.items():
        exec(code if words in text else "", names)
    for block in blocks(text):
        if block.language in ("python", "py") and not block.not_run:
            exec(compile(block.text, f"{path}:{block.line}", "exec"), names)
        for line in command_lines(block) if is_shell(block) else ():
            if found(line, PASSED_OVER):
                continue
            if block.not_run or found(line, PARSED):
                check_options(line)
            else:
                run_in_small(line, place)


def code_of_readers() -> dict[str, str]:
    """The blocks of Python that load a student, and the card's."""
    pages = {path.as_posix(): blocks((ROOT / path).read_text(encoding="utf-8")) for path in documents()}
    found = {
        f"{path}:{block.line}": block.text for path, of in pages.items() for block in of if "AutoModel" in block.text
    }
    return {**found, "a new card": usage_code("runs/icons", ["a", "b"])}


@pytest.mark.parametrize("name", code_of_readers())
def test_a_reader_of_ones_own_process_is_warned_of_nothing(name, place):
    """One that has not imported this project, whose configuration transformers then does not know."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-W", "default", "-c", code_of_readers()[name]]
    ran = subprocess.run(command, cwd=place, env={**variables, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout, ran.stderr[-3000:]
    assert not re.search("warn|[[]transformers[]]", ran.stderr, re.IGNORECASE), ran.stderr


@pytest.mark.parametrize(
    "line",
    [
        "make quick",
        'pip install -e ".[onyx]"',
        "hf repos create a/b --repo-typ space",
        "hf repos mke a/b",
        "accelerate launch train.py --config recipes/icons.yaml --learning_rat 1",
        "accelerate launch train.py --config recipes/icon.yaml",
        "accelerate launch --config_file accelerate_configs/one.yaml train.py --config recipes/icons.yaml",
        "accelerate launch --num_proceses 2 train.py --config recipes/icons.yaml",
        "accelerate launch -m datasets_scripts.add_teacher_features --dataset_name a --output b",
        "python -m inference.serch --k 3",
        "python -m inference.search --images a",
        "python -m inference.search --model_name_or_path a --images b --kk 3 c",
        "python -m datasets_scripts.coco --karpaty a --images b --output_dir c",
        "python -m benchmarks --fast",
        "python -m benchmarks.gpu --tiniest",
        "python other.py",
        "serve --port 80",
    ],
)
def test_what_no_program_takes_is_found(line, monkeypatch):
    """Else the tests of the pages would pass whatever they say."""
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, ValueError, UsageError)):
        check_options(line)


def test_blocks_of_a_page():
    text = "---\na: 1\n---\n\n<!-- not run: needs\na GPU -->\n\n```bash\na \\\n  b && c  # d\n```\n\n"
    text += "- x\n\n  ```python\n  y = 1\n  ```\n"
    first, second = blocks(text + "\nz `--k 3`\n\n    python -m a\n")[:2]
    assert (first.language, first.not_run, command_lines(first)) == ("bash", "needs\na GPU", ["a    b", "c"])
    assert (second.language, second.not_run, second.text) == ("python", None, "y = 1\n")
    assert inline_code(text + "z `--k 3`\n") == ["--k 3"]


@pytest.mark.parametrize("path", documents(), ids=str)
def test_commands_within_sentences_have_the_options_of_their_programs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for code in inline_code((ROOT / path).read_text(encoding="utf-8")):
        if A_COMMAND.match(code) and not found(code, PASSED_OVER):
            check_options(code, complete=False)


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The options of all programs of the project."""
    parser = HfArgumentParser((StudentArguments, DataArguments, DSMDTrainingArguments))
    return set(parser._option_string_actions) | set(RENAMED) | {name for of in programs() for name in options_of(of)}


@pytest.mark.parametrize("path", documents(), ids=str)
def test_an_option_in_a_sentence_is_one_of_a_program(path, known):
    text = (ROOT / path).read_text(encoding="utf-8")
    alone = [code for code in inline_code(text) if code.startswith("--")]
    named = {word.split("=")[0] for code in alone for word in code.split() if re.match(r"--[a-z]", word)}
    unknown = named - known - OF_OTHERS
    assert not unknown
