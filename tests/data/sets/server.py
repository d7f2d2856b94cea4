"""A server of small files on this machine with the faults of real ones: a request takes its file's next fault."""

import gzip
import hashlib
import json
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Shelf:
    """Files by path, what was asked of them, and the faults that wait for each."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Callable[[Any, bytes], bool]]] = defaultdict(list)
        self.validators: dict[str, dict[str, str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.sent: dict[str, int] = defaultdict(int)
        self.address = ""

    def put(self, path: str, content: bytes, *faults: Callable[[Any, bytes], bool]) -> str:
        """Lays a file down and returns its address."""
        self.files[path] = content
        self.faults[path] += faults
        return self.address + path

    def asked(self, path: str) -> list[str | None]:
        """The Range header of each request for a path."""
        return [sought for at, sought in self.requests if at == path]

    def headers_of(self, path: str, content: bytes) -> dict[str, str]:
        return self.validators.get(path, {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shelf: Shelf

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.close_connection = True
        if path.startswith("/api/datasets/"):
            return self.hub_listing(path.removeprefix("/api/datasets/").removesuffix("/revision/main"))
        self.shelf.requests.append((path, self.headers.get("Range")))
        content = self.shelf.files.get(path)
        waiting = self.shelf.faults[path]
        if waiting and waiting.pop(0)(self, content or b""):
            return None
        if content is None:
            return self.answer(404, b"")
        self.serve(self.shelf.files[path])

    def serve(
        self, content: bytes, obey_if_range: bool = True, obey_range: bool = True, cut: int | None = None
    ) -> None:
        """What a good server does; ``cut``: the connection breaks after so many bytes of the body."""
        path = self.path.partition("?")[0]
        headers = self.shelf.headers_of(path, content)
        sought, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if sought and obey_range and (not obey_if_range or condition is None or condition in headers.values()):
            start = int(sought.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            return self.answer(206, content[start:], headers, cut=cut)
        return self.answer(200, content, headers, cut=cut)

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        body = body[:cut]
        self.shelf.sent[self.path] += len(body)
        with suppress(OSError):
            self.wfile.write(body)

    def hub_listing(self, repository: str) -> None:
        prefix = f"/datasets/{repository}/resolve/main/"
        files = {path.removeprefix(prefix): c for path, c in self.shelf.files.items() if path.startswith(prefix)}
        if not files:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = []
        for name, c in files.items():
            large = {"size": len(c), "sha256": hashlib.sha256(c).hexdigest(), "pointerSize": 1}
            siblings.append({"rfilename": name, "size": len(c), "lfs": large})
        body = {"id": repository, "siblings": siblings, "tags": [], "private": False, "downloads": 0, "likes": 0}
        self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})


Fault = Callable[[Any, bytes], bool]
"""Answers a request itself (True) or changes something and lets the server answer (False)."""


def fault(act: Callable[[Handler, bytes], Any]) -> Fault:
    return lambda handler, content: act(handler, content) or True


def drop(after: int) -> Fault:
    """The connection ends early."""
    return fault(lambda handler, content: handler.serve(content, cut=after))


def reset(after: int) -> Fault:
    """The connection is torn down (RST) in the middle."""

    def act(handler: Handler, content: bytes) -> None:
        handler.serve(content, cut=after)
        handler.wfile.flush()
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.wfile = handler.rfile  # nothing left to flush

    return fault(act)


def status(code: int, **headers: str) -> Fault:
    """Only a status."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return fault(lambda handler, _: handler.answer(code, b"no", named))


def instead(content: bytes) -> Fault:
    """Another body with status 200: an error page, a pointer."""
    return fault(lambda handler, _: handler.answer(200, content))


def whole() -> Fault:
    """Range is ignored."""
    return fault(lambda handler, content: handler.serve(content, obey_range=False))


def careless() -> Fault:
    """If-Range is ignored: a piece of whatever lies there now."""
    return fault(lambda handler, content: handler.serve(content, obey_if_range=False))


def promise(length: int) -> Fault:
    """A Content-Length that is not the body's."""
    return fault(lambda handler, content: handler.answer(200, content[:length], length=length))


