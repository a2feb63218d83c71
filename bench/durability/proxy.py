"""An HTTP proxy that does to chosen requests what networks and services do to some."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class Fault(StrEnum):
    """What becomes of a request."""

    ERROR = "answered 500, and not carried out"
    BUSY = "answered 503 SlowDown, and not carried out"
    DROPPED = "dropped, and not carried out"
    LOST = "carried out, and its answer lost"
    LATE = "carried out, and answered 500"
    SILENT = "never answered, and not carried out"
    CUT = "carried out, and its answer cut in half"


# What comes of the request with this number, from 0 on; None if it goes through.
Choose = Callable[[int], Fault | None]

_BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>reduce</Message></Error>"
_SILENT_SECONDS = 5.0


class Proxy:
    """A server on loopback that hands requests on to another, but for its faults."""

    def __init__(self, target: str) -> None:
        """`target` is the other's URL."""
        self.host = urlsplit(target).netloc
        self.asked: list[str] = []
        self._choose: Choose = lambda _: None
        self._mutex, self.over = threading.Lock(), threading.Event()
        handler = type("Handler", (_Handler,), {"proxy": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def arm(self, choose: Choose) -> None:
        """Count requests from 0 on, and let `choose` say what becomes of each."""
        with self._mutex:
            self.asked, self._choose = [], choose

    def note(self, request: str) -> Fault | None:
        """What becomes of a request."""
        with self._mutex:
            self.asked.append(request)
            return self._choose(len(self.asked) - 1)

    def close(self) -> None:
        """End, with all that still waits."""
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def proxy_to(target: str) -> Iterator[Proxy]:
    """A proxy until the end of the block."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        proxy.close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def setup(self) -> None:
        super().setup()
        self._other: http.client.HTTPConnection | None = None

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        if self._other is not None:
            self._other.close()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.note(f"{self.command} {self.path}")
        if fault in (Fault.ERROR, Fault.BUSY):
            code = 500 if fault is Fault.ERROR else 503
            self._answer(code, [("Content-Type", "application/xml")], _BUSY)
        elif fault is Fault.SILENT:
            self.proxy.over.wait(_SILENT_SECONDS)
            self._drop()
        elif fault is Fault.DROPPED:
            self._drop()
        else:
            self._hand_on(body, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def _hand_on(self, body: bytes, fault: Fault | None) -> None:
        code, headers, answer = self._ask(body)
        if fault is Fault.LATE:
            self._answer(500, [("Content-Type", "application/xml")], _BUSY)
        elif fault is Fault.LOST:
            self._drop()
        elif fault is Fault.CUT and len(answer) > 1:
            self._answer(code, headers, answer[: len(answer) // 2], length=len(answer))
            self._drop()
        elif fault is Fault.CUT:
            self._drop()
        else:
            self._answer(code, headers, answer)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        if self._other is None:
            self._other = http.client.HTTPConnection(self.proxy.host, timeout=30)
        headers = {key: value for key, value in self.headers.items() if key != "Connection"}
        try:
            self._other.request(self.command, self.path, body, headers)
            found = self._other.getresponse()
        except (OSError, http.client.HTTPException):  # it closed what was idle
            self._other.close()
            self._other.request(self.command, self.path, body, headers)
            found = self._other.getresponse()
        answer = found.read()
        drop = {"connection", "transfer-encoding", "keep-alive", "server", "date"}
        if self.command != "HEAD":
            drop.add("content-length")
        return found.status, [h for h in found.getheaders() if h[0].lower() not in drop], answer

    def _answer(
        self, code: int, headers: list[tuple[str, str]], answer: bytes, length: int | None = None
    ) -> None:
        self.send_response(code)
        for key, value in headers:
            self.send_header(key, value)
        if not any(key.lower() == "content-length" for key, _ in headers):
            nbytes = len(answer) if length is None else length
            self.send_header("Content-Length", str(nbytes))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)
            self.wfile.flush()

    def _drop(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
