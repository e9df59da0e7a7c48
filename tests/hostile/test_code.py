"""No file that is downloaded runs code: pickles planted for every loading path, and code of repositories without the
flag, leave no mark."""

import ast
import contextlib
import io
import json
import os
import pickle
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from conftest import make_rows, make_student
from huggingface_hub import HfApi
from test_train import write_recipe
from tiny_towers import bert, clip, make_processor, vit
from transformers import AutoModel, BertModel, ViTModel

import train
from datasets_scripts import import_teacher_features, own_data
from datasets_scripts.opening import open_dataset
from inference import export, search
from rows.command_line import run_program
from teachers import load_teacher
from teachers.beit3.convert import convert
from trainers.run import checkpoints


ROOT = Path(__file__).parents[2]
PICKLES = [
    "pytorch_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "data.pkl",
    "x.pt",
]


class Malicious:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """What no test may leave behind."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


@pytest.fixture
def pickles(mark):
    """Puts malicious files into a folder: as `torch.save` makes them, old and new, and as bare pickles."""

    def plant(folder: Path, names=PICKLES) -> None:
        for i, name in enumerate(names):
            if i % 3 == 2:
                (folder / name).write_bytes(pickle.dumps(Malicious(mark)))
            else:
                torch.save({"a": Malicious(mark)}, folder / name, _use_new_zipfile_serialization=i % 3 == 0)

    return plant


@pytest.fixture
def data(tmp_path):
    parts = {"train": make_rows(32), "validation": make_rows(8, seed=1), "test": make_rows(8, seed=2)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def student(tmp_path):
    for part in make_student():
        part.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def refused(arguments) -> str:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert str(stop.value).startswith("error: ")
    return str(stop.value)


def test_the_pickles_are_what_they_seem(tmp_path, pickles, mark):
    """Else the tests below would see nothing."""
    pickles(tmp_path)
    for name in PICKLES:
        with contextlib.suppress(RuntimeError):  # a bare pickle has run by then
            torch.load(tmp_path / name, weights_only=False)
        mark.rmdir()


def test_beside_safetensors_pickles_are_not_opened(student, pickles, mark):
    pickles(student)
    AutoModel.from_pretrained(student)
    AutoModel.from_pretrained(student, trust_remote_code=True)
    load_teacher(str(student))


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_weights_in_a_pickle_run_nothing(tmp_path, student, data, mark, kind, capsys):
    """Every way to a model: of a run, of its towers, as a teacher, for search and for export."""
    towers = {"vision": ViTModel(vit()), "text": BertModel(bert())}
    folders = [student]
    for name, tower in towers.items():
        tower.save_pretrained(tmp_path / name)
        make_processor().save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
    clip().save_pretrained(tmp_path / "clip")
    make_processor().save_pretrained(tmp_path / "clip")
    for folder in [*folders, tmp_path / "clip"]:
        (folder / "model.safetensors").unlink()
        content = [{"a": Malicious(mark)}, Malicious(mark), {}][kind]
        if kind == 2:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious(mark)))
        else:
            torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == 0)
    base = ["--dataset_name", str(data), "--use_cpu", "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    refused([*base, "--model_name_or_path", str(student)])
    pre_trained = ["--vision_model_name_or_path", str(tmp_path / "vision")]
    pre_trained += ["--text_model_name_or_path", str(tmp_path / "text"), "--overwrite_output_dir"]
    refused([*base, *pre_trained])
    for folder in (student, tmp_path / "clip"):
        with pytest.raises(Exception, match="(?i)weights|pickle|load"):
            load_teacher(str(folder))
        with pytest.raises(Exception, match="(?i)weights|pickle|load"):
            AutoModel.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(SystemExit, match="error: "):
        run_program(partial(search.main, ["--model_name_or_path", str(student), "--images", str(tmp_path), "a"]))
    with pytest.raises(SystemExit, match="error: "):
        export.main(["--model_name_or_path", str(student), "--output_dir", str(tmp_path / "onnx")])
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_from_the_hub_runs_nothing(tmp_path, data, pickles, hub, name):
    """Its manifest is right: a stranger seals what he has made."""
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "report_to": "none"}
    recipe = write_recipe(tmp_path, data, **settings, load_best_model_at_end=False)
    trainer, *_ = train.prepare(recipe)
    trainer.train()
    (checkpoint, *_) = checkpoints.of_run(tmp_path / "run")
    pickles(checkpoint, [name, "training_args.bin", "pytorch_model.bin"])
    checkpoints.seal(checkpoint)
    message = refused([*recipe, "--resume_from_checkpoint", str(checkpoint)])
    assert "can run any code" in message and checkpoint.name in message
    HfApi().create_repo("user/student")
    HfApi().upload_folder(repo_id="user/student", folder_path=checkpoint, path_in_repo="last-checkpoint")
    elsewhere = ["--output_dir", str(tmp_path / "elsewhere"), "--resume_from_hub", "user/student"]
    assert "can run any code" in refused([*recipe, *elsewhere])


def test_released_files_of_pickles_run_nothing(tmp_path, pickles):
    pickles(tmp_path, ["a.pth", "b.pth", "c.pth"])
    (tmp_path / "beit3.spm").write_bytes(b"")
    rows = make_rows(4).select_columns(["image", "captions", "image_id"])
    datasets.DatasetDict(train=rows).save_to_disk(tmp_path / "rows")
    for name in ("a.pth", "b.pth", "c.pth"):
        with pytest.raises(ValueError, match="can run any code"):
            convert(tmp_path / name, tmp_path / "beit3.spm", tmp_path / "out")
        file = str(tmp_path / name)
        with pytest.raises(SystemExit, match="can run any code"):
            import_teacher_features.main(
                ["--dataset_name", str(tmp_path / "rows"), "--features", "train", file, file]
                + ["--teacher_model_name_or_path", "x", "--output_dir", str(tmp_path / "out")]
            )
    assert not (tmp_path / "out").exists()


def test_datasets_of_pickles_and_programs_run_nothing(tmp_path, pickles, mark, hub):
    folder = tmp_path / "mine"
    folder.mkdir()
    pickles(folder, ["train.pkl", "train.pt", "train.npy"])
    program = f"import os, datasets\nos.mkdir({str(mark)!r})\nclass B(datasets.GeneratorBasedBuilder): pass\n"
    (folder / "mine.py").write_text(program)
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: train.pkl\n---\n")
    HfApi().create_repo("user/pickles", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/pickles", folder_path=folder, repo_type="dataset")
    for name in (str(folder), "user/pickles"):
        for streaming in (False, True):
            with pytest.raises((ValueError, OSError)):
                open_dataset(name, streaming=streaming)
        with pytest.raises((ValueError, OSError)):
            own_data.main([name, "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt", "npy", "npz"])
def test_pickles_in_tars_run_nothing(tmp_path, pickles, suffix):
    """`webdataset` itself would open them."""
    pickles(tmp_path, ["a", "b", "c"])
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar", "w") as tar:
        for name in "abc":
            tar.add(tmp_path / name, f"{name}.{suffix}")
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    rows = open_dataset(str(tmp_path / "tars"), streaming=True)
    assert [row["image"] for row in rows["train"]] == [None] * 3  # the pickles are passed over
    with pytest.raises(ValueError, match="no sample of the train split has both"):
        open_dataset(str(tmp_path / "tars"), whole_samples=True)
    with pytest.raises(ValueError):
        own_data.main([str(tmp_path / "tars"), "--output_dir", str(tmp_path / "out")])


CODE = """
import os
os.makedirs({mark!r}, exist_ok=True)
from transformers import PretrainedConfig, PreTrainedModel
class Config(PretrainedConfig):
    model_type = "stranger"
