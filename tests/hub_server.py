"""A stand-in for the Hugging Face Hub on loopback: the few endpoints that push and download need.

Repositories live in memory. A commit is a dict of files; branches name commits. Large files go
through the LFS batch endpoint with basic transfers, as they do without hf_xet. `HubServer.faults`
breaks the next requests of a kind on purpose.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".png")
TOKEN = "hf_good"
READ_TOKEN = "hf_read"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        before = self.commits.get(self.branches.get(branch, ""), {})
        self.messages.append(message)
        oid = hashlib.sha1(f"{id(self)} {len(self.messages)}".encode()).hexdigest()
        self.commits[oid] = before | files
        self.branches[branch] = oid
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class HubServer(ThreadingHTTPServer):
    """Use as a context manager; `url` is its endpoint.

    Attributes:
        repositories: by OWNER/NAME.
        lfs: large files by sha256, committed or not.
        faults: how many of the next requests of a kind are cut off in the middle; kinds are
            "create", "preupload", "upload", "commit", "resolve".
        requests: how many of each kind came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.faults: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Dropped(Exception):
    pass


ROUTES = [
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
    ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", "tree"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<revision>[^/]+)", "branch"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
    ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "upload"),
    ("GET|HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    cut = False  # whether this request is to break in the middle

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        kind, groups = self._route()
        self.server.requests[kind] += 1
        length = int(self.headers.get("Content-Length") or 0)
        try:
            self.cut = self.server.faults[kind] > 0 and self.command != "HEAD"
            self.server.faults[kind] -= self.cut
            body = self.rfile.read(length // 2 if self.cut else length)
            if self.cut and self.command != "GET":
                raise Dropped
            getattr(self, f"_{kind}")(body, **groups)
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            self._send({"error": refusal.message}, refusal.status, headers)
        except Dropped:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)

    def _route(self) -> tuple[str, dict[str, str]]:
        path = urlsplit(self.path).path
        for methods, pattern, kind in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and re.fullmatch(methods, self.command):
                groups = {name: unquote(text or "main") for name, text in match.groupdict().items()}
                return kind, groups
        return "unknown", {}

    def _send(
        self, content: object, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            raise Dropped

    # ---- who may do what, and on what ----

    def _token(self) -> str | None:
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if given not in (None, TOKEN, READ_TOKEN):
            raise Refused(401, "Invalid credentials in Authorization header")
        return given

    def _may_write(self) -> None:
        token = self._token()
        if token is None:
            raise Refused(401, "Invalid username or password.")
        if token == READ_TOKEN:
            raise Refused(403, "You don't have the rights to do this")

    def _repository(self, repo: str) -> Repository:
        token, found = self._token(), self.server.repositories.get(repo)
        if found is None or (found.private and token is None):
            raise Refused(401 if token is None else 404, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(repo)
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # ---- endpoints ----

    def _unknown(self, body: bytes) -> None:
        raise Refused(404, f"no such endpoint: {self.command} {self.path}")

    def _create(self, body: bytes) -> None:
        self._may_write()
        given = json.loads(body)
        repo = f"{given.get('organization') or 'me'}/{given['name']}"
        private = given.get("private") or given.get("visibility") == "private"
        known = repo in self.server.repositories
        if not known:
            self.server.repositories[repo] = Repository(private=bool(private))
        self._send({"url": f"{self.server.url}/{repo}"}, 409 if known else 200)

    def _validate(self, body: bytes) -> None:
        self._send({"errors": [], "warnings": []})

    def _info(self, body: bytes, repo: str, revision: str) -> None:
        oid, _ = self._commit_of(repo, revision)
        self._send({"id": repo, "sha": oid, "private": self._repository(repo).private})

    def _tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._commit_of(repo, revision)
        entries = []
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._send(entries)

    def _branch(self, body: bytes, repo: str, revision: str) -> None:
        self._may_write()
        repository = self._repository(repo)
        if revision in repository.branches:
            raise Refused(409, "Reference already exists")
        repository.branches[revision] = repository.branches["main"]
        self._send({})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        self._may_write()
        _, files = self._commit_of(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular"}
            if path in files:
                answer["oid"] = sha256(files[path]) if large else git_oid(files[path])
            answers.append(answer | {"shouldIgnore": False})
        self._send({"files": answers})

    def _batch(self, body: bytes, repo: str) -> None:
        self._may_write()
        self._repository(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.lfs:
                href = f"{self.server.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(answer)
        self._send({"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if sha256(body) != oid:
            raise Refused(400, "content does not match its hash")
        self.server.lfs[oid] = body
        self._send({})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        self._may_write()
        self._commit_of(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        files, message = {}, ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif value["oid"] in self.server.lfs:
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                raise Refused(400, f"large file {value['path']} was never uploaded")
        oid = self.server.repositories[repo].commit(revision, files, message)
        self._send({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid})

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        oid, files = self._commit_of(repo, revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        content = files[path]
        etag = sha256(content) if path.endswith(LARGE) else git_oid(content)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{etag}"'}
        if parse_qs(urlsplit(self.path).query):
            raise Refused(400, "no query is known here")
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            first = int(start[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(content[first:], 206, headers)
        else:
            self._send(content, 200, headers)