def corrupt() -> Fault:
    """One byte in the middle is another, the headers say nothing of it."""

    def act(handler: Handler, content: bytes) -> None:
        middle = len(content) // 2
        wrong = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        handler.answer(200, wrong, handler.shelf.headers_of(handler.path, content))

    return fault(act)


def wrong_piece() -> Fault:
    """206 with bytes from the start, said or unsaid."""
    return fault(lambda h, c: h.answer(206, c, {"Content-Range": f"bytes 0-{len(c) - 1}/{len(c)}"}))


def become(content: bytes) -> Fault:
    """From now on another file lies here."""

    def act(handler: Any, _: bytes) -> bool:
        handler.shelf.files[handler.path] = content
        return False

    return act


def slow(pause: float, pieces: int) -> Fault:
    """Bytes come, but slowly."""

    def act(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        size = -(-len(content) // pieces)
        with suppress(OSError):
            for start in range(0, len(content), size):
                handler.wfile.write(content[start : start + size])
                handler.wfile.flush()
                time.sleep(pause)

    return fault(act)


def stall(after: int, pause: float) -> Fault:
    """Bytes stop coming while the connection stays open."""

    def act(handler: Handler, content: bytes) -> None:
        handler.serve(content, cut=after)
        handler.wfile.flush()
        time.sleep(pause)

    return fault(act)


def unmeasured(cut: int | None = None) -> Fault:
    """Chunked, without a length; ``cut``: the last chunk never comes."""

    def act(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        body = content[:cut]
        handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n" + (b"" if cut else b"0\r\n\r\n"))

    return fault(act)


def endless() -> Fault:
    """Neither a length nor chunks: the body ends with the connection, cut or not."""

    def act(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(content[:-10] + b"]")

    return fault(act)


def encoded(share: float = 1.0, length: bool = True, how: str = "gzip") -> Fault:
    """A compressed body that nobody asked for; ``share``: of it, as a broken cache has kept it."""

    def act(handler: Handler, content: bytes) -> None:
        body = gzip.compress(content)
        body = body[: int(len(body) * share)]
        handler.send_response(200)
        handler.send_header("Content-Encoding", how)
        if length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return fault(act)


def more() -> Fault:
    """A piece with more bytes than it announces, in chunks."""

    def act(handler: Handler, content: bytes) -> None:
        sought = handler.headers.get("Range")
        start = int(sought.removeprefix("bytes=").removesuffix("-")) if sought else 0
        handler.send_response(206 if sought else 200)
        for key, value in handler.shelf.headers_of(handler.path, content).items():
            handler.send_header(key, value)
        if sought:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            handler.send_header("Transfer-Encoding", "chunked")
            body = content[start:] + b"more" * 100
            handler.end_headers()
            with suppress(OSError):
                handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
            return
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:1000])

    return fault(act)


def piece_of_unknown_total() -> Fault:
    """206 that does not tell how long the file is."""
    return fault(lambda h, c: h.answer(206, c[1000:2000], {"Content-Range": "bytes 1000-1999/*"}))


def odd_length() -> Fault:
    """A length that Python's ``isdigit`` takes for a number, and no body."""

    def act(handler: Handler, content: bytes) -> None:
        handler.send_response(503)
        handler.send_header("Content-Length", "\xb2")
        handler.end_headers()

    return fault(act)


def trickle() -> Fault:
    """Headers that come slowly and never end."""

    def act(handler: Handler, content: bytes) -> None:
        with suppress(OSError):
            for _ in range(20):
                handler.wfile.write(b"X")
                handler.wfile.flush()
                time.sleep(0.1)

    return fault(act)


def moved(address: str) -> Fault:
    """A redirect."""
    return fault(lambda handler, _: handler.answer(302, b"", {"Location": address}))


@contextmanager
def serving() -> Iterator[Shelf]:
    """A shelf behind an address of this machine."""
    shelf = Shelf()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"shelf": shelf}))
    server.daemon_threads = True
    shelf.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield shelf
    finally:
        server.shutdown()
        server.server_close()
