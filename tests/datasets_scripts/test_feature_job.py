"""Features that were stopped, killed, begun anew or pushed: nothing is lost, mixed or overwritten."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import feature_job_worker
import pytest
import torch
from conftest import make_rows
from feature_job_worker import count_changes
from launching import command_line, environment
from tiny_features import arguments, contents

from datasets_scripts import add_teacher_features as script
from datasets_scripts import feature_job
from rows.teacher_columns import TEACHER_COLUMNS
from teachers import load_teacher
from trainers.run.locking import alone


def kill_at(moment: int, command: list[str]) -> None:
    line = command_line(1, feature_job_worker.__file__, moment, *command)
    killed = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]


def old_output(folder: Path) -> Path:
    """What --overwrite_output_dir may replace."""
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("the old one")
    rows = make_rows(2)
    rows.add_column("teacher", ["{}"] * 2).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def changes(source, teacher_folder, tmp_path_factory):
    folder = old_output(tmp_path_factory.mktemp("changes") / "out")
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree")):
            patch.setattr(module, name, getattr(module, name))  # put back at the end
        made = count_changes(-1)
        script.main(arguments(source, teacher_folder, folder, "--overwrite_output_dir"))
    return made[0]


# As a file in the first split is written, and in what follows all files: counted from the end.
@pytest.mark.parametrize("moment", [4, -1, -2, -3, -9])
def test_killed_and_started_again_it_goes_on(
    output, source, teacher_folder, tmp_path, moment, changes, monkeypatch, capsys
):
    command = arguments(source, teacher_folder, old_output(tmp_path / "again"), "--overwrite_output_dir")
    moment = moment if moment > 0 else changes + moment + 1
    old = contents(tmp_path / "again")
    kill_at(moment, command)
    if moment < changes - 1:  # until the new one has its name, the old one is whole: in its place, or aside
        place = tmp_path / "again" if (tmp_path / "again").exists() else tmp_path / "again.partial" / "replaced"
        assert contents(place) == old
    whole = len(list((tmp_path / "again.partial").glob("*.parquet")))
    assert whole == (min(max(moment - 2, 0), 11) if moment < changes else 0)  # the last removes the partial work
    encoded = []
    write = sys.modules["datasets_scripts.teacher_features"].write_shard
    monkeypatch.setattr(
        "datasets_scripts.teacher_features.write_shard", lambda shard, *rest: (encoded.append(1), write(shard, *rest))
    )
    if not (tmp_path / "again").exists():  # killed between the two last renames
        with pytest.raises(SystemExit, match="exists: name another --output"):
            script.main([part for part in command if part != "--overwrite_output_dir"])
        assert contents(tmp_path / "again") == old
    script.main(command)
    assert len(encoded) == 11 - whole
    assert contents(tmp_path / "again") == contents(output)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_other_settings_are_not_mixed_with_partial_work(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    with pytest.raises(SystemExit, match="work with another teacher"):
        script.main(arguments(source, other_folder, tmp_path / "out"))
    script.main(arguments(source, other_folder, tmp_path / "out", "--overwrite_output_dir"))
    row = datasets.load_dataset(str(tmp_path / "out"), split="train")[0]
    expected = load_teacher(str(other_folder)).embed_images([row["image"]])[0]
    torch.testing.assert_close(torch.tensor(row["teacher_image_embeds"]), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["thesis/chapter1.txt", "notes.txt", "data/mine.parquet", "data/mine-00000-of-00001.parquet", ".git/config", "e"],
)
def test_what_this_program_did_not_write_is_never_replaced(
    output, source, teacher_folder, tmp_path, capsys, monkeypatch, name
):
    folder = Path(shutil.copytree(output, tmp_path / "out"))
    command = arguments(source, teacher_folder, folder, "--overwrite_output_dir")

    def lay_down():
        (folder / name).parent.mkdir(exist_ok=True)
        if "." not in name:
            (folder / name).mkdir()
        elif name.endswith(".parquet"):  # another's rows, under a name like ours
            datasets.Dataset.from_dict({"a": [1]}).to_parquet(folder / name)
        else:
            (folder / name).write_text("of years")

    assemble = feature_job.assemble

    def while_it_works(*args):
        lay_down()
        return assemble(*args)

    with monkeypatch.context() as patch:
        patch.setattr(feature_job, "assemble", while_it_works)
        with pytest.raises(SystemExit, match=f"holds {name}, which was not made by this program: nothing was deleted"):
            script.main(command)
    before = contents(folder)
    assert (folder / name).exists() and contents(output).items() <= before.items()
    with pytest.raises(SystemExit):
        script.main(command)
    assert f"holds {name}, which was not made by this program" in capsys.readouterr().err
    assert contents(folder) == before


def test_a_strangers_file_among_partial_work_is_left(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    (tmp_path / "out.partial" / "notes.txt").write_text("of years")
    with pytest.raises(SystemExit, match="holds notes.txt, which this program did not write"):
        script.main(arguments(source, other_folder, tmp_path / "out", "--overwrite_output_dir"))
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "of years"


def test_finished_output_is_not_overwritten(output, source, teacher_folder, capsys):
    before = contents(output)
    with pytest.raises(SystemExit):
        script.main(arguments(source, teacher_folder, output))
    assert "exists" in capsys.readouterr().err
    assert contents(output) == before


def test_a_stream_that_has_changed_is_not_mixed_with_partial_work(teacher_folder, tmp_path, stopped):
    for place in ("a", "b"):
        rows = datasets.DatasetDict({"train": make_rows(12, seed=ord(place)).remove_columns(TEACHER_COLUMNS)})
        rows.save_to_disk(tmp_path / place / "data")
    options = ["--streaming"]
    stopped(arguments(tmp_path / "a" / "data", teacher_folder, tmp_path / "out", *options))
    with pytest.raises(SystemExit, match="work with another rows"):
        script.main(arguments(tmp_path / "b" / "data", teacher_folder, tmp_path / "out", *options))


def begun_before_fingerprints(partial: Path, teacher: Path) -> None:
    """Makes partial work what it would have been then."""
    settings = json.loads((partial / "settings.json").read_text())
    del settings["teacher"]["fingerprint"]
    settings["teacher files"] = [feature_job.earlier_fingerprint(str(teacher), None)]
    (partial / "settings.json").write_text(json.dumps(settings))


def test_a_moved_teacher_goes_on_and_another_of_its_name_does_not(
    output, source, teacher_folder, other_folder, tmp_path, stopped
):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    moved = shutil.copytree(teacher_folder, tmp_path / "moved")
    (Path(moved) / "README.md").write_text("edited")
    namesake = shutil.copytree(other_folder, tmp_path / "elsewhere" / teacher_folder.name)
    with pytest.raises(SystemExit, match="work with another teacher files"):
        script.main(arguments(source, namesake, tmp_path / "out"))
    script.main(arguments(source, moved, tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(output)


def test_work_that_was_begun_before_fingerprints_goes_on(source, teacher_folder, other_folder, tmp_path, stopped):
    stopped(arguments(source, teacher_folder, tmp_path / "out"))
    begun_before_fingerprints(tmp_path / "out.partial", teacher_folder)
    with pytest.raises(SystemExit, match="work with another teacher files"):
        script.main(arguments(source, other_folder, tmp_path / "out"))
    script.main(arguments(source, teacher_folder, tmp_path / "out"))
    rows = datasets.load_dataset(str(tmp_path / "out"))
    assert "fingerprint" not in json.loads(rows["test"][0]["teacher"])  # all rows say one thing, as it was begun


def test_two_processes_do_not_write_one_folder(source, teacher_folder, tmp_path):
    with alone(tmp_path / "out.partial", tmp_path / "out.partial.lock"):
        with pytest.raises(SystemExit, match="Another process is at work"):
            script.main(arguments(source, teacher_folder, tmp_path / "out"))


def test_what_is_in_the_way_is_left_alone(source, teacher_folder, tmp_path, capsys):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is in the way"):
        script.main(arguments(source, teacher_folder, tmp_path / "out", "--overwrite_output_dir"))
    with pytest.raises(SystemExit):
        script.main(arguments(source, teacher_folder, tmp_path, "--overwrite_output_dir"))
    assert "was not made by this program" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_a_second_push_leaves_no_files_of_the_first(output, source, teacher_folder, tmp_path, hub):
    first = arguments(source, teacher_folder, tmp_path / "out", "--push_to_hub", "user/features")
    first[first.index("--shard_rows") + 1] = "3"
    script.main(first)
    script.main(
        arguments(source, teacher_folder, tmp_path / "out", "--overwrite_output_dir", "--push_to_hub", "user/features")
    )
    files = {name for name in hub.files("datasets/user/features") if name.startswith("data/")}
    assert files == {name for name in contents(output) if name.startswith("data/")}
    before = hub.commits("datasets/user/features")
    script.main([*first, "--push_to_hub", "user/other"])  # what is there is pushed, not made again
    assert hub.files("datasets/user/other").keys() >= files
    assert hub.commits("datasets/user/features") == before


def test_killed_while_partial_work_is_removed_it_goes_on(source, teacher_folder, output, tmp_path, monkeypatch):
    command = arguments(source, teacher_folder, tmp_path / "out")
    remove = shutil.rmtree

    def half(path, *args, **kwargs):
        if Path(path).name == ".out.partial.removed" and Path(path).exists():
            (Path(path) / "settings.json").unlink()
            raise KeyboardInterrupt
        remove(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            script.main(command)
    assert contents(tmp_path / "out") == contents(output)
    script.main([*command, "--overwrite_output_dir"])
    assert contents(tmp_path / "out") == contents(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_there_is_only_pushed_as_what_it_is(output, source, other_folder, hub, tmp_path):
    with pytest.raises(SystemExit, match="has features of tiny, not of other: it is not pushed"):
        script.main(arguments(source, other_folder, output, "--push_to_hub", "user/features"))
    namesake = shutil.copytree(other_folder, tmp_path / "tiny")
    with pytest.raises(SystemExit, match="has features of another tiny than this one: .*: it is not pushed"):
        script.main(arguments(source, namesake, output, "--push_to_hub", "user/features"))
    assert not [name for name in hub.files("datasets/user/features") if name.startswith("data/")]
