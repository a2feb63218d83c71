"""Object stores' endpoints, each a process of its own on this machine's loopback.

moto's server is S3 with conditional puts, s3rver (of npm) S3 without, Azurite
(of npm, too) Azure's blobs.  What isn't installed is None, with a reason.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate
from importlib.util import find_spec
from pathlib import Path

BUCKET = "bucket"
# Parts this small are S3's only in tests.
PART_NBYTES = 64 << 10
_START_SECONDS = 60.0
# Ends a server when whoever started it closes a pipe, or dies.
_KEEPER = """
import subprocess, sys, threading, os
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: os._exit(server.wait()), daemon=True).start()
sys.stdin.read()
server.kill()
server.wait()
"""


class AbsentError(Exception):
    """A server isn't installed here."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A running server: its URL, the root's beginning, and the environment of its clients."""

    url: str
    scheme: str
    environment: Mapping[str, str]


@contextlib.contextmanager
def moto() -> Iterator[Endpoint]:
    """moto's S3, in memory."""
    if find_spec("moto") is None or find_spec("flask") is None:
        raise AbsentError("moto[server] isn't installed: see tests/ranks-requirements.txt")
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    sizes = {"S3_UPLOAD_PART_MIN_SIZE": str(PART_NBYTES)}
    with _running(words, port, sizes), _client_of(port, "key", "secret") as found:
        _make(urllib.request.Request(f"{found.url}/{BUCKET}", method="PUT", headers=_ANYBODY))
        yield found


@contextlib.contextmanager
def s3rver(directory: Path) -> Iterator[Endpoint]:
    """s3rver's S3, in files of `directory`."""
    port = free_port()
    words = [*_npm("s3rver"), "-a", "127.0.0.1", "-p", str(port), "-d", str(directory), "--silent"]
    words += ["--configure-bucket", BUCKET]
    with _running(words, port, {}), _client_of(port, "S3RVER", "S3RVER") as found:
        yield found


@contextlib.contextmanager
def azurite(directory: Path) -> Iterator[Endpoint]:
    """Azurite's blobs, in files of `directory`."""
    port = free_port()
    words = [*_npm("azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    words += ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "-l", str(directory)]
    url = f"http://127.0.0.1:{port}/{_ACCOUNT}"
    environment = {
        "AZURE_STORAGE_ACCOUNT_NAME": _ACCOUNT,
        "AZURE_STORAGE_ACCOUNT_KEY": _KEY,
        "AZURE_STORAGE_ENDPOINT": url,
        "AZURE_ALLOW_HTTP": "true",
    }
    with _running(words, port, {}):
        _make(_container(url))
        yield Endpoint(url, "az", environment)


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """This process's environment, with some more for the time of a block."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _client_of(port: int, key: str, secret: str) -> Iterator[Endpoint]:
    url = f"http://127.0.0.1:{port}"
    variables = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }
    yield Endpoint(url, "s3", variables)


@contextlib.contextmanager
def _running(words: Sequence[str], port: int, variables: Mapping[str, str]) -> Iterator[None]:
    """A process that listens on a port, until the end of the block."""
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-c", _KEEPER, *words],
        stdin=subprocess.PIPE,
        stdout=quiet,
        stderr=quiet,
        env={**os.environ, **variables},
    )
    assert process.stdin is not None
    try:
        end = time.monotonic() + _START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > end:
                raise AbsentError(f"{words[0]} … doesn't start: {process.poll()}")
            time.sleep(0.05)
        yield
    finally:
        process.stdin.close()
        process.wait(30)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def _npm(command: str) -> list[str]:
    """A command of an npm package: in the folder `npm` of this environment, or on the path."""
    here = Path(sys.prefix) / "npm" / "node_modules" / ".bin"
    found = shutil.which(command, path=str(here)) or shutil.which(command)
    node = shutil.which("node")
    if found is None or node is None:
        raise AbsentError(
            f"{command} isn't installed: npm install --prefix .venv/npm s3rver@3.7.1 azurite@3.35.0"
        )
    return [node, str(Path(found).resolve())]


def _make(request: urllib.request.Request) -> None:
    """Make a bucket."""
    with contextlib.suppress(urllib.error.HTTPError):  # it is there
        urllib.request.urlopen(request, timeout=10).close()


# moto looks only at whose key it is.
_ANYBODY = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
}
# Azurite's, which everybody knows.
_ACCOUNT = "devstoreaccount1"
_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


def _container(url: str) -> urllib.request.Request:
    """A signed request for a container."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    told = f"x-ms-date:{date}\nx-ms-version:{version}\n"
    text = "PUT" + "\n" * 12 + told + f"/{_ACCOUNT}/{_ACCOUNT}/{BUCKET}\nrestype:container"
    digest = hmac.new(base64.b64decode(_KEY), text.encode(), hashlib.sha256).digest()
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {_ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    }
    return urllib.request.Request(
        f"{url}/{BUCKET}?restype=container", method="PUT", headers=headers
    )
