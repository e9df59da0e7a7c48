"""Asks one query of a student in environments that hold one runtime each, and not this project: the answers are equal.

python tests/clean_environments.py FOLDER [--environments onnx sentence-transformers oldest newest]

- onnx: onnxruntime, tokenizers, Pillow and numpy; the exported folder's own onnx_search.py.
- sentence-transformers: that alone; the exported modules, without code of the repository.
- oldest, newest: transformers at the first version that a saved student takes, and at the last that was tried.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


ROOT = Path(__file__).parents[1]
QUERY = "a red house and a small dog"
PICTURES = 5
SHOWN = ("onnxruntime", "tokenizers", "torch", "transformers", "sentence-transformers")  # of the packages
CLOSE = 1e-4  # of each entry of an embedding of length 1, in float32


def ask_onnx(folder: Path) -> dict[str, list[float]]:
    """Of the query and each picture, taken from what the folder's program runs; it prints what it finds."""
    exported = folder / "onnx"
    sys.path.insert(0, str(exported))
    import onnx_search

    outputs = []

    class Session(onnx_search.InferenceSession):
        def run(self, *arguments):
            outputs.append(super().run(*arguments))
            return outputs[-1]

    onnx_search.InferenceSession = Session
    onnx_search.main(exported, folder / "images", QUERY)
    names = ["query", *(path.name for path in sorted((folder / "images").iterdir()))]
    return {name: output[0][0].tolist() for name, output in zip(names, outputs, strict=True)}


def ask_sentence_transformers(folder: Path) -> dict[str, list[float]]:
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "sentence_transformers"), device="cpu")
    answer = {"query": model.encode(QUERY).tolist()}
    for path in sorted((folder / "images").iterdir()):
        answer[path.name] = model.encode([Image.open(path)])[0].tolist()
    return answer


def ask_transformers(folder: Path) -> dict[str, list[float]]:
    """As the README's example does."""
    import torch
    from PIL import Image, ImageOps
    from transformers import AutoModel, AutoProcessor

    student = str(folder / "student")
    model = AutoModel.from_pretrained(student, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(student, backend="pil", trust_remote_code=True)
    answer = {}
    for path in sorted((folder / "images").iterdir()):
        image = ImageOps.exif_transpose(Image.open(path))
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        with torch.no_grad():
            output = model(**processor(text=[QUERY], images=[image], padding=True, return_tensors="pt"))
        answer["query"] = output.text_embeds[0].tolist()
        answer[path.name] = output.image_embeds[0].tolist()
    return answer


ASK = {
    "onnx": ask_onnx,
    "sentence-transformers": ask_sentence_transformers,
    "oldest": ask_transformers,
    "newest": ask_transformers,
}


def requirements() -> dict[str, list[str]]:
    """What each environment holds."""
    import tomllib
    import torch

    from modeling_dsmd.configuration_dsmd import OLDEST_TRANSFORMERS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (newest,) = [name for name in project["dependencies"] if name.startswith("transformers")]
    at_work = [f"torch=={torch.__version__.split('+')[0]}", "numpy", "pillow"]
    return {
        "onnx": ["onnxruntime", "tokenizers", "pillow", "numpy"],
        "sentence-transformers": [at_work[0], *project["optional-dependencies"]["sentence-transformers"], "pillow"],
        "oldest": [*at_work, f"transformers=={OLDEST_TRANSFORMERS}.0"],
        "newest": [*at_work, newest],
    }


def prepare(folder: Path) -> dict[str, list[float]]:
    """Saves a student in every form and some pictures; returns what `inference.search` embeds them as."""
    import torch
    from conftest import make_student
    from image_files import picture
    from tiny_towers import scatter

    from inference import export, search

    model, processor = make_student()
    for part in (scatter(model).eval(), processor):
        part.save_pretrained(folder / "student")
    (folder / "images").mkdir()
    for i in range(PICTURES):
        picture(i).save(folder / "images" / f"{i}.png")
    of = ["--model_name_or_path", str(folder / "student"), "--output_dir"]
    export.main([*of, str(folder / "onnx")])
    export.main([*of, str(folder / "sentence_transformers"), "--format", "sentence-transformers"])
    answer = {}
    with torch.no_grad():
        tokens = processor.tokenizer([QUERY], return_tensors="pt")
        answer["query"] = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).text_embeds[0]
        for path in sorted((folder / "images").iterdir()):
            pixels = processor.image_processor(images=[search.read_image(path)], return_tensors="pt")
            answer[path.name] = model(**pixels).image_embeds[0]
    return {name: embeds.tolist() for name, embeds in answer.items()}


def ask_in(place: Path, wanted: list[str], name: str, folder: Path) -> tuple[dict[str, list[float]], list[str]]:
    """What the environment in `place` answers, which is made where it is missing, and the packages that it holds."""
    python = place / "bin" / "python"
    if not python.is_file():
        venv.create(place, with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--upgrade", *wanted], check=True)
    listed = subprocess.run([*pip, "list", "--format", "freeze"], capture_output=True, text=True, check=True).stdout
    environment = {**os.environ, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, Path(__file__), folder, "--ask", name]
    answered = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if answered.returncode:
        print(answered.stderr[-3000:], file=sys.stderr)
        return {}, listed.split()
    return json.loads(answered.stdout.splitlines()[-1]), listed.split()


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """The largest of an entry of any embedding; infinite where they are not of the same things."""
    if one.keys() != other.keys():
        return float("inf")
    return max(abs(a - b) for name in one for a, b in zip(one[name], other[name]))


def ranking(answer: dict[str, list[float]]) -> list[str]:
    """The pictures by their cosine with the query, best first."""
    scores = {name: sum(a * b for a, b in zip(answer["query"], embeds)) for name, embeds in answer.items()}
    return sorted(scores.keys() - {"query"}, key=scores.get, reverse=True)


def main(environments: Path, names: list[str]) -> list[str]:
    """The environments whose answer is another; prints a line of each."""
    wanted, wrong = requirements(), []
    with tempfile.TemporaryDirectory() as folder:
        expected = prepare(Path(folder))
        for name in names:
            answer, packages = ask_in(environments / name, wanted[name], name, Path(folder))
            apart = difference(answer, expected)
            same = apart <= CLOSE and ranking(answer) == ranking(expected)
            wrong += [] if same else [name]
            shown = ", ".join(line for line in packages if line.split("==")[0].replace("_", "-") in SHOWN)
            print(f"{name} ({shown}; {len(packages)} packages): ", end="")
            print(f"{'the same' if same else 'ANOTHER'} answer, entries at most {apart:.1e} apart", flush=True)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the environments; they stay for the next time")
    parser.add_argument("--environments", nargs="+", choices=ASK, default=list(ASK))
    parser.add_argument("--ask", choices=ASK, help=argparse.SUPPRESS)  # in an environment: of the student in `folder`
    arguments = parser.parse_args()
    if arguments.ask:
        sys.path.remove(str(Path(__file__).parent))
        print(json.dumps(ASK[arguments.ask](arguments.folder)))
    else:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        wrong = main(arguments.folder.absolute(), arguments.environments)
        sys.exit(f"Another answer: {', '.join(wrong)}." if wrong else 0)