class Model(PreTrainedModel):
    config_class = Config
"""


@pytest.fixture
def stranger(tmp_path, mark):
    """A model's folder whose code would leave the mark."""
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    auto_map = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    auto_map |= {name: "code.Model" for name in ("AutoProcessor", "AutoImageProcessor", "AutoTokenizer")}
    (folder / "config.json").write_text(json.dumps({"model_type": "stranger", "auto_map": auto_map}))
    for name in ("preprocessor_config", "processor_config", "tokenizer_config"):
        (folder / f"{name}.json").write_text(json.dumps({"auto_map": auto_map}))
    return folder


def test_code_of_a_repository_runs_only_with_the_flag(tmp_path, stranger, data, mark, hub, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")  # a person who is asked, and declines
    HfApi().create_repo("user/stranger")
    HfApi().upload_folder(repo_id="user/stranger", folder_path=stranger)
    plain = tmp_path / "plain"
    rows = datasets.load_from_disk(data)
    columns = ["image", "captions", "image_id"]
    datasets.DatasetDict({split: part.select_columns(columns) for split, part in rows.items()}).save_to_disk(plain)
    base = ["--use_cpu", "--output_dir", str(tmp_path / "run"), "--report_to", "none", "--overwrite_output_dir"]
    for name in (str(stranger), "user/stranger"):
        for options in (
            ["--model_name_or_path", name],
            ["--vision_model_name_or_path", name, "--text_model_name_or_path", name],
        ):
            assert "trust_remote_code" in refused([*base, "--dataset_name", str(data), *options])
        recipe = write_recipe(tmp_path, data, dataset_name=str(plain), teacher_model_name_or_path=name)
        assert "trust_remote_code" in refused([*recipe, "--overwrite_output_dir"])
        with pytest.raises(ValueError, match="trust_remote_code"):
            load_teacher(name)
        for program, arguments in (
            (search, ["--images", str(tmp_path), "a"]),
            (export, ["--output_dir", f"{tmp_path}/o"]),
        ):
            with pytest.raises(SystemExit, match="trust_remote_code"):
                run_program(partial(program.main, ["--model_name_or_path", name, *arguments]))
    assert not mark.exists()
    with pytest.raises((OSError, ValueError, AttributeError, TypeError)):
        load_teacher(str(stranger), trust_remote_code=True)
    assert mark.exists()  # the code would have run
    mark.rmdir()


def test_recipes_make_no_objects(tmp_path, mark):
    (tmp_path / "recipe.yaml").write_text(f"learning_rate: !!python/object/apply:os.mkdir [{str(mark)!r}]\n")
    assert "is no recipe" in refused(["--config", str(tmp_path / "recipe.yaml")])


def calls(tree: ast.AST) -> list[tuple[str, dict]]:
    """Dotted names of what is called, and the keywords' values where they are constants."""
    return [
        (ast.unparse(node.func), {word.arg: getattr(word.value, "value", None) for word in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def test_nothing_of_ours_opens_a_pickle_or_makes_objects_of_yaml():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in files.stdout.split() if not name.startswith("tests/")]
    assert len(paths) > 40
    for path in (path for path in paths if path.is_file()):
        for name, keywords in calls(ast.parse(path.read_text())):
            if name.endswith("torch.load"):
                assert keywords.get("weights_only") is True, path
            if name.endswith(("np.load", "numpy.load")):
                assert keywords.get("allow_pickle") is False, path
            assert name not in ("yaml.load", "yaml.full_load", "yaml.unsafe_load", "pickle.load", "pickle.loads"), path
            assert not name.startswith(("dill.", "joblib.", "shelve.", "marshal.")), path
            assert not name.endswith(("read_pickle", "extractall")), path
