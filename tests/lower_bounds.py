"""Installs exactly the lower bounds of pyproject.toml beside the environment, and runs some tests on them.

python tests/lower_bounds.py FOLDER
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

import tomllib  # of Python 3.11


ROOT = Path(__file__).parents[1]
EXTRAS = ("test", "onnx", "faiss")
TESTS = (
    "tests/test_train.py::test_a_run_leaves_what_it_promises_and_can_be_evaluated",
    "tests/test_train.py::test_a_run_goes_on_from_the_hub",
    "tests/modeling_dsmd/test_modeling_dsmd.py",
    "tests/trainers/test_losses.py",
    "tests/trainers/run/test_old_checkpoints.py",
    "tests/rows/test_checks.py",
    "tests/datasets_scripts/test_building.py",
    "tests/datasets_scripts/test_own_data.py",
    "tests/inference/test_search.py",
    "tests/hostile/test_fuzz.py",
    "tests/hostile/test_images.py",
)


def lower_bounds() -> list[str]:
    """`name==version` for each requirement of the project and of some of its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [
        *project["dependencies"],
        *(name for extra in EXTRAS for name in project["optional-dependencies"][extra]),
    ]
    bounds = {}
    for requirement in required:
        name, version = re.fullmatch(r"([\w-]+)[>=]=([\w.]+)(?:,<[\d.]+)?", requirement).groups()
        bounds[name] = version
    return [f"{name}=={version}" for name, version in bounds.items()]


def main(folder: Path) -> None:
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *lower_bounds()], check=True)
    subprocess.run([*install, "--no-deps", "torchscale==0.3.0"], check=True)
    # Of the project itself only the folder: what is installed are its requirements.
    sys.exit(subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS], cwd=ROOT).returncode)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
