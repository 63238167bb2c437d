"""A stand-in for the Hub: repositories of models and datasets in memory, over real HTTP, for the Hub's own client.

    python tests/hub.py --token SECRET

prints its address on its first line and serves until it is killed. It answers what uploads and loads need: making a
repository, committing files (parquet and safetensors through LFS, as there), listing and reading them, ranges too.
Whoever writes must have the token. ``/log`` tells a test what was asked: the commits, and how each request was
authorized, as far as it was.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of-this-test-only"
REPO = r"(?P<repo>(?:datasets|models)/[^/]+/[^/]+)"
LARGE = (".parquet", ".safetensors")
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("GET", r"/api/whoami-v2", "who"),
    ("POST", rf"/api/{REPO}/preupload/[^/]+", "preupload"),
    ("POST", rf"/api/{REPO}/commit/[^/]+", "commit"),
    ("POST", rf"/api/{REPO}/paths-info/[^/]+", "paths_info"),
    ("GET", rf"/api/{REPO}/tree/[^/]+(?:/(?P<path>.+))?", "tree"),
    ("GET", rf"/api/{REPO}(?:/revision/[^/]+)?", "info"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", "store"),
    ("GET", rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", "resolve"),
    ("GET", r"/log", "log"),
)
WRITES = {"create", "preupload", "commit", "batch"}


class State:
    """What the server has."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[dict[str, Any]] = []
        self.large: dict[str, bytes] = {}  # uploaded through LFS, by SHA-256
        self.refused = 0


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"
    state: State

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_GET(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if re.fullmatch(r"/(?!datasets/|api/)[^/]+/[^/]+(/resolve/.+|\.git/.+)", path):
            path = f"/models{path}"  # files of a model have addresses without its kind
        self.query = parse_qs(url.query)
        self.body = self.read_body()
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match is None or wanted != method:
                continue
            if name in WRITES and self.headers.get("Authorization") != f"Bearer {self.state.token}":
                self.state.refused += 1
                return self.send(401, {"error": "Invalid username or password."})
            repo = match.groupdict().get("repo")
            if repo is not None and repo not in self.state.repos:
                return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return getattr(self, name)(**match.groupdict())
        return self.send(404, {"error": f"no route {method} {self.path}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))} | (headers or {})
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def sha(self, repo: str) -> str:
        return hashlib.sha1(json.dumps([c for c in self.state.commits if c["repo"] == repo]).encode()).hexdigest()

    # Writing

    def create(self) -> None:
        wanted = json.loads(self.body)
        name, kind = f"{wanted.get('organization') or 'me'}/{wanted['name']}", wanted.get("type", "model") + "s"
        url = {"url": f"{self.address}/{kind}/{name}".replace("/models/", "/"), "name": name}
        if f"{kind}/{name}" in self.state.repos:
            return self.send(409, url | {"error": "You already created this repo"})
        self.state.repos[f"{kind}/{name}"] = {".gitattributes": b"*.parquet filter=lfs\n*.safetensors filter=lfs\n"}
        return self.send(200, url)

    def validate(self) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        names = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": n, "uploadMode": "lfs" if n.endswith(LARGE) else "regular"} for n in names]
        self.send(200, {"files": [mode | {"shouldIgnore": False} for mode in modes]})

    def batch(self, repo: str) -> None:
        objects = []
        for each in json.loads(self.body)["objects"]:
            entry = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.state.large:
                entry["actions"] = {"upload": {"href": f"{self.address}/lfs/{each['oid']}", "header": {}}}
            objects.append(entry)
        self.send(200, {"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid, "an upload arrived damaged"
        self.state.large[oid] = self.body
        self.send(200, {})

    def commit(self, repo: str) -> None:
        files, record = self.state.repos[repo], {"repo": repo, "added": [], "deleted": []}
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                record["summary"] = value["summary"]
            elif key == "deletedFile":
                del files[value["path"]]
                record["deleted"].append(value["path"])
            else:
                is_large = key == "lfsFile"
                content = self.state.large[value["oid"]] if is_large else base64.b64decode(value["content"])
                files[value["path"]] = content
                record["added"].append(value["path"])
        self.state.commits.append(record)
        oid = self.sha(repo)
        self.send(200, {"commitOid": oid, "commitUrl": f"{self.address}/{repo}/commit/{oid}"})

    # Reading

    def who(self) -> None:
        self.send(200, {"type": "user", "name": "me", "orgs": []})

    def info(self, repo: str) -> None:
        siblings = [{"rfilename": name} for name in sorted(self.state.repos[repo])]
        fields = {
            "id": repo.partition("/")[2],
            "sha": self.sha(repo),
            "private": False,
            "gated": False,
            "disabled": False,
        }
        self.send(200, fields | {"downloads": 0, "likes": 0, "tags": [], "siblings": siblings})

    def entry(self, repo: str, name: str) -> dict[str, Any]:
        content = self.state.repos[repo][name]
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def folder(self, name: str) -> dict[str, Any]:
        return {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def tree(self, repo: str, path: str | None) -> None:
        begin = f"{path}/" if path else ""
        files = [name for name in sorted(self.state.repos[repo]) if name.startswith(begin)]
        if path and not files:
            return self.send(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        deep = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        folders = sorted({begin + name[len(begin) :].split("/")[0] for name in files if "/" in name[len(begin) :]})
        shown = [name for name in files if deep or "/" not in name[len(begin) :]]
        return self.send(200, [self.folder(name) for name in folders] + [self.entry(repo, name) for name in shown])

    def paths_info(self, repo: str) -> None:
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        found, files = [], self.state.repos[repo]
        for path in paths:
            if path in files:
                found.append(self.entry(repo, path))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append(self.folder(path))
        self.send(200, found)

    def resolve(self, repo: str, path: str) -> None:
        content = self.state.repos[repo].get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.sha(repo)}
            return self.send(404, {"error": "Entry not found"}, headers)
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": self.sha(repo), "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
            return self.send(206, content[begin : end + 1], headers)
        return self.send(200, content, headers)

    def log(self) -> None:
        state = self.state
        self.send(200, {"commits": state.commits, "refused": state.refused, "large": len(state.large)})


@contextlib.contextmanager
def serve(home: Path) -> Iterator[dict[str, str]]:
    """Start a stand-in, and give the environment in which the Hub's client uses it, with its cache in ``home``."""
    command = [sys.executable, __file__, "--token", TOKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield {
                "HF_ENDPOINT": process.stdout.readline().strip(),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",  # another protocol for large files; the stand-in has LFS
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HOME": str(home),
                "HF_TOKEN": TOKEN,
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            }
        finally:
            process.kill()


def read_log(environment: dict[str, str]) -> dict[str, Any]:
    """Ask a stand-in for its log."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{environment['HF_ENDPOINT']}/log") as response:
        return json.load(response)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token", required=True, help="that allows writing")
    Handler.state = State(parser.parse_args().token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
