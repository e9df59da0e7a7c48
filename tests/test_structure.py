"""The house as it is meant: imports run one way, files are short, and tests mirror the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
# From the ground up; a room imports those below it. Rooms of one floor do not import each other.
FLOORS = (
    ("modeling_dsmd", "rows"),
    ("model_cards", "trainers.run"),
    ("trainers", "teachers"),
    ("datasets_scripts",),
    ("inference",),
    ("train",),
    ("benchmarks", "docs"),
)
ROOMS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What no test of its own name holds: a test of another name does, or the file is a command of a few lines.
HELD_ELSEWHERE = {
    "docs/conf.py": "tests/test_docs.py",
    "docs/write_settings.py": "tests/test_docs.py",
    "datasets_scripts/left_out.py": "tests/datasets_scripts/test_building.py",
    "datasets_scripts/coco.py": "tests/datasets_scripts/test_karpathy.py",
    "datasets_scripts/flickr30k.py": "tests/datasets_scripts/test_karpathy.py",
    "datasets_scripts/icon_licences.py": "tests/datasets_scripts/test_icons.py",
    "datasets_scripts/icons_teacher.py": "tests/datasets_scripts/test_icons.py",
    "datasets_scripts/feature_files.py": "tests/datasets_scripts/test_import_teacher_features.py",
    "datasets_scripts/tar_stream.py": "tests/datasets_scripts/test_samples.py",
    "datasets_scripts/opening.py": "tests/test_train.py",
    "inference/compare_picture.py": "tests/inference/test_compare.py",
    "inference/dual_encoders.py": "tests/inference/test_compare.py",
    "inference/image_files.py": "tests/inference/test_search.py",
    "inference/queries.py": "tests/inference/test_vectors.py",
    "inference/sources.py": "tests/inference/test_embed.py",
    "inference/student.py": "tests/inference/test_export.py",
    "inference/encoders.py": "tests/inference/test_export.py",
    "inference/export_tables.py": "tests/inference/test_export.py",
    "inference/onnx_graphs.py": "tests/inference/test_onnx_files.py",
    "inference/onnx_search.py": "tests/inference/test_export.py",
    "inference/space/app.py": "tests/inference/test_space.py",
    "model_cards/front_matter.py": "tests/model_cards/test_model_card.py",
    "inference/web_check.py": "tests/inference/test_web_page.py",
    "inference/web_files.py": "tests/inference/test_web.py",
    "inference/web_open.py": "tests/inference/test_web.py",
    "inference/web_page.py": "tests/inference/test_web.py",
    "inference/web_pictures.py": "tests/inference/test_web.py",
    "inference/web_runtime.py": "tests/inference/test_web.py",
    "inference/web_student.py": "tests/inference/test_web.py",
    "model_cards/example.py": "tests/model_cards/test_model_card.py",
    "model_cards/tables.py": "tests/hostile/test_cards.py",
    "teachers/teacher.py": "tests/teachers/test_load_teacher.py",
    "trainers/card.py": "tests/model_cards/test_model_card.py",
    "trainers/step_rows.py": "tests/trainers/test_processes.py",
    "trainers/run/distributed.py": "tests/trainers/test_processes.py",
    "teachers/beit3/configuration_beit3.py": "tests/teachers/test_beit3.py",
    "teachers/beit3/modeling_beit3.py": "tests/teachers/test_beit3.py",
    "teachers/beit3/convert.py": "tests/teachers/test_beit3_convert.py",
}


def product_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(name) for name in listed.stdout.split() if not name.startswith("tests/")]


def module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in product_files()}


def room_of(module: str) -> str:
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len)


def imports_of(module: str) -> set[str]:
    """The project's own modules that a module imports anywhere in it, in functions too."""
    path = MODULES[module]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) + 1 - node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from room import name`: a module of that name, else what the room itself holds.
            found.update(f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names)
    return {name for name in found if name in MODULES and name != module}


def test_the_parser_of_imports_sees_relative_and_lazy_ones():
    assert "datasets_scripts.icons" in imports_of("datasets_scripts.opening")  # in a function
    assert {"trainers.run.checkpoints", "rows.files"} <= imports_of("trainers.run.resumable_trainer")
    assert "rows.teacher_columns" in imports_of("trainers.distillation_trainer")


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_its_own_room_and_those_below(module):
    room = room_of(module)
    wrong = [name for name in imports_of(module) if room_of(name) != room and ROOMS[room_of(name)] >= ROOMS[room]]
    assert not wrong, f"{module} is on floor {ROOMS[room]} ({room}) and imports {wrong}"


def test_no_import_in_a_circle():
    visited, on_the_way = set(), []

    def visit(module: str) -> None:
        assert module not in on_the_way, f"a circle: {' -> '.join([*on_the_way[on_the_way.index(module) :], module])}"
        if module in visited:
            return
        on_the_way.append(module)
        for name in sorted(imports_of(module)):
            visit(name)
        on_the_way.pop()
        visited.add(module)

    for module in MODULES:
        visit(module)


def test_rows_loads_no_transformers():
    modules = [module for module in MODULES if room_of(module) == "rows"]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "assert 'transformers' not in sys.modules, 'transformers'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_image_processors_are_pillows_wherever_torchvision_can_be_imported():
    """transformers then prefers torchvision's, whose resizing gives other pixels than a student learned from."""
    texts = [*product_files(), Path("README.md"), Path("model_cards/example/README.md"), *Path("docs").rglob("*.md")]
    loads = [
        (path, call)
        for path in texts
        for call in re.findall(
            r"Auto(?:Image)?Processor\.from_pretrained\((?:[^()]|\([^()]*\))*\)",
            (ROOT / path).read_text(encoding="utf-8"),
        )
    ]
    assert len(loads) > 8
    assert not [load for load in loads if 'backend="pil"' not in load[1]]


@pytest.mark.parametrize("path", product_files(), ids=str)
def test_a_file_is_read_in_one_sitting(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", product_files(), ids=str)
def test_tests_mirror_the_tree(path):
    if path.name in ("__init__.py", "__main__.py") or path.parts[0] == "benchmarks":
        return  # benchmarks are held together, in tests/benchmarks
    place = HELD_ELSEWHERE.get(path.as_posix(), f"tests/{path.parent}/test_{path.name}")
    assert (ROOT / place).is_file(), f"{path} has no {place}"
