"""A server on this machine that speaks as much of the Hub's protocol as uploads, downloads and searches of models use.

Repos live in memory: each is a list of commits (path -> bytes) and branches. Written from what huggingface_hub's
client sends and reads; writing needs the token, as on the Hub. No Xet: clients run with ``HF_HUB_DISABLE_XET=1``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_" + "t" * 34


@dataclass
class Repo:
    """Commits in order, and which of them each branch is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class HubServer(ThreadingHTTPServer):
    """``with HubServer() as hub:`` serves at ``hub.endpoint``; ``hub.calls`` lists (method, path) of what came in."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.calls: list[tuple[str, str]] = []
        self.lock = threading.RLock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client process use this server."""
        return {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


class HubError(Exception):
    """An answer with an error status; ``code`` is the Hub's ``X-Error-Code``."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


NAME = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"


class Handler(BaseHTTPRequestHandler):
    """One request; ``ROUTES`` at the end of this file says who answers."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def serve(self) -> None:
        url = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.query = parse_qs(url.query)
        with self.server.lock:
            self.server.calls.append((self.command, url.path))
            try:
                for methods, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, url.path)
                    if self.command in methods and match:
                        found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                        return answer(self, **found)
                raise HubError(404, "", f"no route for {self.command} {url.path}")
            except HubError as error:
                self.send(
                    {"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                )

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = serve  # noqa: N815

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def need_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HubError(401, "", "Invalid credentials")

    def repo(self, name: str) -> Repo:
        if name not in self.server.repos:
            raise HubError(404, "RepoNotFound", "Repository not found")
        return self.server.repos[name]

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self.repo(name)
        oid = repo.find(revision)
        if oid is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repo.commits[oid]

    # Writing

    def whoami(self) -> None:
        self.need_token()
        self.send({"name": "tester", "type": "user", "orgs": []})

    def create(self) -> None:
        self.need_token()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        answer = {"url": f"{self.server.endpoint}/{name}", "name": name, "id": name}
        if name in self.server.repos:
            return self.send(answer | {"error": "You already created this model repo"}, 409)
        self.server.repos[name] = Repo()
        self.server.repos[name].commit(
            "main", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
        )
        self.send(answer)

    def branch(self, repo: str, revision: str) -> None:
        self.need_token()
        found = self.repo(repo)
        if revision in found.branches:
            raise HubError(409, "", "Reference already exists")
        found.branches[revision] = found.branches["main"]
        self.send({})

    def validate_yaml(self) -> None:
        text = json.loads(self.body)["content"]
        front = re.match(r"---\n(.*?)\n---", text, flags=re.DOTALL)
        fields = yaml.safe_load(front[1]) if front else {}
        refused = [{"message": "license refused is unknown"}] if fields.get("license") == "refused" else []
        warnings = [] if fields else [{"message": "no metadata"}]
        self.send({"errors": refused, "warnings": warnings}, 400 if refused else 200)

    def preupload(self, repo: str, revision: str) -> None:
        self.need_token()
        self.commit_of(repo, revision)
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.send({"files": files})

    def lfs_batch(self, repo: str) -> None:
        self.need_token()
        self.repo(repo)
        objects = []
        for each in json.loads(self.body)["objects"]:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.server.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{each['oid']}"}}
            objects.append(entry)
        self.send({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "", "sha256 differs")
        self.server.objects[oid] = self.body
        self.send({})

    def commit(self, repo: str, revision: str) -> None:
        self.need_token()
        _, old = self.commit_of(repo, revision)
        files = dict(old)
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        branch = revision
        answer = {"success": True}
        if self.query.get("create_pr") == ["1"]:
            branch = "refs/pr/1"
            answer["pullRequestUrl"] = f"{self.server.endpoint}/{repo}/discussions/1"
        oid = self.repo(repo).commit(branch, files)
        self.send(answer | {"commitOid": oid, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}"})

    # Reading

    def info(self, repo: str, revision: str = "main") -> None:
        oid, files = self.commit_of(repo, revision)
        self.send(self.describe(repo, oid, files))

    def describe(self, repo: str, oid: str, files: dict[str, bytes]) -> dict[str, Any]:
        front = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), flags=re.DOTALL)
        card = yaml.safe_load(front[1]) if front else {}
        tags = [*card.get("tags", [])]
        if card.get("base_model"):  # as the Hub does
            tags += [
                f"base_model:{card['base_model']}",
                f"base_model:{card.get('base_model_relation')}:{card['base_model']}",
            ]
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {
            "_id": oid, "id": repo, "modelId": repo, "sha": oid, "private": False, "tags": tags, "siblings": siblings,
            "cardData": card, "downloads": 0, "likes": 0,
        }  # fmt: skip

    def models(self) -> None:
        wanted = {tag for value in self.query.get("filter", []) for tag in value.split(",")}
        found = []
        for name, repo in self.server.repos.items():
            oid = repo.branches["main"]
            entry = self.describe(name, oid, repo.commits[oid])
            if wanted <= set(entry["tags"]):
                found.append(entry)
        self.send(found)

    def tree(self, repo: str, revision: str, path: str = "") -> None:
        oid, files = self.commit_of(repo, revision)
        found = [
            {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": name}
            for name, content in sorted(files.items())
            if name.startswith(f"{path}/" if path else "")
        ]
        if path and not found:
            raise HubError(404, "EntryNotFound", f"{path} does not exist")
        self.send(found, headers={"X-Repo-Commit": oid})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        oid, files = self.commit_of(repo, revision)
        if path not in files:
            raise HubError(404, "EntryNotFound", f"Entry not found: {path}")
        headers = {
            "X-Repo-Commit": oid,
            "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
            "Content-Type": "application/octet-stream",
        }
        self.send(files[path], headers=headers)


ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), r"/api/whoami-v2", Handler.whoami),
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("GET",), r"/api/models/?", Handler.models),
    (("POST",), rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("POST",), rf"/api/models/{NAME}/branch/{REVISION}", Handler.branch),
    (("GET",), rf"/api/models/{NAME}/revision/{REVISION}", Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/{REVISION}(?:/(?P<path>.*))?", Handler.tree),
    (("GET",), rf"/api/models/{NAME}", Handler.info),
    (("POST",), rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
