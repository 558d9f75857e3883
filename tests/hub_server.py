"""A model hub on this machine: the part of its protocol that the hub's own clients speak."""

import contextlib
import hashlib
import json
import struct
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LARGE = (".safetensors", ".tar", "wiki1m_for_simcse.txt")
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


class HubServer:
    """Serves repositories over HTTP on a port of its own and keeps every request it had.

    A file's key is REPOSITORY/FILE, with datasets/ before that of a dataset. As on the hub a large
    file's ETag is its SHA-256, and any other's is git's hash.

    Attributes:
        requests: in the order of arrival.
        cut: keys of files whose next download breaks off after half of the bytes.
        held: keys of files whose next download stalls after half of the bytes.
        damaged: keys of files whose next download has its last byte changed.
        chunked: keys of files that come from the chunk store where the client can use it (Xet).
        stalled: set while a held download waits.
    """

    def __init__(self) -> None:
        self._http: ThreadingHTTPServer | None = None
        self._port = 0
        self._files: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.cut: set[str] = set()
        self.held: set[str] = set()
        self.damaged: set[str] = set()
        self.chunked: set[str] = set()
        self.stalled = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen; after a stop on the same port as before."""
        self._http = ThreadingHTTPServer(("127.0.0.1", self._port), _Handler)
        self._http.hub = self
        self._port = self._http.server_port
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def reset(self) -> None:
        """Forget files, faults and requests."""
        for kept in (self._files, self.requests, self.cut, self.held, self.damaged, self.chunked):
            kept.clear()
        self.stalled.clear()

    def publish(self, repository: str, source: Path | dict[str, bytes]) -> None:
        """Serve what a folder holds, or bytes by file name."""
        if isinstance(source, Path):
            files = (path for path in source.rglob("*") if path.is_file())
            source = {path.relative_to(source).as_posix(): path.read_bytes() for path in files}
        self._files |= {f"{repository}/{name}": content for name, content in source.items()}

    def content(self, key: str) -> bytes | None:
        return self._files.get(key)

    def holds(self, repository: str) -> bool:
        return any(key.startswith(f"{repository}/") for key in self._files)

    def commit(self, repository: str) -> str:
        """The repository's state: another one once a file has changed."""
        state = hashlib.sha1(repository.encode())
        for key in sorted(key for key in self._files if key.startswith(f"{repository}/")):
            state.update(f"{key} {etag(key, self._files[key])}".encode())
        return state.hexdigest()

    def chunked_file(self, identifier: str) -> tuple[str, bytes]:
        """Key and bytes of the file that the chunk store knows by this name."""
        files = ((key, self._files[key]) for key in self.chunked)
        return next((key, content) for key, content in files if chunk_hash(content) == identifier)

    def take_faults(self, key: str) -> set[str]:
        """Which faults this download is to have; the next one has none."""
        kinds = {"cut": self.cut, "held": self.held, "damaged": self.damaged}
        faults = {name for name, keys in kinds.items() if key in keys}
        for name in faults:
            kinds[name].remove(key)
        return faults

    def chunk_store(self) -> dict[str, str]:
        """Where the chunks are, as the client wants to be told."""
        return {
            "X-Xet-Cas-Url": self.url,
            "X-Xet-Access-Token": "open",
            "X-Xet-Token-Expiration": str(int(time.time()) + 3600),
        }

    def downloads(self, name: str = "") -> list[Request]:
        """The requests for the bytes of files whose path ends in `name`."""
        gets = (request for request in self.requests if request.method == "GET")
        return [r for r in gets if "/resolve/" in r.path and r.path.endswith(name)]

    def blocks(self) -> list[Request]:
        """The requests for bytes of the chunk store."""
        return [request for request in self.requests if request.path.startswith("/chunks/blocks/")]


def chunk_hash(content: bytes) -> str:
    """What the chunk store calls a file: a hash, and not the file's SHA-256."""
    return hashlib.sha256(b"chunks of " + content).hexdigest()


def etag(key: str, content: bytes) -> str:
    if key.endswith(_LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def damage(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def packed(content: bytes) -> bytes:
    """The file as one block of uncompressed chunks, each after its 8-byte header."""
    block = b""
    for start in range(0, len(content), _CHUNK):
        chunk = content[start : start + _CHUNK]
        size = struct.pack("<I", len(chunk))[:3]
        block += b"\0" + size + b"\0" + size + chunk
    return block


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append(Request(self.command, f"/{path}", self.headers.get("Range")))
        if "/resolve/" in path:
            repository, _, file = path.partition("/resolve/")
            self.resolve(repository, file.partition("/")[2])
        elif path == "":
            self.reply(200)
        elif path.startswith("api/models/") and hub.holds(path.removeprefix("api/models/")):
            repository = path.removeprefix("api/models/")
            self.reply_json({"id": repository, "sha": hub.commit(repository), "siblings": []})
        elif path == "chunks/token":
            self.reply(200, headers=hub.chunk_store())
        elif path.startswith("v1/reconstructions/"):
            self.reconstruction(path.rpartition("/")[2])
        elif path.startswith("chunks/blocks/"):
            self.block(path.rpartition("/")[2])
        else:
            self.reply(404)

    def resolve(self, repository: str, file: str) -> None:
        hub = self.server.hub
        key = f"{repository}/{file}"
        content = hub.content(key)
        if content is None:
            missing = "EntryNotFound" if hub.holds(repository) else "RepoNotFound"
            status = 404 if hub.holds(repository) else 401
            headers = {"X-Error-Code": missing, "X-Repo-Commit": hub.commit(repository)}
            self.reply(status, headers=headers)
            return
        headers = {"X-Repo-Commit": hub.commit(repository), "ETag": f'"{etag(key, content)}"'}
        if key.endswith(_LARGE):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        if key in hub.chunked:
            headers["X-Xet-Hash"] = chunk_hash(content)
            headers["Link"] = f'<{hub.url}/chunks/token>; rel="xet-auth"'
        faults = hub.take_faults(key) if self.command == "GET" else set()
        self.reply(200, damage(content) if "damaged" in faults else content, headers, faults)

    def block(self, identifier: str) -> None:
        key, content = self.server.hub.chunked_file(identifier)
        damaged = "damaged" in self.server.hub.take_faults(key)
        self.reply(200, packed(damage(content) if damaged else content))

    def reconstruction(self, identifier: str) -> None:
        _, content = self.server.hub.chunked_file(identifier)
        chunks = {"start": 0, "end": -(-len(content) // _CHUNK)}
        fetch = {
            "range": chunks,
            "url": f"{self.server.hub.url}/chunks/blocks/{identifier}",
            "url_range": {"start": 0, "end": len(packed(content)) - 1},
        }
        term = {"hash": identifier, "unpacked_length": len(content), "range": chunks}
        self.reply_json(
            {
                "offset_into_first_range": 0,
                "terms": [term],
                "fetch_info": {identifier: [fetch]},
            }
        )

    def reply_json(self, content: object) -> None:
        self.reply(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def reply(
        self,
        status: int,
        content: bytes = b"",
        headers: dict[str, str] | None = None,
        faults: Collection[str] = (),
    ) -> None:
        asked = self.headers.get("Range")
        headers = dict(headers or {}) | {"Accept-Ranges": "bytes"}
        if asked and status == 200:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        broken = "cut" in faults or "held" in faults
        self.wfile.write(content[: len(content) // 2] if broken else content)
        if "held" in faults:
            self.server.hub.stalled.set()
            with contextlib.suppress(ConnectionError):
                self.connection.recv(1)  # returns once the client is gone
        self.close_connection = broken
