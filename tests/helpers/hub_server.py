"""A stand-in of the Hub on this machine: the requests of huggingface_hub that upload and download
models, answered from memory."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

_LARGE = (".safetensors", ".png", ".bin")
"""Endings of files that are uploaded apart from the commit, as Git LFS does."""


@dataclass
class StandIn:
    """What the Hub has, and what it was asked."""

    address: str = ""
    token: str = "hf_right"
    """The one that may write."""
    gated: set[str] = field(default_factory=set)
    repos: dict[str, dict[str, str]] = field(default_factory=dict)
    """Commits of branches, by repository."""
    private: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by commit."""
    large: dict[str, bytes] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)
    """Paths of the files that were downloaded."""
    requests: int = 0
    breaks: str = ""
    """Ending of the files that are sent in part."""

    def add(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit with these files, and no others; returns its hash."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[digest] = files
        self.repos.setdefault(name, {})[branch] = digest
        return digest

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        branches = self.repos[name]
        return self.commits[branches.get(revision, revision)]


@contextmanager
def hub_on_this_machine(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[StandIn]:
    """The libraries of this process ask the stand-in, and keep downloads in `cache`."""
    hub = StandIn()

    class Handler(_Handler):
        own = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, in native code
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    """Status and `X-Error-Code` of an answer."""


class _Handler(BaseHTTPRequestHandler):
    own: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *parts: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answer(self._post)

    def do_PUT(self) -> None:
        content = self._body()
        self.own.large[hashlib.sha256(content).hexdigest()] = content
        self._send(b"")

    def _answer(self, found: Any) -> None:
        # The library asks once for a list of programs that start it.
        self.own.requests += not self.path.startswith("/api/agent")
        try:
            found(unquote(urlsplit(self.path).path).strip("/").split("/"))
        except _Refused as refused:
            status, code = refused.args
            self._send(b"{}", status, {"X-Error-Code": code})

    def _get(self, parts: list[str]) -> None:
        match parts:
            case ["api", "models", user, model, *rest]:
                name = f"{user}/{model}"
                commit = self._commit(name, rest[1] if len(rest) > 1 else "main")
                if rest[:1] == ["tree"]:
                    return self._send_json([self._entry(*one) for one in self._files(commit)])
                return self._send_json({"id": name, "sha": commit, "siblings": [], "tags": []})
            case [user, model, "resolve", revision, *path]:
                commit = self._commit(f"{user}/{model}", revision)
                file = "/".join(path)
                content = self.own.commits[commit].get(file)
                if content is None:
                    raise _Refused(404, "EntryNotFound")
                if self.command == "GET":
                    self.own.served.append(file)
                headers = {"ETag": f'"{self._oid(file, content)}"', "X-Repo-Commit": commit}
                return self._send(
                    content, headers=headers, breaks=file.endswith(self.own.breaks or "?")
                )
        raise _Refused(404, "RepoNotFound")

    def _post(self, parts: list[str]) -> None:
        body = self._body()
        if self.headers.get("Authorization") is None:
            raise _Refused(401, "")
        if self.headers["Authorization"] != f"Bearer {self.own.token}":
            raise _Refused(403, "")
        match parts:
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                address = json.dumps({"url": f"{self.own.address}/{name}"}).encode()
                if name in self.own.repos:
                    return self._send(address, 409)
                self.own.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
                if asked.get("visibility") == "private" or asked.get("private"):
                    self.own.private.add(name)
                return self._send(address)
            case ["api", "validate-yaml"]:
                return self._send_json({"errors": [], "warnings": []})
            case ["api", "models", user, model, "branch", branch]:
                branches = self.own.repos[f"{user}/{model}"]
                branches.setdefault(branch, branches["main"])
                return self._send_json({})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
                return self._send_json({"files": files})
            case [_, _, "info", "lfs", "objects", "batch"]:
                objects = json.loads(body)["objects"]
                for one in objects:
                    href = f"{self.own.address}/large/{one['oid']}"
                    one["actions"] = {"upload": {"href": href}}
                return self._send_json({"transfer": "basic", "objects": objects})
            case ["api", "models", user, model, "commit", branch]:
                name = f"{user}/{model}"
                commit = self._committed(name, branch, body)
                address = f"{self.own.address}/{name}/commit/{commit}"
                return self._send_json({"commitUrl": address, "commitOid": commit})
        raise _Refused(404, "")

    def _committed(self, name: str, branch: str, body: bytes) -> str:
        files = dict(self.own.files(name, branch))
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.own.large[value["oid"]]
            elif one["key"] == "deletedFile":
                del files[value["path"]]
        return self.own.add(name, files, branch)

    def _commit(self, name: str, revision: str) -> str:
        may_read = self.headers.get("Authorization") == f"Bearer {self.own.token}"
        branches = self.own.repos.get(name)
        if branches is None or (name in self.own.private and not may_read):
            raise _Refused(401, "RepoNotFound")
        if name in self.own.gated and not may_read:
            raise _Refused(403, "GatedRepo")
        commit = branches.get(revision, revision)
        if commit not in self.own.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit

    def _files(self, commit: str) -> list[tuple[str, bytes]]:
        return sorted(self.own.commits[commit].items())

    def _entry(self, path: str, content: bytes) -> dict[str, Any]:
        oid = self._oid(path, content)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
        if path.endswith(_LARGE):
            entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
        return entry

    def _oid(self, path: str, content: bytes) -> str:
        large = path.endswith(_LARGE)
        return (hashlib.sha256(content) if large else hashlib.sha1(content)).hexdigest()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send_json(self, content: object) -> None:
        self._send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def _send(
        self,
        content: bytes,
        status: int = 200,
        headers: dict[str, str] | None = None,
        breaks: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if breaks else content)
        if breaks:
            self.close_connection = True
