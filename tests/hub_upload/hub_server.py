# SPDX-License-Identifier: Apache-2.0
"""A loopback server that speaks the Hub's protocol for uploads (git-LFS) and downloads, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_theTokenOfTheTests"
PART_SIZE = 2**20  # larger files are uploaded in parts


class Repository:
    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        self.commits = {"0" * 40: {}}  # of each commit its files: name -> content
        self.refs = {"main": "0" * 40}

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


class HubServer(ThreadingHTTPServer):
    """
    `repositories` and `objects` (large files by their SHA-256) are what arrived. `received` counts the bytes of each
    object that was uploaded, however often. Of the uploads of the object `oid`, the next `drops[oid]` lose their
    connection half way, when the objects in `before_drops` have arrived.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lock = threading.Lock()
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.received, self.drops = Counter(), Counter()
        self.before_drops: set[str] = set()
        self.faults: list[str] = []  # what a client must not do, and did
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def push(self, folder: Path, name: str) -> None:
        """Puts a folder into a repository, without a client."""
        repository = self.repositories[name] = Repository(name, private=True)
        repository.commits["1" * 40] = {file.name: file.read_bytes() for file in folder.iterdir()}
        repository.refs["main"] = "1" * 40

    def handle_error(self, request, client_address):
        self.faults.append(f"{request} failed")
        super().handle_error(request, client_address)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer
    routes = [
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_metadata"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?", "describe"),
        ("GET", r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", "list_files"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "choose_upload_modes"),
        ("POST", r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "plan_large_files"),
        ("PUT", r"/storage/(?P<oid>\w{64})(?:/(?P<part>\d+))?", "receive"),
        ("POST", r"/storage/(?P<oid>\w{64})/complete", "join_parts"),
        ("POST", r"/storage/(?P<oid>\w{64})/verify", "verify"),
        ("POST", r"/api/models/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "download"),
    ]

    def log_message(self, *args):
        pass

    def handle_request(self):
        self.url = urlsplit(self.path)
        self.body = None
        for method, pattern, action in self.routes:
            match = re.fullmatch(pattern, self.url.path)
            if match and method == self.command.replace("HEAD", "GET"):
                groups = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
                signed = self.url.path.startswith("/storage/") and action != "verify"
                if signed and "Authorization" in self.headers:
                    self.server.faults.append(f"the token was sent to {self.path}")
                if not signed and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.read_body()
                    return self.answer(401, {"error": "Invalid username or password."})
                if "name" in groups and groups["name"] not in self.server.repositories:
                    self.read_body()
                    return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                if "name" in groups:
                    groups["repository"] = self.server.repositories[groups.pop("name")]
                return getattr(self, action)(**groups)
        if self.command in ("POST", "PUT"):
            self.server.faults.append(f"unknown request {self.command} {self.path}")
        self.read_body()
        self.answer(404, {"error": "Not found"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def read_body(self, limit: int | None = None) -> bytes:
        """The body of the request, or its first `limit` bytes."""
        if self.body is None:
            length = int(self.headers.get("Content-Length", 0))
            self.body = self.rfile.read(length if limit is None else min(limit, length))
        return self.body

    def json(self):
        return json.loads(self.read_body())

    def answer(self, status: int, content=None, headers: dict | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {
            "Content-Length": len(body),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def create_repository(self):
        request = self.json()
        name = f"{request['organization'] or 'me'}/{request['name']}"
        private = request.get("visibility") == "private" or request.get("private", False)
        known = name in self.server.repositories
        if not known:
            self.server.repositories[name] = Repository(name, private)
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "error": "It exists" if known else ""})

    def validate_metadata(self):
        known = self.json()["content"].startswith("---\n")
        self.answer(200 if known else 400, {"errors": [] if known else [{"message": "no metadata"}], "warnings": []})

    def describe(self, repository: Repository, revision: str | None):
        commit = repository.resolve(revision or "main")
        siblings = [{"rfilename": file} for file in repository.commits[commit]]
        self.answer(200, {"id": repository.name, "sha": commit, "private": repository.private, "siblings": siblings})

    def list_files(self, repository: Repository, revision: str, folder: str | None):
        if folder:  # all files stand at the top
            return self.answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        files = repository.files(revision).items()
        self.answer(
            200, [{"type": "file", "path": path, "size": len(data), "oid": git_oid(data)} for path, data in files]
        )

    def choose_upload_modes(self, repository: Repository, revision: str):
        files = []
        for file in self.json()["files"]:
            large = file["path"].endswith(".safetensors")
            present = repository.files(revision).get(file["path"])
            oid = None
            if present is not None:
                oid = hashlib.sha256(present).hexdigest() if large else git_oid(present)
            mode = "lfs" if large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.answer(200, {"files": files})

    def plan_large_files(self, repository: Repository):
        objects = []
        for entry in self.json()["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid not in self.server.objects:
                storage = f"{self.server.url}/storage/{oid}"
                upload = {"href": storage}
                if size > PART_SIZE:
                    parts = range(1, -(-size // PART_SIZE) + 1)
                    header = {str(part): f"{storage}/{part}" for part in parts}
                    upload = {"href": f"{storage}/complete", "header": {"chunk_size": str(PART_SIZE), **header}}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{storage}/verify"}}
            objects.append(entry)
        transfer = "multipart" if any("header" in entry.get("actions", {}) for entry in objects) else "basic"
        self.answer(200, {"transfer": transfer, "objects": objects})

    def receive(self, oid: str, part: str | None):
        with self.server.lock:
            dropped = self.server.drops[oid] > 0
            self.server.drops[oid] -= dropped
        body = self.read_body(int(self.headers["Content-Length"]) // 2 if dropped else None)
        with self.server.lock:
            self.server.received[oid] += len(body)
        if dropped:
            for _ in range(100):
                if self.server.before_drops <= self.server.objects.keys():
                    break
                time.sleep(0.1)
            self.close_connection = True
            self.connection.close()
        elif part is None:
            self.keep(oid, body)
        else:
            self.server.parts[oid, int(part)] = body
            self.answer(200, b"", {"ETag": hashlib.md5(body).hexdigest()})

    def join_parts(self, oid: str):
        parts = self.json()["parts"]
        content = [self.server.parts[oid, part["partNumber"]] for part in parts]
        if [part["etag"] for part in parts] != [hashlib.md5(data).hexdigest() for data in content]:
            return self.answer(400, {"error": "Parts do not match"})
        self.keep(oid, b"".join(content))

    def keep(self, oid: str, content: bytes):
        if hashlib.sha256(content).hexdigest() != oid:
            self.server.faults.append(f"corrupt object {oid}")
            return self.answer(400, {"error": "Corrupt"})
        self.server.objects[oid] = content
        self.answer(200, {})

    def verify(self, oid: str):
        known = oid in self.server.objects and len(self.server.objects[oid]) == self.json()["size"]
        self.answer(200 if known else 404, {})

    def commit(self, repository: Repository, revision: str):
        header, *operations = [json.loads(line) for line in self.read_body().splitlines()]
        files = dict(repository.files(revision))
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                raise NotImplementedError(operation["key"])
        commit = hashlib.sha1(self.read_body() + str(len(repository.commits)).encode()).hexdigest()
        repository.commits[commit] = files
        pull_request = None
        if parse_qs(self.url.query).get("create_pr") == ["1"]:
            number = len(repository.refs)
            revision, pull_request = f"refs/pr/{number}", f"{self.server.url}/{repository.name}/discussions/{number}"
        repository.refs[revision] = commit
        address = f"{self.server.url}/{repository.name}/commit/{commit}"
        self.answer(200, {"commitUrl": address, "commitOid": commit, "pullRequestUrl": pull_request})

    def download(self, repository: Repository, revision: str, file: str):
        commit = repository.resolve(revision)
        content = repository.commits.get(commit, {}).get(file)
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.answer(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
        self.answer(200, content, {**headers, "ETag": f'"{git_oid(content)}"'})
