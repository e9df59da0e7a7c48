"""A Hub on 127.0.0.1, in memory: answers what the real clients of huggingface_hub, transformers and datasets ask.

Repositories are named as in their web address: `user/model`, `datasets/user/data`, `spaces/user/demo`. Pull requests,
tags, Xet storage and paged listings are not served; a new repository is empty (the real one has a .gitattributes).
"""

import atexit
import base64
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


REPO = r"(?P<repo>((datasets|spaces)/)?[^/]+/[^/]+)"
API = re.compile(rf"/api/(models/)?{REPO}(/(?P<action>[^/]+)(/(?P<revision>[^/]+)(/(?P<path>.+))?)?)?")
RESOLVE = re.compile(rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
LFS_BATCH = re.compile(rf"/{REPO}\.git/info/lfs/objects/batch")


class Commit(NamedTuple):
    oid: str
    message: str
    files: dict[str, bytes]  # the whole tree, not the change


class Answer(NamedTuple):
    status: int
    body: bytes | list | dict
    headers: dict[str, str] = {}


class Refusal(Exception):
    """An error answer; `code` is what the client picks its exception class by."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        headers = {"X-Error-Message": message.encode("ascii", "replace").decode(), "X-Error-Code": code}
        self.answer = Answer(status, {"error": message}, headers)


def is_lfs(path: str, sample: bytes, size: int) -> bool:
    """Whether a file of this path, first bytes and size goes to large file storage rather than into the commit."""
    return size > 10_000_000 or b"\0" in sample[:512] or path.endswith((".safetensors", ".parquet"))


def file_hash(path: str, content: bytes) -> str:
    """The hash by which the client sees that a file has not changed; also its ETag."""
    if is_lfs(path, content, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def folders(files: dict[str, bytes]) -> set[str]:
    return {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}


def describe(files: dict[str, bytes], path: str) -> dict:
    """An entry of a listing: a file, or a folder."""
    if path not in files:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    content = files[path]
    oid = file_hash(path, content)
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if is_lfs(path, content, len(content)):
        entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
    return entry


def upload_mode(files: dict[str, bytes], path: str, sample: str, size: int) -> dict:
    """How a file is to be sent, and the hash of what is there now."""
    mode = "lfs" if is_lfs(path, base64.b64decode(sample), size) else "regular"
    oid = file_hash(path, files[path]) if path in files else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


class LoopbackHub:
    """A running Hub.

    `url` is its address. `requests` logs each as "METHOD /path?query". Reading needs no token, writing any token.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._numbers = itertools.count()  # never reset: clients cache by commit, so a commit's hash must not return
        self.clear()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self.requests: list[str] = []
            self._branches: dict[str, dict[str, Commit]] = {}
            self._commits: dict[str, list[Commit]] = {}
            self._lfs: dict[str, bytes] = {}
            self._faults: list[tuple[int | str, str]] = []

    def commits(self, repo: str) -> list[Commit]:
        """All commits of a repository, oldest first. The first is its creation, without files."""
        return list(self._commits[repo])

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path and content of every file at a branch or commit hash."""
        return dict(self._at(repo, revision).files)

    def fail(self, next_n: int, kind: int | str, on: str = "") -> None:
        """Let the next requests go wrong; nothing of what they carry is kept.

        Args:
            next_n: how many.
            kind: the status to answer, or "close": the connection ends half-way through the body that is sent, or,
                where the request has none, through the answer.
            on: only requests whose "METHOD /path?query" contains this.
        """
        with self._lock:
            self._faults += [(kind, on)] * next_n

    def recover(self) -> None:
        """Takes back the faults that are still to come."""
        with self._lock:
            self._faults.clear()

    def _at(self, repo: str, revision: str) -> Commit:
        if repo not in self._commits:
            raise Refusal(404, f"no repository {repo}", "RepoNotFound")
        for commit in self._commits[repo]:
            if commit.oid == revision:
                return commit
        if revision not in self._branches[repo]:
            raise Refusal(404, f"no revision {revision} in {repo}", "RevisionNotFound")
        return self._branches[repo][revision]

    def _add_commit(self, repo: str, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        commit = Commit(hashlib.sha1(b"commit %d" % next(self._numbers)).hexdigest(), message, files)
        self._commits.setdefault(repo, []).append(commit)
        self._branches.setdefault(repo, {})[branch] = commit
        return commit

    def _fault(self, request: str) -> int | str | None:
        with self._lock:
            self.requests.append(request)
            for i, (kind, on) in enumerate(self._faults):
                if on in request:
                    del self._faults[i]
                    return kind
        return None

    def _answer(self, method: str, target: str, headers, body: bytes) -> Answer:
        path, query = urlsplit(target).path, urlsplit(target).query
        writes = method == "POST" and path != "/api/validate-yaml" and "/paths-info/" not in path
        needs_token = writes or path == "/api/whoami-v2"
        if needs_token and not headers.get("Authorization", "").startswith("Bearer "):
            raise Refusal(401, "Invalid credentials in Authorization header")
        with self._lock:
            if path == "/api/whoami-v2":
                return Answer(200, {"type": "user", "name": "user", "orgs": []})
            if path == "/api/validate-yaml":
                return Answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                return self._create(json.loads(body))
            if method == "PUT" and path.startswith("/lfs/"):
                return self._store(path.removeprefix("/lfs/"), body)
            if match := RESOLVE.fullmatch(path):
                return self._resolve(*map(unquote, match.group("repo", "revision", "path")), headers.get("Range"))
            if match := LFS_BATCH.fullmatch(path):
                return self._lfs_batch(match["repo"], json.loads(body)["objects"])
            if match := API.fullmatch(path):
                revision, folder = unquote(match["revision"] or "main"), unquote(match["path"] or "")
                return self._api(match["repo"], match["action"], revision, folder, query, body)
        raise Refusal(404, f"the loopback Hub has no {path}", "RepoNotFound")

    def _create(self, wanted: dict) -> Answer:
        kind, owner = wanted.get("type", "model"), wanted.get("organization") or "user"
        repo = f"{kind}s/" * (kind != "model") + f"{owner}/{wanted['name']}"
        exists = repo in self._commits
        if not exists:
            self._add_commit(repo, "main", "initial commit", {})
        return Answer(409 if exists else 200, {"url": f"{self.url}/{repo}"})

    def _store(self, oid: str, content: bytes) -> Answer:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(422, f"the content is not that of {oid}")
        self._lfs[oid] = content
        return Answer(200, b"")

    def _lfs_batch(self, repo: str, objects: list[dict]) -> Answer:
        self._at(repo, "main")
        for item in objects:
            if item["oid"] not in self._lfs:
                item["actions"] = {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}
        return Answer(200, {"transfer": "basic", "objects": objects})

    def _resolve(self, repo: str, revision: str, path: str, byte_range: str | None) -> Answer:
        commit = self._at(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            refused = Refusal(404, f"no file {path}", "EntryNotFound").answer
            return refused._replace(headers=refused.headers | headers)
        content = commit.files[path]
        headers["ETag"] = f'"{file_hash(path, content)}"'
        if byte_range is None:
            return Answer(200, content, headers)
        start, last = re.fullmatch(r"bytes=(\d+)-(\d*)", byte_range).groups()
        part = content[int(start) : int(last) + 1 if last else None]
        if not part:
            return Answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers["Content-Range"] = f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}"
        return Answer(206, part, headers)

    def _api(self, repo: str, action: str | None, revision: str, path: str, query: str, body: bytes) -> Answer:
        if action == "branch":
            return self._create_branch(repo, revision, json.loads(body).get("startingPoint", "main"))
        commit = self._at(repo, revision)
        files = commit.files
        entries = sorted(folders(files) | files.keys())
        if action in (None, "revision"):
            name = "/".join(repo.split("/")[-2:])
            return Answer(200, {"id": name, "sha": commit.oid, "siblings": [{"rfilename": p} for p in sorted(files)]})
        if action == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": head.oid}
                for name, head in self._branches[repo].items()
            ]
            return Answer(200, {"branches": branches, "converts": [], "tags": []})
        if action == "tree":
            if path and path not in folders(files):
                raise Refusal(404, f"no folder {path}", "EntryNotFound")
            start = f"{path}/" if path else ""
            entries = [p for p in entries if p.startswith(start)]
            if "recursive=true" not in query:
                entries = [p for p in entries if "/" not in p[len(start) :]]
            return Answer(200, [describe(files, p) for p in entries])
        if action == "paths-info":
            wanted = parse_qs(body.decode())["paths"]
            return Answer(200, [describe(files, p) for p in entries if p in wanted])
        if action == "preupload":
            return Answer(200, {"files": [upload_mode(files, **file) for file in json.loads(body)["files"]]})
        if action == "commit" and "create_pr" not in query:
            return self._commit(repo, revision, body)
        raise Refusal(404, f"the loopback Hub does not serve {action}")

    def _create_branch(self, repo: str, branch: str, start: str) -> Answer:
        commit = self._at(repo, start)
        if branch in self._branches[repo]:
            raise Refusal(409, f"branch {branch} exists")
        self._branches[repo][branch] = commit
        return Answer(200, {})

    def _commit(self, repo: str, branch: str, body: bytes) -> Answer:
        if branch not in self._branches[repo]:
            raise Refusal(400, f"{branch} is not a branch of {repo}")
        head = self._branches[repo][branch]
        files, message = dict(head.files), ""
        for line in body.splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            path = value.get("path", "").rstrip("/")
            if key == "header":
                message = f"{value['summary']}\n\n{value['description']}".strip()
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self._lfs:
                    raise Refusal(400, f"{path}: its content was not uploaded")
                files[path] = self._lfs[value["oid"]]
            else:
                gone = [p for p in files if p == path or (key == "deletedFolder" and p.startswith(f"{path}/"))]
                if not gone:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                for file in gone:
                    del files[file]
        commit = self._add_commit(repo, branch, message, files)
        return Answer(200, {"commitOid": commit.oid, "commitUrl": f"{self.url}/{repo}/commit/{commit.oid}"})


@functools.cache
def start() -> LoopbackHub:
    """The one Hub of this process, and the environment in which its clients, and those of its children, find it."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
        del os.environ[name]  # the developer's own token, caches, endpoint
    hub, home = LoopbackHub(), tempfile.mkdtemp(prefix="hf-home-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_TOKEN": "hf_loopback", "HF_HUB_DISABLE_XET": "1"}
    # load_dataset asks hosts of its own (a load counter, the dataset viewer): they end here too, refused.
    os.environ |= {"http_proxy": hub.url, "https_proxy": hub.url, "no_proxy": "127.0.0.1,localhost"}
    return hub


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: 40 ms each otherwise

    def do_GET(self) -> None:
        fault = self.hub._fault(f"{self.command} {self.path}")
        length = int(self.headers.get("Content-Length", 0))
        if fault == "close" and (length or self.command == "HEAD"):
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        try:
            if isinstance(fault, int):
                raise Refusal(fault, "Invalid credentials in Authorization header" if fault == 401 else "as told")
            answer = self.hub._answer(self.command, self.path, self.headers, body)
        except Refusal as refusal:
            answer = refusal.answer
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if fault == "close":
            content = content[: len(content) // 2]
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *args) -> None:
        pass
