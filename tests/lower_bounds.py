"""Installs both ends of what pyproject.toml admits beside the environment, and runs some tests on each.

python tests/lower_bounds.py FOLDER [--ends lower newest loading]

- lower: exactly the lower bounds.
- newest: the newest versions that the bounds admit.
- loading: a saved student under the oldest transformers that its own code names, without this project.
"""

import argparse
import os
import re
import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

import tomllib  # of Python 3.11


ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "onnx")
TESTS = (
    "tests/test_train.py",
    "tests/test_train_teacher.py",
    "tests/modeling_dsmd/test_modeling_dsmd.py",
    "tests/modeling_dsmd/test_saving.py",
    "tests/modeling_dsmd/test_towers.py",
    "tests/trainers/test_losses.py",
    "tests/trainers/test_logsumexp.py",
    "tests/trainers/test_loss_inputs.py",
    "tests/trainers/run/test_resumable_trainer.py",
    "tests/trainers/run/test_old_checkpoints.py",
    "tests/rows/test_checks.py",
    "tests/datasets_scripts/test_building.py",
    "tests/datasets_scripts/test_arrow_files.py",
    "tests/datasets_scripts/test_own_data.py",
    "tests/inference/test_search.py",
    "tests/hostile/test_fuzz.py",
    "tests/hostile/test_images.py",
)


def requirements() -> list[str]:
    """Of the project and of some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(name for extra in EXTRAS for name in project["optional-dependencies"][extra]),
    ]


def lower_bounds() -> list[str]:
    """`name==version` for each requirement."""
    bounds = {}
    for requirement in requirements():
        name, bound = re.fullmatch(r"([\w-]+)[>=]=([\w.]+)(?:,<[\d.]+)?", requirement).groups()
        bounds[name] = bound
    return [f"{name}=={bound}" for name, bound in bounds.items()]


def install(folder: Path, wanted: list[str], *options: str) -> Path:
    """The Python of a new environment in `folder`, with what is wanted and not with this project."""
    if not (folder / "bin" / "python").is_file():
        venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, *options, *wanted], check=True)
    return folder / "bin" / "python"


def run_tests(folder: Path, wanted: list[str]) -> bool:
    """Whether the tests pass. Of the project itself only the folder is there: installed are its requirements."""
    python = install(folder, wanted, "--upgrade")
    install(folder, ["torchscale==0.3.0"], "--no-deps")
    versions = [python, "-m", "pip", "--disable-pip-version-check", "list", "--format", "freeze"]
    listed = subprocess.run(versions, capture_output=True, text=True, check=True).stdout.split()
    names = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "safetensors")
    print(f"{folder.name}:", *(line for line in listed if line.split("==")[0].replace("-", "_") in names), flush=True)
    return not subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS], cwd=ROOT).returncode


def run_loading(folder: Path) -> bool:
    """Whether saved students give the same embeddings under the oldest transformers that they are said to need."""
    from modeling_dsmd.configuration_dsmd import OLDEST_TRANSFORMERS

    script = ROOT / "tests" / "saved_students.py"
    torch = f"torch=={version('torch').split('+')[0]}"  # the environment's
    python = install(folder, [torch, f"transformers=={OLDEST_TRANSFORMERS}.0", "numpy"])
    subprocess.run([sys.executable, script, "save", folder / "students"], check=True)
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    command = [python, script, "load", folder / "students"]
    return not subprocess.run(command, cwd=folder, env=environment).returncode


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ends", nargs="+", default=["loading", "lower", "newest"])
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    runs = {
        "loading": lambda: run_loading(folder / "loading"),
        "lower": lambda: run_tests(folder / "lower", lower_bounds()),
        "newest": lambda: run_tests(folder / "newest", requirements()),
    }
    failed = [end for end in arguments.ends if not runs[end]()]
    sys.exit(f"Failed: {', '.join(failed)}." if failed else 0)
