"""A Hugging Face hub on loopback: the routes that huggingface_hub requests, over repositories in memory.

    GET       /api/models/{repo}[/revision/{rev}]   the commit that `rev` stands for, and its files
    GET       /api/models/{repo}/tree/{rev}         the files with their sizes and checksums
    HEAD, GET /{repo}/resolve/{rev}/{file}          a small file; a redirect for a large file
    GET       /lfs/{sha256}/{file}                  a large file, from the requested byte on

Files that end in .pth or .safetensors are large. They are served from `localhost` while the hub is `127.0.0.1`, so
the client treats them as files of another host, as with the real hub.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType

LARGE = (".pth", ".safetensors")
Files = dict[str, bytes]


def checksum(name: str, content: bytes) -> str:
    """Return the checksum that the hub announces: sha256 of a large file, git's sha1 of a small file."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub:
    """Repositories with their commits, and the faults with which they are served.

    `faults` maps a file or a repository to its fault. A fault is a status (401, 403, 404, 500) or, for a
    file only, `cut` (the connection breaks halfway), `short` (a complete answer with half of the file),
    `flipped` (one byte does not match the announced checksum). `cut once` breaks only once.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Files]] = {}  # by repository and commit
        self.branches: dict[str, dict[str, str]] = {}
        self.faults: dict[str, int | str] = {}
        self.requests: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    @contextmanager
    def away(self) -> Iterator[None]:
        """Stop the server while the block runs, then listen on the same port again."""
        self.__exit__(None, None, None)
        try:
            yield
        finally:
            self.__enter__()

    def put(self, repo: str, files: Files, branch: str = "main") -> str:
        """Add a commit of `files` to a branch, and return the commit's sha."""
        sums = json.dumps([repo, sorted((name, checksum(name, f)) for name, f in files.items())])
        commit = hashlib.sha1(sums.encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = dict(files)
        self.branches.setdefault(repo, {})[branch] = commit
        return commit


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        path = self.path.split("?")[0].replace("%2F", "/")
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "lfs":
            return self._large(parts[1], parts[2])
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            repo, what, rest = "/".join(parts[2:4]), parts[4:5], parts[5:]
        elif len(parts) >= 5 and parts[2] == "resolve":
            repo, what, rest = "/".join(parts[:2]), ["resolve"], parts[3:]
        else:
            return self._refuse(404)
        if isinstance(fault := self.hub.faults.get(repo), int):
            return self._refuse(fault)
        if repo not in self.hub.commits:
            return self._refuse(404, "RepoNotFound")
        revision = rest[0] if rest else "main"
        commit = self.hub.branches[repo].get(revision, revision)
        files = self.hub.commits[repo].get(commit)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        if what == ["resolve"]:
            return self._file(commit, files, "/".join(rest[1:]))
        if what == ["tree"]:
            return self._json([_entry(name, content) for name, content in sorted(files.items())])
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self._json({"_id": "0", "id": repo, "sha": commit, "siblings": siblings})

    def _file(self, commit: str, files: Files, name: str) -> None:
        if isinstance(fault := self.hub.faults.get(name), int):
            return self._refuse(fault, "EntryNotFound" if fault == 404 else "")
        if name not in files:
            return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{checksum(name, files[name])}"'}
        if not name.endswith(LARGE):
            return self._send(200, self._damaged(name, files[name]), headers)
        sum_, port = checksum(name, files[name]), self.hub.port
        headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(files[name]))}
        return self._send(
            302, b"", headers | {"Location": f"http://localhost:{port}/lfs/{sum_}/{name}"}
        )

    def _large(self, sum_: str, name: str) -> None:
        repositories = (commit for repo in self.hub.commits.values() for commit in repo.values())
        versions = (files[name] for files in repositories if name in files)
        content = next(content for content in versions if checksum(name, content) == sum_)
        content = self._damaged(name, content)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        fault = self.hub.faults.get(name)
        if fault == "cut once":
            del self.hub.faults[name]
        if fault in ("cut", "cut once"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return None
        if start:
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self._send(206, content[start:], headers)
        return self._send(200, content, {})

    def _damaged(self, name: str, content: bytes) -> bytes:
        fault = self.hub.faults.get(name)
        if fault == "short":
            return content[: len(content) // 2]
        if fault == "flipped":
            middle = len(content) // 2
            return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        return content

    def _refuse(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", (headers or {}) | ({"X-Error-Code": code} if code else {}))

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(name: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(content)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": checksum(name, content), "size": len(content), "pointerSize": 134}
    return entry
