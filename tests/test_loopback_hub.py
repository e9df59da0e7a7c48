"""The loopback Hub, through the clients it is for."""

import subprocess
import sys

import datasets
import httpx2
import numpy as np
import pytest
import torch
from conftest import make_rows, make_student
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, HfFileSystem, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFolder
from PIL import Image
from safetensors.torch import load_file


REPO = "user/student"
DATA = "user/rows"

# A process that cannot import our package: what a user of the repository has.
ELSEWHERE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_dsmd", "trainers"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Absent())
from PIL import Image
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

try:
    AutoModel.from_pretrained("user/student")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise AssertionError("loaded without the code")
processor = AutoProcessor.from_pretrained("user/student")
inputs = processor(text=["red house", "dog"], images=[Image.open("image.png")], return_tensors="pt", padding=True)
tensors = {}
for revision in sys.argv[1:]:
    model = AutoModel.from_pretrained("user/student", revision=revision, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    with torch.no_grad():
        output = model(**inputs)
    tensors |= {f"{revision}/images": output.image_embeds, f"{revision}/texts": output.text_embeds}
save_file(tensors, "out.safetensors")
"""


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi()


def upload(api: HfApi, files: dict[str, bytes], deleted: tuple[str, ...] = (), **arguments):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    operations += [CommitOperationDelete(path) for path in deleted]
    return api.create_commit(REPO, operations, commit_message="test", **arguments)


def test_every_revision_of_a_model_loads_where_the_package_is_not(hub, tmp_path):
    model, processor = make_student()
    processor.push_to_hub(REPO)
    old = model.push_to_hub(REPO).oid
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    inputs = processor(text=["red house", "dog"], images=[image], return_tensors="pt", padding=True)
    expected = {}
    with torch.no_grad():
        output = model(**inputs)
        expected |= {f"{old}/images": output.image_embeds, f"{old}/texts": output.text_embeds}
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) / 10
        model.push_to_hub(REPO)
        output = model(**inputs)
        expected |= {"main/images": output.image_embeds, "main/texts": output.text_embeds}
    assert (expected["main/images"] - expected[f"{old}/images"]).abs().max() > 0.01
    command = [sys.executable, "-c", ELSEWHERE, old, "main"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    actual = load_file(tmp_path / "out.safetensors")
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=1e-6)
    assert len(hub.commits(REPO)) == 4 and "modeling_dsmd.py" in hub.files(REPO, old)


def assert_same_rows(actual, expected):
    actual = list(actual)
    assert len(actual) == len(expected)
    for row, other in zip(actual, expected):
        image, image_too = row.pop("image"), other.pop("image")
        assert row == other
        assert np.array_equal(np.asarray(image), np.asarray(image_too))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_pushed_dataset_loads_again(hub, streaming):
    parts = {"train": make_rows(9), "test": make_rows(4, seed=1)}
    datasets.DatasetDict(parts).push_to_hub(DATA, num_shards={"train": 2, "test": 1})
    assert sorted(hub.files(f"datasets/{DATA}")) == [
        "README.md",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00002.parquet",
        "data/train-00001-of-00002.parquet",
    ]
    loaded = datasets.load_dataset(DATA, streaming=streaming)
    assert set(loaded) == {"train", "test"}
    for split, rows in parts.items():
        assert loaded[split].features == rows.features
        assert_same_rows(loaded[split], rows)
        encoded = loaded[split].cast_column("image", datasets.Image(decode=False))
        for row, expected in zip(encoded, rows.cast_column("image", datasets.Image(decode=False))):
            assert row["image"]["bytes"] == expected["image"]["bytes"]


def test_a_dataset_pushed_to_a_branch_and_again_is_read_by_revision(hub):
    first = make_rows(3).push_to_hub(DATA).oid
    make_rows(5).push_to_hub(DATA)
    make_rows(7).push_to_hub(DATA, revision="more")
    for revision, count in ((first, 3), ("main", 5), (None, 5), ("more", 7)):
        assert len(datasets.load_dataset(DATA, split="train", revision=revision)) == count
    assert {ref.name for ref in HfApi().list_repo_refs(DATA, repo_type="dataset").branches} == {"main", "more"}


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
  - split: validation
    path: data/validation-*.parquet
---
Tiny.
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_an_uploaded_folder_of_parquet_loads_by_split(api, tmp_path, streaming):
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    parts = {
        "train-00000": make_rows(5),
        "train-00001": make_rows(4, seed=1),
        "validation-00000": make_rows(3, seed=2),
    }
    for name, rows in parts.items():
        rows.to_parquet(tmp_path / "data" / f"{name}.parquet")
    api.create_repo(DATA, repo_type="dataset")
    api.upload_folder(repo_id=DATA, folder_path=tmp_path, repo_type="dataset")
    expected = {
        "train": datasets.concatenate_datasets([parts["train-00000"], parts["train-00001"]]),
        "validation": parts["validation-00000"],
    }
    for split, rows in expected.items():
        assert_same_rows(datasets.load_dataset(DATA, split=split, streaming=streaming), rows)


def test_the_same_name_in_another_test_is_another_repository(hub):
    """Clients cache listings by name: an emptied Hub must not show what was there before."""
    for count, split in ((3, "train"), (4, "test")):
        hub.clear()
        make_rows(count).push_to_hub(DATA, split=split)
        loaded = datasets.load_dataset(DATA)
        assert {name: len(rows) for name, rows in loaded.items()} == {split: count}


def test_snapshot_download_takes_what_it_is_told(api, hub, tmp_path):
    api.create_repo(REPO)
    files = {
        "last-checkpoint/a.txt": b"a",
        "last-checkpoint/deep/b ü.bin": b"\0b",
        "empty": b"",
        "model.safetensors": b"m" * 100,
    }
    upload(api, files)
    folder = tmp_path / "local"
    snapshot_download(REPO, allow_patterns="last-checkpoint/*", local_dir=folder)
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    found = {path: content for path, content in found.items() if not path.startswith(".cache/")}
    assert found == {path: files[path] for path in files if path.startswith("last-checkpoint/")}
    assert not any("resolve" in request and "model.safetensors" in request for request in hub.requests)
    cached = snapshot_download(REPO)
    assert {path for path in files if (tmp_path / cached / path).read_bytes() == files[path]} == set(files)


def test_listings(api, hub):
    api.create_repo(REPO)
    oid = upload(api, {"a.txt": b"hello\n", "one/two/b.safetensors": b"xyz", "one/c": b""}).oid
    assert hub.files(REPO) == {"a.txt": b"hello\n", "one/two/b.safetensors": b"xyz", "one/c": b""}

    def tree(*args, **arguments):
        return sorted(entry.path for entry in api.list_repo_tree(REPO, *args, **arguments))

    assert tree() == ["a.txt", "one"]
    assert tree(recursive=True) == ["a.txt", "one", "one/c", "one/two", "one/two/b.safetensors"]
    assert tree("one") == ["one/c", "one/two"]
    assert tree("one/two", revision=oid) == ["one/two/b.safetensors"]
    infos = {info.path: info for info in api.get_paths_info(REPO, ["a.txt", "none", "one", "one/two/b.safetensors"])}
    assert infos.keys() == {"a.txt", "one", "one/two/b.safetensors"}
    text, weights = infos["a.txt"], infos["one/two/b.safetensors"]
    assert (text.size, text.blob_id) == (6, "ce013625030ba8dba906f756967f9e9ca394464a")  # as `git hash-object` says
    assert weights.lfs.sha256 == "3608bca1e44ea6c4d268eb6db02260269892c0b42b86bbf1e77a6fa16c3c9282"  # as `sha256sum`
    assert isinstance(infos["one"], RepoFolder)
    assert api.list_repo_files(REPO) == ["a.txt", "one/c", "one/two/b.safetensors"]
    assert api.model_info(REPO).sha == api.model_info(REPO, revision=oid).sha == oid
    assert api.whoami()["name"] == "user"
    with pytest.raises(EntryNotFoundError):
        tree("two")


def test_what_is_missing_raises_the_clients_own_errors(api):
    api.create_repo(REPO)
    for call in (api.model_info, api.list_repo_files):
        for repo in ("user/none", "gpt2"):
            with pytest.raises(RepositoryNotFoundError):
                call(repo)
        with pytest.raises(RevisionNotFoundError):
            call(REPO, revision="none")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info(REPO)  # a model of that name is no dataset
    for path in ("none.txt", "нет/none.txt"):
        with pytest.raises(EntryNotFoundError):
            api.hf_hub_download(REPO, path)
    with pytest.raises(RepositoryNotFoundError):
        api.hf_hub_download("user/none", "config.json")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="none")
    with pytest.raises(DatasetNotFoundError):
        datasets.load_dataset("user/none")


@pytest.mark.parametrize("kind, address", [("model", ""), ("dataset", "datasets/"), ("space", "spaces/")])
def test_creating_a_repository_twice_is_refused(api, hub, kind, address):
    sdk = "gradio" if kind == "space" else None
    url = api.create_repo("user/thing", repo_type=kind, space_sdk=sdk)
    assert (url, url.repo_type, url.repo_id) == (f"{hub.url}/{address}user/thing", kind, "user/thing")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("user/thing", repo_type=kind, space_sdk=sdk)
    assert api.create_repo("user/thing", repo_type=kind, space_sdk=sdk, exist_ok=True) == url
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="user/thing", repo_type=kind)
    assert hub.files(f"{address}user/thing") == {"x": b"x"}


def test_unchanged_files_are_not_sent_again(api, hub):
    api.create_repo(REPO)
    files = {"a.txt": b"a", "b.safetensors": b"b"}
    first = upload(api, files).oid
    hub.requests.clear()
    assert upload(api, files).oid == first
    assert not any("/commit/" in request or "PUT" in request for request in hub.requests)
    second = upload(api, {**files, "a.txt": b"changed"}).oid
    assert [commit.oid for commit in hub.commits(REPO)][1:] == [first, second]
    assert (hub.files(REPO, first)["a.txt"], hub.files(REPO)["a.txt"]) == (b"a", b"changed")


def test_large_files_with_the_content_of_another_are_not_sent_again(api, hub):
    api.create_repo(REPO)
    upload(api, {"a.safetensors": b"weights"})
    upload(api, {"b.safetensors": b"weights"})
    assert sum(request.startswith("PUT") for request in hub.requests) == 1
    assert hub.files(REPO) == {"a.safetensors": b"weights", "b.safetensors": b"weights"}


def test_files_and_folders_are_deleted(api, hub):
    api.create_repo(REPO)
    files = {"a": b"1", "folder/b": b"2", "folder/deep/c": b"3", "folder2": b"4"}
    before = upload(api, files).oid
    upload(api, {"new": b"5"}, deleted=("a", "folder/"))
    assert hub.files(REPO) == {"folder2": b"4", "new": b"5"}
    assert hub.files(REPO, before) == files
    with pytest.raises(EntryNotFoundError):
        upload(api, {}, deleted=("folder/b",))
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(api, {"late": b""}, parent_commit=before)


def test_parts_of_a_file_are_read(api):
    api.create_repo(REPO)
    content = bytes(range(256)) * 40
    upload(api, {"numbers.bin": content})
    with HfFileSystem().open(f"{REPO}/numbers.bin", block_size=64) as file:
        for start, size in ((1000, 50), (0, 1), (len(content) - 5, 100)):
            file.seek(start)
            assert file.read(size) == content[start : start + size]
    url, headers = f"{api.endpoint}/{REPO}/resolve/main/numbers.bin", {"Range": "bytes=10-19"}
    answer = httpx2.get(url, headers=headers)
    assert (answer.status_code, answer.content) == (206, content[10:20])
    assert answer.headers["Content-Range"] == f"bytes 10-19/{len(content)}"
    assert httpx2.get(url, headers={"Range": f"bytes={len(content)}-"}).status_code == 416
    head = httpx2.head(url)
    assert int(head.headers["Content-Length"]) == len(content) and not head.content


def test_no_other_host_is_reached(hub):
    assert httpx2.get("http://example.com/api/x").status_code == 404
    assert hub.requests == ["GET http://example.com/api/x"]
    with pytest.raises(httpx2.ProxyError):
        httpx2.get("https://example.com")


def test_reading_needs_no_token_and_writing_does(hub):
    HfApi().create_repo(REPO)
    stranger = HfApi(token=False)
    with pytest.raises(HfHubHTTPError, match="401"):
        upload(stranger, {"a": b""})
    with pytest.raises(HfHubHTTPError, match="401"):
        stranger.create_repo("user/other")
    upload(HfApi(), {"a": b"1"})
    assert open(stranger.hf_hub_download(REPO, "a"), "rb").read() == b"1"


@pytest.mark.parametrize("kind", [500, 403, 401, "close"])
def test_a_failed_commit_raises_and_changes_nothing(api, hub, kind):
    api.create_repo(REPO)
    upload(api, {"a": b"1"})
    hub.fail(1, kind, on="/commit/")
    with pytest.raises(httpx2.TransportError if kind == "close" else HfHubHTTPError) as failure:
        upload(api, {"a": b"2" * 10_000})
    assert kind == "close" or failure.value.response.status_code == kind
    assert hub.files(REPO) == {"a": b"1"}
    upload(api, {"a": b"2"})  # as told, only the next one
    assert hub.files(REPO) == {"a": b"2"}


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the client's attempts


@pytest.mark.parametrize("kind", [500, 429, "close"])
def test_the_client_tries_again(api, hub, no_waiting, kind):
    api.create_repo(REPO)
    hub.fail(3, kind, on="PUT /lfs/")
    upload(api, {"model.safetensors": b"m" * 100_000})
    assert hub.files(REPO) == {"model.safetensors": b"m" * 100_000}
    assert sum(request.startswith("PUT") for request in hub.requests) == 4


def test_a_download_that_breaks_off_is_resumed(api, hub, no_waiting):
    api.create_repo(REPO)
    content = np.random.default_rng(0).bytes(300_000)
    upload(api, {"model.safetensors": content})
    hub.fail(2, "close", on="GET /user/student/resolve/")
    with open(api.hf_hub_download(REPO, "model.safetensors"), "rb") as file:
        assert file.read() == content
    assert sum(request.startswith(f"GET /{REPO}/resolve/") for request in hub.requests) == 3
