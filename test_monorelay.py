# /// script
# requires-python = ">=3.9"
# dependencies = [
#   "pytest", "anthropic", "openai", "PyJWT", "hypothesis", "trustme", "PyYAML", "selenium", "prometheus_client", "h11",
# ]
# ///
"""The tests of MonoRelay: `python3 test_monorelay.py [pytest's arguments]`.

The block above names everything the tests need beyond the standard library. A plain run installs that into
.venv/ (one folder per Python version) and starts pytest there; `uv run test_monorelay.py` brings its own
environment. `-m slow` runs the soak, the crowd and all that is tried at full size instead of the rest, `-m browser`
what needs Debian's chromium and chromium-driver. `-m timed` is the part of a plain run that measures seconds.
TEST_SEED=N generates the same messages for the parsers as the run that failed and told that number.

Three things talk to each other in most tests: a raw client, a relay started in this process, and a provider
whose every byte is scripted. Streaming and cancelling are proved by gates (`threading.Event`), never by
sleeping. The rooms below are those of monorelay.py, in its order.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


# ------------------------------------------------------------------------------------------------------------
# Bootstrap: an environment that has what the block above names
# ------------------------------------------------------------------------------------------------------------


def dependencies() -> list[str]:
    """The requirements that the script block at the top of this file names."""
    source = Path(__file__).read_text(encoding="utf-8")
    return re.findall(r'"([^"]+)"', re.search(r"^# dependencies = \[(.*?)\]", source, re.M | re.S)[1])


def installed(requirements: list[str]) -> bool:
    """Whether this very interpreter has them all, as it has under `uv run`."""
    try:
        return all(importlib.metadata.version(name) for name in requirements)
    except importlib.metadata.PackageNotFoundError:
        return False


def environment(requirements: list[str]) -> Path:
    """The python of an environment with the requirements in it, made anew when they have changed."""
    folder = HERE / ".venv" / "{}.{}".format(*sys.version_info)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = folder / "requirements.sha256"
    wanted = hashlib.sha256(repr((requirements, sys.version)).encode()).hexdigest()
    if not python.exists() or not stamp.exists() or stamp.read_text() != wanted:
        print(f"Installing {', '.join(requirements)} into {folder.relative_to(HERE)}/ ...", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        if os.spawnv(os.P_WAIT, python, [str(python), "-m", "pip", "install", "--quiet", *requirements]):
            sys.exit("The tests' dependencies could not be installed; pip says why above.")
        stamp.write_text(wanted)
    return python


# A coroutine that nobody awaits is a call that never happened: Python only warns of it, and where it is collected.
MARKERS = "markers=slow: takes a minute\nbrowser: needs Chromium\ntimed: measures seconds, best with nothing beside it"
PYTEST = ["-m", "pytest", "-q", "--strict-markers", "-p", "no:cacheprovider", "-o", MARKERS,
          "-W", "error::RuntimeWarning", "-W", "error::pytest.PytestUnraisableExceptionWarning"]  # fmt: skip


def run_pytest(arguments: list[str]) -> None:
    """Replaces this process by pytest on this file; what is marked slow or browser runs only when asked for."""
    python = Path(sys.executable) if installed(dependencies()) else environment(dependencies())
    options = [] if "-m" in arguments else ["-m", "not slow and not browser"]
    print(f"Running pytest on Python {sys.version.split()[0]}", flush=True)
    os.execv(python, [str(python), *PYTEST, *options, "--rootdir", str(HERE), __file__, *arguments])


if __name__ == "__main__":
    run_pytest(sys.argv[1:])

import ast
import asyncio
import atexit
import base64
import collections.abc
import concurrent.futures
import configparser
import contextlib
import csv
import datetime
import email.utils
import fractions
import functools
import gc
import gzip
import hmac
import io
import itertools
import json
import math
import mmap
import py_compile
import random
import resource
import runpy
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import string
import struct
import subprocess
import tempfile
import threading
import time
import tracemalloc
import types
import typing
import urllib.parse
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import anthropic
import h11
import hypothesis
import jwt
import openai
import prometheus_client.parser
import pydantic
import pytest
import trustme
import typing_extensions
import yaml
from hypothesis import strategies as st

sys.path.insert(0, str(HERE))
import monorelay

# Every run tries the same examples, however slow the machine; fewer where the same was tried on another Python.
EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))
hypothesis.settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=EXAMPLES)
hypothesis.settings.load_profile("suite")
# What is generated without it is another in every run, and what fails tells the number that makes the same again.
TEST_SEED = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(1 << 32))

TIMEOUT_SECONDS = 5
TOKEN = "access-key-of-the-tests"
JWT_SECRET = "a secret of the tests, 32 bytes or more"
ANTHROPIC_VERSION = "anthropic-version: 2023-06-01"
PASSWORD = "correct horse"
PASSWORD_HASH = monorelay.hash_password(PASSWORD)
UNIX_TIME = 1_700_000_000.0


# ------------------------------------------------------------------------------------------------------------
# The raw wire: a socket that reads and writes exact bytes, for both ends
# ------------------------------------------------------------------------------------------------------------


class Message(NamedTuple):
    """A request or an answer as it stood on the wire, its body out of the framing."""

    head: bytes
    body: bytes

    @property
    def start(self) -> str:
        return self.head.split(b"\r\n", 1)[0].decode("latin-1")

    @property
    def method(self) -> str:
        return self.start.split(" ")[0]

    @property
    def target(self) -> str:
        return self.start.split(" ")[1]

    @property
    def status(self) -> int:
        return int(self.start.split(" ")[1])

    @property
    def headers(self) -> list[tuple[str, str]]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return [
            (name.lower(), value.strip())
            for name, _, value in (line.partition(":") for line in lines if line)
        ]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def get(self, name: str) -> str | None:
        return ", ".join(self.all(name)) if self.all(name) else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A connected socket with a buffer; every wait ends after TIMEOUT_SECONDS."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_SECONDS)
        self.sock = sock
        self.buffer = bytearray()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def fill(self) -> bool:
        """Takes what has arrived; False at the end of the connection."""
        data = self.sock.recv(1 << 18)
        self.buffer += data
        return bool(data)

    def take(self, count: int) -> bytes:
        while len(self.buffer) < count:
            if not self.fill():
                raise EOFError(
                    f"{count} bytes awaited, {len(self.buffer)} there: {bytes(self.buffer[:200])!r}"
                )
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def until(self, mark: bytes) -> bytes:
        """The bytes up to and with the mark."""
        start = 0
        while (at := self.buffer.find(mark, start)) < 0:
            start = max(0, len(self.buffer) - len(mark) + 1)
            if not self.fill():
                raise EOFError(f"{mark!r} awaited, there is {bytes(self.buffer[:200])!r}")
        return self.take(at + len(mark))

    def rest(self) -> bytes:
        """Everything until the other side closes, cleanly or not."""
        with contextlib.suppress(ConnectionError):
            while self.fill():
                pass
        return self.take(len(self.buffer))

    def chunk(self) -> bytes:
        """The next chunk's data; empty at the last, whose trailers are read too."""
        size = int(self.until(b"\r\n").split(b";")[0], 16)
        if not size:
            while self.until(b"\r\n") != b"\r\n":
                pass
            return b""
        data = self.take(size)
        assert self.take(2) == b"\r\n"
        return data

    def message(self, is_answer: bool, head_only: bool = False) -> Message:
        """The next whole request or answer; EOFError when it doesn't come to its end."""
        bare = Message(self.until(b"\r\n\r\n"), b"")
        if head_only or (is_answer and bare.status in (204, 304)):
            return bare
        if bare.get("transfer-encoding"):
            return bare._replace(body=b"".join(iter(self.chunk, b"")))
        if bare.get("content-length"):
            return bare._replace(body=self.take(int(bare.get("content-length"))))
        return bare._replace(body=self.rest() if is_answer else b"")

    def reset(self) -> None:
        """Ends with RST rather than FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()

    def is_quiet(self) -> bool:
        """Whether nothing more has come, not even the end."""
        return not select.select([self.sock], [], [], 0.02)[0]

    def ended_within(self, seconds: float) -> bool:
        """Whether the other side closes before the time is over; what it sends until then is dropped."""
        self.sock.settimeout(seconds)
        try:
            while self.sock.recv(1 << 16):
                pass
        except socket.timeout:
            return False
        except OSError:
            pass
        return True


class Client(Wire):
    """A client of the relay that sends exactly what it is told to."""

    def __init__(self, url: str, source: str = "", **options: int) -> None:
        address = urllib.parse.urlsplit(url)
        sock = socket.socket(socket.AF_INET6 if ":" in address.hostname else socket.AF_INET)
        if source:
            sock.bind((source, 0))
        for name, value in options.items():
            sock.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        sock.settimeout(TIMEOUT_SECONDS)
        sock.connect((address.hostname, address.port))
        super().__init__(sock)

    def answer(self, head_only: bool = False) -> Message:
        """The next final answer."""
        return self.message(is_answer=True, head_only=head_only)

    def ask(
        self, method: str, path: str, body: bytes | None = None, *headers: str, token: str = TOKEN
    ) -> Message:
        self.send(request(method, path, body, *headers, token=token))
        return self.answer(head_only=method == "HEAD")


def request(method: str, path: str, body: bytes | None = None, *headers: str, token: str = TOKEN) -> bytes:
    """A request's bytes; an empty token leaves the credential out."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: relay",
        *([f"x-api-key: {token}"] if token else []),
        *headers,
    ]
    framed = any(line.lower().startswith(("transfer-encoding", "content-length")) for line in headers)
    if body is not None and not framed:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def chunked(*parts: bytes) -> bytes:
    """A whole body in chunked coding."""
    return b"".join(map(chunk, parts)) + b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer(status: int = 200, body: bytes = b"{}", *headers: str) -> bytes:
    """A provider's answer with a length."""
    lines = [f"HTTP/1.1 {status} Whatever", "content-type: application/json", *headers]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode("latin-1") + body


# ------------------------------------------------------------------------------------------------------------
# The scripted provider
# ------------------------------------------------------------------------------------------------------------


class Connection(Wire):
    """One connection at the provider, in the hands of its script."""

    def __init__(self, sock: socket.socket, upstream: Upstream) -> None:
        super().__init__(sock)
        self.upstream = upstream

    def read_request(self) -> Message:
        message = self.message(is_answer=False)
        self.upstream.requests.append(message)
        self.upstream.called.set()
        return message

    def wait(self, gate: threading.Event) -> None:
        assert gate.wait(TIMEOUT_SECONDS), "the script's gate was never opened"


Script = Callable[[Connection], None]


class Upstream:
    """A provider on loopback whose every connection runs the script in a thread of its own."""

    def __init__(self, script: Script, context: ssl.SSLContext | None = None) -> None:
        self.script = script
        self.context = context
        self.requests: list[Message] = []
        self.connections: list[Connection] = []
        self.called = threading.Event()
        self.left = False
        self.faults: list[BaseException] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock = self.listener.accept()[0]
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self.serve, args=(sock,), daemon=True).start()

    def serve(self, sock: socket.socket) -> None:
        try:
            with Connection(
                self.context.wrap_socket(sock, server_side=True) if self.context else sock, self
            ) as it:
                self.connections.append(it)
                self.script(it)
        except (EOFError, OSError):
            sock.close()
        except BaseException as fault:
            self.faults.append(fault)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in list(self.connections):
            connection.close()


def replies(*answers: bytes) -> Script:
    """Each request gets the next of the answers, on whichever connection; the last one stays."""
    pending = itertools.chain(answers, itertools.repeat(answers[-1]))

    def script(connection: Connection) -> None:
        while True:
            connection.read_request()
            connection.send(next(pending))

    return script


def replies_then_closes(*pieces: bytes) -> Script:
    """Sends the pieces as the answer to one request and hangs up."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(*pieces)

    return script


def silence(connection: Connection) -> None:
    """Reads the request and never answers; ends when the relay hangs up."""
    connection.read_request()
    connection.upstream.left = connection.ended_within(TIMEOUT_SECONDS)


STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def sse(name: str, **data: Any) -> bytes:
    """One event of an Anthropic stream."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-test", "content": [],
           "stop_reason": None, "stop_sequence": None, "usage": {"input_tokens": 25,
           "output_tokens": 1}}  # fmt: skip
ANTHROPIC_EVENTS = [
    sse("message_start", message=MESSAGE),
    sse("content_block_start", index=0, content_block={"type": "text", "text": ""}),
    sse("ping"),
    sse("content_block_delta", index=0, delta={"type": "text_delta", "text": "Grüße, \u2028"}),
    sse("content_block_delta", index=0, delta={"type": "text_delta", "text": "world"}),
    sse("content_block_stop", index=0),
    sse(
        "message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage={"output_tokens": 12}
    ),
    sse("message_stop"),
]
OPENAI_EVENTS = [
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"gpt-test","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":"Hi"},"finish_reason":null}]}\n\n',
    b'data: {"id":"c1","object":"chat.completion.chunk","created":1,"model":"gpt-test","choices":'
    b'[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n',
    b"data: [DONE]\n\n",
]
ANTHROPIC_STREAM = STREAM_HEAD + chunked(*ANTHROPIC_EVENTS)
OPENAI_STREAM = STREAM_HEAD + chunked(*OPENAI_EVENTS)
OVERLOADED = (
    b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}\n\n'
)


def gated_stream(gate: threading.Event) -> Script:
    """One event, then the rest once the gate is open."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]))
        gate.wait(4 * TIMEOUT_SECONDS)
        connection.send(chunked(*ANTHROPIC_EVENTS[1:]))

    return script


def gated_pieces(
    pieces: list[bytes],
    gates: list[threading.Event],
    head: bytes = STREAM_HEAD,
    frame: Callable[[bytes], bytes] = chunk,
    last: bytes = b"0\r\n\r\n",
) -> Script:
    """Each piece of a stream once the gate of the one before is open, the end once all are."""

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(head)
        for piece, gate in zip(pieces, gates):
            connection.send(frame(piece))
            connection.wait(gate)
        connection.send(last)

    return script


# ------------------------------------------------------------------------------------------------------------
# Fixtures: any number of providers and relays per test, all gone at its end
# ------------------------------------------------------------------------------------------------------------


def settings(providers: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A relay.json as a dict.

    A provider is an Upstream, or a dict whose "upstream" is one; its format is that of its name.
    """
    described: dict[str, Any] = {}
    for name, wanted in providers.items():
        provider = dict(wanted) if isinstance(wanted, dict) else {"upstream": wanted}
        upstream = provider.pop("upstream", None)
        provider.setdefault("format", "openai" if name.startswith("openai") else name.rstrip(string.digits))
        if provider["format"] != "echo":
            provider.setdefault("keys", [f"sk-{name}-secret"])
        if upstream is not None:
            provider["base_url"] = upstream.url + ("/v1" if provider["format"] == "openai" else "")
        described[name] = provider
    server = {"host": "127.0.0.1", "port": 0, "access_key": TOKEN, **sections.pop("server", {})}
    return {"server": server, "providers": described, "routes": {"*": list(described)}, **sections}


def parse(providers: dict[str, Any] | None = None, **sections: Any) -> Any:
    """The Config of such a relay.json."""
    providers = {"anthropic": {"base_url": "http://127.0.0.1:9"}} if providers is None else providers
    return monorelay.parse_config(json.dumps(settings(providers, **sections)), {})


def both_formats(upstream: Upstream) -> dict[str, Any]:
    """A provider of each format, for its own paths only."""
    return {name: {"upstream": upstream, "translate": False} for name in ("anthropic", "openai")}


class Clock:
    """A clock that stands still until a test moves it, and the loop that goes by it once there is one."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.loop: monorelay.EventLoop | None = None

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        """Lets so many seconds pass, and the loop serve whatever is due then."""
        self.now += seconds
        for _ in range(3):  # in turn: the one that has begun before, one at this time with its sweep, the next one
            turned = threading.Event()
            self.loop.post(turned.set)
            assert turned.wait(TIMEOUT_SECONDS), "the event loop is stuck"


class Relay:
    """A relay in this process, with its log, and with a clock of the test's if that is to move it."""

    def __init__(self, providers: dict[str, Any], clock: Clock | None = None, **sections: Any) -> None:
        self.log = io.StringIO()
        self.server = monorelay.RelayServer(
            parse(providers, **sections), log=self.log, clock=clock or time.monotonic
        )
        if clock:
            clock.loop = self.server.service.loop
        self.server.start()
        self.url = self.server.url
        self.stopping = threading.Thread(target=self.server.stop)

    def client(self, source: str = "", **options: int) -> Client:
        """A client of this relay, at another address of this machine if need be."""
        return Client(self.url, source, **options)

    def ask(
        self, method: str, path: str, body: bytes | None = None, *headers: str, token: str = TOKEN
    ) -> Message:
        with self.client() as client:
            return client.ask(method, path, body, *headers, token=token)

    def post(self, path: str, body: Any, *headers: str, token: str = TOKEN) -> Message:
        """What a POST of this body, or of this object as JSON, gets."""
        return self.ask(
            "POST",
            path,
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            *headers,
            token=token,
        )

    def logged(self, *words: str) -> str:
        """The first line of the log with all the words, waited for."""
        return eventually(
            lambda: next(line for line in self.log.getvalue().splitlines() if all(w in line for w in words))
        )


def eventually(attempt: Callable[[], Any], seconds: float = TIMEOUT_SECONDS) -> Any:
    """The attempt's first true result; its last failure when there is none in time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := attempt():
                return result
            failure: BaseException = AssertionError("it never came true")
        except (AssertionError, LookupError, StopIteration, OSError) as error:
            failure = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} seconds: {failure!r}") from failure
        time.sleep(0.005)


@pytest.fixture(scope="session", autouse=True)
def hasty_ledgers() -> Iterator[None]:
    """The ledgers of this process are written ten times a second; those of programs show the pause as it is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monorelay, "LEDGER_PAUSE_SECONDS", 0.1)
        yield


@pytest.fixture
def upstream() -> Iterator[Callable[..., Upstream]]:
    made: list[Upstream] = []

    def make(script: Script | bytes, context: ssl.SSLContext | None = None) -> Upstream:
        made.append(Upstream(script if callable(script) else replies(script), context))
        return made[-1]

    yield make
    for one in made:
        one.stop()
    assert [fault for one in made for fault in one.faults] == []


@pytest.fixture(scope="session")
def retired() -> Iterator[list[Relay]]:
    """Relays whose test is over: they stop in the background, and none may have logged a traceback."""
    relays: list[Relay] = []
    yield relays
    for one in relays:
        one.stopping.join()
    assert [one.log.getvalue() for one in relays if "Traceback" in one.log.getvalue()] == []


@pytest.fixture
def relay(retired: list[Relay]) -> Iterator[Callable[..., Relay]]:
    made: list[Relay] = []

    def make(providers: dict[str, Any], clock: Clock | None = None, **sections: Any) -> Relay:
        made.append(Relay(providers, clock, **sections))
        return made[-1]

    yield make
    for one in made:
        one.stopping.start()
    retired += made


def refused(got: Message, status: int, kind: str, openai_shape: bool = False) -> str:
    """The message of an error that the relay itself made, checked in every part the format has."""
    assert got.status == status, got
    error = got.json["error"]
    assert error["type"] == kind
    assert got.get("x-monorelay-error")
    assert got.get("request-id") == got.get("x-request-id") and got.get("request-id").startswith("req_")
    if openai_shape:
        assert set(got.json) == {"error"} and set(error) == {"message", "type", "param", "code"}
    else:
        assert set(got.json) == {"type", "error", "request_id"} and got.json["type"] == "error"
        assert got.json["request_id"] == got.get("request-id")
    return error["message"]


def prompt(model: str = "claude-test", **fields: Any) -> dict[str, Any]:
    """The least that an Anthropic request needs."""
    return {
        "model": model,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": "Hello there"}],
        **fields,
    }


def chat(model: str = "gpt-test", **fields: Any) -> dict[str, Any]:
    """The least that an OpenAI chat request needs."""
    return {"model": model, "messages": [{"role": "user", "content": "Hello there"}], **fields}


STREAMED = json.dumps(prompt(stream=True)).encode()


def unused_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def assert_died(client: Client, after: bytes = b"", anthropic: bool = True) -> None:
    """The stream begins with the whole lines of `after`, ends in an error event, has no proper end."""
    head = Message(client.until(b"\r\n\r\n"), b"")
    assert head.status == 200
    received = bytearray()
    if head.get("transfer-encoding"):
        with pytest.raises((EOFError, ConnectionError)):
            for data in iter(client.chunk, b""):
                received += data
    else:
        received += client.rest()
        assert len(received) < int(head.get("content-length"))
    whole = after[: after.rfind(b"\n") + 1]
    assert received.startswith(whole)
    last = bytes(received[len(whole) :]).rstrip(b"\n").split(b"\n\n")[-1].split(b"\n")
    data = json.loads(next(line for line in last if line.startswith(b"data: "))[6:])
    assert data["error"]["type"] and data["error"]["message"]
    if anthropic:
        assert b"event: error" in last and data["type"] == "error"


def bytes_grown(event: Callable[[], object], count: int) -> int:
    """How much more Python's own memory holds when the event has happened so often, within 20 seconds."""
    gc.collect()
    tracemalloc.start()
    try:
        before, begin = tracemalloc.get_traced_memory()[0], time.process_time()
        for number in range(count):
            event()
            assert time.process_time() - begin < 20, f"{number} of {count} events took so long"
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


def seconds_each(event: Callable[[], object], count: int = 200) -> float:
    """The processor time of one event: the best of several rounds, as noise only ever adds to it."""
    rounds = []
    for _ in range(5):
        begin = time.process_time()
        for _ in range(count):
            event()
        rounds.append((time.process_time() - begin) / count)
    return min(rounds)


# ------------------------------------------------------------------------------------------------------------
# The tests themselves
# ------------------------------------------------------------------------------------------------------------


NEVER_AWAITED = """
async def call():
    pass

def test_that_forgets_an_await():
    call()
"""


@pytest.mark.parametrize("awaited", [False, True])
def test_a_coroutine_that_is_never_awaited_fails_the_run(tmp_path, awaited):
    text = NEVER_AWAITED.replace("    call()\n", "    call().close()\n") if awaited else NEVER_AWAITED
    (tmp_path / "test_it.py").write_text(text)
    done = subprocess.run(
        [sys.executable, *PYTEST, "--rootdir", str(tmp_path), "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=10 * TIMEOUT_SECONDS,
    )  # fmt: skip
    assert (done.returncode == 0) == awaited, done.stdout
    assert ("was never awaited" in done.stdout) != awaited, done.stdout


# ------------------------------------------------------------------------------------------------------------
# Config
# ------------------------------------------------------------------------------------------------------------

# Every key of the contract, each with a value that isn't its default.
FULL_CONFIG = """{
  "//": "comments start so",
  "server": {
    "host": "127.0.0.1", "port": 8800, "access_key": ["${KEY}", "another-access-key"],
    "jwt_secret": "${JWT:-0123456789abcdef0123456789abcdef}", "workers": 1, "max_body_mb": 1.5,
    "max_upload_mb": 64, "max_held_mb": 512, "max_connections": 128, "drain_seconds": 2.5,
    "cors_origins": ["https://app.example"], "log": "json"
  },
  "users": { "alice": { "password": "", "models": ["claude-*"], "requests_per_minute": 60,
             "tokens_since": "2026-11-26T12:00:00Z", "// a": 1, "usd_per_day": 20.5, "usd_per_month": 300,
             "tokens_per_day": 5000000, "viewer": true } },
  "providers": {
    "one": { "format": "anthropic", "base_url": "https://one.example", "enabled": false, "timeout": 0.5,
             "keys": [{"key": "k1", "label": "first", "weight": 3}, "k2", ""], "connect_timeout": 0.25,
             "cooldown": 1, "key_strategy": "weighted", "headers": {"x-team": "a", "user-agent": null},
             "auth_header": "authorization", "models": ["claude-*"] },
    "two": { "format": "openai", "base_url": "https://two.example/v1", "keys": ["${NONE:-}"] },
    "echo": { "format": "echo" }
  },
  "aliases": { "fast": "claude-a@one", "smart": ["fast", "gpt-5@two"] },
  "routes": { "claude-*": ["one"], "gpt-*": "two", "echo*": "echo" },
  "ledger": { "path": "spent.db", "keep_days": 30 },
  "prices": { "claude-opus-*": { "input": 5, "output": 25, "cache_read": 0.5, "cache_write": 6.25,
                                 "cache_write_long": 10 },
              "llama*": { "input": 0, "output": 0 }, "//": "the first counts" }
}"""


def brief(value: Any) -> str:
    """A test's name for a parameter that may be long."""
    return repr(value)[:40]


def changed(path: str, value: Any) -> str:
    """FULL_CONFIG's text with one place set to another value."""
    config = json.loads(FULL_CONFIG)
    config["users"]["alice"]["password"] = PASSWORD_HASH
    place = config
    *parents, last = path.split("/")
    for parent in parents:
        place = place[parent]
    place[last] = value
    return json.dumps(config)


def problems(text: str, environ: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(monorelay.ConfigError) as caught:
        monorelay.parse_config(text, {"KEY": "an-access-key-here"} if environ is None else environ)
    return caught.value.problems


def test_config_takes_every_key_of_the_contract():
    monorelay.parse_config(changed("server/port", 8801), {"KEY": "an-access-key-here"})


def test_config_runs_with_next_to_nothing():
    monorelay.parse_config('{"providers": {"echo": {"format": "echo"}}, "routes": {"*": "echo"}}', {})


@hypothesis.given(
    st.integers(0, 70), st.lists(st.integers(0, 70), max_size=20), st.sampled_from([1, 100, 2_000])
)
def test_close_matches_compares_a_bounded_number_of_characters(length, lengths, times):
    compared: list[str] = []

    def get_close_matches(name: str, known: list[str], count: int) -> list[str]:
        compared.extend(known)
        return []

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(monorelay.difflib, "get_close_matches", get_close_matches)
        known = ["x" * other for other in lengths] * times
        assert monorelay.close_matches("x" * length, iter(known), 3) == []
    assert length * sum(map(len, compared)) <= monorelay.COMPARED_PRODUCT
    assert all(len(other) <= monorelay.COMPARED_CHARACTERS for other in compared)
    if sum(lengths) * times * length < monorelay.COMPARED_PRODUCT and length <= monorelay.COMPARED_CHARACTERS:
        assert compared == [other for other in known if len(other) <= monorelay.COMPARED_CHARACTERS], "few are all seen"


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [("chek", ["token", "check"], ["check"]), ("claude-fsat", ["claude-fast"] * 2 + ["gpt"], ["claude-fast"] * 2),
     ("check", ["check" + "x" * 60, "x" * 5000, "checks"], ["checks"]), ("x" * 65, ["x" * 65, "x" * 64], []),
     ("", ["a"], []), ("check", [], []), ("claude-fsat", [f"gpt-{n:06}" for n in range(500)] + ["claude-fast"],
                                           ["claude-fast"])],
    ids=brief,
)  # fmt: skip
def test_close_matches_are_the_best_of_the_short_ones(name, known, expected):
    assert monorelay.close_matches(name, known, 3) == expected


def test_config_reads_the_environment_and_says_what_is_unset():
    (problem,) = problems(changed("server/port", 1234), environ={})
    assert problem.startswith("relay.json: server.access_key") and "KEY" in problem


def test_config_names_the_place_and_what_was_probably_meant():
    text = changed(
        "providers/one",
        {"format": "anthropic", "base_ulr": "https://x.example", "base_url": "https://y.example"},
    )
    assert problems(text) == ["relay.json: providers.one.base_ulr: unknown key, did you mean base_url?"]


def test_config_reports_all_problems_at_once():
    config = json.loads(changed("server/prot", 1))
    config["providers"]["one"]["timeout"] = 0
    config["routes"]["x-*"] = "nobody"
    places = " ".join(problems(json.dumps(config)))
    assert all(
        place in places
        for place in ("server.prot", "did you mean port?", "providers.one.timeout", "routes.x-*")
    )


@pytest.mark.parametrize(
    ("path", "value", "place"),
    [
        ("servre", {}, "servre: unknown key, did you mean server?"),
        ("server", [], "server"),
        ("server/port", "8787", "server.port"),
        ("server/port", True, "server.port"),
        ("server/port", 65536, "server.port"),
        ("server/port", -1, "server.port"),
        ("server/host", 5, "server.host"),
        ("server/workers", 0, "server.workers"),
        ("server/workers", 1.5, "server.workers"),
        ("server/max_body_mb", 0, "server.max_body_mb"),
        ("server/max_upload_mb", -1, "server.max_upload_mb"),
        ("server/max_held_mb", 0, "server.max_held_mb"),
        ("server/max_held_mb", "64", "server.max_held_mb"),
        ("server/max_connections", 0, "server.max_connections"),
        ("server/drain_seconds", 0, "server.drain_seconds"),
        ("server/drain_seconds", -0.5, "server.drain_seconds"),
        ("server/drain_seconds", "30", "server.drain_seconds"),
        ("server/cors_origins", "https://a.example", "server.cors_origins"),
        ("server/cors_origins", [1], "server.cors_origins"),
        ("server/log", "xml", "server.log"),
        ("server/access_key", 12345, "server.access_key"),
        ("server/jwt_secret", "only 31 bytes are not enough...", "server.jwt_secret"),
        ("server/jwt_secret", '"in quotes that docker has kept there"', "server.jwt_secret"),
        ("users", [], "users"),
        ("users/alice/password", "plain", "users.alice.password"),
        ("users/alice/models", "claude-*", "users.alice.models"),
        ("users/alice/requests_per_minute", 0, "users.alice.requests_per_minute"),
        ("users/alice/requests_per_minute", "9", "users.alice.requests_per_minute"),
        ("users/alice/rpm", 9, "users.alice.rpm"),
        ("users/alice/tokens_since", "yesterday", "users.alice.tokens_since"),
        ("users/alice/tokens_since", 1700000000, "users.alice.tokens_since"),
        ("users/alice/tokens_since", "2026-02-30T12:00:00Z", "users.alice.tokens_since"),
        ("providers", [], "providers"),
        *((section, {"": {}}, f"{section}: a name in it is empty") for section in ("users", "providers")),
        *((section, {"": "one"}, f"{section}: a name in it is empty") for section in ("aliases", "routes")),
        ("providers/one", "https://x.example", "providers.one"),
        ("providers/one/format", "antropic", "providers.one.format"),
        ("providers/one/base_url", "one.example", "providers.one.base_url"),
        ("providers/one/base_url", "ftp://one.example", "providers.one.base_url"),
        ("providers/one/base_url", 1, "providers.one.base_url"),
        ("providers/one/base_url", "https://one.example/v1/messages", "must not end in /messages"),
        ("providers/two/base_url", "https://two.example/v1/chat/completions/", "must not end in /chat/completions/"),
        ("providers/one/enabled", "yes", "providers.one.enabled"),
        ("providers/one/timeout", 0, "providers.one.timeout"),
        ("providers/one/timeout", True, "providers.one.timeout"),
        ("providers/one/connect_timeout", -1, "providers.one.connect_timeout"),
        ("providers/one/cooldown", 0, "providers.one.cooldown"),
        ("providers/one/cooldown", None, "providers.one.cooldown"),
        ("providers/one/key_strategy", "stickey", "providers.one.key_strategy"),
        ("providers/one/auth_header", "cookie", "providers.one.auth_header"),
        ("providers/one/headers", ["x"], "providers.one.headers"),
        ("providers/one/headers", {"x-a": "two\r\nx-b: lines"}, "x-a"),
        ("providers/one/headers", {"x a": "1"}, "x a"),
        ("providers/one/keys", "k1", "providers.one.keys"),
        ("providers/one/keys", [7], "providers.one.keys"),
        ("providers/one/keys", ["two\r\nlines"], "providers.one.keys"),
        ("providers/one/keys", [{"label": "x"}], "providers.one.keys"),
        ("providers/one/keys", [{"key": "k", "weight": 0}], "providers.one.keys"),
        ("providers/one/keys", [{"key": "k", "wieght": 2}], "did you mean weight?"),
        ("providers/one/models", "claude-*", "providers.one.models"),
        ("aliases", [], "aliases"),
        ("aliases/fast", 5, "aliases.fast"),
        ("aliases/fast", [], "aliases.fast"),
        ("aliases/fast", "smart", "aliases"),
        ("aliases/fast", "fast", "aliases.fast"),
        ("routes", [], "routes"),
        ("routes/claude-*", "onne", "did you mean one?"),
        ("routes/claude-*", ["one", "three"], "routes.claude-*"),
        ("routes/claude-*", 1, "routes.claude-*"),
        ("users/alice/usd_per_day", 0, "users.alice.usd_per_day"),
        ("users/alice/usd_per_month", "300", "users.alice.usd_per_month"),
        ("users/alice/tokens_per_day", 1.5, "users.alice.tokens_per_day"),
        ("users/alice/viewer", 1, "users.alice.viewer"),
        ("ledger", "usage.db", "ledger: must be an object"),
        ("ledger/path", "", "ledger.path"),
        ("server/access_key", "k" * 8193, "server.access_key"),
        ("ledger/keep_days", 0, "ledger.keep_days"),
        ("ledger/keep", 1, "did you mean keep_days?"),
        ("prices", 5, "prices: must be an object"),
        ("prices/x", [], "prices: x: must be an object"),
        ("prices/x", {"input": 1, "output": 1, "cash_read": 1}, "prices: x.cash_read: unknown key, did you mean cache"),
        ("prices/x", {"input": 1}, "prices: x.output: is missing"),
        ("prices/x", {"input": -1, "output": 1}, "prices: x.input: must be from 0"),
        ("prices/x", {"input": "1", "output": 1}, "prices: x.input: must be a number"),
        ("prices/x", {"input": True, "output": 1}, "prices: x.input: must be a number"),
    ],
)
def test_config_refuses(path, value, place):
    found = problems(changed(path, value))
    assert any(place in problem for problem in found), found
    assert all(problem.startswith("relay.json: ") for problem in found)


@pytest.mark.parametrize("budget", [{"usd_per_day": 1}, {"usd_per_month": 1}, {"tokens_per_day": 1}])
def test_config_refuses_a_budget_that_a_restart_would_forget(budget):
    config = {"users": {"alice": budget}, "providers": {"echo": {"format": "echo"}}, "routes": {"*": "echo"}}
    (problem,) = problems(json.dumps(config))
    assert problem.startswith("relay.json: users.alice: has a budget, which needs the ledger")
    monorelay.parse_config(json.dumps({**config, "ledger": {"path": "usage.db"}}), {})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"server": NaN}', '{"server": {"port": 1, "port": 2}}',
     '{"server": {"drain_seconds": Infinity}}', '{"server": {"drain_seconds": 1e999}}',
     '{"server": {"port": ' + "9" * 5000 + "}}", "[" * 100_000],
    ids=brief,
)  # fmt: skip
def test_config_refuses_what_is_not_plain_json(text):
    assert problems(text)


def test_config_never_prints_a_secret():
    config = json.loads(changed("server/prot", 1))
    config["server"]["jwt_secret"] = "short-jwt-secret"
    config["providers"]["one"]["keys"] = ["sk-live-secret", {"key": "sk-live-secret", "x": 1}]
    text = "\n".join(problems(json.dumps(config)))
    assert "secret" not in text.replace("jwt_secret", "")
    good = monorelay.parse_config(
        changed("providers/one/keys", ["sk-live-secret"]), {"KEY": "an-access-key-here"}
    )
    assert "sk-live-secret" not in repr(good) and "an-access-key-here" not in repr(good)


SALT_AND_DIGEST = f"{'s' * 22}${'d' * 43}"


@pytest.mark.parametrize(
    "cost", ["131072$8$1", "16383$8$1", "0$8$1", "1$8$1", "16384$0$1", "16384$8$0", "16384$99$99"]
)
def test_config_refuses_a_hash_that_the_relay_never_computes(cost):
    (problem,) = problems(changed("users/alice/password", f"scrypt${cost}${SALT_AND_DIGEST}"))
    assert problem.startswith("relay.json: users.alice.password")


def test_config_takes_every_hash_that_it_makes():
    assert PASSWORD_HASH.startswith("scrypt$")
    monorelay.parse_config(changed("users/alice/password", PASSWORD_HASH), {"KEY": "an-access-key-here"})


KNOBS = {"max_tokens_field": "max_tokens", "reasoning": "effort", "reasoning_back": "reasoning", "system_turns": "user",
         "default_max_tokens": 5, "drop": ["seed"], "extra": {"a": {"b": [1]}}}  # fmt: skip


@pytest.mark.parametrize("format", ["openai", "anthropic"])
def test_a_provider_says_how_it_is_translated_for(format):
    def read(**given: Any) -> Any:
        provider = {"format": format, "base_url": "http://127.0.0.1:9/v1", **given}
        return monorelay.parse_config(json.dumps({"providers": {"a": provider}}), {}).providers["a"]

    assert read(translate=False).translate is None
    usual = read().translate
    assert usual == read(translate=True).translate == read(translate={}).translate
    assert usual.system_turns == ("lead" if format == "anthropic" else "keep") and usual.max_tokens_field == "auto"
    given = read(translate=KNOBS).translate._asdict()
    assert given == {**KNOBS, "drop": ("seed",), "extra": json.dumps(KNOBS["extra"])}
    assert hash(read(translate=KNOBS))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("no", "providers.a.translate: must be true, false or an object of settings, not a string"),
        ({"reasonin": "none"}, "providers.a.translate.reasonin: unknown key, did you mean reasoning?"),
        ({"system_turns": "keeps"}, "providers.a.translate.system_turns: must be one of keep, user, lead"),
        ({"default_max_tokens": 0}, "providers.a.translate.default_max_tokens: must be a whole number"),
        ({"drop": "seed"}, 'providers.a.translate.drop: must be a list: write ["seed"]'),
        ({"extra": []}, "providers.a.translate.extra: must be an object, not a list"),
    ],
    ids=brief,
)
def test_what_is_wrong_with_a_translation_is_told_by_its_place(given, problem):
    provider = {"format": "openai", "base_url": "http://127.0.0.1:9/v1", "translate": given}
    with pytest.raises(monorelay.ConfigError) as caught:
        monorelay.parse_config(json.dumps({"providers": {"a": provider}}), {})
    assert [line.startswith(f"relay.json: {problem}") for line in caught.value.problems] == [True], caught.value


# ------------------------------------------------------------------------------------------------------------
# Auth
# ------------------------------------------------------------------------------------------------------------

CLAIMS = {"sub": "alice", "exp": UNIX_TIME + 600, "type": "access"}


def claims(**changes: Any) -> dict[str, Any]:
    """Claims that are valid now, for the tests that go through a relay."""
    return {"sub": "alice", "exp": time.time() + 600, **changes}


def b64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token_of(header: Any, payload: Any, secret: str = JWT_SECRET) -> str:
    """A correctly signed token of any header and payload, given as text or as an object."""
    parts = [
        b64url((part if isinstance(part, str) else json.dumps(part)).encode()) for part in (header, payload)
    ]
    signed = ".".join(parts)
    return f"{signed}.{b64url(hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest())}"


def test_tokens_are_pyjwts_tokens_in_both_directions():
    assert (
        jwt.decode(monorelay.sign_token(CLAIMS, JWT_SECRET), JWT_SECRET, ["HS256"], {"verify_exp": False})
        == CLAIMS
    )
    assert monorelay.verify_token(jwt.encode(CLAIMS, JWT_SECRET, "HS256"), JWT_SECRET, UNIX_TIME) == CLAIMS


def test_token_of_rfc_7515_appendix_a_1():
    token = (
        "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9"
        ".eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
        ".dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
    )
    key = base64.urlsafe_b64decode(
        "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow=="
    ).decode("utf-8", "surrogateescape")
    expected = {"iss": "joe", "exp": 1300819380, "http://example.com/is_root": True}
    assert monorelay.verify_token(token, key, 1300819379) == expected
    with pytest.raises(monorelay.TokenError):
        monorelay.verify_token(token, key, 1300819380 + 61)


HS256 = {"alg": "HS256", "typ": "JWT"}


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"exp": UNIX_TIME + 0.5},
        {"nbf": UNIX_TIME + 59},
        {"iat": UNIX_TIME + 59},
        {"nbf": UNIX_TIME - 1, "iat": UNIX_TIME - 1.5, "other": {"deep": [1]}},
    ],
)
def test_token_is_taken(claims):
    assert (
        monorelay.verify_token(token_of(HS256, {**CLAIMS, **claims}), JWT_SECRET, UNIX_TIME)["sub"] == "alice"
    )


BAD_TOKENS = {
    "alg none": b64url(b'{"alg":"none"}') + "." + b64url(json.dumps(CLAIMS).encode()) + ".",
    "alg none, signed": token_of({"alg": "none"}, CLAIMS),
    "alg in another case": token_of({"alg": "hs256"}, CLAIMS),
    "alg of another strength": jwt.encode(CLAIMS, JWT_SECRET * 2, "HS512"),
    "alg named HS512": token_of({"alg": "HS512"}, CLAIMS),
    "alg missing": token_of({"typ": "JWT"}, CLAIMS),
    "alg twice": token_of('{"alg":"none","alg":"HS256"}', CLAIMS),
    "crit unknown": token_of({**HS256, "crit": ["exp2"], "exp2": 1}, CLAIMS),
    "crit empty": token_of({**HS256, "crit": []}, CLAIMS),
    "header a list": token_of([], CLAIMS),
    "payload a list": token_of(HS256, [CLAIMS]),
    "payload not JSON": token_of(HS256, "{"),
    "payload nested deeply": token_of(HS256, "[" * 100_000),
    "claim twice": token_of(HS256, f'{{"sub":"alice","sub":"root","exp":{UNIX_TIME + 60}}}'),
    "exp missing": token_of(HS256, {"sub": "alice"}),
    "exp past": token_of(HS256, {**CLAIMS, "exp": UNIX_TIME - 61}),
    "exp a string": token_of(HS256, {**CLAIMS, "exp": str(UNIX_TIME + 60)}),
    "exp a bool": token_of(HS256, {**CLAIMS, "exp": True}),
    "exp null": token_of(HS256, {**CLAIMS, "exp": None}),
    "exp NaN": token_of(HS256, '{"sub":"alice","exp":NaN}'),
    "exp infinite": token_of(HS256, '{"sub":"alice","exp":Infinity}'),
    "exp over all floats": token_of(HS256, '{"sub":"alice","exp":1e999}'),
    "exp of 5000 digits": token_of(HS256, '{"sub":"alice","exp":%s}' % ("9" * 5000)),
    "nbf in the future": token_of(HS256, {**CLAIMS, "nbf": UNIX_TIME + 61}),
    "nbf a string": token_of(HS256, {**CLAIMS, "nbf": "0"}),
    "iat in the future": token_of(HS256, {**CLAIMS, "iat": UNIX_TIME + 61}),
    "iat a list": token_of(HS256, {**CLAIMS, "iat": [0]}),
    "another secret": token_of(HS256, CLAIMS, "another secret of 32 bytes or more"),
    "no signature": token_of(HS256, CLAIMS).rpartition(".")[0] + ".",
    "two parts": token_of(HS256, CLAIMS).rpartition(".")[0],
    "four parts": token_of(HS256, CLAIMS) + ".e30",
    "padded": token_of(HS256, CLAIMS) + "=",
    "a space after": token_of(HS256, CLAIMS) + " ",
    "a line end after": token_of(HS256, CLAIMS) + "\n",
    "not ASCII": token_of(HS256, CLAIMS)[:-1] + "é",
    "the other alphabet": token_of(HS256, CLAIMS)[:-1] + "+",
    "empty": "",
    "dots": "..",
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_token_is_refused(name):
    with pytest.raises(monorelay.TokenError):
        monorelay.verify_token(BAD_TOKENS[name], JWT_SECRET, UNIX_TIME)


def test_token_whose_base64_is_another_spelling_of_the_same_bytes_is_refused():
    token = token_of(HS256, CLAIMS)
    alphabet = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
    # The last of 43 characters carries two bits that no byte uses.
    other = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
    assert base64.urlsafe_b64decode(token.split(".")[2] + "=") == base64.urlsafe_b64decode(
        other.split(".")[2] + "="
    )
    with pytest.raises(monorelay.TokenError):
        monorelay.verify_token(other, JWT_SECRET, UNIX_TIME)


def test_every_reason_to_refuse_a_token_has_an_error_of_its_own():
    names = ["exp past", "nbf in the future", "another secret", "alg named HS512"]
    kinds = set()
    for name in names:
        with pytest.raises(monorelay.TokenError) as caught:
            monorelay.verify_token(BAD_TOKENS[name], JWT_SECRET, UNIX_TIME)
        kinds.add(type(caught.value))
    assert len(kinds) == len(names)


@pytest.mark.parametrize("payload", ["{", "[" * 2000, "[]", '{"sub":"alice","sub":"root"}', "7"], ids=brief)
def test_claims_are_read_only_behind_the_signature(payload):
    with pytest.raises(monorelay.BadSignature):
        monorelay.verify_token(token_of(HS256, payload, "another secret of 32 bytes or more"), JWT_SECRET, UNIX_TIME)
    with pytest.raises(monorelay.MalformedToken):
        monorelay.verify_token(token_of(HS256, payload), JWT_SECRET, UNIX_TIME)


def test_a_tokens_header_has_512_characters_at_most():
    def header(characters: int) -> dict[str, Any]:
        bare = len(json.dumps({**HS256, "kid": ""}))
        return {**HS256, "kid": "x" * (characters * 3 // 4 - bare)}

    assert [len(token_of(header(size), CLAIMS).split(".")[0]) for size in (512, 514)] == [512, 514]
    assert monorelay.verify_token(token_of(header(512), CLAIMS), JWT_SECRET, UNIX_TIME) == CLAIMS
    with pytest.raises(monorelay.MalformedToken):
        monorelay.verify_token(token_of(header(514), CLAIMS), JWT_SECRET, UNIX_TIME)


def test_a_token_that_is_longer_than_any_is_refused_before_anything_is_computed(monkeypatch):
    longest = "k" * monorelay.JWT_BYTES
    config = parse({"echo": {}}, server={"access_key": longest, "jwt_secret": JWT_SECRET}, users={"bob": {"key": BOB}})
    assert monorelay.identify([f"{longest}k", longest], config, UNIX_TIME).admin, "the other one may be valid"
    for name in ("is_access_key", "verify_token", "hashlib"):
        monkeypatch.setattr(monorelay, name, None)
    with pytest.raises(monorelay.MalformedToken):
        monorelay.identify([f"{longest}k"] * 2, config, UNIX_TIME)


def test_password_hashes_are_salted_scrypt():
    first, second = monorelay.hash_password("pässword"), monorelay.hash_password("pässword")
    assert first != second and first.startswith("scrypt$")
    assert monorelay.check_password("pässword", first) and monorelay.check_password("pässword", second)
    assert not monorelay.check_password("password", first) and not monorelay.check_password("", first)


@pytest.mark.parametrize("hashed", ["", "scrypt$", "plain", "scrypt$x$y$z$a$b", "md5$1$2"])
def test_password_never_matches_a_malformed_hash(hashed):
    assert not monorelay.check_password("", hashed) and not monorelay.check_password("plain", hashed)


@pytest.mark.parametrize(("count", "length"), [(50_000, 40), (50_000, 1000), (2_000, 16_000)])
@pytest.mark.timed
def test_a_throttle_stays_small_and_quick_whatever_names_are_invented(count, length):
    throttle = monorelay.Throttle()
    numbers = itertools.count()

    def event() -> None:
        throttle.wait_seconds(f"{next(numbers)}".ljust(length, "x"), 10, 0.001 * next(numbers))

    alone = seconds_each(event)
    assert bytes_grown(event, count) < 20 << 20
    # Timed without tracemalloc, which makes whatever allocates slower.
    assert seconds_each(event) < 5 * alone + 50e-6


def test_a_throttle_that_was_filled_with_invented_names_goes_on_to_count():
    throttle = monorelay.Throttle()
    for number in range(12_000):
        throttle.wait_seconds(f"invented{number}", 2, 0)
    waits = [throttle.wait_seconds("alice", 2, second) for second in (1, 2, 3)]
    assert waits[:2] == [0, 0] and 0 < waits[2] <= 60
    assert throttle.wait_seconds("alice", 2, 62) == 0


def shared_throttles(workers: int) -> list[monorelay.SharedThrottle]:
    """One of each worker, in memory that is shared with processes that are forked."""
    cells = memoryview(mmap.mmap(-1, workers * monorelay.SharedThrottle.BYTES)).cast("Q")
    return [monorelay.SharedThrottle(cells, worker) for worker in range(workers)]


events = st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.integers(1, 4), st.sampled_from([0, 1, 20, 59, 60, 61]))


@hypothesis.given(st.lists(events, max_size=60))
def test_a_shared_throttle_is_to_all_workers_what_one_is_to_a_process(events):
    alone, shared, now = monorelay.Throttle(), shared_throttles(3), 100
    for worker, name, limit, pause in events:
        now += pause
        expected = alone.wait_seconds(name, limit, now)
        assert shared[worker].wait_seconds(name, limit, now) == (expected or 0)
        assert {it.left(name, limit, now) for it in shared} == {alone.left(name, limit, now)}


@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 30)), max_size=60))
def test_a_shared_throttle_lets_no_more_through_in_any_minute(events):
    shared, now, passed = shared_throttles(3), 100.0, []
    for worker, pause in events:
        now += pause
        wait = shared[worker].wait_seconds("alice", 3, now)
        if wait:
            assert 0 < wait <= 61 and shared[0].left("alice", 3, now + wait) > 0
        else:
            passed.append(now)
            assert sum(then > now - 60 for then in passed) <= 3


def test_processes_that_race_let_exactly_so_many_through():
    shared, limit = shared_throttles(4), 1000
    ready, gate = os.pipe(), os.pipe()
    for it in shared:
        if not os.fork():
            os.close(gate[1])
            os.read(gate[0], 1)
            passed = sum(not it.wait_seconds("alice", limit, 100 + number / 1000) for number in range(2000))
            os.write(ready[1], struct.pack("I", passed))
            os._exit(0)
    os.close(gate[1])
    os.close(gate[0])
    assert [os.wait()[1] for _ in shared] == [0] * 4
    assert sum(struct.unpack("4I", os.read(ready[0], 16))) == limit
    assert shared[0].left("alice", limit, 102) == 0 and shared[0].left("bob", limit, 102) == limit


def test_names_that_a_shared_throttle_finds_at_one_place_are_counted_apart(monkeypatch):
    monkeypatch.setattr(monorelay.SharedThrottle, "_tag", staticmethod(lambda name: len(name) * 4096 + 4095))
    shared = shared_throttles(2)
    for name, count in (("a", 1), ("bb", 2), ("ccc", 3)):
        for number in range(count):
            assert not shared[number % 2].wait_seconds(name, 9, 100)
    assert [shared[0].left("x" * length, 9, 100) for length in (1, 2, 3, 4)] == [8, 7, 6, 9]


# ------------------------------------------------------------------------------------------------------------
# Routing
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("claude-a", ["claude-a@anthropic", "claude-a@anthropic2"]),
        ("claude-a@anthropic2", ["claude-a@anthropic2"]),
        ("claude-opus-4-5[1m]", ["claude-opus-4-5[1m]@anthropic", "claude-opus-4-5[1m]@anthropic2"]),
        ("claude-a@20250101", ["claude-a@20250101@anthropic", "claude-a@20250101@anthropic2"]),
        ("claude-a@20250101@anthropic2", ["claude-a@20250101@anthropic2"]),
        ("claude-special-1", ["claude-special-1@anthropic", "claude-special-1@anthropic2"]),
        ("gpt-5", ["gpt-5@openai"]),
        ("nothing@openai", ["nothing@openai"]),
        ("one", ["gpt-5@openai"]),
        ("chain", ["gpt-5@openai"]),
        ("list", ["claude-b@anthropic2", "gpt-5@openai", "claude-a@anthropic", "claude-a@anthropic2"]),
        ("claude-alias", ["gpt-5@openai"]),
        ("router/a/b-1", ["a/b-1@openai"]),
        ("router/", None),
        ("router/exactly", ["claude-b@anthropic2"]),
        ("mine-7-x", ["claude-7@anthropic", "claude-7@anthropic2"]),
        ("openai/gpt-x", ["gpt-x@openai"]),
        ("openai/gpt-x[1m]", ["gpt-x@openai"]),
        ("openai/", None),
        ("nobody/gpt-x", None),
        ("one[1m]", ["gpt-5@openai"]),
        ("router/a[1m]", ["a[1m]@openai"]),
        ("loop-a", ["gpt-a@openai"]),
        ("Claude-a", None),
        ("unknown", None),
        ("unknown[1m]", None),
        ("", None),
    ],
)
def test_model_becomes_its_targets_in_order_of_preference(name, expected):
    config = parse(
        {name: {"base_url": "http://127.0.0.1:9"} for name in ("anthropic", "anthropic2", "openai")},
        routes={"claude-*": ["anthropic", "anthropic2"], "claude-special*": "openai", "gpt-*": "openai"},
        aliases={
            "one": "gpt-5",
            "chain": "one",
            "list": ["claude-b@anthropic2", "chain", "claude-a"],
            "claude-alias": "one",
            "router/*": "*@openai",
            "router/exactly": "claude-b@anthropic2",
            "mine-*-x": "claude-*",
            "loop-*": "loop-gpt-*",
            "loop-gpt-*": "gpt-*",
        },
    )
    if expected is None:
        with pytest.raises(monorelay.NotFound):
            monorelay.resolve(config, name)
    else:
        assert [f"{it.model}@{it.provider.name}" for it in monorelay.resolve(config, name)] == expected


@pytest.mark.parametrize(("name", "sent"), [("gpt-5[1m]", "gpt-5"), ("[1m]", "[1m]")])
def test_a_mark_of_anthropics_clients_goes_to_no_provider_of_the_other_format(name, sent):
    config = parse(
        {name: {"base_url": "http://127.0.0.1:9", "keys": ["k"]} for name in ("anthropic", "openai")},
        routes={"*": ["openai", "anthropic"]},
    )
    targets = monorelay.targets_for(config, name, "anthropic", True)
    assert [(it.provider.name, it.model) for it in targets] == [("openai", sent), ("anthropic", name)]
    assert {it.model for it in monorelay.targets_for(config, name, "openai", True)} == {name}


@pytest.mark.parametrize("name", ["opus-4-8[1m]", "what?", "a*b", "[", "[!x]", "x]"])
def test_a_pattern_that_equals_a_name_matches_it_whatever_characters_it_has(name):
    config = parse(
        {"anthropic": {"base_url": "http://127.0.0.1:9", "models": [name]}}, routes={name: "anthropic"}
    )
    assert [it.model for it in monorelay.resolve(config, name)] == [name]
    assert monorelay.matches_any(name, [name])


def test_aliases_with_a_star_lead_nowhere_for_ever():
    config = parse({"openai": {"base_url": "http://127.0.0.1:9"}}, aliases={"x*": ["*", "x-*"]}, routes={"y": "openai"})
    with pytest.raises(monorelay.NotFound):
        monorelay.resolve(config, "x" * 200)
    assert [it.model for it in monorelay.resolve(config, "xy")] == ["y"]
    with pytest.raises(monorelay.ConfigError, match="one \\* at most"):
        parse({"openai": {"base_url": "http://127.0.0.1:9"}}, aliases={"a*b*": "*@openai"})


def test_a_pattern_with_brackets_goes_on_to_be_a_pattern():
    assert monorelay.matches_any("opus-4-8m", ["opus-4-8[1m]"])
    assert not monorelay.matches_any("opus-4-8x", ["opus-4-8[1m]"])


# ------------------------------------------------------------------------------------------------------------
# Key pool
# ------------------------------------------------------------------------------------------------------------


class Pool:
    """A key pool over a provider whose keys k0, k1, ... weigh so much, and a second one with one key."""

    def __init__(self, strategy: str = "fill-first", weights: tuple[int, ...] = (1, 1, 1)) -> None:
        keys = [{"key": f"secret{i}", "label": f"k{i}", "weight": weight} for i, weight in enumerate(weights)]
        common = {"base_url": "http://127.0.0.1:9", "cooldown": 30}
        second = {**common, "keys": [{"key": "other", "label": "other"}]}
        self.config = parse(
            {"anthropic": {**common, "keys": keys, "key_strategy": strategy}, "anthropic2": second}
        )
        self.pool = monorelay.KeyPool(random.Random(1))

    def order(self, now: float = 0, session: str = "s", name: str = "claude-a@anthropic") -> list[Any]:
        return self.pool.order(monorelay.resolve(self.config, name), session, now)

    def labels(self, now: float = 0, session: str = "s", name: str = "claude-a@anthropic") -> str:
        return " ".join(candidate.key.label for candidate in self.order(now, session, name))

    def first(self, **wanted: Any) -> Any:
        return self.order(**wanted)[0]

    def failed(self, candidate: Any, status: int, retry_after: float | None, now: float) -> None:
        self.pool.failed(candidate, status, retry_after, now)

    def succeeded(self, candidate: Any, now: float) -> None:
        self.pool.succeeded(candidate, now)


def test_keys_fill_first_in_the_order_of_the_config():
    assert {Pool().labels(session=str(i)) for i in range(9)} == {"k0 k1 k2"}


def test_keys_take_turns_when_round_robin():
    pool = Pool("round-robin")
    assert Counter(pool.labels()[:2] for _ in range(9)) == {"k0": 3, "k1": 3, "k2": 3}


@pytest.mark.parametrize(
    ("strategy", "weights", "expected"), [("random", (1, 1, 1), 1000), ("weighted", (8, 1, 1), 2400)]
)
def test_keys_are_drawn_as_often_as_they_weigh(strategy, weights, expected):
    pool = Pool(strategy, weights)
    drawn = Counter(pool.labels()[:2] for _ in range(3000))
    assert len(drawn) == 3 and abs(drawn["k0"] - expected) < 150


def test_keys_stick_to_a_session_and_spread_over_sessions():
    pool = Pool("sticky")
    chosen = {session: pool.labels(session=session) for session in map(str, range(60))}
    assert chosen == {session: pool.labels(session=session) for session in chosen}
    assert Counter(order[:2] for order in chosen.values()).keys() == {"k0", "k1", "k2"}


def test_a_sticky_session_moves_only_while_its_own_key_cools():
    pool = Pool("sticky")
    before = {session: pool.labels(session=session)[:2] for session in map(str, range(30))}
    broken = pool.first(session="0")
    pool.failed(broken, 429, 10.0, 0)
    during = {session: pool.labels(1, session)[:2] for session in before}
    assert all(during[session] == key for session, key in before.items() if key != broken.key.label)
    assert broken.key.label not in during.values()
    assert {session: pool.labels(11, session)[:2] for session in before} == before


@pytest.mark.parametrize(
    ("status", "retry_after", "cool_at", "well_at"),
    [
        (429, 7.5, 7, 8),
        (429, None, 29, 31),
        (401, None, 299, 301),
        (402, None, 299, 301),
        (403, None, 0.9, 1.1),
        (500, None, 0.9, 1.1),
        (503, None, 0.9, 1.1),
        (529, None, 0.9, 1.1),
    ],
)
def test_a_failed_key_cools_as_long_as_its_status_says(status, retry_after, cool_at, well_at):
    pool = Pool()
    pool.failed(pool.first(), status, retry_after, 0)
    assert pool.labels(cool_at) == "k1 k2 k0"
    assert pool.labels(well_at) == "k0 k1 k2"


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_bad_request_says_nothing_about_a_key(status):
    pool = Pool()
    pool.failed(pool.first(), status, None, 0)
    assert pool.labels() == "k0 k1 k2"


@pytest.mark.parametrize(
    ("status", "other_model"),
    [(529, "k0 k1 k2"), (403, "k0 k1 k2"), (429, "k0 k1 k2"), (401, "k1 k2 k0"), (402, "k1 k2 k0")],
)
def test_a_limit_or_an_overload_counts_for_the_model_and_a_refused_key_for_all(status, other_model):
    pool = Pool()
    pool.failed(pool.first(), status, None, 0)
    assert pool.labels(0.5) == "k1 k2 k0"
    assert pool.labels(0.5, name="claude-b@anthropic") == other_model


def test_repeated_overloads_double_the_cooling_up_to_cooldown_and_a_success_clears_it():
    pool, now, seen = Pool(weights=(1, 1)), 0.0, []
    for _ in range(7):
        candidate = next(it for it in pool.order(now) if it.key.label == "k0")
        pool.failed(candidate, 529, None, now)
        step = next(seconds for seconds in range(1, 99) if pool.labels(now + seconds + 0.01) == "k0 k1")
        seen.append(step)
        now += step + 0.02
    assert seen == [1, 2, 4, 8, 16, 30, 30]
    pool.succeeded(candidate, now)
    pool.failed(candidate, 529, None, now)
    assert pool.labels(now + 1.01) == "k0 k1"


@pytest.mark.parametrize("status", [429, 403, 500, 529])
def test_success_ends_the_cooling_that_no_retry_after_asked_for(status):
    pool = Pool()
    candidate = pool.first()
    pool.failed(candidate, status, None, 0)
    assert pool.labels(0.5) == "k1 k2 k0"
    pool.succeeded(candidate, 0.5)
    assert pool.labels(0.5) == "k0 k1 k2"


def test_when_all_keys_cool_the_one_back_soonest_comes_first():
    pool = Pool()
    for candidate, seconds in zip(pool.order(), (30.0, 10.0, 20.0)):
        pool.failed(candidate, 429, seconds, 0)
    assert pool.labels(1) == "k1 k2 k0"


def test_a_lone_key_is_never_banned():
    pool = Pool(weights=(1,))
    pool.failed(pool.first(), 401, None, 0)
    assert pool.labels(1) == "k0"


def test_an_unreachable_provider_lets_the_next_target_go_first():
    pool = Pool()
    assert pool.labels(name="claude-a") == "k0 k1 k2 other"
    pool.pool.unreachable(pool.first(), 0)
    assert pool.labels(0.5, name="claude-a").startswith("other")
    pool.succeeded(pool.first(now=0.5), 0.5)
    assert pool.labels(0.5, name="claude-a") == "k0 k1 k2 other"


def test_a_429_leaves_the_key_to_other_models_and_waits_for_its_own_time():
    pool = Pool()
    candidate = pool.first()
    pool.failed(candidate, 429, 3600.0, 0)
    assert pool.labels(1) == "k1 k2 k0" and pool.labels(1, name="claude-b@anthropic") == "k0 k1 k2"
    pool.succeeded(pool.first(now=1, name="claude-b@anthropic"), 1)
    assert pool.labels(3599) == "k1 k2 k0"
    pool.succeeded(candidate, 2)
    assert pool.labels(3599) == "k1 k2 k0", "a request that was under way says nothing about the limit"
    assert pool.labels(3601) == "k0 k1 k2"


def test_a_success_ends_what_its_own_model_had_and_no_other():
    pool = Pool()
    overloaded, other = pool.first(), pool.first(name="claude-b@anthropic")
    for candidate in (overloaded, other):
        pool.failed(candidate, 529, None, 0)
    pool.succeeded(overloaded, 0.1)
    assert pool.labels(0.5) == "k0 k1 k2" and pool.labels(0.5, name="claude-b@anthropic") == "k1 k2 k0"


@pytest.mark.parametrize(("count", "length"), [(30_000, 20), (12_000, 256)])
@pytest.mark.parametrize("status", [429, 529])
@pytest.mark.timed
def test_what_a_pool_remembers_is_bounded_whatever_models_are_invented(status, count, length):
    pool = Pool()
    provider = pool.first().target.provider
    numbers = itertools.count()

    def fail() -> None:
        number = next(numbers)
        target = monorelay.Target(provider, f"claude-{number}".ljust(length, "x"))
        pool.failed(monorelay.Candidate(target, provider.keys[0]), status, 3600.0, 0.001 * number)

    alone = seconds_each(fail)
    assert bytes_grown(fail, count) < 20 << 20
    assert seconds_each(fail) < 5 * alone + 50e-6
    assert len(pool.pool._cooling) <= 10_000


def others_view(it: Pool, now: float) -> Pool:
    """A second worker's pool, which has taken over what the first one shares."""
    other = Pool()
    other.pool.adopt(json.loads(json.dumps(it.pool.shared(now))))
    return other


def test_what_cools_in_one_worker_cools_in_another_until_it_recovers_there():
    it = Pool()
    it.failed(it.first(), 429, 20, now=100)
    other = others_view(it, 100)
    assert other.labels(101) == it.labels(101) == "k1 k2 k0" and other.labels(121) == "k0 k1 k2"
    it.failed(it.first(), 500, None, now=100)
    other.pool.adopt(it.pool.shared(100.5))
    it.succeeded(it.order(100.5)[1], now=100.5)
    assert other.labels(100.6) != it.labels(100.6)
    other.pool.adopt(it.pool.shared(100.6))
    assert other.labels(100.6) == it.labels(100.6) == "k1 k2 k0"


def test_of_two_workers_views_the_later_one_holds():
    first, second = Pool(), Pool()
    first.failed(first.first(), 429, 50, now=100)
    second.failed(second.first(), 429, 10, now=105)
    first.pool.adopt(second.pool.shared(105))
    second.pool.adopt(first.pool.shared(105))
    assert first.labels(116) == second.labels(116) == "k0 k1 k2"
    second.pool.adopt([[["anthropic", "x", "m"], 1e9, 1, True, "429", 99.0, 0.0]])
    assert len(second.pool._cooling) == 2


def test_what_has_recovered_is_forgotten_when_nobody_takes_it_for_cooling_any_more():
    it = Pool()
    it.failed(it.first(), 500, None, now=100)
    it.succeeded(it.order(100)[-1], now=100.2)
    assert [shared[1] for shared in it.pool.shared(100.5)] == [0.0] and it.pool.shared(101.5) == []
    it.pool.forget(100.5)
    assert it.pool._cooling
    it.pool.forget(101.5)
    assert not it.pool._cooling


def test_whole_keys_are_shared_before_the_models_that_clients_invent():
    it = Pool()
    for number in range(1000):
        it.failed(it.first(name=f"{number}{'x' * 100}@anthropic"), 429, 500, now=100 + number / 1000)
    it.failed(it.first(name="claude-a@anthropic"), 401, None, now=100)
    it.pool.unreachable(it.order(name="x@anthropic2")[0], now=100)
    shared = it.pool.shared(100.5)
    assert len(shared) == monorelay.SHARED_COOLING and [len(entry[0]) for entry in shared[:3]] == [1, 2, 3]
    assert shared[2][0][2].startswith("999")
    for odd in ("x" * 200, "\U0001f600" * 40):
        it.failed(it.first(name=f"{odd}@anthropic"), 429, 500, now=102)
    assert it.pool.shared(102)[1][0][2].startswith("999")


KEY_LIMITS = {"anthropic-ratelimit-requests-limit": "50", "anthropic-ratelimit-requests-remaining": "40",
           "anthropic-ratelimit-requests-reset": "2023-11-14T22:14:20Z"}  # fmt: skip


def key_documents(it: Pool, clock: float = UNIX_TIME, now: float = 100.0) -> list[dict[str, Any]]:
    records = {name: monorelay.record_document(record) for name, record in it.pool.records.items()}
    return monorelay.key_states(
        it.config.providers.values(), it.pool, records, now, clock
    )


def test_how_a_key_is_says_what_it_has_met_and_what_is_left():
    it = Pool()
    first, second, _ = it.order()
    other = it.first(name="claude-a@anthropic2")
    for _ in range(3):
        it.pool.note(first, "ok", UNIX_TIME)
    it.pool.note(first, "429", UNIX_TIME - 3600)
    it.pool.note(first, "429", UNIX_TIME - 7200)
    it.failed(first, 429, 30, now=100)
    it.pool.note(second, "401", UNIX_TIME)
    it.failed(second, 401, None, now=100)
    it.pool.unreachable(other, now=100)
    fields = monorelay.Headers([(name, value) for name, value in KEY_LIMITS.items()])
    it.pool.note_limits(first, fields, UNIX_TIME)
    keys = {(key["provider"], key["key"]): key for key in key_documents(it)}
    assert list(keys) == [("anthropic", "k0"), ("anthropic", "k1"), ("anthropic", "k2"), ("anthropic2", "other")]
    k0 = keys["anthropic", "k0"]
    assert (k0["state"], k0["for"], k0["why"], k0["models"]) == ("cooling", 30.0, "429", ["claude-a"])
    assert k0["failed"][1] == "429" and k0["limits"] == [
        {
            "limit": "requests",
            "used": pytest.approx(0.2),
            "left": 40,
            "of": 50,
            "reset": UNIX_TIME + 60,
            "at": UNIX_TIME,
        }
    ]
    k1 = keys["anthropic", "k1"]
    assert (k1["state"], k1["for"], k1["why"], k1["models"]) == ("cooling", 300.0, "401", None)
    assert (k1["requests"], k1["errors"], k1["failed"]) == (1, 1, (UNIX_TIME, "401"))
    assert keys["anthropic", "k2"]["state"] == "ok" and keys["anthropic", "k2"]["requests"] == 0
    assert keys["anthropic2", "other"]["why"] == "no connection" and keys["anthropic2", "other"]["models"] is None
    later = {(key["provider"], key["key"]): key for key in key_documents(it, UNIX_TIME + 61, 131)}
    assert later["anthropic", "k0"]["limits"] == [] and later["anthropic", "k0"]["state"] == "ok"
    assert key_documents(it, UNIX_TIME + 3 * 3600)[0]["requests"] == 0


def test_keys_that_are_missing_the_clients_own_or_built_in_say_so():
    config = parse(
        {
            "anthropic": {"base_url": "http://127.0.0.1:9", "keys": []},
            "openai": {"base_url": "http://127.0.0.1:9/v1", "keys": "client"},
            "anthropic2": {"base_url": "http://127.0.0.1:9", "enabled": False},
            "echo": {},
        }
    )
    states = monorelay.key_states(config.providers.values(), Pool().pool, {}, 0.0, UNIX_TIME)
    assert [(key["provider"], key["key"], key["state"], key["why"]) for key in states] == [
        ("anthropic", "", "missing", "set a key for anthropic"),
        ("openai", "", "client", None),
        ("echo", "", "echo", None),
    ]
    assert all(
        set(key)
        == {"provider", "key", "state", "for", "why", "models", "requests", "errors", "failed", "answered", "limits",
            "outcomes"}
        for key in states
    )


def test_what_several_workers_know_of_a_key_is_one():
    pools = [Pool(), Pool(), Pool()]
    for number, it in enumerate(pools):
        it.pool.note(it.first(), "ok", UNIX_TIME)
        it.pool.note(it.first(), f"50{number}", UNIX_TIME + number)
        told = [("x-ratelimit-limit-tokens", "10"), ("x-ratelimit-remaining-tokens", str(10 - number))]
        it.pool.note_limits(it.first(), monorelay.Headers(told), UNIX_TIME + number)
    own, *others = (monorelay.record_document(it.pool.records["anthropic", "k0"]) for it in pools)
    joined = monorelay.joined_records([own, *map(json.loads, map(json.dumps, others))])
    assert joined["hours"] == [[int(UNIX_TIME // 3600), 6, 3]]
    assert list(joined["failed"]) == [UNIX_TIME + 2, "502"] and joined["answered"] == UNIX_TIME
    assert [round(limit["used"], 6) for limit in joined["limits"]] == [0.2]


def test_what_is_remembered_of_a_key_is_bounded_whatever_its_provider_tells():
    it = Pool()
    candidate = it.first()

    def told(number: int) -> None:
        kind = f"{number:x}".translate(str.maketrans("0123456789", "ghijklmnop"))
        fields = {f"anthropic-ratelimit-x-{kind}-{n}-utilization": "0.5" for n in range(200)}
        it.pool.note_limits(candidate, monorelay.Headers([*fields.items()]), UNIX_TIME + number)
        it.pool.note(candidate, "ok", UNIX_TIME + number * 3600)

    for number in range(100):
        told(number)
    record = it.pool.records["anthropic", "k0"]
    assert len(monorelay.limit_fields(record.limits_told)) == monorelay.RATE_LIMIT_FIELDS and len(record.hours) == 2
    assert record.limits_at == UNIX_TIME + 99


# ------------------------------------------------------------------------------------------------------------
# Ledger rules
# ------------------------------------------------------------------------------------------------------------

KINDS = ("input", "cache_read", "cache_write", "cache_write_long", "output")
# In the form of LiteLLM's list, with numbers that are on the providers' own pages.
LITELLM_PRICES = {
    "sample_spec": {"input_cost_per_token": 0.0, "litellm_provider": "one of https://docs.litellm.ai/docs/providers"},
    "claude-sonnet": {
        "litellm_provider": "anthropic", "input_cost_per_token": 3e-06, "output_cost_per_token": 1.5e-05,
        "cache_creation_input_token_cost": 3.75e-06, "cache_creation_input_token_cost_above_1hr": 6e-06,
        "cache_read_input_token_cost": 3e-07, "input_cost_per_token_above_200k_tokens": 6e-06,
        "output_cost_per_token_above_200k_tokens": 2.25e-05, "cache_read_input_token_cost_above_200k_tokens": 6e-07,
        "cache_creation_input_token_cost_above_200k_tokens": 7.5e-06, "some_field_of_tomorrow": {"a": ["b"]},
        "search_context_cost_per_query": {"search_context_size_low": 0.01},
    },
    "claude-opus": {
        "litellm_provider": "anthropic", "input_cost_per_token": 5e-06, "output_cost_per_token": 2.5e-05,
        "cache_creation_input_token_cost": 6.25e-06, "cache_creation_input_token_cost_above_1hr": 1e-05,
        "cache_read_input_token_cost": 5e-07, "input_cost_per_token_batches": 2.5e-06,
        "output_cost_per_token_batches": 1.25e-05, "cache_read_input_token_cost_batches": 2.5e-07,
        "cache_read_input_audio_token_cost": "no text", "provider_specific_entry": {"us": 1.1, "fast": 2.0, "x": "y"},
    },
    "claude-haiku": {
        "litellm_provider": "anthropic", "input_cost_per_token": 1e-06, "output_cost_per_token": 5e-06,
        "cache_read_input_token_cost": None,
    },
    "gpt-5": {
        "litellm_provider": "openai", "input_cost_per_token": 1.25e-06, "output_cost_per_token": 1e-05,
        "cache_read_input_token_cost": 1.25e-07, "input_cost_per_token_flex": 6.25e-07,
        "output_cost_per_token_flex": 5e-06, "cache_read_input_token_cost_flex": 6.25e-08,
        "provider_specific_entry": ["not", "an", "object"],
    },
    "gpt-5.4": {
        "litellm_provider": "openai", "input_cost_per_token": 2.5e-06, "output_cost_per_token": 1.5e-05,
        "cache_read_input_token_cost": 2.5e-07, "input_cost_per_token_above_272k_tokens": 5e-06,
        "output_cost_per_token_above_272k_tokens": 2.25e-05, "cache_read_input_token_cost_above_272k_tokens": 5e-07,
        "input_cost_per_token_priority": 5e-06, "output_cost_per_token_priority": 3e-05,
    },
    "gpt-5.6": {
        "litellm_provider": "openai", "input_cost_per_token": 4e-06, "output_cost_per_token": 2e-05,
        "cache_read_input_token_cost": 4e-07, "cache_creation_input_token_cost": 5e-06,
        "cache_creation_input_token_cost_above_12hr": 1e-05,
        "cache_creation_input_token_cost_above_12hr_above_272k_tokens": 2e-05,
        "input_cost_per_token_above_272k_tokens": 8e-06,
    },
    "second/llama": {"litellm_provider": "second", "input_cost_per_token": 0, "output_cost_per_token": 0.0},
    "a-painter": {"litellm_provider": "openai", "output_cost_per_image": 0.04, "output_cost_per_token": 1e-05},
}  # fmt: skip
PRICED = {"anthropic": {"base_url": "http://127.0.0.1:9"}, "openai": {"base_url": "http://127.0.0.1:9"},
          "second": {"format": "openai", "base_url": "http://127.0.0.1:9/v1"}}  # fmt: skip


def used(input: int, read: int = 0, write: int = 0, long: int = 0, output: int | None = 0, **rest: Any) -> Any:
    return monorelay.Used(input, read, write, long, output, **rest)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        # Anthropic: what a cache gave or took isn't in input_tokens.
        ({"input_tokens": 3, "cache_creation_input_tokens": 12304, "cache_read_input_tokens": 0, "output_tokens": 550},
         (3, 0, 12304, 0, 550)),
        ({"input_tokens": 3, "cache_creation_input_tokens": 300, "cache_read_input_tokens": 70, "output_tokens": 5,
          "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200}},
         (3, 70, 100, 200, 5)),
        # A stream's message_start split its 3068, and message_delta has the total of 3337.
        ({"input_tokens": 3, "cache_creation_input_tokens": 3337, "output_tokens": 5,
          "cache_creation": {"ephemeral_5m_input_tokens": 3068, "ephemeral_1h_input_tokens": 0}}, (3, 0, 3337, 0, 5)),
        ({"input_tokens": 3, "cache_creation_input_tokens": 3337, "output_tokens": 5,
          "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 3068}}, (3, 0, 269, 3068, 5)),
        ({"input_tokens": 3, "cache_creation_input_tokens": 3000, "output_tokens": 5,
          "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 3068}}, (3, 0, 0, 3000, 5)),
        ({"input_tokens": 3, "cache_creation": {"ephemeral_5m_input_tokens": 1, "ephemeral_1h_input_tokens": 2},
          "cache_creation_input_tokens": None}, (3, 0, 1, 2, 0)),
        ({"cache_creation": {"ephemeral_1h_input_tokens": 2}}, (0, 0, 0, 2, 0)),
        # OpenAI, chat: all of it is in prompt_tokens.
        ({"prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306,
          "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
          "completion_tokens_details": {"reasoning_tokens": 200}}, (86, 1920, 0, 0, 300)),
        ({"prompt_tokens": 5, "total_tokens": 5}, (5, 0, 0, 0, 0)),
        ({"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": None}, (5, 0, 0, 0, 1)),
        ({"prompt_tokens": 100, "completion_tokens": 1, "prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36},
         (36, 64, 0, 0, 1)),
        ({"prompt_tokens": 100, "completion_tokens": 1, "cached_tokens": 60}, (40, 60, 0, 0, 1)),
        # A gateway that speaks OpenAI's format and tells Anthropic's figures, too.
        ({"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 60},
          "cache_read_input_tokens": 60, "cache_creation_input_tokens": 30}, (10, 60, 30, 0, 1)),
        # OpenAI, Responses.
        ({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}, "output_tokens": 7,
          "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 107}, (40, 60, 0, 0, 7)),
        ({"input_tokens": 1000, "output_tokens": 7, "input_tokens_details": {
            "cached_tokens": 600, "cache_write_tokens": 300, "cache_write_tokens_details": {"ttl_12h_tokens": 100}}},
         (100, 600, 200, 100, 7)),
        # More was read than there was.
        ({"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": 6**9}},
         (0, 10, 0, 0, 1)),
        # What is no count is as if not named.
        ({"input_tokens": True, "output_tokens": "5", "cache_read_input_tokens": -1}, (None,) * 5),
        ({"input_tokens": 4, "output_tokens": 10**12 + 1, "cache_read_input_tokens": 1.5}, (4, 0, 0, 0, 0)),
        ({"input_tokens": 10**12, "output_tokens": 1, "cache_creation": "5m"}, (10**12, 0, 0, 0, 1)),
        ({}, (None,) * 5), (None, (None,) * 5), ([1], (None,) * 5), ("usage", (None,) * 5),
    ],
    ids=brief,
)  # fmt: skip
def test_the_kinds_of_tokens_are_disjoint_in_either_format(usage, expected):
    assert monorelay.used_of(usage)[:5] == expected


@pytest.mark.parametrize(
    ("usage", "beside", "expected"),
    [
        ({"service_tier": "standard", "speed": "standard"}, "", ("", "", "", 0)),
        ({"service_tier": "batch", "speed": "fast", "inference_geo": "us"}, "priority", ("batch", "fast", "us", 0)),
        ({}, "priority", ("priority", "", "", 0)),
        ({}, "default", ("", "", "", 0)),
        ({"service_tier": None, "server_tool_use": {"web_search_requests": 3}}, "flex", ("flex", "", "", 3)),
        ({"service_tier": "x" * 33, "speed": "two words", "inference_geo": 5, "server_tool_use": [3]}, "ü",
         ("", "", "", 0)),
    ],
    ids=brief,
)  # fmt: skip
def test_the_tier_speed_and_place_are_told_where_they_are_not_the_usual_ones(usage, beside, expected):
    found = monorelay.used_of({"input_tokens": 1, **usage}, beside)
    assert (found.tier, found.speed, found.geo, found.web_searches) == expected


def test_iterations_are_kept_with_their_models_beside_the_totals():
    usage = {
        "input_tokens": 3, "output_tokens": 550, "service_tier": "priority", "iterations": [
            {"type": "message", "input_tokens": 1, "output_tokens": 50, "cache_read_input_tokens": 9},
            {"type": "advisor_message", "model": "claude-opus", "input_tokens": 2, "output_tokens": 500},
            {"type": "compaction", "input_tokens": 4, "output_tokens": 6, "model": "x" * 257},
            "nonsense", {"type": "message"},
        ],
    }  # fmt: skip
    found = monorelay.used_of(usage)
    assert found[:5] == (3, 0, 0, 0, 550)
    assert [(model, step[:5], step.tier) for model, step in found.iterations] == [
        ("", (1, 9, 0, 0, 50), "priority"),
        ("claude-opus", (2, 0, 0, 0, 500), "priority"),
        ("", (4, 0, 0, 0, 6), "priority"),
    ]  # fmt: skip
    assert monorelay.used_of({**usage, "iterations": usage["iterations"] * 21}).iterations == ()


USAGE_NAMES = [
    "input_tokens", "output_tokens", "prompt_tokens", "completion_tokens", "cache_read_input_tokens", "cached_tokens",
    "cache_creation_input_tokens", "cache_creation", "ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens",
    "prompt_tokens_details", "input_tokens_details", "cache_write_tokens", "cache_write_tokens_details",
    "ttl_12h_tokens", "service_tier", "speed", "inference_geo", "server_tool_use", "web_search_requests", "iterations",
    "model", "prompt_cache_hit_tokens",
]  # fmt: skip
ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40) | st.integers(0, 10**13),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(USAGE_NAMES), inner, max_size=8),
    max_leaves=30,
)
COUNTS = st.integers(0, 10**12)


@hypothesis.settings(max_examples=200)
@hypothesis.given(st.dictionaries(st.sampled_from(USAGE_NAMES), ANY_JSON, max_size=12) | ANY_JSON, ANY_JSON)
def test_whatever_a_provider_calls_its_usage_is_read_without_a_fault(usage, beside):
    found = monorelay.used_of(usage, beside)
    for step in (found, *(step for _, step in found.iterations)):
        assert len({count is None for count in step[:5]}) == 1, "all kinds are known, or none"
        assert all(type(count) is int and 0 <= count <= 2 * 10**12 for count in step[:5] if count is not None)
        assert all(isinstance(word, str) and len(word) <= 32 for word in (step.tier, step.speed, step.geo))
    nano_usd = cost("openai", "gpt-5.4", found)
    assert nano_usd is None or (type(nano_usd) is int and 0 <= nano_usd <= monorelay.COST_NANO_USD)


@hypothesis.given(COUNTS, COUNTS, COUNTS, COUNTS, COUNTS)
def test_openais_total_is_the_sum_of_its_kinds_and_anthropics_parts_stay_as_they_are(total, read, write, long, output):
    details = {"cached_tokens": read, "cache_write_tokens": write}
    details["cache_write_tokens_details"] = {"ttl_12h_tokens": long}
    chat = {"prompt_tokens": total, "completion_tokens": output, "prompt_tokens_details": details}
    responses = {"input_tokens": total, "output_tokens": output, "input_tokens_details": details}
    found = monorelay.used_of(chat)
    assert found == monorelay.used_of(responses) and sum(found[:4]) == total and found.output == output
    split = {"ephemeral_5m_input_tokens": max(0, write - long), "ephemeral_1h_input_tokens": long}
    anthropic_usage = {"input_tokens": total, "cache_read_input_tokens": read, "cache_creation_input_tokens": write,
                       "output_tokens": output, "cache_creation": split}  # fmt: skip
    found = monorelay.used_of(anthropic_usage)
    assert (found.input, found.cache_read, found.output) == (total, read, output)
    assert found.cache_write + found.cache_write_long == write and found.cache_write_long == min(long, write)


def cost(provider: str, model: str, tokens: Any, prices: Any = LITELLM_PRICES) -> int | None:
    """What it costs in 10^-9 USD."""
    return monorelay.cost_of(monorelay.parse_prices(prices), parse(PRICED).providers[provider], model, tokens)


@pytest.mark.parametrize(
    ("provider", "model", "tokens", "nano_usd"),
    [
        # A bill of Anthropic's: $0.04614 for the writes, $0.00825 for the output.
        ("anthropic", "claude-sonnet", used(3, write=12304, output=550), 54_399_000),
        ("anthropic", "claude-sonnet-20250219", used(3, write=12304, output=550), 54_399_000),
        ("anthropic", "claude-sonnet@20250219", used(0, output=1), 15_000),
        ("anthropic", "claude-sonnet-2025021", used(0, output=1), None),
        ("openai", "gpt-5", used(86, read=1920, output=300), 86 * 1250 + 1920 * 125 + 300 * 10_000),
        ("openai", "gpt-5-2025-08-07", used(86, read=1920, output=300), 86 * 1250 + 1920 * 125 + 300 * 10_000),
        # The size of the prompt, with what was read and written, picks the tier of the whole request.
        ("openai", "gpt-5.4", used(200_000, read=100_000, output=1000), 200_000 * 5000 + 100_000 * 500 + 1000 * 22_500),
        ("openai", "gpt-5.4", used(272_000, output=1000), 272_000 * 2500 + 1000 * 15_000),
        ("openai", "gpt-5.4", used(272_001, output=1000), 272_001 * 5000 + 1000 * 22_500),
        ("anthropic", "claude-sonnet", used(1, read=199_998, write=1, long=1), 6000 + 199_998 * 600 + 7500 + 12_000),
        ("anthropic", "claude-sonnet", used(0, read=199_998, write=1, long=1), 199_998 * 300 + 3750 + 6000),
        # Service tiers; where one and the size aren't given together, the dearer one.
        ("openai", "gpt-5", used(86, read=1920, output=300, tier="flex"), 86 * 625 + 120_000 + 300 * 5000),
        ("openai", "gpt-5", used(86, output=300, tier="scale"), 86 * 1250 + 300 * 10_000),
        ("openai", "gpt-5.4", used(300_000, read=1, output=1, tier="priority"), 300_000 * 5000 + 500 + 30_000),
        ("anthropic", "claude-opus", used(2, read=1, output=4, tier="batch"), 5000 + 250 + 50_000),
        # The batch rates of writes aren't listed: they are in the proportion of the input's.
        ("anthropic", "claude-opus", used(0, write=4, long=2, tier="batch"), 12_500 + 10_000),
        ("openai", "gpt-5.6", used(1, read=2, write=4, long=8, output=3), 4000 + 800 + 20_000 + 80_000 + 60_000),
        ("openai", "gpt-5.6", used(272_000, long=1), 272_000 * 8000 + 20_000),
        # Speed, place, web searches.
        ("anthropic", "claude-opus", used(10, output=1, speed="fast"), 150_000),
        ("anthropic", "claude-opus", used(10, output=1, geo="us"), 82_500),
        ("anthropic", "claude-opus", used(10, output=1, speed="fast", geo="us", web_searches=2), 165_000 + 20_000_000),
        ("anthropic", "claude-opus", used(10, output=1, speed="slow", geo="global"), 75_000),
        # What a list leaves out has the usual proportion of the format.
        ("anthropic", "claude-haiku", used(1, read=10, write=4, long=2, output=1), 1000 + 1000 + 5000 + 4000 + 5000),
        ("openai", "claude-haiku", used(1, read=10, write=4, long=2, output=1), 1000 + 10_000 + 5000 + 5000 + 5000),
        # By the provider's name and the model's; free is a price, too.
        ("second", "llama", used(1000, output=1000), 0),
        ("openai", "llama", used(1000, output=1000), None),
        ("openai", "sample_spec", used(1), None),
        ("openai", "a-painter", used(1, output=1), None),
        # Nothing was told, or only a part of it.
        ("openai", "gpt-5", monorelay.Used(), None),
        ("openai", "gpt-5", used(8, output=None), 10_000),
        # Other models' iterations at their own price; all must have one.
        ("anthropic", "claude-sonnet", used(3, output=550, iterations=(
            ("", used(1, output=50)), ("claude-opus", used(2, output=500)), ("", used(100, output=10)))),
         3000 + 750_000 + 10_000 + 12_500_000 + 300_000 + 150_000),
        ("anthropic", "claude-sonnet", used(3, output=5, iterations=(("unknown", used(1)),)), None),
        ("openai", "gpt-5", used(10**12, output=10**12), None),
    ],
    ids=brief,
)  # fmt: skip
def test_a_cost_is_what_the_bill_says(provider, model, tokens, nano_usd):
    assert cost(provider, model, tokens) == nano_usd


def test_prices_by_pattern_are_usd_per_million_and_the_first_match_counts():
    prices = {"//": "mine", "claude-opus-4-1*": {"input": 15, "output": 75}, "claude-*": {"input": 3, "output": 15,
              "cache_read": 0, "cache_write": 3.75}, "second/llama*": {"input": 0.1, "output": 0.3, "//": "guessed"},
              "gpt-[5]": {"input": 1.25, "output": 10}, "odd[1": {"input": 1, "output": 2}}  # fmt: skip
    assert cost("anthropic", "claude-opus-4-1-x", used(1, read=10, output=1), prices) == 15_000 + 15_000 + 75_000
    assert cost("anthropic", "claude-new", used(1, read=10, write=4, long=1), prices) == 3000 + 15_000 + 6000
    assert cost("second", "llama-4", used(1, read=1, output=1), prices) == 100 + 100 + 300
    assert cost("openai", "llama-4", used(1), prices) is None
    assert cost("openai", "gpt-5", used(4, output=1), prices) == 15_000
    assert cost("openai", "odd[1", used(1), prices) == 1000
    assert monorelay.cost_of(None, parse(PRICED).providers["openai"], "gpt-5", used(1)) is None


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(st.decimals(0, 1000, places=7) | st.integers(0, 1000), min_size=5, max_size=5),
    st.lists(st.integers(0, 10**8), min_size=5, max_size=5),
)
def test_a_cost_is_exact_to_the_unit_whatever_the_price(rates, counts):
    prices = {"m": {kind: json.loads(str(rate)) for kind, rate in zip(KINDS, rates)}}
    exact = sum(fractions.Fraction(rate) * 1000 * count for rate, count in zip(rates, counts))
    assert cost("openai", "m", monorelay.Used(*counts), prices) == math.floor(exact + fractions.Fraction(1, 2))


@hypothesis.given(st.decimals(0, 1, places=13) | st.floats(1e-12, 1.0))
def test_a_price_is_the_number_as_it_is_written(value):
    number = json.loads(str(value))
    assert fractions.Fraction(monorelay.exact(number), 10**30) == fractions.Fraction(str(number))


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ([], "must be an object"), ("https://example.org", "must be an object"),
        ({"gpt-5": {"litellm_provider": "openai", "input_cost_per_token": "1"}}, "gpt-5.input_cost_per_token: must be"),
        ({"gpt-5": {"litellm_provider": "x", "output_cost_per_token_flex": -1}}, "gpt-5.output_cost_per_token_flex"),
        ({"gpt-5": {"input_cost_per_token": 1.5}}, "gpt-5.input_cost_per_token: must be from 0 to 1 USD"),
        ({"gpt-5": {"input_cost_per_token": 10**400}}, "gpt-5.input_cost_per_token: must be a number of a sensible"),
        ({"gpt-5": {"input_cost_per_token": 1}, "x": 1}, "x: must be an object of prices, not a number"),
        ({"openai": {"models": {}}}, "openai.models: unknown key"),
    ],
    ids=brief,
)  # fmt: skip
def test_a_broken_price_list_names_the_place(document, place):
    with pytest.raises(ValueError, match=f"^{re.escape(place)}"):
        monorelay.parse_prices(document)


@pytest.mark.parametrize(
    ("now", "expected", "day_ends", "month_ends"),
    [
        ("2026-11-26T12:00:00", ("2026-11-26", "2026-11"), "2026-11-27", "2026-12-01"),
        ("2026-12-31T23:59:59", ("2026-12-31", "2026-12"), "2027-01-01", "2027-01-01"),
        ("2028-02-28T00:00:00", ("2028-02-28", "2028-02"), "2028-02-29", "2028-03-01"),
    ],
)
def test_budgets_are_for_days_and_months_in_utc(now, expected, day_ends, month_ends):
    found = monorelay.windows(timestamp(now))
    assert found == expected
    assert monorelay.window_end(found[0]) == timestamp(f"{day_ends}T00:00:00")
    assert monorelay.window_end(found[1]) == timestamp(f"{month_ends}T00:00:00")


def timestamp(text: str) -> float:
    """The seconds since 1970 of a time in UTC."""
    return datetime.datetime.fromisoformat(f"{text}+00:00").timestamp()


@pytest.mark.parametrize(
    ("spent", "told", "until"),
    [
        ({}, None, None),
        ({"2026-11-26": (20 * 10**9 - 1, 4_999_999), "2026-11": (300 * 10**9 - 1, 0)}, None, None),
        ({"2026-11-26": (20 * 10**9, 0)}, "alice has spent $20.00 of $20.00 in 2026-11-26 (UTC)", "2026-11-27"),
        ({"2026-11": (300_123_456_789, 9)}, "alice has spent $300.12 of $300.00 in 2026-11 (UTC)", "2026-12-01"),
        ({"2026-11-26": (0, 5_000_000)}, "alice has used 5000000 of 5000000 tokens in 2026-11-26", "2026-11-27"),
        ({"2026-11-26": (10**15, 10**9), "2026-11": (10**15, 0)}, "in 2026-11 (UTC)", "2026-12-01"),
    ],
    ids=brief,
)  # fmt: skip
def test_a_spent_budget_says_how_much_of_what_and_until_when(spent, told, until):
    budget = {"usd_per_day": 20, "usd_per_month": 300, "tokens_per_day": 5_000_000}
    user = parse({"echo": {}}, users={"alice": budget}, ledger={"path": "usage.db"}).users["alice"]
    found = monorelay.spent_over(user, lambda window: spent.get(window, (0, 0)), timestamp("2026-11-26T12:00:00"))
    if told is None:
        assert found is None
    else:
        assert told in found.message and f"begins anew at {until}T00:00:00Z" in found.message
        assert found.ends == timestamp(f"{until}T00:00:00")


def test_who_has_no_budget_is_never_over_it():
    user = parse({"echo": {}}, users={"alice": {}}).users["alice"]
    assert not user.has_budget and monorelay.spent_over(user, lambda window: (10**18, 10**18), 0.0) is None


# ------------------------------------------------------------------------------------------------------------
# Wire rules: request heads
# ------------------------------------------------------------------------------------------------------------

GOOD_HEADS = {
    "least": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "old": b"GET /v1/models?limit=1 HTTP/1.0\r\n\r\n",
    "absolute": b"GET http://elsewhere.example/v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "length": b"POST /v1/messages HTTP/1.1\r\nhOsT:a:80\r\nContent-Length: 3\r\n\r\n",
    "chunked": b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n",
    "values": b"GET / HTTP/1.1\r\nHost: a\r\nX-A: \t b c \t\r\nX-A:\r\nX-B: caf\xe9\r\n"
    b"!#$%&'*+-.^_`|~09aZ: 1\r\n\r\n",
    "ip": b"GET / HTTP/1.1\r\nHost: [::1]:8787\r\n\r\n",
}


def host(line: bytes, method: bytes = b"POST") -> bytes:
    """A head with one more header line."""
    return method + b" /v1/messages HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n"


BAD_HEADS = {
    "length and coding": host(b"Content-Length: 5\r\nTransfer-Encoding: chunked"),
    "coding and length": host(b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
    "length twice": host(b"Content-Length: 5\r\nContent-Length: 5"),
    "length a list": host(b"Content-Length: 5, 5"),
    "length +3": host(b"Content-Length: +3"),
    "length 1_0": host(b"Content-Length: 1_0"),
    "length -1": host(b"Content-Length: -1"),
    "length hex": host(b"Content-Length: 0x3"),
    "length a fraction": host(b"Content-Length: 3.0"),
    "length empty": host(b"Content-Length:"),
    "length overflow": host(b"Content-Length: " + b"9" * 30),
    "length arabic digits": host("Content-Length: ٣".encode()),
    "length with vertical tab": host(b"Content-Length: \x0b3"),
    "coding gzip": host(b"Transfer-Encoding: gzip"),
    "coding gzip, chunked": host(b"Transfer-Encoding: gzip, chunked"),
    "coding chunked, gzip": host(b"Transfer-Encoding: chunked, gzip"),
    "coding twice chunked": host(b"Transfer-Encoding: chunked, chunked"),
    "coding in two lines": host(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked"),
    "coding identity": host(b"Transfer-Encoding: identity"),
    "coding empty": host(b"Transfer-Encoding:"),
    "coding with vertical tab": host(b"Transfer-Encoding: \x0bchunked"),
    "coding with parameter": host(b"Transfer-Encoding: chunked;a=b"),
    "coding on 1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "space before colon": host(b"Content-Length : 5"),
    "tab before colon": host(b"X-A\t: 5"),
    "obs-fold": host(b"X-A: b\r\n c"),
    "obs-fold with tab": host(b"X-A: b\r\n\tc"),
    "folded first line": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare CR in value": host(b"X-A: b\rX-C: d"),
    "bare CR before the end": host(b"X-A: b\r"),
    "bare LF in value": host(b"X-A: b\nX-C: d"),
    "LF only": b"GET / HTTP/1.1\nHost: a\n\n",
    "LF after request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "LF as the empty line": b"GET / HTTP/1.1\r\nHost: a\r\n\n\r\n\r\n",
    "NUL in value": host(b"X-A: b\0"),
    "NUL in name": host(b"X\0A: b"),
    "control in value": host(b"X-A: b\x01"),
    "escape in value": host(b"X-A: \x1b[31m"),
    "delete in value": host(b"X-A: b\x7f"),
    "no colon": host(b"X-A"),
    "no name": host(b": b"),
    "name with space": host(b"X A: b"),
    "name not a token": host(b"X(A): b"),
    "name not ASCII": host("X-é: b".encode()),
    "host missing": b"GET / HTTP/1.1\r\nX-A: b\r\n\r\n",
    "host twice": b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
    "host with path": b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "host with user": b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n",
    "host with space": b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n",
    "underscored length": host(b"Content_Length: 5"),
    "dotted coding": host(b"Transfer.Encoding: chunked"),
    "underscored key": host(b"X_Api_Key: k"),
    "dotted key": host(b"x-api.key: k"),
    "underscored api-key": host(b"Api_Key: k"),
    "underscored google key": host(b"X-Goog-Api_Key: k"),
    "underscored relay key": host(b"X_MonoRelay_Key: k"),
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "version 0.9": b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    "version 2": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "version in lower case": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "version with more": b"GET / HTTP/1.1x\r\nHost: a\r\n\r\n",
    "version 1.10": b"GET / HTTP/1.10\r\nHost: a\r\n\r\n",
    "two spaces": b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
    "space first": b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "space last": b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
    "tab": b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "vertical tab": b"GET\x0b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "file separator": b"GET\x1c/\x1cHTTP/1.1\r\nHost: a\r\n\r\n",
    "no-break space": b"GET\xa0/\xa0HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "control in target": b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n",
    "target not ASCII": "GET /é HTTP/1.1\r\nHost: a\r\n\r\n".encode(),
    "target with fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "target relative": b"GET v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "target empty": b"GET  HTTP/1.1\r\nHost: a\r\n\r\n",
    "method not a token": b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "binary": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}
LONG_HEADS = {
    "request line": (b"GET /" + b"a" * 16 * 1024 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414),
    "one header": (host(b"X-A: " + b"a" * 64 * 1024), 431),
    "many headers": (host(b"\r\n".join(b"X-%d: 1" % i for i in range(200))), 431),
}


def parse_head(data: bytes) -> Any:
    """The parsed request head that the data begins with."""
    return monorelay.parse_request_head(data[: monorelay.head_length(data) or len(data)])


@pytest.mark.parametrize("name", GOOD_HEADS)
def test_request_head_is_taken_whole_and_however_it_arrives(name):
    data = GOOD_HEADS[name]
    assert [monorelay.head_length(data[:end]) for end in range(len(data))] == [0] * len(data)
    assert (
        monorelay.head_length(data)
        == monorelay.head_length(data + b"GET /next HTTP/1.1\r\n\r\n")
        == len(data)
    )
    assert parse_head(data).method in ("GET", "POST")


def test_request_head_keeps_order_repetition_and_case_of_values():
    head = parse_head(GOOD_HEADS["values"])
    pairs = [(name.lower(), value) for name, value in head.fields.pairs]
    assert pairs[1:] == [("x-a", "b c"), ("x-a", ""), ("x-b", "caf\xe9"), ("!#$%&'*+-.^_`|~09az", "1")]
    head = parse_head(GOOD_HEADS["old"])
    assert (head.path, head.query, head.method) == ("/v1/models", "limit=1", "GET")


@pytest.mark.parametrize("name", BAD_HEADS)
def test_request_head_is_refused(name):
    with pytest.raises(monorelay.MalformedRequest) as caught:
        parse_head(BAD_HEADS[name])
    assert caught.value.status == 400


@pytest.mark.parametrize("name", LONG_HEADS)
def test_request_head_over_the_limits_is_refused_before_it_is_complete(name):
    data, status = LONG_HEADS[name]
    with pytest.raises(monorelay.MalformedRequest) as caught:
        parse_head(data)
    assert caught.value.status == status
    if name != "many headers":
        with pytest.raises(monorelay.MalformedRequest) as caught:
            monorelay.head_length(data[:-4])
        assert caught.value.status == status


HEAD_PIECES = [b"GET", b"POST", b" ", b"/", b"/v1", b"HTTP/1.1", b"HTTP/1.0", b"\r\n", b"\n", b"\r", b"\0",
b"\t", b":",
               b"Host: a", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"\r\n\r\n", b",", b"\xff",
               b"X: y"]  # fmt: skip


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    st.one_of(
        st.binary(max_size=120),
        st.lists(st.sampled_from(HEAD_PIECES), max_size=20).map(b"".join),
        st.tuples(
            st.sampled_from(sorted(GOOD_HEADS.values())), st.integers(0, 90), st.binary(max_size=4)
        ).map(lambda it: it[0][: it[1]] + it[2] + it[0][it[1] :]),
    ),
    st.binary(max_size=20),
)
def test_request_parser_yields_one_head_or_a_refusal(data, junk):
    def outcome(piece: bytes) -> Any:
        try:
            length = monorelay.head_length(piece)
            head = length and monorelay.parse_request_head(piece[:length])
        except monorelay.MalformedRequest as error:
            return error.status
        return head and (length, head.method, head.path, tuple(map(tuple, head.fields.pairs)))

    whole = outcome(data)
    if isinstance(whole, tuple):
        assert data[: whole[0]].endswith(b"\r\n\r\n") and data[: whole[0]].count(b"\r\n\r\n") == 1
        assert b"\n" not in data[: whole[0]].replace(b"\r\n", b"")
        assert outcome(data + junk) == whole, "what follows a head must not change it"
    first = next((seen for seen in (outcome(data[:end]) for end in range(len(data) + 1)) if seen), 0)
    assert first == whole, "byte by byte must mean the same as at once"


# ------------------------------------------------------------------------------------------------------------
# Wire rules: answers, chunks, the model, retry-after
# ------------------------------------------------------------------------------------------------------------


def test_response_head_is_read_as_it_stands():
    head = monorelay.parse_response_head(
        b"HTTP/1.1 299 Odd  Reason\r\nA: 1\r\nSet-Cookie: x\r\na:  2 \r\n\r\n"
    )
    assert (head.status, head.reason.strip()) == (299, "Odd  Reason")
    assert [(name.lower(), value) for name, value in head.fields.pairs] == [
        ("a", "1"),
        ("set-cookie", "x"),
        ("a", "2"),
    ]
    assert monorelay.parse_response_head(b"HTTP/1.0 204\r\n\r\n").status == 204


@pytest.mark.parametrize("line", [b"HTTP/1.1 20 OK", b"HTTP/1.1 +20 OK", b"HTTP/1.1 2000 OK", b"HTTP/1.1 abc",
b"ICY 200 OK",
                                  b"HTTP/2 200", b"HTTP/1.1", b"", b"garbage", b"HTTP/1.1 099 Low",
                                  b"HTTP/1.1 200 O\0K",
                                  b"HTTP/1.1 200 OK\r\nno colon", b"HTTP/1.1 200 OK\r\nA : b",
                                  b"HTTP/1.1 200 OK\r\nA: b\rc",
                                  b"HTTP/1.1 200 OK\r\nA: \0"])  # fmt: skip
def test_response_head_that_is_garbage_is_refused(line):
    with pytest.raises(monorelay.FramingError):
        monorelay.parse_response_head(line + b"\r\n\r\n")


def bytewise(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


def dechunk(pieces: list[bytes]) -> tuple[bytes, Any]:
    decoder = monorelay.ChunkedDecoder()
    return b"".join(decoder.feed(piece) for piece in pieces), decoder


@pytest.mark.parametrize("extension", [b"", b";name=value", b' ; quoted="a b"'])
def test_chunks_are_decoded_however_they_arrive(extension):
    data = b"5%s\r\nhello\r\n00A\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\nnext" % extension
    for size in range(1, len(data) + 1):
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        decoder, decoded, rest = monorelay.ChunkedDecoder(), b"", b""
        for piece in pieces:
            if decoder.finished:
                rest += piece
            else:
                decoded += decoder.feed(piece)
        assert (decoded, decoder.finished, bytes(decoder.rest) + rest) == (b"hello0123456789", True, b"next")


@pytest.mark.parametrize("data", [b"+3\r\nabc\r\n", b"0x3\r\nabc\r\n", b"0_3\r\nabc\r\n", b"-1\r\n", b"\r\n",
b" 3\r\nabc\r\n",
                                  b"3\nabc\r\n", b"3\r\nabcd\r\n", b"3\r\nabc\n", b"3\r\nabc\n0", b"g\r\n",
                                  b"f" * 17 + b"\r\n", b"3;a\nb\r\nabc\r\n",
                                  b"3;\0\r\nabc\r\n", b"3\r\nabc\rX", b"0\r\nbad trailer\r\n\r\n",
                                  b"0\r\nA: b\nc\r\n\r\n",
                                  b"0\r\n folded\r\n\r\n", b"3;" + b"a" * 300_000], ids=brief)  # fmt: skip
def test_chunks_that_are_malformed_are_refused(data):
    for pieces in ([data], [data[i : i + 1] for i in range(min(len(data), 64))] + [data[64:]]):
        with pytest.raises(monorelay.FramingError):
            dechunk(pieces)


@hypothesis.given(st.lists(st.binary(min_size=1, max_size=30)), st.lists(st.integers(0, 400)))
def test_chunks_give_back_what_was_put_in(parts, cuts):
    data = chunked(*parts)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    decoded, decoder = dechunk([data[a:b] for a, b in zip(edges, edges[1:])])
    assert decoded == b"".join(parts) and decoder.finished


# -- the parsers beside h11's: ours may refuse more, and reads all else alike


class Reading(NamedTuple):
    """What a parser makes of a message and of the bytes behind it."""

    start: tuple[object, ...]  # method, target and version of a request; status, reason and version of a response
    fields: list[tuple[str, str]]
    content: bytes
    rest: bytes | None  # what follows the message; None: the message isn't whole


def read_by_h11(data: bytes, method: str) -> Reading | None:
    """What h11 reads: a request, or the final response to one of this method; None while the head isn't whole.
    Raises h11.RemoteProtocolError."""
    peer = h11.Connection(h11.CLIENT if method else h11.SERVER)
    if method:
        peer.send(h11.Request(method=method, target="/", headers=[("Host", "relay")]))
        peer.send(h11.EndOfMessage())
    if data:  # none would be the end of the connection
        peer.receive_data(data)
    head, content, rest = None, b"", None
    while not isinstance(event := peer.next_event(), (h11.EndOfMessage, type(h11.NEED_DATA))):
        if isinstance(event, h11.Data):
            content += event.data
        elif not isinstance(event, h11.InformationalResponse):
            head = event
    if not head:
        return None
    if isinstance(event, h11.EndOfMessage):
        rest = peer.trailing_data[0]
    else:  # it may be one that ends with the connection
        peer.receive_data(b"")
        with contextlib.suppress(h11.RemoteProtocolError):
            rest = b"" if isinstance(peer.next_event(), h11.EndOfMessage) else None
    start = (head.status_code, head.reason) if method else (head.method, head.target)
    return Reading(
        tuple(part.decode("latin-1") if isinstance(part, bytes) else part for part in (*start, head.http_version)),
        [(name.decode("latin-1"), value.decode("latin-1")) for name, value in head.headers.raw_items()],
        content, rest,
    )  # fmt: skip


class Arriving:
    """As much of a Channel as the reading of a response's head needs."""

    def __init__(self) -> None:
        self.received, self.ended = b"", False

    def take(self, count: int) -> bytes:
        taken, self.received = self.received[:count], self.received[count:]
        return taken


def read_by_ours(pieces: list[bytes], method: str) -> Reading | None:
    """What the relay reads of a message that comes in these pieces. Raises MalformedRequest and FramingError."""
    channel, head, decoder, content, behind, seen = Arriving(), None, None, b"", b"", 0
    heads = monorelay.ResponseHeads(types.SimpleNamespace(now=0.0), channel)
    for piece in pieces:
        if not head:
            channel.received += piece
            if method:
                head = heads.take_final()
                decoder = head and monorelay.response_decoder(head, method)
            else:
                size, seen = monorelay.head_length(channel.received, seen), len(channel.received)
                head = monorelay.parse_request_head(channel.take(size)) if size else None
                length = head and head.body_length
                decoder = monorelay.ChunkedDecoder() if length is None else monorelay.LengthDecoder(length)
            piece = channel.take(len(channel.received)) if head else b""
        if head and decoder.finished:
            behind += piece
        elif head:
            content += decoder.feed(piece)
    if not head:
        return None
    start = (head.status, head.reason) if method else (head.method, head.path + "?" * bool(head.query) + head.query)
    rest = decoder.rest + behind if decoder.finished or isinstance(decoder, monorelay.CloseDecoder) else None
    return Reading((*start, f"1.{head.version}"), head.fields.pairs, content, rest)


def outcome_of(read: Callable[..., Reading | None], data: Any, method: str) -> Reading | str:
    """What was read, or why nothing was."""
    try:
        return read(data, method) or "incomplete"
    except (h11.RemoteProtocolError, monorelay.MalformedRequest, monorelay.FramingError):
        return "refused"


FRAMING_FIELD = rb"(?i)\r\n(?:content-length|transfer-encoding):[^\r\n]*"


def without_ours_alone(data: bytes, has_body: bool) -> bytes:
    """The message without what h11 refuses and ours takes by RFC 9112."""
    head, body = re.match(rb"(?s)((?:HTTP/1\.. 1.*?\r\n\r\n)*.*?\r\n\r\n)(.*)", data).groups()
    if not has_body:  # §6.3, 1: whatever the fields say, it ends with its head
        return re.sub(FRAMING_FIELD, b"", head) + body
    body = re.sub(rb"(?m)^([0-9A-Fa-f]+)[ \t]+;", rb"\1;", body)  # §7.1.1: blanks before an extension are passed over
    return head + re.sub(FRAMING_FIELD, b"", body)  # §7.1.2: a trailer field may be discarded, whatever it says


def comparable(reading: Reading | str) -> Reading | str:
    """The reading without what may differ: h11 leaves a target with a host as it is, and drops repeated lengths."""
    if isinstance(reading, str):
        return reading
    first, second, version = reading.start
    absolute = re.fullmatch(r"(?i:https?)://[^/?]*/?(.*)", str(second))
    fields = [pair for pair in reading.fields if pair[0].lower() not in ("content-length", "transfer-encoding")]
    return reading._replace(start=(first, "/" + absolute[1] if absolute else second, version), fields=fields)


# What may stand in each place of a message: first the usual, then the rare and the wrong.
PLACES = {
    "method": ["POST", "GET", "HEAD", "OPTIONS", "CONNECT", "get", "M-SEARCH", "", "P(ST"],
    "target": ["/", "/v1/messages", "/v1/messages?beta=true&x", "//a/../b?c?d", "*", "http://a:80/b?c", "HTTPS://a",
               "a:443", "/caf%C3%A9", "/café", "/a#b", "/a b"],
    "status": ["200 OK", "200", "200 ", "204 No Content", "304 Not Modified", "404 Not  Found\t", "529 é", "099 Low",
               "600 Odd", "20 OK", "2000", "100 Continue\r\n\r\nHTTP/1.1 200 OK",
               "103\r\nLink: <a>\r\n\r\nHTTP/1.1 200", "101 Switching Protocols"],
    "version": ["1.1", "1.0", "1.0", "1.2", "2.0", "1.10", "0.9", "1"],
    "field": ["Host: relay", "host: relay:80", "A: 1", "a:1", "A:  b\t c \t", "X-Empty:", "X-Odd: café \x85\xa0",
              "Connection: close", "Connection: keep-alive, x", "Upgrade: h2c", "Cookie: a=b; c",
              "Expect: 100-continue", "!#$%&'*+.^_`|~: token", "Content_Length: 5", "A: b\r\n folded", "A : 1",
              "é: 1"],
    "length": ["{}", "{} ", "\t{}", "0{}", "{:020}", "1{:015}", "{0}, {0}", "{0},1{0}", "+{}", "-{}", "0x{}", "{}_0",
               "{};", "{}.0", "²", "", "{0}\r\nContent-Length: {0}", "{0}\r\ncontent-length: 1{0}", "\r\n {}",
               "{}\r\nTransfer-Encoding: chunked"],
    "coding": ["chunked", "Chunked", " chunked\t", "chunked, chunked", "gzip, chunked", ",chunked", "chunked;q=1",
               "xchunked", "identity", "", "chunked\x0b", "chunked\r\nTransfer-Encoding: chunked",
               "chunked\r\nContent-Length: 3", "chunked\r\ntransfer-encoding: identity", "\r\n chunked"],
    "size": ["{:x}", "{:X}", "00{:x}", "{:015x}", "{:016x}", "{:x};a", '{:x}; a="b\té"', "{:x} ;a=b", "{:x}\t",
             "+{:x}", "-{:x}", "0x{:x}", "{:x}_0", "{:x}\x0b", "{:x};a\x00", "{:x};\r", " {:x}", ""],
    "trailer": ["", "A: b\r\n", "a:\r\nb: c\r\n", " folded: no\r\n", "A : b\r\n", "no colon\r\n", ": a\r\n",
                "Content-Length: x\r\n"],
    "byte": ["", " ", "\t", "\x00", "\r", "\n", "\r\n", "\r\n ", ",", ":", ";", "\x0b", "\x0c", "\x1c", "\x7f",
             "\x80", "\x85", "\xa0", "ÿ", "0", "+", "-", "_", "a"],
    "line end": ["\r\n"] * 12 + ["\n", "\r", "\r\r\n", "\n\n", ""],
    "piece": ["HTTP/1.1 200", "GET / HTTP/1.1"],
}  # fmt: skip


def generated_message(chance: random.Random, is_response: bool) -> bytes:
    """A message: a third as it should be, a third with one fault or two, a third with more, or of random pieces."""
    odds = chance.choice([0.0, 0.1, 0.25])

    def one_of(place: str) -> str:
        return chance.choice(PLACES[place]) if chance.random() < odds else PLACES[place][0]

    def line(text: str) -> bytes:
        return (text + one_of("line end")).encode("latin-1")

    if chance.random() < odds / 2:
        places = chance.choices([*PLACES.values(), ["\r\n"]], k=chance.randrange(20))
        return "".join(map(chance.choice, places)).encode("latin-1")
    fields = [one_of("field"), *(field for field in PLACES["field"][2:12] if chance.random() < 0.15)]
    body = [chance.randbytes(chance.randrange(1, 40)) for _ in range(3)]
    framing = chance.choice(["length", "chunked", "none"])
    if framing == "length":
        fields.append("Content-Length: " + one_of("length").format(sum(map(len, body))))
    elif framing == "chunked":
        fields.append("Transfer-Encoding: " + one_of("coding"))
        body = [line(one_of("size").format(len(part))) + part + line("") for part in body]
        body += [line(one_of("size").format(0)), one_of("trailer").encode("latin-1"), line("")]
    elif not is_response:
        body = []
    chance.shuffle(fields)
    version = "HTTP/" + one_of("version")
    words = [version, one_of("status")] if is_response else [one_of("method"), one_of("target"), version]
    message = b"".join([*map(line, [" ".join(words), *fields, ""]), *body])
    while chance.random() < 2 * odds:  # a byte more, less, or another in its place, where bytes matter
        at = chance.choice([match.start() for match in re.finditer(rb"[\s:;,]|\Z", message)])
        at = max(0, at + chance.randrange(-1, 3))
        message = message[:at] + chance.choice(PLACES["byte"]).encode("latin-1") + message[at + chance.randrange(2) :]
    return message


@pytest.mark.parametrize("is_response", [False, True], ids=["requests", "responses"])
def test_what_h11_refuses_is_refused_and_what_both_take_is_read_alike(is_response):
    chance, taken, refusals = random.Random(f"{TEST_SEED} {is_response}"), 0, 0
    for number in range(2000):
        method = chance.choice(["GET", "POST", "HEAD"]) if is_response else ""
        data = generated_message(chance, is_response) + chance.choice([b"", b"\r\n", b"GET /", b"\0\xff"])
        told = f"TEST_SEED={TEST_SEED}, message {number} {method}: {data!r}"
        ours = outcome_of(read_by_ours, [data], method)
        assert ours == outcome_of(read_by_ours, bytewise(data), method), told
        theirs = outcome_of(read_by_h11, data, method)
        if isinstance(ours, Reading) and theirs == "refused":
            has_body = method != "HEAD" and ours.start[0] not in (204, 304)
            theirs = outcome_of(read_by_h11, without_ours_alone(data, has_body), method)
        taken, refusals = taken + isinstance(ours, Reading), refusals + (ours == theirs == "refused")
        # What can't become a head may be refused later than by h11, but no message is made of it.
        if ours != "refused" and (ours, theirs) != ("incomplete", "refused"):
            assert comparable(ours) == comparable(theirs), told
    assert taken > 500 and refusals > 200


# -- the model of a JSON body


def walked(pieces: list[bytes]) -> Any:
    """What a walk over a JSON body says that comes in these pieces."""
    walk = monorelay.JsonWalk()
    for piece in pieces:
        walk.feed(piece)
        while walk.behind:
            walk.go_on()
    walk.finish()
    while walk.behind:
        walk.go_on()
    return walk.facts


def model_of(body: bytes) -> str:
    """The model that a JSON body names: read at once, walked whole and walked byte by byte, with the same result."""

    def outcome(read: Callable[[Any], Any], given: Any) -> Any:
        try:
            return read(given)._replace(span=None)
        except monorelay.BadRequest as error:
            return error.code, "" if error.code == "not_json" else error.message

    at_once = outcome(monorelay.read_at_once, body)
    assert outcome(walked, [body]) == outcome(walked, bytewise(body)) == at_once
    return monorelay.read_at_once(body).model


def with_model(body: bytes, name: str) -> bytes:
    """The body with another name for its model, the same however that was found and the body is cut."""
    span = walked([body]).span
    assert span == walked(bytewise(body)).span == monorelay.model_span(body)
    spliced = b"".join(monorelay.splice_model([body], span, name))
    assert b"".join(monorelay.splice_model(bytewise(body), span, name)) == spliced
    return spliced


@pytest.mark.parametrize(
    ("body", "spliced"),
    [
        (b'{"model":"old"}', b'{"model":"new"}'),
        (b' \r\n{ "a" : 1.0e2 ,\t"model" : "old" , "z":{"model":"old"}}\n',
         b' \r\n{ "a" : 1.0e2 ,\t"model" : "new" , "z":{"model":"old"}}\n'),
        (b'{"messages":[{"model":"x","content":"\\"model\\":\\"y\\""}],"model":"old"}',
         b'{"messages":[{"model":"x","content":"\\"model\\":\\"y\\""}],"model":"new"}'),
        (b'{"a":"model","model":"old"}', b'{"a":"model","model":"new"}'),
        (b'{"a":["model","x"],"model":"old","a":2}', b'{"a":["model","x"],"model":"new","a":2}'),
        (b'{"m":"\\\\","model":"\\u006fld"}', b'{"m":"\\\\","model":"new"}'),
        (b'{"\\u006dodel":"old"}', b'{"\\u006dodel":"new"}'),
        ('{"ü":"\u2028","model":"old","n":12345678901234567890123}'.encode(),
         '{"ü":"\u2028","model":"new","n":12345678901234567890123}'.encode()),
        (b'{"m":"\\ud800","model":"old"}', b'{"m":"\\ud800","model":"new"}'),
    ], ids=brief)  # fmt: skip
def test_model_is_spliced_and_nothing_else_changes(body, spliced):
    assert model_of(body) == "old"
    assert with_model(body, "new") == spliced
    assert json.loads(with_model(body, 'ü"\\\n'))["model"] == 'ü"\\\n'


BAD_BODIES = {
    "empty": b"",
    "not JSON": b"hello",
    "cut short": b'{"model":"a","x":',
    "cut in a string": b'{"model":"a',
    "garbage inside": b'{"model":"a","x":nope}',
    "comma at the end": b'{"model":"a",}',
    "garbage after": b'{"model":"a"} x',
    "two objects": b'{"model":"a"}{"model":"b"}',
    "a list": b'["model","a"]',
    "a string": b'"model"',
    "model missing": b'{"messages":[{"model":"a"}]}',
    "model a number": b'{"model":1}',
    "model null": b'{"model":null}',
    "model an object": b'{"model":{"model":"a"}}',
    "model twice": b'{"model":"a","x":1,"model":"a"}',
    "model twice, once escaped": b'{"model":"a","\\u006dodel":"b"}',
    "NaN": b'{"model":"a","x":NaN}',
    "UTF-16": '{"model":"a"}'.encode("utf-16"),
    "not UTF-8": b'{"model":"a","x":"\xff"}',
    "control in a string": b'{"model":"a","x":"\x01"}',
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_body_without_one_clear_model_is_a_bad_request(name):
    with pytest.raises(monorelay.BadRequest) as caught:
        model_of(BAD_BODIES[name])
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("tools", "is_seen"),
    [
        (b'[{"type":"advisor_20260301","name":"advisor","model":"b"}]', True),
        (b'[1,{"x":[{}],"y":{"z":"a"}},{"x":{"y":"z"},"Mod\\u0065l":"b"}]', True),
        (b'[{"models":"%s"}]' % (b"b" * 5000), True),
        (b'[{"input_schema":{"type":"object","properties":{"model":{"type":"string"}}}}]', False),
        (b'[{"name":"model","x":["model","b"],"y":{"model":"b"}},"model",["model","b"]]', False),
        (b'[{"model":null},{"model":{"x":"y"}},{"model":["b"]}]', False),
        (b'{"model":"b"}', False),
    ],
    ids=brief,
)
def test_a_tool_with_a_model_of_its_own_is_seen_however_a_body_is_read(tools, is_seen):
    for body in (b'{"model":"a","tools":%s}', b'{"tools":%s,"model":"a"}'):
        assert model_of(body % tools) == "a"
        assert monorelay.read_at_once(body % tools).lookalike == is_seen


@pytest.mark.parametrize("size", range(4090, 4100))
def test_a_string_of_any_length_is_a_string(size):
    for body in (b'{"model":"a","%s":1}' % (b"z" * size), b'{"x":["%s"],"model":"a"}' % (b"z" * size)):
        assert model_of(body) == "a"


@pytest.mark.parametrize("name", ["model", "MODEL"])
def test_a_walk_keeps_no_members_however_many_are_called_model(name):
    walk = monorelay.JsonWalk()

    def attempt() -> None:
        with contextlib.suppress(monorelay.BadRequest):
            walk.feed(b"{" + b'"%s":1,' % name.encode() * 100_000 + b'"x":1}')
            while walk.behind:
                walk.go_on()

    assert bytes_grown(attempt, 1) < 2 << 20


@pytest.mark.parametrize("letter", ["é", "語", "😀"])
def test_a_long_string_may_be_cut_within_any_character(letter):
    body = json.dumps({"model": "a", "x": letter * 6000 + "\n" + letter * 3000}, ensure_ascii=False).encode()
    for cut in (*range(5000, 5016), *range(11_990, 12_010), *range(len(body) - 12, len(body))):
        assert walked([body[:cut], body[cut:]]).model == "a"
        assert walked([body[: cut - 4200], body[cut - 4200 : cut], body[cut:]]).model == "a"


def test_small_pieces_of_a_body_become_large_ones():
    body = monorelay.ReadBody()
    for _ in range(200_000):
        body.add(b"ab")
    assert b"".join(body.content) == b"ab" * 200_000 and len(body.content) < 10


def test_a_number_too_long_for_an_alias_is_a_bad_request(upstream, relay):
    it = relay({"anthropic": upstream(answer())}, aliases={"fast": "claude-test"})
    dense = b'"x":[' + b'"abcd",' * 8000 + b"9" * 5000 + b"]"
    for before, after, status in ((b"", b"," + dense, 200), (dense + b",", b"", 400)):
        assert it.post("/v1/messages", b'{%s"model":"claude-test"%s}' % (before, after)).status == 200
        assert it.post("/v1/messages", b'{%s"model":"fast"%s}' % (before, after)).status == status


@pytest.mark.parametrize(
    ("text", "is_walked"),
    [
        ('"' + "x" * 500_000 + '"', False), ("[" + '"' + '","'.join(["x" * 90] * 5000) + '"]', False),
        ("[" + "[]," * 90_000 + "1]", True), ('"' + "," * 300_000 + '"', True), ("[" + "[]," * 80_000 + "1]", False),
        ('"' + "x" * 600_000 + '"', True),
    ],
    ids=["long", "strings", "dense", "commas", "short", "longer"],
)  # fmt: skip
def test_json_reads_at_once_what_takes_it_milliseconds(text, is_walked):
    data = f'{{"x":{text},"model":"a"}}'.encode()
    body = monorelay.ReadBody()
    for at in range(0, len(data), 65536):
        body.add(data[at : at + 65536])
        while body.behind:
            body.go_on()
    body.finish()
    while body.behind:
        body.go_on()
    assert body.facts.model == "a" and (body.values > 0) == is_walked
    body.locate_model()
    while body.behind:
        body.go_on()
    assert data[slice(*body.facts.span)] == b'"a"'
    assert json.loads(b"".join(body.with_model("other")[0]))["model"] == "other"


def test_deep_nesting_is_searched_or_refused():
    body = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"model":"a"}'
    assert walked([body]).model == "a"
    with contextlib.suppress(monorelay.BadRequest):
        assert monorelay.read_at_once(body).model == "a"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    st.dictionaries(st.text(), JSON_VALUES),
    st.text(min_size=1, max_size=256),
    st.booleans(),
    st.sampled_from([None, 1]),
)
def test_model_is_found_in_any_json_object(fields, name, ascii_only, indent):
    body = json.dumps({**fields, "model": name}, ensure_ascii=ascii_only, indent=indent).encode()
    assert model_of(body) == name
    assert json.loads(with_model(body, "other")) == {**fields, "model": "other"}


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0), ("7", 7), ("7.5", 7.5), ("3600", 3600),
        (email.utils.formatdate(UNIX_TIME + 90, usegmt=True), 90),
        (email.utils.formatdate(UNIX_TIME - 90, usegmt=True), None),
        ("3601", 3600), ("287441", 3600), ("1795785586", 3600),
        ("1795785586123.5", 3600), ("-1", None), ("+3", None), ("1_0", None), ("1e3", None), ("nan", None),
        ("inf", None), ("", None),
        ("soon", None), ("٣", None), ("9" * 5000, None), (email.utils.formatdate(UNIX_TIME + 7200,
         usegmt=True), 3600),
        ("Fri, 99 Xyz 9999 99:99:99 GMT", None),
    ], ids=brief)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_an_hour_at_most(value, seconds):
    assert monorelay.retry_after_seconds(value, UNIX_TIME) == seconds


def patterns_in_use() -> dict[tuple[Any, int], set[str]]:
    """The source and flags of every regular expression in monorelay.py, and by which methods it is used.

    Those that are built while it runs are missing; they have tests of their own."""
    found: dict[tuple[Any, int], set[str]] = {}
    for node in ast.walk(ast.parse(Path(monorelay.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(monorelay, node.value.id, None)
            if isinstance(value, re.Pattern):
                found.setdefault((value.pattern, value.flags), set()).add(node.attr)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not node.args:
            continue
        if isinstance(node.func.value, ast.Name) and node.func.value.id == "re":
            first = node.args[0]
            source = (
                getattr(monorelay, first.id, None)
                if isinstance(first, ast.Name)
                else getattr(first, "value", None)
            )
            if isinstance(source, (str, bytes)):
                found.setdefault((source, re.compile(source).flags), set()).add(node.func.attr)
    for value in vars(monorelay).values():
        if isinstance(value, re.Pattern):
            found.setdefault((value.pattern, value.flags), {"match", "search"})
    return found


PATTERNS_IN_USE = patterns_in_use()
# What the code makes sure of before it lets a pattern see a text.
PREPARED: dict[Any, Callable[[Any], Any]] = {r"\s*\S+": str.rstrip, rb"\s*\S+": bytes.rstrip}
FILLINGS = [" ", "\t", '"', "\\", '\\"', "[", "]", "{", "}", ",", ":", "/", "%", ".", ";", "=", "@", "$", "0", "9f",
            "a", "a:", "é", "\r", "\n", "\r\n", " \t", '"a":', '{"', '",', "a,", "[],", "\\u0041", "x\r\n",
            "x: y\r\n"]  # fmt: skip
BEGINNINGS = ["", "a:", '"', '{"', '{"a":', "1;", "/", "GET /", "http://", "HTTP/1.1 200 ", "event:", "data: {"]


def near_misses(source: Any) -> list[str]:
    """Words of a pattern, and each without its end: what it matches almost."""
    text = source.decode("latin-1") if isinstance(source, bytes) else source
    words = re.findall(r'[A-Za-z_"-][A-Za-z0-9_"/: .-]{2,}', re.sub(r"\[[^\]]*\]|\\[a-z]", " ", text))
    pieces = [piece for word in dict.fromkeys(words) for piece in (word, word[:-1], word + " ")]
    return pieces[:: max(1, len(pieces) // 15)]  # of a list of many words, some: each is tried behind each other


def adversaries(source: Any, size: int) -> Iterator[Any]:
    """Texts of a size that make a pattern try as much as it can, each followed by what doesn't fit."""
    words = near_misses(source)
    for opening in (*BEGINNINGS, *words):
        for filling in (*FILLINGS, *words):
            for end in ("", "\x01", "~\n"):
                text = opening + filling * (size // len(filling)) + end
                yield text.encode("latin-1") if isinstance(source, bytes) else text


def assert_linear(use: Callable[[Any], object], texts: Iterator[Any], seconds: float) -> None:
    """Each text is done with within the time; the best of three counts, as noise only ever adds to it."""
    for text in texts:
        spent = []
        while len(spent) < 3 and min(spent, default=seconds) >= seconds:
            begin = time.process_time()
            use(text)
            spent.append(time.process_time() - begin)
        assert min(spent) < seconds, (text[:40], text[-9:], len(text))


METHODS = {"match", "search", "fullmatch", "findall", "finditer", "split", "sub"}


def uses_of(source: Any, flags: int) -> list[Callable[[Any], object]]:
    """What the program does with a pattern."""
    pattern, prepare = re.compile(source, flags), PREPARED.get(source, lambda text: text)
    names = {"match" if name == "compile" else name for name in PATTERNS_IN_USE[source, flags]} & METHODS
    if "sub" in names:
        return [lambda text: pattern.sub(text[:0], prepare(text))]
    return [
        lambda text, name=name: (
            [found for found in getattr(pattern, name)(prepare(text)) or ()]
            if name in ("findall", "finditer", "split")
            else getattr(pattern, name)(prepare(text))
        )
        for name in sorted(names)
    ]


@pytest.mark.parametrize(("source", "flags"), PATTERNS_IN_USE, ids=brief)
@pytest.mark.timed
def test_no_pattern_takes_long_over_what_almost_fits(source, flags):
    # 2 and 8 kB find those that grow faster than their text in no time; a linear one takes 0.1 ms.
    for size, seconds in ((2_000, 0.02), (8_000, 0.02)):
        for use in uses_of(source, flags):
            assert_linear(use, adversaries(source, size), seconds)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "flags"), PATTERNS_IN_USE, ids=brief)
def test_no_pattern_takes_long_over_the_most_that_is_let_in(source, flags):
    # Heads are text and at most 64 KiB for a client's; the rest is bytes, and 256 KiB of it are held at a time.
    for size in (8_000, 1 << 16 if isinstance(source, str) else 1 << 18):
        for use in uses_of(source, flags):
            assert_linear(use, adversaries(source, size), 0.05)


HEADS = {
    "request head": lambda text: monorelay.parse_request_head(
        b"GET / HTTP/1.1\r\nHost: a\r\n" + text + b"\r\n\r\n"
    ),
    "response head": lambda text: monorelay.parse_response_head(b"HTTP/1.1 200 OK\r\n" + text + b"\r\n\r\n"),
    "request trailer": lambda text: monorelay.ChunkedDecoder().feed(b"0\r\n" + text + b"\r\n\r\n"),
    "chunk size": lambda text: monorelay.ChunkedDecoder().feed(b"1;" + text + b"\r\n"),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.timed
def test_no_head_takes_long_to_be_read_or_refused(name):
    def read(text: bytes) -> None:
        with contextlib.suppress(monorelay.FramingError, monorelay.MalformedRequest):
            HEADS[name](text)

    for size, seconds in ((4_000, 0.02), (64_000, 0.05)):
        assert_linear(read, adversaries(b'x: "', size), seconds)


@pytest.mark.parametrize(
    ("opening", "piece"),
    [(b"0\r\n", b"a:\r\n"), (b"0\r\n", b"a: b"), (b"1;", b"a"), (b"0\r\na:", b" ")],
    ids=brief,
)
@pytest.mark.timed
def test_chunks_cost_the_same_whether_they_come_whole_or_a_byte_at_a_time(opening, piece):
    data = opening + piece * (8_000 // len(piece))

    def read(size: int) -> float:
        decoder = monorelay.ChunkedDecoder()
        begin = time.process_time()
        with contextlib.suppress(monorelay.FramingError):
            for start in range(0, len(data), size):
                decoder.feed(data[start : start + size])
        return time.process_time() - begin

    # A call takes about a microsecond; looking again at all that came before would take seconds.
    assert min(read(1) for _ in range(3)) < 0.2
    assert min(read(len(data)) for _ in range(3)) < 0.02


def limits(**fields: str) -> dict[str, Any]:
    """What these headers say of limits, their names with _ for -."""
    headers = monorelay.Headers([(name.replace("_", "-"), value) for name, value in fields.items()])
    return monorelay.rate_limits(monorelay.limit_fields(headers), UNIX_TIME)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "anthropic_ratelimit_input_tokens_limit": "1000",
                "anthropic_ratelimit_input_tokens_remaining": "250",
                "anthropic_ratelimit_input_tokens_reset": "2023-11-14T22:13:50Z",
            },
            {"input_tokens": (0.75, 250, 1000, UNIX_TIME + 30)},
        ),
        (
            {
                "anthropic_ratelimit_unified_5h_utilization": "0.97",
                "anthropic_ratelimit_unified_5h_reset": "1700003600",
                "anthropic_ratelimit_unified_5h_status": "allowed",
                "anthropic_ratelimit_unified_status": "allowed",
                "anthropic_ratelimit_unified_reset": "1700003600",
                "anthropic_ratelimit_unified_7d_utilization": "1.04",
            },
            {"unified_5h": (0.97, None, None, UNIX_TIME + 3600), "unified_7d": (1.04, None, None, None)},
        ),
        (
            {
                "x_ratelimit_limit_requests": "60",
                "x_ratelimit_remaining_requests": "0",
                "x_ratelimit_reset_requests": "1m30.5s",
                "x_ratelimit_limit_tokens": "150000",
                "x_ratelimit_remaining_tokens": "149984",
                "x_ratelimit_reset_tokens": "6ms",
            },
            {
                "requests": (1.0, 0, 60, UNIX_TIME + 90.5),
                "tokens": (pytest.approx(16 / 150000), 149984, 150000, pytest.approx(UNIX_TIME + 0.006)),
            },
        ),
        (
            {
                "x_ratelimit_limit_requests": "60",
                "x_ratelimit_remaining_requests": "59",
                "x_ratelimit_reset_requests": "1d2h3m4s",
            },
            {"requests": (pytest.approx(1 / 60), 59, 60, UNIX_TIME + 93784)},
        ),
        (
            {"anthropic_ratelimit_requests_limit": "50", "anthropic_ratelimit_requests_remaining": "70"},
            {"requests": (0.0, 70, 50, None)},
        ),
        ({"anthropic_ratelimit_requests_limit": "50"}, {}),
        ({"anthropic_ratelimit_requests_remaining": "50"}, {}),
        ({"anthropic_ratelimit_requests_limit": "0", "anthropic_ratelimit_requests_remaining": "0"}, {}),
        ({"x_ratelimit_limit": "60", "x_ratelimit_remaining": "3", "ratelimit_limit": "9"}, {}),
        ({}, {}),
    ],
)
def test_what_a_provider_says_of_its_limits(fields, expected):
    found = limits(**fields)
    assert {name: (limit.used, limit.left, limit.of, limit.reset) for name, limit in found.items()} == expected
    assert all(limit.at == UNIX_TIME for limit in found.values())


ODD_NUMBERS = ["", "-1", "1e3", "NaN", "inf", "0x10", "1.5.2", "\u0661", "9" * 400, "1, 2", "+5", " ", "12.", "1_000"]


@pytest.mark.parametrize("value", ODD_NUMBERS)
@pytest.mark.parametrize("part", ["limit", "remaining", "utilization"])
def test_limits_that_are_no_numbers_are_not_told(part, value):
    usual = {"limit": "50", "remaining": "40"}
    fields = {f"anthropic_ratelimit_x_{name}": told for name, told in {**usual, part: value}.items()}
    assert limits(**fields) == (
        {} if part != "utilization" else limits(**{name: told for name, told in fields.items() if part not in name})
    )


@pytest.mark.parametrize(
    "value",
    [
        "",
        "soon",
        "-5",
        "1e9",
        "99999999999999",
        "2023-11-14",
        "2023-11-14T22:13:50",
        "s",
        "m",
        "0001-01-01T00:00:00+23:59",
        "9999-12-31T23:59:59-23:59",
        "1.s",
        "5s3m",
        "\u0661s",
        "Tue, 14 Nov 2023",
    ],
)
def test_a_reset_that_is_no_time_is_unknown(value):
    found = limits(anthropic_ratelimit_x_utilization="0.5", anthropic_ratelimit_x_reset=value)["x"]
    assert found.used == 0.5 and (found.reset is None or abs(found.reset) < 1e12)


@hypothesis.given(
    st.dictionaries(
        st.from_regex(
            r"(anthropic-ratelimit-[a-z0-9-]{1,40}|x-ratelimit-)(limit|remaining|reset|utilization)?(-requests|-tokens)?",
            fullmatch=True,
        ),
        st.text(st.characters(max_codepoint=255), max_size=200),
        max_size=60,
    )
)
def test_no_headers_make_a_fault_or_more_limits_than_a_few(fields):
    found = monorelay.rate_limits(monorelay.limit_fields(monorelay.Headers([*fields.items()])), UNIX_TIME)
    assert len(found) <= monorelay.RATE_LIMIT_FIELDS and all(limit.used >= 0 for limit in found.values())
    json.dumps([limit._asdict() for limit in found.values()], allow_nan=False)


# ------------------------------------------------------------------------------------------------------------
# SSE, as seen through the relay
# ------------------------------------------------------------------------------------------------------------

LINE_ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}
FRAMINGS = {
    "chunked": (STREAM_HEAD, chunk, b"0\r\n\r\n"),
    "close-delimited": (b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n", bytes, b""),
}


def stream_lines(line_end: bytes) -> list[bytes]:
    """The lines of a whole Anthropic stream with a comment and an unknown event in it."""
    text = (
        b"".join(ANTHROPIC_EVENTS[:2])
        + b": a comment\nevent: new\nid: 7\n\n"
        + b"".join(ANTHROPIC_EVENTS[2:])
    )
    return [line + line_end for line in text.split(b"\n")[:-1]]


def test_any_stream_split_anywhere_arrives_byte_for_byte(upstream, relay):
    plan: dict[str, Any] = {}

    def script(connection: Connection) -> None:
        head, frame, end = FRAMINGS[plan["framing"]]
        connection.read_request()
        connection.send(head)
        for piece in plan["pieces"]:
            connection.send(frame(piece))
        connection.send(end)

    it = relay({"anthropic": upstream(script)})

    @hypothesis.given(
        st.lists(st.tuples(st.binary(max_size=12), st.sampled_from(sorted(LINE_ENDS.values()))), max_size=12),
        st.sampled_from(sorted(LINE_ENDS.values())),
        st.lists(st.integers(0, 400), max_size=12),
        st.sampled_from(sorted(FRAMINGS)),
    )
    def check(lines: list[tuple[bytes, bytes]], end: bytes, cuts: list[int], framing: str) -> None:
        opening = b"event: message_start" + end
        text = opening + b"".join(map(b"".join, lines)) + ANTHROPIC_EVENTS[-1].replace(b"\n", end)
        edges = [0, *sorted({min(cut, len(text)) for cut in cuts} - {0, len(text)}), len(text)]
        plan.update(pieces=[text[a:b] for a, b in zip(edges, edges[1:])], framing=framing)
        got = it.post("/v1/messages", STREAMED)
        assert (got.status, got.body) == (200, text)

    check()


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("end", LINE_ENDS)
def test_every_line_reaches_the_client_before_upstream_has_sent_the_next(upstream, relay, end, framing):
    lines = stream_lines(LINE_ENDS[end])
    gates = [threading.Event() for _ in lines]
    with relay({"anthropic": upstream(gated_pieces(lines, gates, *FRAMINGS[framing]))}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        assert Message(client.until(b"\r\n\r\n"), b"").status == 200
        received = b""
        for number, (line, gate) in enumerate(zip(lines, gates), 1):
            while len(received) < sum(map(len, lines[:number])):
                received += client.chunk()
            assert received.endswith(line)
            gate.set()
        assert client.chunk() == b""
    assert received == b"".join(lines)


@pytest.mark.parametrize(
    "line",
    [b"", b": bye", b"event: message_stop", b"data: [DONE]", b"data: [DO", b"data: words {", b'id: {"a"', b'{"a":',
     b"data: {}", b'data:{"a":"\xc3\xa9"} ', b'data: {"a":%s}' % (b"9" * 5000)],
    ids=brief,
)  # fmt: skip
def test_a_last_line_that_is_whole_or_no_json_object_is_not_cut_off(line):
    assert not monorelay.is_cut_off(line)


@pytest.mark.parametrize("line", [b'data: {"a":"\xc3\xa9","b":[1.5e3,{"c":null}]}', b'data:{"a":%s' % (b"[" * 100_000)],
                         ids=brief)  # fmt: skip
def test_a_last_line_is_cut_off_wherever_its_object_ends_too_early(line):
    for end in {*range(line.index(b"{") + 1, min(len(line), 60)), len(line) - 1}:
        assert monorelay.is_cut_off(line[:end])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_an_event_stream_is_told_to_proxies_as_one(upstream, relay, path):
    openai_path = path.endswith("completions")
    it = relay(
        {
            "openai" if openai_path else "anthropic": upstream(
                OPENAI_STREAM if openai_path else ANTHROPIC_STREAM
            )
        }
    )
    got = it.post(path, chat(stream=True) if openai_path else prompt(stream=True))
    assert got.body == b"".join(OPENAI_EVENTS if openai_path else ANTHROPIC_EVENTS)
    assert got.get("content-type") == "text/event-stream" and got.get("content-length") is None
    assert (got.get("x-accel-buffering"), got.get("cache-control")) == ("no", "no-cache")


def test_a_line_over_64_kib_goes_out_in_pieces(upstream, relay):
    gate, line = threading.Event(), b"data: " + b"x" * 200_000

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(b"event: message_start\n"), chunk(line))
        connection.wait(gate)
        connection.send(chunk(b"\n\n" + ANTHROPIC_EVENTS[-1]), chunked())

    with relay({"anthropic": upstream(script)}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"\r\n\r\n")
        received = b""
        while len(received) < 1 << 16:
            received += client.chunk()
        gate.set()
        received += b"".join(iter(client.chunk, b""))
    assert received == b"event: message_start\n" + line + b"\n\n" + ANTHROPIC_EVENTS[-1]


def resident_bytes() -> int:
    """The memory of this process: relay, provider and client together."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_line_of_100_megabytes_is_relayed_in_bounded_memory(upstream, relay):
    piece = chunk(b"x" * (1 << 20))

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(b"event: message_start\ndata: "))
        for _ in range(100):
            connection.send(piece)
        connection.send(chunked(b"\n\n" + ANTHROPIC_EVENTS[-1]))

    with relay({"anthropic": upstream(script)}).client() as client:
        before = peak = resident_bytes()
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"\r\n\r\n")
        length = 0
        for number, data in enumerate(iter(client.chunk, b"")):
            length += len(data)
            if number % 64 == 0:
                peak = max(peak, resident_bytes())
    assert length == len(b"event: message_start\ndata: ") + 100 * (1 << 20) + 2 + len(ANTHROPIC_EVENTS[-1])
    assert peak - before < 24 << 20


def chunks(*documents: Any) -> bytes:
    """An OpenAI stream of these chunks."""
    return b"".join(b"data: " + json.dumps(document).encode() + b"\n\n" for document in documents) + b"data: [DONE]\n\n"


CACHED = {
    "input_tokens": 10,
    "output_tokens": 1,
    "cache_read_input_tokens": 500,
    "cache_creation_input_tokens": 70,
    "cache_creation": {"ephemeral_5m_input_tokens": 30, "ephemeral_1h_input_tokens": 40},
    "service_tier": "standard",
    "inference_geo": "us",
}
STEPS = [
    {"type": "message", "input_tokens": 3, "output_tokens": 20, "model": "claude-test"},
    {"type": "compaction", "input_tokens": 900, "output_tokens": 80, "cache_read_input_tokens": 7},
]
CHAT_USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 9,
    "total_tokens": 109,
    "prompt_tokens_details": {"cached_tokens": 60, "cache_write_tokens": 15, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 5},
}
RESPONSES_USAGE = {
    "input_tokens": 100,
    "output_tokens": 9,
    "total_tokens": 109,
    "input_tokens_details": {
        "cached_tokens": 60,
        "cache_write_tokens": 15,
        "cache_write_tokens_details": {"ttl_12h_tokens": 4},
    },
    "output_tokens_details": {"reasoning_tokens": 5},
}
DECOY = {"usage": {"input_tokens": 666_000, "output_tokens": 666_000, "service_tier": "priority"}}
SAID = f'in the text: {json.dumps(DECOY)} "usage":{{'
CALLED = {"type": "tool_use", "id": "t", "name": "f", "input": {**DECOY, "deep": [DECOY]}}
DELTA = {"stop_reason": "stop_sequence", "stop_sequence": "content_block"}  # as its client has asked for


def whole_message(usage: Any, *content: Any) -> dict[str, Any]:
    """An Anthropic message."""
    return {**MESSAGE, "content": [{"type": "text", "text": SAID}, *content], "usage": usage}


def message_stream(first: Any, last: Any, *blocks: Any) -> bytes:
    """An Anthropic stream whose first and last events tell such a usage."""
    events = [sse("message_start", message={**MESSAGE, "usage": first})]
    for index, block in enumerate(blocks):
        events += [
            sse("content_block_start", index=index, content_block=block),
            sse("content_block_delta", index=index, delta={"type": "text_delta", "text": SAID}),
        ]
    return b"".join([*events, sse("message_delta", delta=DELTA, usage=last), sse("message_stop")])


def whole_chat(**fields: Any) -> dict[str, Any]:
    message = {
        "role": "assistant",
        "content": SAID,
        "tool_calls": [{"id": "t", "type": "function", "function": {"name": "f", "arguments": json.dumps(DECOY)}}],
    }
    return {"id": "c1", "object": "chat.completion", "choices": [{"index": 0, "message": message}], **fields}


# It comes back in the answer, where a client would rather have its own figures read.
FREE = {"prompt_tokens": 0, "completion_tokens": 0, "service_tier": "batch", "iterations": [{"input_tokens": 0}]}
DECOYS = {"content_block": {}, "message_start": {"type": "message_start"}, "usage": {"type": "object", **FREE}}
SCHEMA = {"type": "function", "name": "f", "parameters": {"properties": DECOYS}}


def whole_response(**fields: Any) -> dict[str, Any]:
    output = [{"type": "message", "content": [{"type": "output_text", "text": SAID}]}]
    tier = {"service_tier": fields.pop("service_tier")} if "service_tier" in fields else {}
    named = {f"k{number}": "usage" for number in range(16)}  # as many as OpenAI takes
    return {"id": "r1", "object": "response", "output": output, **tier, "tools": [SCHEMA], **fields, "user": None,
            "metadata": named}  # fmt: skip


def response_events(usage: Any, tier: str) -> bytes:
    began = {"type": "response.created", "response": whole_response(usage=None, service_tier="auto")}
    done = {"type": "response.completed", "response": whole_response(usage=usage, service_tier=tier)}
    return b"".join(
        b"event: %s\ndata: %s\n\n" % (one["type"].encode(), json.dumps(one).encode()) for one in (began, done)
    )


CHOICE = {"choices": [{"index": 0, "delta": {"content": SAID}, "finish_reason": None}]}
UNKNOWN = (None, None, None, None, None)
# Path, the answer, and what the ledger has of it: input, cache_read, cache_write, cache_write_long, output, tier.
USAGE_TOLD: dict[str, tuple[str, Any, tuple[Any, ...], str | None]] = {
    "a message": ("/v1/messages", whole_message({"input_tokens": 25, "output_tokens": 3}), (25, 0, 0, 0, 3), None),
    "cache lifetimes": ("/v1/messages", whole_message({**CACHED, "output_tokens": 9}), (10, 500, 30, 40, 9), None),
    "a cache without lifetimes": (
        "/v1/messages",
        whole_message({name: count for name, count in CACHED.items() if name != "cache_creation"}),
        (10, 500, 70, 0, 1),
        None,
    ),
    "a decoy in a tool's input": (
        "/v1/messages",
        whole_message({"input_tokens": 25, "output_tokens": 3}, CALLED),
        (25, 0, 0, 0, 3),
        None,
    ),
    "totals before iterations": (
        "/v1/messages",
        whole_message({"input_tokens": 3, "output_tokens": 550, "service_tier": "batch", "iterations": STEPS}),
        (3, 0, 0, 0, 550),
        "batch",
    ),
    "totals behind iterations": (
        "/v1/messages",
        whole_message({"iterations": STEPS, "output_tokens": 550, "input_tokens": 3, "service_tier": "priority"}),
        (3, 0, 0, 0, 550),
        "priority",
    ),
    "a message without usage": ("/v1/messages", {**MESSAGE, "usage": None}, UNKNOWN, None),
    "a usage over 16 KiB": (
        "/v1/messages",
        whole_message({"x": "x" * 20_000, "input_tokens": 25, "output_tokens": 3}),
        UNKNOWN,
        None,
    ),
    "a stream": (
        "/v1/messages",
        message_stream({"input_tokens": 25, "output_tokens": 1}, {"output_tokens": 12}, {"type": "text", "text": ""}),
        (25, 0, 0, 0, 12),
        None,
    ),
    "a stream's cache lifetimes": (
        "/v1/messages",
        message_stream(
            CACHED,
            {
                "input_tokens": 10,
                "cache_creation_input_tokens": 75,
                "cache_read_input_tokens": 500,
                "output_tokens": 12,
            },
        ),
        (10, 500, 35, 40, 12),
        None,
    ),
    "a stream's iterations": (
        "/v1/messages",
        message_stream({"input_tokens": 3, "output_tokens": 1}, {"output_tokens": 550, "iterations": STEPS}),
        (3, 0, 0, 0, 550),
        None,
    ),
    "a decoy in a stream's tool": (
        "/v1/messages",
        message_stream({"input_tokens": 25, "output_tokens": 1}, {"output_tokens": 12}, CALLED),
        (25, 0, 0, 0, 12),
        None,
    ),
    "a chat": ("/v1/chat/completions", whole_chat(usage=CHAT_USAGE, service_tier="flex"), (25, 60, 15, 0, 9), "flex"),
    "a chat's tier before": (
        "/v1/chat/completions",
        whole_chat(service_tier="default", usage=CHAT_USAGE),
        (25, 60, 15, 0, 9),
        None,
    ),
    "a chat without usage": ("/v1/chat/completions", whole_chat(), UNKNOWN, None),
    "a completion": (
        "/v1/completions",
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2}},
        (4, 0, 0, 0, 2),
        None,
    ),
    "an embedding": (
        "/v1/embeddings",
        {"data": [], "usage": {"prompt_tokens": 4, "total_tokens": 4}},
        (4, 0, 0, 0, 0),
        None,
    ),
    "a chat's stream": (
        "/v1/chat/completions",
        chunks({**CHOICE, "usage": None}, {"choices": [], "usage": CHAT_USAGE, "service_tier": "priority"}),
        (25, 60, 15, 0, 9),
        "priority",
    ),
    "a chat that counts its reasoning apart, as xAI's": (
        "/v1/chat/completions",
        whole_chat(usage={"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115,
                          "completion_tokens_details": {"reasoning_tokens": 100}}),
        (10, 0, 0, 0, 105),
        None,
    ),
    "a chat's stream without usage": ("/v1/chat/completions", chunks({**CHOICE, "usage": None}, CHOICE), UNKNOWN, None),
    "a chat's stream with usage in each chunk": (
        "/v1/chat/completions",
        chunks(*({**CHOICE, "usage": {"prompt_tokens": 4, "completion_tokens": n}} for n in range(40))),
        (4, 0, 0, 0, 39),
        None,
    ),
    "a response": (
        "/v1/responses",
        whole_response(usage=RESPONSES_USAGE, service_tier="scale"),
        (25, 60, 11, 4, 9),
        "scale",
    ),
    "a response's stream": ("/v1/responses", response_events(RESPONSES_USAGE, "flex"), (25, 60, 11, 4, 9), "flex"),
    "a response's long tools": (
        "/v1/responses",
        whole_response(service_tier="flex", instructions="long " * 30_000, usage=RESPONSES_USAGE),
        (25, 60, 11, 4, 9),
        "flex",
    ),
}


def told_in_pieces(body: bytes, is_stream: bool, cuts: list[int], by_line: bool = True) -> Any:
    """What is read of a body that arrives cut at these places; `by_line`: of a stream that is passed on so, and not
    translated."""
    usage, lines = monorelay.Usage(), monorelay.LineSplitter()
    for start, end in zip([0, *cuts], [*cuts, len(body)]):
        piece = body[start:end]
        usage.read(lines.feed(piece) if is_stream and by_line else piece, is_stream)
    usage.read(lines.flush(), is_stream)
    return usage.used


@pytest.mark.parametrize("name", USAGE_TOLD)
def test_what_an_answer_says_was_used_is_told_as_it_says(upstream, relay, name):
    path, said, tokens, tier = USAGE_TOLD[name]
    is_stream = isinstance(said, bytes)
    sent = STREAM_HEAD + chunked(said) if is_stream else answer(200, json.dumps(said).encode())
    it = relay({"openai" if "messages" not in path else "anthropic": upstream(sent)})
    assert it.post(path, prompt("m", stream=is_stream)).status == 200
    row = eventually(lambda: it.server.service.tally.ended)[0]
    assert (row.input, row.cache_read, row.cache_write, row.cache_write_long, row.output) == tokens
    assert (row.tier, row.stream, row.complete, row.status, row.error) == (tier, is_stream, 1, 200, None)
    line = it.logged(path)
    assert ("input=" in line) == (tokens is not UNKNOWN) and (tokens is UNKNOWN or f" output={tokens[4]}" in line)


@pytest.mark.parametrize("name", USAGE_TOLD)
def test_what_was_used_is_the_same_however_an_answer_arrives(name):
    _, said, tokens, tier = USAGE_TOLD[name]
    is_stream = isinstance(said, bytes)
    for body in [said] if is_stream else [json.dumps(said).encode(), json.dumps(said, indent=1).encode()]:
        begins = body.find(b'"usage"')
        bytewise = list(range(1, len(body))) if len(body) < 6000 else list(range(begins - 60, len(body)))
        ways = [[], bytewise, *([cut] for cut in range(max(1, begins - 60), min(len(body), begins + 600)))]
        for cuts in ways:
            for by_line in (True, False):
                used = told_in_pieces(body, is_stream, cuts, by_line)
                assert used[:5] == tokens and (used.tier or None) == tier, cuts[:5]


@hypothesis.given(st.sampled_from(sorted(USAGE_TOLD)), st.data())
def test_what_was_used_is_the_same_wherever_an_answer_is_cut(name, data):
    _, said, tokens, tier = USAGE_TOLD[name]
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(body) - 1), max_size=12)))
    for by_line in (True, False):
        used = told_in_pieces(body, isinstance(said, bytes), cuts, by_line)
        assert used[:5] == tokens and (used.tier or None) == tier


def test_the_steps_of_a_stream_are_charged_by_their_own_models(upstream, relay):
    steps = [{**STEPS[0], "model": "dear"}, {**STEPS[1], "model": "cheap"}]
    stream = message_stream({"input_tokens": 3, "output_tokens": 1}, {"output_tokens": 20, "iterations": steps})
    it = relay(
        {"anthropic": upstream(STREAM_HEAD + chunked(stream))},
        prices={"dear": {"input": 10, "output": 100}, "cheap": {"input": 1, "output": 2, "cache_read": 0}},
    )
    it.post("/v1/messages", prompt("dear", stream=True))
    row = eventually(lambda: it.server.service.tally.ended)[0]
    assert (row.output, row.cost) == (20, (3 * 10 + 20 * 100 + 900 * 1 + 80 * 2) * 1000)


def test_what_message_start_says_of_the_output_is_no_figure(upstream, relay):
    """The client leaves before message_delta: what is known is kept, with its cost, and the rest is unknown."""
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate))}, prices={"*": {"input": 2, "output": 8}})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(ANTHROPIC_EVENTS[0])
    row = eventually(lambda: it.server.service.tally.ended)[0]
    gate.set()
    assert (row.input, row.output, row.complete, row.error, row.untold) == (25, None, 0, "client_gone", True)
    assert row.cost == 25 * 2000 and not row.failed
    assert not it.server.service.tally.refused, "a client that leaves is refused nothing"
    line = it.logged("client_gone")
    assert " input=25" in line and "output=" not in line


def test_counting_tokens_is_no_use_of_a_model(upstream, relay):
    it = relay({"anthropic": upstream(answer(200, b'{"input_tokens":9,"usage":{"input_tokens":9,"output_tokens":1}}'))})
    assert it.post("/v1/messages/count_tokens", prompt()).status == 200
    assert "tokens" not in it.logged("/v1/messages/count_tokens").replace("count_tokens", "")
    it.post("/v1/messages", prompt())
    rows = eventually(lambda: it.server.service.tally.ended)
    assert [row.path for row in rows] == ["/v1/messages"]


EVIL_USAGES = {
    "openings": b'"usage":{' * 8000,
    "nested objects": b'"usage":{"x":' * 5000,
    "a long list": b'"usage":{"a":[' + b"1," * 30_000,
    "many digits": b'"usage":{"input_tokens":' + b"9" * 60_000,
    "lists within lists": b'"usage":{"a":' + b"[" * 60_000,
    "an endless string": b'"usage":{"a":"' + b"\\u0041" * 10_000,
    "whole ones": b'"usage":{"input_tokens":1},' * 2500,
    "tiers": b'"service_tier":"flex",' * 3000,
    "tiers and openings": b'"service_tier":"flex","usage":{' * 2000,
    "blanks": b'"usage" ' * 8000,
    "one line of stream": b"data: " + b'"usage":{"x":1},' * 4000 + b"\n",
}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("name", EVIL_USAGES)
@pytest.mark.timed
def test_no_answer_makes_it_dear_to_look_what_was_used(name, is_stream):
    """Neither when it comes at once nor byte by byte; and little of it is held."""
    usage = monorelay.Usage()
    begin = time.process_time()
    usage.read(EVIL_USAGES[name], is_stream)
    assert time.process_time() - begin < 0.05
    assert len(usage._held) <= monorelay.USAGE_BYTES
    assert seconds_each(lambda: usage.read(b"1", is_stream), 20) < 0.005
    assert len(usage._held) <= monorelay.USAGE_BYTES + 200
    usage.read(b'\n,"usage":{"input_tokens":7,"output_tokens":8}}\n', is_stream)
    assert usage.used[::4][:2] == (7, 8)


# ------------------------------------------------------------------------------------------------------------
# Formats: requests and answers in the other chat format, without any socket
# ------------------------------------------------------------------------------------------------------------


def events_of(body: bytes) -> list[tuple[str, Any]]:
    """The (event, data) pairs of a stream, without its comments."""
    pairs = []
    for block in body.decode().split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        pairs.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return pairs


TOOL = {
    "name": "look",
    "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}


def target_of(format: str = "openai", host: str = "127.0.0.1", **settings: Any) -> Any:
    """A target whose provider speaks the format, with the settings of its `translate`."""
    provider = {"format": format, "base_url": f"http://{host}/v1", "translate": settings or True}
    config = monorelay.parse_config(json.dumps({"providers": {"acme": provider}}), {})
    return monorelay.Target(config.providers["acme"], "model-upstream")


def translated(request: dict[str, Any], target: Any = None, raw: bytes = b"") -> tuple[dict[str, Any], Any]:
    """The request as the provider gets it, and what else is known of it."""
    body = raw or json.dumps(request).encode()
    made = monorelay.translate_request([body], 0, target or target_of(), "model-asked", "req_1", 7.5)
    return json.loads(b"".join(made.body)), made


def to_chat(target: Any = None, **fields: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A request of Messages with these fields as the provider gets it, and what was left out."""
    body, made = translated(prompt(**fields), target)
    assert made.path == "/chat/completions"
    return body, made.dropped


def to_messages(target: Any = None, **fields: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A chat request with these fields as the provider gets it, and what was left out."""
    body, made = translated(chat(**fields), target or target_of("anthropic"))
    assert made.path == "/messages"
    return body, made.dropped


def not_translated(made: Callable[[], object]) -> str:
    """Why a request isn't translated."""
    with pytest.raises(monorelay.BadRequest) as caught:
        made()
    return caught.value.message


def user(*blocks: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def assistant(*blocks: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(blocks)}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def tool_use(id: str, name: str = "look", **given: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": id, "name": name, "input": given}


def tool_result(id: str, content: Any = None, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": id, **({} if content is None else {"content": content}), **more}


def image_part(data: str = "AAAA") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


HELLO = {"role": "user", "content": "Hello there"}
CALLS = [HELLO, assistant(said("Looking. "), tool_use("toolu_1", at="door"), tool_use("toolu_2"))]
PDF = {"type": "base64", "media_type": "application/pdf", "data": "JVBERg=="}


def test_q1_system_blocks_become_one_text_without_the_billing_line():
    blocks = [said("x-anthropic-billing-header: v=1"), said("You", cache_control={"type": "ephemeral"}), said("look.")]
    body, dropped = to_chat(system=blocks)
    assert body["messages"] == [{"role": "system", "content": "You\n\nlook."}, HELLO] and dropped == ()
    assert to_chat(system="")[0]["messages"] == [HELLO]
    assert to_chat(system="Be.")[0]["messages"][0] == {"role": "system", "content": "Be."}


def test_q2_and_q3_results_come_first_and_their_pictures_behind_all_of_them():
    results = [tool_result("toolu_1", [said("a"), IMAGE, said("b")]), tool_result("toolu_2", "open")]
    body, _ = to_chat(messages=[*CALLS, user(said("And?"), results[0], IMAGE, results[1])])
    assert body["messages"][2:] == [
        {"role": "tool", "tool_call_id": "toolu_1", "content": "a\n\nb"},
        {"role": "tool", "tool_call_id": "toolu_2", "content": "open"},
        user(said("[tool result toolu_1]"), image_part(), said("And?"), image_part()),
    ]
    alone = [HELLO, assistant(tool_use("t1")), user(tool_result("t1", [IMAGE]))]
    assert to_chat(messages=alone)[0]["messages"][2:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "(see the next message)"},
        user(image_part()),
    ]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (tool_result("t1", "no such door", is_error=True), "Error: no such door"),
        (tool_result("t1", "Error: no", is_error=True), "Error: no"),
        (tool_result("t1", "ErrorLog.txt isn't there", is_error=True), "Error: ErrorLog.txt isn't there"),
        (tool_result("t1", is_error=True), "Error"),
        (tool_result("t1"), ""),
        (tool_result("t1", []), ""),
        (tool_result("t1", [{"type": "tool_reference", "tool_name": "dig"}]), "Tool available: dig"),
        (
            tool_result("t1", [{"type": "search_result", "title": "T", "source": "S", "content": [said("x")]}]),
            "T\n\nS\n\nx",
        ),
        (tool_result("t1", [{"type": "document", "source": {"type": "text", "data": "d"}}]), "d"),
    ],
)
def test_q4_and_q5_what_a_tool_returned_is_text(result, told):
    body, _ = to_chat(messages=[HELLO, assistant(tool_use("t1")), user(result)])
    assert body["messages"][2:] == [{"role": "tool", "tool_call_id": "t1", "content": told}]


def test_q6_to_q8_an_assistants_turn_is_one_message():
    results = user(tool_result("toolu_1", "x"), tool_result("toolu_2", "y"))
    message = to_chat(messages=[*CALLS, results])[0]["messages"][1]
    assert message["content"] == "Looking. " and [call["id"] for call in message["tool_calls"]] == [
        "toolu_1",
        "toolu_2",
    ]
    assert [json.loads(call["function"]["arguments"]) for call in message["tool_calls"]] == [{"at": "door"}, {}]
    only_calls = [HELLO, assistant(tool_use("t1")), user(tool_result("t1"))]
    assert to_chat(messages=only_calls)[0]["messages"][1]["content"] is None
    thought = {"type": "thinking", "thinking": "hm", "signature": "foreign"}
    only_thought = [HELLO, assistant(thought), assistant({"type": "redacted_thinking", "data": "x"}), HELLO]
    body, dropped = to_chat(messages=only_thought)
    assert body["messages"] == [HELLO, {"role": "assistant", "content": ""}, HELLO] and dropped == ()


def test_q9_thinking_goes_back_to_the_provider_that_thought_it():
    own = {"type": "thinking", "thinking": "hm", "signature": monorelay.thinking_signature("acme", "")}
    kept = {"type": "thinking", "thinking": "", "signature": monorelay.thinking_signature("acme", "hidden")}
    other = {"type": "thinking", "thinking": "hm", "signature": monorelay.thinking_signature("other", "")}
    broken = {"type": "thinking", "thinking": "hm", "signature": "mr1.AAAA"}
    turns = [HELLO]
    for block in (own, kept, other, broken):
        turns += [assistant(block, said("so")), HELLO]

    def told(knob: str) -> list[Any]:
        body, _ = to_chat(target_of(reasoning_back=knob), messages=turns)
        return [message.get(knob) for message in body["messages"] if message["role"] == "assistant"]

    assert told("reasoning_content") == ["hm", "hidden", " ", " "]
    assert told("reasoning") == ["hm", "hidden", None, None]
    assert told("none") == [None] * 4


def forged(text: str) -> dict[str, Any]:
    """Thinking whose signature carries a text that this relay didn't put there."""
    return {"type": "thinking", "thinking": "", "signature": "mr1." + monorelay.base64url(text.encode())}


@pytest.mark.parametrize(
    "text", ["[]", "7", '{"p":7}', '{"p":"acme","x":[]}', '{"p":"acme","x":' + "9" * 5000 + "}"], ids=brief
)
def test_q9_what_is_no_thinking_of_ours_is_left_out(text):
    body, dropped = to_chat(messages=[HELLO, assistant(forged(text), said("so")), HELLO])
    assert body["messages"][1] == {"role": "assistant", "content": "so"} and dropped == ()


@pytest.mark.parametrize(
    "text",
    ["[" + "0," * 90_000 + "0]", '{"a":[' + "0," * 90_000 + '"\\u0061"]}', '"' + "\\n" * 700_000 + '"'],
    ids=brief,
)
def test_json_within_strings_may_have_as_many_values_as_a_body(text):
    """All such strings of a request together."""
    thoughts, calls = [forged(text)] * 3, [called(str(number), text) for number in range(3)]
    told = "more than 250000 values or 2000000 escapes aren't translated"
    assert not_translated(lambda: to_chat(messages=[HELLO, assistant(*thoughts, said("so")), HELLO])) == told
    if text.startswith("{"):
        body, _ = to_messages(messages=[HELLO, assistant_said(None, *calls[:2])])
        assert body["messages"][1]["content"][1]["input"] == json.loads(text)
        assert not_translated(lambda: to_messages(messages=[HELLO, assistant_said(None, *calls)])) == told


@pytest.mark.parametrize(
    ("choice", "written"),
    [
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
        ({"type": "tool", "name": "look"}, {"type": "function", "function": {"name": "look"}}),
    ],
)
def test_q10_tool_choice_has_its_word(choice, written):
    body, _ = to_chat(tools=[TOOL], tool_choice=choice)
    assert body["tool_choice"] == written and "parallel_tool_calls" not in body
    for tools in ({}, {"tools": []}):
        fields = {**tools, "tool_choice": {**choice, "disable_parallel_tool_use": True}}
        if choice["type"] in ("any", "tool"):
            told = not_translated(lambda fields=fields: to_chat(**fields))
            assert told.startswith("tool_choice: a call of a tool that isn't offered can't be sent")
        else:
            assert not {"tools", "tool_choice", "parallel_tool_calls"} & set(to_chat(**fields)[0])


def test_q11_parallel_calls_can_be_switched_off_and_never_on():
    def parallel(**choice: Any) -> Any:
        return to_chat(tools=[TOOL], tool_choice=choice)[0].get("parallel_tool_calls")

    assert parallel(type="auto", disable_parallel_tool_use=True) is False
    assert parallel(type="auto", disable_parallel_tool_use=False) is None
    assert parallel(type="none", disable_parallel_tool_use=True) is None


WEB_SEARCH = {"type": "web_search_20250305", "name": "web_search"}
UPLOAD = {"type": "container_upload", "file_id": "f"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"stop_sequences": list("abcde")}, "stop_sequences: more than 4 of them", id="q12"),
        pytest.param({"tools": [WEB_SEARCH]}, "tools.0: a tool of the type web_search_20250305", id="q13"),
        pytest.param(
            {"tools": [TOOL, {"type": "bash_20250124", "name": "bash"}]},
            "tools.1: a tool of the type bash_20250124",
            id="bash",
        ),
        pytest.param({"tool_choice": {"type": "some"}}, "tool_choice: the type some", id="choice"),
        pytest.param(
            {"messages": [user({"type": "document", "source": {"type": "url", "url": "u"}})]},
            "messages.0.content.0: a document with a source of the type url",
            id="q17",
        ),
        pytest.param(
            {"messages": [user({"type": "image", "source": {"type": "file", "file_id": "f"}})]},
            "messages.0.content.0: an image with a source of the type file",
            id="file",
        ),
        pytest.param(
            {"messages": [HELLO, assistant(said("{"))]}, "messages: a final assistant message (prefill)", id="q18"
        ),
        pytest.param(
            {"messages": [HELLO, user(said("a"), {"type": "hologram"})]},
            "messages.1.content.1: a block of the type hologram",
            id="q19",
        ),
        pytest.param(
            {"messages": [HELLO, assistant({"type": "hologram"}), HELLO]},
            "messages.1.content.0: a block of the type hologram",
            id="q19-assistant",
        ),
        pytest.param(
            {"messages": [user(UPLOAD)]}, "messages.0.content.0: a block of the type container_upload", id="upload"
        ),
        pytest.param(
            {"messages": [user({"type": "web_search_tool_result", "tool_use_id": "s"})]},
            "messages.0.content.0: a block of the type web_search_tool_result",
            id="server-result",
        ),
        pytest.param({"messages": [{"role": "judge", "content": "x"}]}, "messages.0.role: the role judge", id="role"),
        pytest.param(
            {"messages": [HELLO, assistant({**tool_use("t"), "input": [1]}), HELLO]},
            "messages.1.content.0.input: what is no object",
            id="input",
        ),
        pytest.param({"max_tokens": 0}, "max_tokens: 0", id="prewarm"),
        pytest.param({"mcp_servers": [{"url": "x"}]}, "mcp_servers: this field", id="mcp"),
        pytest.param({"container": "c"}, "container: this field", id="container"),
        pytest.param({"fallbacks": [{"model": "m"}]}, "fallbacks: this field", id="fallbacks"),
        pytest.param(
            {"output_config": {"format": {"type": "regex"}}}, "output_config.format: the type regex", id="form"
        ),
    ],
)
def test_what_chat_cannot_say_is_refused_by_field_and_provider(fields, words):
    assert not_translated(lambda: to_chat(**fields)) == f"{words} can't be sent to the provider acme (OpenAI format)"


def test_calls_and_results_must_pair_as_anthropic_has_it():
    missing = [*CALLS, user(tool_result("toolu_2", "x"))]
    told = "messages.2: `tool_use` ids were found without `tool_result` blocks immediately after: toolu_1"
    assert not_translated(lambda: to_chat(messages=missing)) == told
    surplus = [*CALLS, user(tool_result("toolu_1"), tool_result("toolu_2"), tool_result("toolu_3"))]
    assert "messages.2.content.2: unexpected `tool_use_id`" in not_translated(lambda: to_chat(messages=surplus))
    twice = [*CALLS, user(tool_result("toolu_1"), tool_result("toolu_2"), tool_result("toolu_2"))]
    assert "messages.2.content.2: unexpected" in not_translated(lambda: to_chat(messages=twice))
    long = "toolu_x" + "A" * 100_000
    assert len(not_translated(lambda: to_chat(messages=[*CALLS, user(tool_result(long))]))) < 1000
    assert len(not_translated(lambda: to_messages(messages=[HELLO, returned(long)]))) < 1000
    assert "at most" in not_translated(lambda: to_chat(messages=[*CALLS, user(tool_result(long + long))]))


def test_q14_a_long_name_goes_there_and_back():
    name = "mcp__" + "server" * 9 + "__tool.with dots"
    history = [HELLO, assistant(tool_use("t1", name)), user(tool_result("t1"))]
    fields = {"tools": [{**TOOL, "name": name}], "tool_choice": {"type": "tool", "name": name}, "messages": history}
    body, made = translated(prompt(**fields))
    sent = body["tools"][0]["function"]["name"]
    assert re.fullmatch(r"[a-zA-Z0-9_-]{64}", sent) and sent[:55] == name[:55]
    assert body["tool_choice"]["function"]["name"] == sent
    assert body["messages"][1]["tool_calls"][0]["function"]["name"] == sent
    answer = whole_answer(made.asked, completion(calls=[call(0, "c1", sent, "{}")], finish="tool_calls"))
    assert answer["content"][0]["name"] == name


def test_q14_names_are_bounded_in_length_and_those_that_are_changed_in_number():
    def odd(count: int) -> dict[str, Any]:
        return {"tools": [{**TOOL, "name": f"a.{number}"} for number in range(count)]}

    _, made = translated(prompt(**odd(1000)))
    assert len(made.asked.names) == 1000
    assert "more than 1000 names" in not_translated(lambda: to_chat(**odd(1001)))
    assert len(to_chat(tools=[{**TOOL, "name": f"a{number}"} for number in range(1001)])[0]["tools"]) == 1001
    long = "a" * 257
    for made_of in (
        lambda: to_chat(messages=[HELLO, assistant(tool_use("c1", long)), user(tool_result("c1"))]),
        lambda: to_messages(messages=[HELLO, assistant_said(None, called("c1", name=long)), returned("c1")]),
    ):
        assert not_translated(made_of).startswith("tools: a name of more than 256 characters can't be sent to")


def test_q15_the_systems_later_words_part_no_call_from_its_result():
    turns = [
        *CALLS,
        {"role": "system", "content": "Mind."},
        user(tool_result("toolu_1"), tool_result("toolu_2"), said("?")),
        {"role": "system", "content": [said("Last.")]},
    ]

    def roles(knob: str) -> list[tuple[str, Any]]:
        body, _ = to_chat(target_of(system_turns=knob), system="First.", messages=turns)
        return [
            (message["role"], message["content"])
            for message in body["messages"]
            if message["role"] in ("system", "user")
        ]

    assert roles("keep") == [
        ("system", "First."),
        ("user", "Hello there"),
        ("system", "Mind."),
        ("user", "?"),
        ("system", "Last."),
    ]
    assert roles("lead") == [("system", "First.\n\nMind.\n\nLast."), ("user", "Hello there"), ("user", "?")]
    mind, last = (f"<system-reminder>\n{text}\n</system-reminder>" for text in ("Mind.", "Last."))
    assert roles("user") == [("system", "First."), ("user", "Hello there"), ("user", f"{mind}\n\n?\n\n{last}")]
    body, _ = to_chat(messages=turns)
    assert [message["role"] for message in body["messages"]] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "system",
        "user",
        "system",
    ]


def test_q16_a_schema_stays_as_it_is_but_for_what_servers_stumble_over():
    schema = {
        "$defs": {"a": {"$schema": "kept"}},
        "anyOf": [{"type": "object"}],
        "additionalProperties": {},
        "format": "uri",
    }
    body, dropped = to_chat(
        tools=[
            {
                "name": "t",
                "input_schema": {**schema, "$schema": "x", "required": None},
                "strict": True,
                "cache_control": {},
                "defer_loading": True,
                "input_examples": [{}],
            }
        ]
    )
    assert body["tools"] == [
        {
            "type": "function",
            "function": {"name": "t", "parameters": {**schema, "type": "object", "properties": {}}, "strict": True},
        }
    ]
    assert dropped == ("tools.input_examples",)
    for callers, named in ((["direct"], ()), (["direct", "code_execution_20250825"], ("tools.allowed_callers",))):
        assert to_chat(tools=[{**TOOL, "allowed_callers": callers}])[1] == named
    for gemini in ({"const": 1, "type": "object"}, {"properties": {"const": {"const": 1, "type": "string"}}}):
        target = target_of(host="generativelanguage.googleapis.com")
        parameters = to_chat(target, tools=[{"name": "t", "input_schema": gemini}])[0]["tools"][0]["function"][
            "parameters"
        ]
        names = {"const": {"type": "string"}} if "properties" in gemini else {}
        assert parameters == {"type": "object", "properties": names}


def test_q17_documents_become_files_and_texts():
    blocks = [
        {"type": "document", "source": PDF, "title": "a.pdf"},
        {"type": "document", "source": PDF, "citations": {"enabled": True}, "context": "P"},
        {"type": "document", "title": "T", "context": "C", "source": {"type": "text", "data": "D"}},
        {"type": "document", "source": {"type": "content", "content": [said("E"), IMAGE]}},
    ]
    body, dropped = to_chat(messages=[user(*blocks)])
    data = "data:application/pdf;base64,JVBERg=="
    assert body["messages"][0]["content"] == [
        {"type": "file", "file": {"filename": "a.pdf", "file_data": data}},
        said("P"),
        {"type": "file", "file": {"filename": "document.pdf", "file_data": data}},
        said("T"),
        said("C"),
        said("D"),
        said("E"),
        image_part(),
    ]
    assert dropped == ("citations",)


def test_what_server_tools_left_in_the_history_is_left_out_and_named():
    history = assistant(
        {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}},
        {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
        said("Found."),
    )
    body, dropped = to_chat(messages=[HELLO, history, HELLO])
    assert body["messages"][1] == {"role": "assistant", "content": "Found."}
    assert dropped == ("server_tool_use", "web_search_tool_result")


def test_q20_who_the_user_is_stays_here():
    body, dropped = to_chat(
        metadata={"user_id": "someone"}, top_k=5, service_tier="auto", speed="fast", context_management={}
    )
    assert set(body) == {"model", "messages", "max_tokens"}
    assert dropped == ("top_k", "service_tier", "speed", "context_management", "metadata.user_id")


@pytest.mark.parametrize(
    ("host", "settings", "field"),
    [
        ("api.openai.com", {}, "max_completion_tokens"),
        ("me.openai.azure.com", {}, "max_completion_tokens"),
        ("api.mistral.ai", {}, "max_tokens"),
        ("api.openai.com", {"max_tokens_field": "max_tokens"}, "max_tokens"),
        ("127.0.0.1", {"max_tokens_field": "max_completion_tokens"}, "max_completion_tokens"),
    ],
)
def test_q22_the_limit_has_the_name_that_the_host_knows(host, settings, field):
    body, _ = to_chat(target_of(host=host, **settings))
    assert {name: value for name, value in body.items() if name.startswith("max")} == {field: 64}


# Recorded from Claude Code 2.1.197; texts and lists are cut short.
CLAUDE_CODE_BETAS = "claude-code-20250219,context-management-2025-06-27,mid-conversation-system-2026-04-07"
CLAUDE_CODE_HEADERS = (
    f"anthropic-beta: {CLAUDE_CODE_BETAS}", "anthropic-dangerous-direct-browser-access: true", "x-app: cli",
    "user-agent: claude-cli/2.1.197 (external, sdk-cli)", "x-claude-code-session-id: 0", "x-stainless-lang: js",
)  # fmt: skip
CLAUDE_CODE_TOOLS = [
    {
        "name": name,
        "description": f"{name}s.",
        "input_schema": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": properties,
            "required": list(properties)[:1],
            "additionalProperties": False,
        },
    }
    for name, properties in {
        "Bash": {"command": {"type": "string"}, "timeout": {"type": "number"}},
        "Read": {"file_path": {"type": "string"}, "limit": {"type": "integer", "exclusiveMinimum": 0}},
        "TaskUpdate": {
            "status": {"anyOf": [{"type": "string", "enum": ["pending"]}, {"type": "string", "const": "deleted"}]},
            "metadata": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {}},
        },
    }.items()
]


def claude_code(*later: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A request of Claude Code with these messages behind the first."""
    cached = {"cache_control": {"type": "ephemeral"}}
    first = user(said("<system-reminder>\nx\n</system-reminder>\n\n"), said("Go", **cached))
    return {
        "model": "claude-opus-4-6",
        "messages": [first, {"role": "system", "content": "Available agent types: x"}, *later],
        "system": [
            said("x-anthropic-billing-header: cc_version=2.1.197.008; cc_entrypoint=sdk-cli;"),
            said("You are a Claude agent.", **cached),
            said("\nYou are interactive.", **cached),
        ],
        "tools": CLAUDE_CODE_TOOLS,
        "metadata": {"user_id": json.dumps({"device_id": "d" * 64, "account_uuid": "", "session_id": "s" * 36})},
        "max_tokens": 32000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
        **fields,
    }


CLAUDE_CODE_TURN = (
    assistant(
        said("Calling."),
        tool_use("call_1", "Read", file_path="/a"),
        tool_use("call_2", "Bash", command="echo b"),
        tool_use("call_3", "Read", file_path="/none"),
    ),
    user(
        tool_result("call_1", "1\tA"),
        tool_result("call_3", "File does not exist.", is_error=True),
        tool_result("call_2", "b", is_error=False, cache_control={"type": "ephemeral"}),
    ),
)
CLAUDE_CODE_IN_CHAT = [
    {"role": "system", "content": "You are a Claude agent.\n\n\nYou are interactive."},
    {"role": "user", "content": "<system-reminder>\nx\n</system-reminder>\n\n\n\nGo"},
    {"role": "system", "content": "Available agent types: x"},
]
CLAUDE_CODE_DROPPED = ("thinking", "output_config.effort", "context_management", "metadata.user_id")


def valid(body: dict[str, Any], form: Any) -> None:
    """Checks a request by the types of an official SDK."""
    waiting = [pydantic.TypeAdapter(form).validate_python(body)]
    while waiting:  # what is iterable is checked when it is read
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif not isinstance(value, (str, int, float, type(None))):
            waiting += value


def test_q23_what_claude_code_sends_is_valid_for_openai():
    body, made = translated(claude_code(*CLAUDE_CODE_TURN))
    valid(body, openai.types.chat.completion_create_params.CompletionCreateParamsStreaming)
    assert {*body} == {"model", "messages", "max_tokens", "stream", "stream_options", "tools"}
    assert body["messages"][:3] == CLAUDE_CODE_IN_CHAT
    called, *told = body["messages"][3:]
    assert called["content"] == "Calling."
    assert [it["id"] for it in called["tool_calls"]] == ["call_1", "call_2", "call_3"]
    assert [(it["role"], it["tool_call_id"], it["content"]) for it in told] == [
        ("tool", "call_1", "1\tA"),
        ("tool", "call_3", "Error: File does not exist."),
        ("tool", "call_2", "b"),
    ]
    for tool, given in zip(body["tools"], CLAUDE_CODE_TOOLS):
        schema = {name: value for name, value in given["input_schema"].items() if name != "$schema"}
        assert tool["function"] == {"name": given["name"], "description": given["description"], "parameters": schema}
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True}
    assert made.dropped == CLAUDE_CODE_DROPPED and made.asked.thinking == "shown" and made.asked.input_tokens > 150


def test_q23_claude_code_is_understood_with_each_setting():
    thinking = {"type": "adaptive", "display": "omitted"}
    request = claude_code(thinking=thinking, output_config={"effort": "max"})
    body, made = translated(request, target_of(reasoning="effort", system_turns="user"))
    valid(body, openai.types.chat.completion_create_params.CompletionCreateParamsStreaming)
    assert body["reasoning_effort"] == "xhigh" and made.asked.thinking == "omitted"
    assert made.dropped == CLAUDE_CODE_DROPPED[2:]
    later = "<system-reminder>\nAvailable agent types: x\n</system-reminder>"
    first = {"role": "user", "content": f"{CLAUDE_CODE_IN_CHAT[1]['content']}\n\n{later}"}
    assert body["messages"] == [CLAUDE_CODE_IN_CHAT[0], first]
    lead = translated(request, target_of(system_turns="lead"))[0]["messages"]
    assert [message["role"] for message in lead] == ["system", "user"]
    assert lead[0]["content"].endswith("interactive.\n\nAvailable agent types: x")


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10000}}, "medium"),
        ({"thinking": {"type": "enabled", "budget_tokens": 32000}}, "high"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "xhigh"}}, "xhigh"),
        ({"thinking": {"type": "adaptive"}}, None),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, None),
    ],
)
def test_thinking_becomes_an_effort_where_the_provider_knows_one(fields, effort):
    body, dropped = to_chat(target_of(reasoning="effort"), **fields)
    assert body.get("reasoning_effort") == effort
    assert dropped == (("output_config.effort",) if fields["thinking"]["type"] == "disabled" else ())
    assert "reasoning_effort" not in to_chat(**fields)[0]


@pytest.mark.parametrize("strict", [False, True])
def test_the_form_of_the_answer_is_strict_where_the_schema_is(strict):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    if not strict:
        del schema["required"]
    for fields in (
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
        {"output_format": {"type": "json_schema", "schema": schema}},
    ):
        form = to_chat(**fields)[0]["response_format"]
        assert form == {"type": "json_schema", "json_schema": {"name": "output", "schema": schema, "strict": strict}}


def test_a_schema_of_many_members_takes_no_long_look():
    names = [f"k{number:05d}" for number in range(30_000)]
    schema = {"type": "object", "additionalProperties": False, "properties": {name: {} for name in names}}
    schema["required"] = names[::-1]
    began = time.thread_time()
    assert monorelay.is_strict(schema) and not monorelay.is_strict({**schema, "required": [*names[1:], [], 7]})
    assert time.thread_time() - began < 0.3


def test_q24_half_a_surrogate_pair_arrives_as_it_was_sent():
    for body in (prompt(messages=[user(said("\ud83d"))]), chat(messages=[user(said("\ud83d"))])):
        target = target_of("openai" if "max_tokens" in body else "anthropic")
        text = json.dumps(translated(body, target)[0])
        assert '"\\ud83d"' in text
    history = [HELLO, assistant(tool_use("t", at="\ud83d")), user(tool_result("t"))]
    function = to_chat(messages=history)[0]["messages"][1]["tool_calls"][0]["function"]
    assert json.loads(function["arguments"]) == {"at": "\ud83d"}


def test_mistral_gets_ids_of_nine_letters_and_the_same_ones_each_time():
    history = [
        HELLO,
        assistant(tool_use("toolu_1"), tool_use("abcDEF123")),
        user(tool_result("toolu_1"), tool_result("abcDEF123")),
    ]
    for _ in range(2):
        _, answer, first, second = to_chat(target_of(host="api.mistral.ai"), messages=history)[0]["messages"]
        ids = [call["id"] for call in answer["tool_calls"]]
        assert re.fullmatch("[a-zA-Z0-9]{9}", ids[0]) and ids[1] == "abcDEF123"
        assert [first["tool_call_id"], second["tool_call_id"]] == ids
    assert ids[0] == "mlsdQGRqB" or len(ids[0]) == 9


def sealed(signature: str) -> dict[str, Any]:
    """What Gemini adds to a call."""
    return {"extra_content": {"google": {"thought_signature": signature}}}


@pytest.mark.parametrize("stream", [False, True])
def test_g2_geminis_signature_goes_with_its_call_and_comes_back_to_gemini_alone(stream):
    signed = {**call(0, "function-call-1", "look", "{}"), **sealed("sig" * 999)}
    answer = completion("tool_calls", calls=[signed, call(1, "c2", "look", "{}")])
    if stream:
        chunks = [delta(calls=[signed]), delta(calls=[call(1, "c2", "look", "{}")]), delta("tool_calls", USAGE)]
        blocks = accumulated(asked_of(), sse_of(chunks))["content"]
    else:
        blocks = whole_answer(asked_of(), answer)["content"]
    assert re.fullmatch("[a-zA-Z0-9_-]+", blocks[0]["id"]) and blocks[1]["id"] == "c2"
    history = [HELLO, assistant(*blocks), user(*(tool_result(block["id"], "x") for block in blocks))]
    for host, sent in (("generativelanguage.googleapis.com", signed["extra_content"]), ("127.0.0.1", None)):
        _, turn, *results = to_chat(target_of(host=host), messages=history)[0]["messages"]
        assert [one.get("extra_content") for one in turn["tool_calls"]] == [sent, None]
        ids = ["function-call-1", "c2"]
        assert [one["id"] for one in turn["tool_calls"]] == [one["tool_call_id"] for one in results] == ids


def test_the_owners_settings_take_fields_out_and_put_some_in():
    target = target_of(drop=["temperature", "stream_options"], extra={"top_k": 3, "chat_template_kwargs": {"a": [1]}})
    body, dropped = to_chat(target, temperature=0.5, stop_sequences=["x"])
    assert "temperature" not in body and body["top_k"] == 3 and body["chat_template_kwargs"] == {"a": [1]}
    assert dropped == ("temperature",) and body["stop"] == ["x"]


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": "x"},
        {"messages": ["x"]},
        {"messages": []},
        {"messages": [{"role": 1, "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [user({"type": "text", "text": 5})]},
        {"messages": [user({"type": "image", "source": {"type": "base64"}})]},
        {"messages": [user({})]},
        {"messages": [user({"type": ["text"]})]},
        {"messages": [HELLO, assistant({"type": "tool_use"}), HELLO]},
        {"messages": [user({"type": "tool_result"})]},
        {"max_tokens": None},
        {"max_tokens": "5"},
        {"max_tokens": True},
        {"tools": {}, "x": 1, "system": 5},
        {"system": [5]},
        {"tools": [{}]},
        {"stop_sequences": [5]},
        {"stop_sequences": 5},
        {"tools": [TOOL], "tool_choice": {"type": "tool"}},
        {"tools": ["x"]},
        {"output_config": {"format": {}, "effort": []}, "max_tokens": 0},
    ],
    ids=brief,
)
def test_what_is_no_sound_request_of_messages_is_a_400(fields):
    assert ": " in not_translated(lambda: to_chat(**fields))


@pytest.mark.parametrize(
    "raw",
    [
        b"[]",
        b"{",
        b'{"a":1e400,"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}]}',
        b'{"stop_sequences":["x"],"top_p":1e400,"model":"m","max_tokens":1,"messages":[{"role":"user","content":"x"}]}',
        b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"[" * 300_000,
        b'{"a":NaN}',
    ],
    ids=brief,
)
@pytest.mark.parametrize("format", ["openai", "anthropic"])
def test_what_is_no_json_or_too_much_of_it_is_a_400(raw, format):
    if b'"a":1e400' in raw:  # which isn't passed on
        raw = raw.replace(b'"a"', b'"top_p"')
    assert not_translated(lambda: translated({}, target_of(format), raw))


ODD = {"a": "\x7f" * 1_000_000}


@pytest.mark.parametrize(
    "made",
    [
        lambda: to_chat(messages=[user({"type": ODD})]),
        lambda: to_chat(messages=[user({"type": "image", "source": {"type": ODD}})]),
        lambda: to_chat(messages=[user({"type": "document", "source": {"type": ODD}})]),
        lambda: to_chat(tools=[{**TOOL, "type": ODD}]),
        lambda: to_chat(tool_choice={"type": ODD}),
        lambda: to_chat(output_config={"format": {"type": ODD}}),
        lambda: to_messages(messages=[user({"type": ODD})]),
        lambda: to_messages(messages=[{"role": ODD}]),
        lambda: to_messages(tools=[{"type": ODD}]),
        lambda: to_messages(tool_choice=ODD),
        lambda: to_messages(tool_choice=ODD["a"]),
        lambda: to_messages(messages=[HELLO, assistant_said(None, {**called("a"), "type": ODD})]),
    ],
)
def test_what_stands_for_a_word_is_told_as_far_as_it_is_short(made):
    tracemalloc.start()
    try:
        told = not_translated(made)
        assert len(told) < 400 and tracemalloc.get_traced_memory()[1] < 14_000_000, "the request itself takes 13 MB"
    finally:
        tracemalloc.stop()


def test_estimates_count_texts_and_tools_and_never_base64():
    def estimate(**fields: Any) -> int:
        return monorelay.estimated_tokens(prompt(**fields))

    empty = estimate(messages=[])
    assert empty == 0 and estimate(messages=[user(said("x" * 1000))]) == 304
    assert estimate(system="x" * 1000, messages=[]) == estimate(system=[said("x" * 1000)], messages=[]) == 300
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "A" * 1_000_000}}
    assert estimate(messages=[user(picture)]) == 1604
    assert estimate(messages=[user(tool_result("t", [picture, said("x" * 100)]))]) == 1634
    assert estimate(messages=[], tools=[TOOL]) >= 20
    assert estimate(messages=[assistant(tool_use("t", at="x" * 1000))]) > 300
    pdf = {"type": "document", "source": {**PDF, "data": "A" * 68_000}}
    assert 2400 < estimate(messages=[user(pdf)]) < 2700


@pytest.mark.parametrize("odd", ["é", '"', "\\", "\n", "\ud83d", "\U0001f600", "x"])
def test_long_strings_are_written_like_short_ones(odd):
    texts = [odd * size for size in (1, 400, 500, 2000, 65536, 65537, 140_000)]
    body, _ = to_chat(messages=[user(*map(said, texts), IMAGE)], system=texts[-2])
    assert body["messages"] == [{"role": "system", "content": texts[-2]}, user(*map(said, texts), image_part())]


def value_of(chance: random.Random, depth: int) -> Any:
    """A JSON value, as deep as that at most, and sometimes wide."""
    width = chance.choice([0, 1, 3, 49, 50, 51, 120] if depth < 3 else [1, 2, 3])
    kind = chance.random() if depth else 0
    if kind < 0.5:
        texts = ["", "a", "é\U0001f600\ud83d", '"\\\n', "x" * 3000, "x" * 70_000]
        return chance.choice([*texts, 1, -2.5, True, None, [], {}])
    if kind < 0.75:
        return [value_of(chance, depth - 1) for _ in range(width)]
    return {chance.choice(["k", "é", '"']) + str(number): value_of(chance, depth - 1) for number in range(width)}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_large_is_written_in_parts_and_the_same(monkeypatch, seed):
    chance = random.Random(seed)
    document = {"x": [value_of(chance, 4) for _ in range(3)], "y": value_of(chance, 3)}
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
    monkeypatch.setattr(monorelay, "WRITTEN_AT_ONCE_CHARACTERS", 0)
    first, second = (json.loads(monorelay.narrow(text)) for _ in range(2))
    assert monorelay.dump_apart(first) == monorelay.narrow(text)
    assert json.loads(b"".join(monorelay.json_pieces(second))) == document


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
@pytest.mark.parametrize("count", [1, 200_000])
def test_a_body_reads_the_same_in_pieces_of_any_size(size, count):
    document = {"é": ["\U0001f600\\u00e9\\é データ" * (count // 50 + 1), "\ud83d", '"\u2028'], "x": "é" * count}
    text = json.dumps(document, ensure_ascii=False).replace("\ud83d", "\\ud83d")
    body = text.encode()
    size *= count // 1000 + 1
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    read = monorelay.read_document(pieces, 0)
    assert json.loads(b"".join(monorelay.json_pieces(read))) == document
    wrong = body.replace(b'"x"', "\"\\é\"".encode())  # no escape
    wrongs = [wrong[at : at + size] for at in range(0, len(wrong), size)]
    for broken in ([*pieces[:-1], b"\xc3"], [*pieces[:1], b"\xff", *pieces[1:]], wrongs):
        assert not_translated(lambda broken=broken: monorelay.read_document(broken, 0))


@pytest.mark.parametrize("text", ["x", "é", "\U0001f600"])
@pytest.mark.parametrize("format", ["openai", "anthropic"])
def test_a_translation_holds_as_much_as_the_body_and_little_more_while_it_is_made(format, text):
    data = "A" * 4_000_000
    picture = {**IMAGE, "source": {**IMAGE["source"], "data": data}} if format == "openai" else image_part(data)
    body = json.dumps(prompt(messages=[user(said(text), picture)]), ensure_ascii=False).encode()
    pieces, target = [body[at : at + 65536] for at in range(0, len(body), 65536)], target_of(format)
    del body, picture, data
    tracemalloc.start()
    try:
        made = monorelay.translate_request(pieces, 0, target, "m", "req_1", 0.0)
        held, peak = tracemalloc.get_traced_memory()
        size = sum(map(len, made.body))
        assert held < 1.1 * size and peak < 2.2 * size, "beside the body itself"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["openai", "anthropic"])
def test_a_conversation_is_read_and_written_message_by_message(format):
    turns = [user(said("x" * 1000)), {"role": "assistant", "content": "y" * 1000}] * 2000
    body = json.dumps(prompt(messages=[*turns, HELLO])).encode()
    pieces, target = [body[at : at + 65536] for at in range(0, len(body), 65536)], target_of(format)
    tracemalloc.start()
    try:
        made = monorelay.translate_request(pieces, 0, target, "m", "req_1", 0.0)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(body), "beside the body itself"
    finally:
        tracemalloc.stop()
    assert len(json.loads(b"".join(made.body))["messages"]) == 4001


DOCUMENTS = [
    "{}", '{"a":[]}', '{"a":{},"b":[[]]}', ' {"a" : [1 , {"b":[2]},-3.5e1 ] , "c":"]},:" }', '{"a":1,"a":[2]}',
    '{"a":[true,false,null,"\\u0041\\"]"]}', '{"a":-1,"b":[12,1E2]}', '{"a":12   ,"b" :[1   ,2   ]   }   ',
    # and what is none
    "", " ", "{", "[]", "1", '"a"', "{}1", '{"a"}', '{"a":}', '{"a":1,}', "{,}", '{"a":[1,]}', '{"a":[,1]}',
    '{"a":[1 2]}', '{"a":1 "b":2}', '{a:1}', "{1:2}", '{"a":[1}', '{"a":[1]]', '{"a":"', '{"a":[1', '{"a":[nul]}',
    '{"a":1.}', '{"a":-}', '{"a":[1]:2}', '{"a":[1]}}', '{"a",1}', '{"a":01}', '{"a":"\n"}', '{"a":[[1]}',
    '{"a":Infinity}', '{"a":[NaN]}', '{"a":1   2}', '{"a":[1  2]}', '{"a":1   ', '{"a"  1}',
]  # fmt: skip


@pytest.mark.parametrize("text", DOCUMENTS)
def test_a_document_in_parts_is_read_as_json_reads_it(text):
    try:
        expected = monorelay.read_json(text)
    except ValueError:
        expected = None
    ways = [[text[:at], text[at:]] for at in range(len(text) + 1)] + [list(text)]
    for parts in ways:
        reader = monorelay.DocumentReader(iter(parts))
        if isinstance(expected, dict):
            assert reader.read() == expected, parts
        else:
            with pytest.raises(ValueError):
                reader.read()


@pytest.mark.parametrize("escaped", [False, True])
def test_characters_beyond_ascii_stay_what_they_are_in_names_and_in_what_is_told(escaped):
    known = target_of(extra={"ü": "é"}, drop=["ö"]).provider
    target, wide = monorelay.Target(known._replace(name="acmé中"), "modèle中"), "中" * 300

    def made(*messages: Any, **fields: Any) -> Any:
        body = json.dumps(prompt(messages=messages, **fields), ensure_ascii=escaped).encode()
        return monorelay.translate_request([body], 0, target, "m", "req_1", 0.0)

    it = made(user({"type": "tool_reference", "tool_name": wide}), é中=1, tools=[{**TOOL, "name": "naïve"}])
    body = json.loads(b"".join(it.body))
    assert (body["model"], body["ü"], it.dropped) == ("modèle中", "é", ("é中",))
    assert body["messages"][0]["content"] == f"Tool available: {wide[:200]}"
    refused = not_translated(lambda: made(user({"type": wide})))
    assert f": a block of the type {wide}"[:202] + " can't be sent to the provider acmé中 (" in refused
    name, given = body["tools"][0]["function"]["name"], json.dumps({"à": WIDE}, ensure_ascii=escaped)
    calls = [{"id": "é", "function": {"name": name, "arguments": given}}]
    choice = {"message": {"tool_calls": calls}, "finish_reason": "tool_calls"}
    answer = json.dumps({"choices": [choice]}, ensure_ascii=escaped).encode()
    message = json.loads(monorelay.AnswerTranslator(it.asked).whole(answer, is_stream=False))
    assert message["content"][0]["name"] == "naïve" and message["content"][0]["input"] == {"à": WIDE}
    error = json.dumps({"error": {"message": f"nö {WIDE}"}}, ensure_ascii=escaped).encode()
    with pytest.raises(monorelay.AnswerFault) as caught:
        monorelay.AnswerTranslator(it.asked).whole(error, is_stream=False)
    assert caught.value.message == f"nö {WIDE}"


WIDE = "\U0001f600"  # a character of which Python makes four bytes, and of all others in its string
LETTERS = "a" * 2_000_000
IN_JSON = {"name": "look", "arguments": json.dumps({"a": LETTERS + WIDE}, ensure_ascii=False)}
FILE_DATA = "data:text/plain;base64," + base64.b64encode(f"{LETTERS}{WIDE}".encode()).decode()


@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize(
    ("format", "messages", "most"),
    [
        ("openai", [user(said(LETTERS + WIDE))], 2.2),
        ("openai", [user(*[said("a" * 60_000 + WIDE)] * 40)], 2.2),
        ("openai", [user(said(WIDE * 500_000))], 2.2),
        ("openai", [HELLO, assistant(tool_use("t", at=LETTERS + WIDE)), user(tool_result("t"))], 3.3),
        ("anthropic", [user(said(LETTERS + WIDE))], 2.2),
        ("anthropic", [user(*[said("a" * 60_000 + WIDE)] * 40)], 2.2),
        ("anthropic", [user({"type": "file", "file": {"file_data": FILE_DATA}})], 2.2),
        ("anthropic", [HELLO, {"role": "assistant", "tool_calls": [{"id": "t", "function": IN_JSON}]}], 2.4),
    ],
)
def test_a_wide_character_makes_no_other_one_of_a_request_wide(format, messages, most, escaped):
    body = json.dumps(prompt(messages=messages), ensure_ascii=escaped).encode()
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    tracemalloc.start()
    try:
        made = monorelay.translate_request(pieces, 0, target_of(format), "m", "req_1", 0.0)
        assert tracemalloc.get_traced_memory()[1] < most * len(body), "beside the body itself"
    finally:
        tracemalloc.stop()
    assert str(json.loads(b"".join(made.body))).count(WIDE) == max(1, str(messages).count(WIDE))
    assert all(made.body) and max(map(len, made.body)) < 300_000


# Two characters that are one in other parts of a string, halves that are none, and what looks like an escape.
@hypothesis.given(
    st.lists(st.sampled_from([*'\\u"', "00e9", "d83d", "\n", "\x7f", *"é\x85\u2028\ud83d\ude00", WIDE])).map("".join),
    st.integers(1, 40),
    st.booleans(),
)
def test_any_text_is_translated_as_it_is_however_it_is_written_and_cut(text, size, escaped):
    whole = json.loads(json.dumps(text))  # pairs of halves become one
    body = json.dumps(prompt(messages=[user(said("." + text))]), ensure_ascii=escaped)
    body = re.sub("[\ud800-\udfff]", lambda half: f"\\u{ord(half[0]):04X}", body).encode()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    for given in ([body], pieces):
        made = monorelay.translate_request(given, 0, target_of(), "m", "req_1", 0.0)
        assert json.loads(b"".join(made.body))["messages"] == [{"role": "user", "content": "." + whole}]


@pytest.mark.timed
@pytest.mark.parametrize("odd", ["\x85", "\u2028", "\ud83d"], ids=ascii)
def test_odd_characters_are_translated_as_fast_as_others(odd):
    body = json.dumps(prompt(messages=[user(said(odd * 300_000))]), ensure_ascii=odd == "\ud83d").encode()
    begin = time.process_time()
    made = monorelay.translate_request([body], 0, target_of(), "m", "req_1", 0.0)
    assert time.process_time() - begin < 0.5
    assert json.loads(b"".join(made.body))["messages"][0]["content"] == odd * 300_000
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    begin = time.process_time()
    sent = it.feed(sse_of([delta(content=odd * 100_000)], done=False))
    assert time.process_time() - begin < 0.05
    assert odd == "\ud83d" or (odd.encode() not in sent and sent.count(json.dumps(odd)[1:-1].encode()) == 100_000)


def test_an_id_in_escapes_is_the_same_wherever_it_is_cut():
    call = {"id": f"call {WIDE}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": call["id"]}]
    body = json.dumps(prompt(messages=turns)).encode()
    whole = monorelay.translate_request([body], 0, target_of("anthropic"), "m", "req_1", 0.0)
    for cut in range(1, len(body)):
        made = monorelay.translate_request([body[:cut], body[cut:]], 0, target_of("anthropic"), "m", "req_1", 0.0)
        assert b"".join(made.body) == b"".join(whole.body), cut


# -- from chat


@pytest.mark.parametrize("blanks", ["\u3000", "\xa0 \x85", "\x1f\n", "\u2003" * 20_000], ids=ascii)
def test_an_answer_to_go_on_with_loses_the_blanks_at_its_end(blanks):
    body, _ = to_messages(messages=[HELLO, {"role": "assistant", "content": f"{WIDE}{blanks}b{blanks}"}])
    assert body["messages"][-1]["content"] == [said(f"{WIDE}{blanks}b")]


def test_t1_the_systems_words_lead():
    body, _ = to_messages(messages=[{"role": "system", "content": "You"}, HELLO])
    assert body["system"] == "You" and body["messages"] == [user(said("Hello there"))]
    turns = [
        {"role": "developer", "content": "A"},
        {"role": "system", "content": [said("B", cache_control={"type": "ephemeral"})]},
        HELLO,
        {"role": "system", "content": "C"},
        assistant_said("D"),
        HELLO,
    ]
    body, _ = to_messages(messages=turns)
    assert body["system"] == [said("A"), said("B", cache_control={"type": "ephemeral"}), said("C")]

    def roles(knob: str) -> list[str]:
        made, _ = to_messages(target_of("anthropic", system_turns=knob), messages=turns)
        return [message["role"] for message in made["messages"]]

    assert roles("lead") == ["user", "assistant", "user"]
    assert roles("keep") == ["user", "system", "assistant", "user"]
    assert roles("user") == ["user", "assistant", "user"]


def assistant_said(text: Any, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A turn of the assistant in a chat request."""
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {}), **more}


def called(id: str, arguments: Any = "{}", name: str = "look") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def returned(id: str, content: Any = "ok") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": id, "content": content}


def test_t2_results_and_the_users_words_are_one_turn():
    calls = assistant_said("Looking.", called("a", '{"at":1}'), called("b"))
    for order in (
        [returned("a"), returned("b"), HELLO],
        [returned("a"), HELLO, returned("b")],
        [HELLO, returned("a"), returned("b")],
    ):
        body, _ = to_messages(messages=[HELLO, calls, *order])
        assert body["messages"][1:] == [
            assistant(said("Looking."), tool_use("a", at=1), tool_use("b")),
            user(tool_result("a", "ok"), tool_result("b", "ok"), said("Hello there")),
        ]
    body, _ = to_messages(messages=[HELLO, calls, returned("a", None), returned("b", [said("x"), image_part()])])
    assert body["messages"][2]["content"] == [tool_result("a"), tool_result("b", [said("x"), IMAGE])]


@pytest.mark.parametrize(("arguments", "given"), [("", {}), (None, {}), ('{"a":1}', {"a": 1}), (" {} ", {})])
def test_t3_arguments_are_an_object(arguments, given):
    body, _ = to_messages(messages=[HELLO, assistant_said(None, called("a", arguments)), returned("a")])
    assert body["messages"][1] == assistant({**tool_use("a"), "input": given})


CHAT_FILE = {"filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBERg=="}


def test_t4_pictures_and_files():
    parts = [
        image_part(),
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;charset=x;base64,BBBB", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "https://a/b.png"}},
        {"type": "file", "file": CHAT_FILE},
        {"type": "file", "file": {"file_data": "JVBERg=="}},
        {"type": "file", "file": {"filename": "a.txt", "file_data": "data:text/markdown;base64,SGk="}},
    ]
    body, _ = to_messages(messages=[user(*parts)])
    assert body["messages"][0]["content"] == [
        IMAGE,
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": "BBBB"}},
        {"type": "image", "source": {"type": "url", "url": "https://a/b.png"}},
        {"type": "document", "source": PDF, "title": "a.pdf"},
        {"type": "document", "source": PDF},
        {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Hi"}, "title": "a.txt"},
    ]


@pytest.mark.parametrize(
    "url", ["data:a/b" + ";a" * 5_000_000, "data:image/png" + ";a" * 200 + ";base64,AA"], ids=brief
)
def test_t4_what_stands_before_the_data_of_a_picture_is_short(url):
    tracemalloc.start()
    try:
        picture = {"type": "image_url", "image_url": {"url": url}}
        assert "an image" in not_translated(lambda: to_messages(messages=[user(picture)]))
        assert tracemalloc.get_traced_memory()[1] < 3 * len(url) + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 8192),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6, "max_tokens": 5}, 6),
        ({"max_tokens": 0}, 8192),
        ({"max_tokens": -1}, 8192),
        ({"max_completion_tokens": None}, 8192),
    ],
)
def test_t5_a_limit_is_made_up_where_none_is_given(fields, tokens):
    assert to_messages(**fields)[0]["max_tokens"] == tokens
    assert to_messages(target_of("anthropic", default_max_tokens=77))[0]["max_tokens"] == 77


def test_t6_to_t8_sampling_stops_and_choices():
    body, dropped = to_messages(temperature=1.5, top_p=0.5)
    assert body["temperature"] == 1 and "top_p" not in body and dropped == ("temperature", "top_p")
    assert to_messages(top_p=0.5)[0]["top_p"] == 0.5
    assert to_messages(stop="x")[0]["stop_sequences"] == ["x"]
    body, dropped = to_messages(stop=["\n", "y"])
    assert body["stop_sequences"] == ["y"] and dropped == ("stop",)
    tools = [{"type": "function", "function": {"name": "look", "parameters": TOOL["input_schema"]}}]
    for choice, parallel, written in (
        ("none", False, {"type": "none"}),
        (None, False, {"type": "auto", "disable_parallel_tool_use": True}),
        ("required", False, {"type": "any", "disable_parallel_tool_use": True}),
        ("auto", True, {"type": "auto"}),
        ({"type": "function", "function": {"name": "look"}}, None, {"type": "tool", "name": "look"}),
        (None, None, None),
    ):
        body, dropped = to_messages(tools=tools, tool_choice=choice, parallel_tool_calls=parallel)
        assert body.get("tool_choice") == written and len(body["tools"]) == 1 and dropped == ()
    assert "tool_choice" not in to_messages(tool_choice="auto", parallel_tool_calls=False)[0]


def test_t9_allowed_tools_are_those_that_go():
    tools = [{"type": "function", "function": {"name": name}} for name in "ab"]
    for mode, kind in (("auto", "auto"), ("required", "any")):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools[1:]}}
        body, _ = to_messages(tools=tools, tool_choice=choice)
        assert [tool["name"] for tool in body["tools"]] == ["b"] and body["tool_choice"] == {"type": kind}
    assert "tools" not in to_messages(tool_choice="auto")[0]


@pytest.mark.parametrize(
    "choice",
    ["required", {"type": "function", "function": {"name": "f"}},
     {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [called("", name="other")]}}],
    ids=brief,
)  # fmt: skip
def test_t9_a_call_of_a_tool_that_is_not_offered_cannot_be_required(choice):
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]} if "allowed_tools" in choice else {}
    told = not_translated(lambda: to_messages(**tools, tool_choice=choice))
    assert told.startswith("tool_choice: a call of a tool that isn't offered can't be sent")


@pytest.mark.parametrize("stream", ["true", 1, ["x"]], ids=brief)
def test_whether_an_answer_streams_is_true_or_false(stream):
    for made in (to_chat, to_messages):
        told = not_translated(lambda made=made: made(stream=stream))
        assert told == "stream: Input should be a valid boolean"


def test_t10_the_form_of_the_answer():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 1}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    body, dropped = to_messages(response_format=form)
    assert body["output_config"] == {"format": {"type": "json_schema", "schema": schema}} and dropped == ()
    body, dropped = to_messages(response_format={"type": "json_object"})
    assert body["system"] == "Answer with one JSON object only." and dropped == ("response_format",)
    assert "output_config" not in to_messages(response_format={"type": "text"})[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"n": 2}, "n: more than one choice", id="t11-n"),
        pytest.param({"logprobs": True}, "logprobs: this field", id="t11-logprobs"),
        pytest.param({"top_logprobs": 3}, "top_logprobs: this field", id="t11-top"),
        pytest.param({"functions": [{}]}, "functions: this field", id="functions"),
        pytest.param({"audio": {"voice": "a"}}, "audio: this field", id="audio"),
        pytest.param(
            {"messages": [HELLO, assistant_said("x", function_call={"name": "f", "arguments": "{}"})]},
            "messages.1.function_call: this field",
            id="legacy",
        ),
        pytest.param({"modalities": ["text", "audio"]}, "modalities: audio", id="modalities"),
        pytest.param({"web_search_options": {"a": 1}}, "web_search_options: this field", id="search"),
        pytest.param({"web_search_options": {}}, "web_search_options: this field", id="usual-search"),
        pytest.param({"tools": [{"type": "custom", "custom": {}}]}, "tools.0: a tool of the type custom", id="custom"),
        pytest.param({"tool_choice": {"type": "custom"}}, "tool_choice: the type custom", id="choice"),
        pytest.param(
            {"messages": [user({"type": "input_audio"})]},
            "messages.0.content.0: a part of the type input_audio",
            id="t4-audio",
        ),
        pytest.param(
            {"messages": [user({"type": "file", "file": {"file_id": "f"}})]},
            "messages.0.content.0: a file that isn't in the request",
            id="t4-file",
        ),
        pytest.param(
            {"messages": [user({"type": "file", "file": {"file_data": "data:text/plain,Hi"}})]},
            "messages.0.content.0: a file whose data isn't in base64",
            id="t4-not-base64",
        ),
        pytest.param(
            {"messages": [HELLO, assistant_said(None, called("a", "[1]")), returned("a")]},
            "messages.1.tool_calls.0.function.arguments: what is no JSON object",
            id="t3",
        ),
        pytest.param(
            {"messages": [HELLO, assistant_said(None, called("a", "{")), returned("a")]},
            "messages.1.tool_calls.0.function.arguments: what is no JSON object",
            id="t3-broken",
        ),
        pytest.param(
            {"messages": [HELLO, assistant_said(None, called("a")), returned("b")]},
            "messages.2.tool_call_id: a result without a call before it that has this id",
            id="unpaired",
        ),
        pytest.param(
            {"messages": [HELLO, {"role": "function", "name": "f", "content": "x"}]},
            "messages.1.role: the role function",
            id="role",
        ),
        pytest.param(
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function.parameters: what is no schema of an object",
            id="root",
        ),
        pytest.param({"response_format": {"type": "grammar"}}, "response_format: the type grammar", id="form"),
    ],
)
def test_what_messages_cannot_say_is_refused_by_field_and_provider(fields, words):
    assert (
        not_translated(lambda: to_messages(**fields))
        == f"{words} can't be sent to the provider acme (Anthropic format)"
    )


def test_t12_texts_without_a_character_are_left_out():
    turns = [user(said(""), said("Hi")), assistant_said("  "), user(said("\n")), HELLO]
    assert to_messages(messages=turns)[0]["messages"] == [user(said("Hi"), said("Hello there"))]
    assert "at least one message" in not_translated(lambda: to_messages(messages=[{"role": "user", "content": " "}]))
    assert to_messages(messages=[HELLO, assistant_said("It is \n")])[0]["messages"][1] == assistant(said("It is"))


def test_t13_a_schema_without_a_type_is_one_of_an_object():
    tools = [
        {"type": "function", "function": {"name": "f", **given}}
        for given in ({}, {"parameters": None}, {"parameters": {"properties": {}}})
    ]
    body, _ = to_messages(tools=tools)
    assert all(tool["input_schema"] == {"type": "object", "properties": {}} for tool in body["tools"])


def test_t14_odd_ids_are_carried_and_come_back():
    odd = "functions.Bash:0"
    turns = [HELLO, assistant_said(None, called(odd)), returned(odd)]
    first, second = (to_messages(messages=turns)[0]["messages"] for _ in range(2))
    sent = first[1]["content"][0]["id"]
    assert first == second and re.fullmatch("[a-zA-Z0-9_-]+", sent) and first[2]["content"][0]["tool_use_id"] == sent
    history = [HELLO, assistant(tool_use(sent)), user(tool_result(sent))]
    assert to_chat(messages=history)[0]["messages"][2]["tool_call_id"] == odd
    assert "tool_call_id" in not_translated(lambda: to_messages(messages=[HELLO, returned("x")]))


NARROW = st.text().map(monorelay.narrow)


@hypothesis.given(NARROW.filter(bool) | NARROW.map(monorelay.carrying_id), NARROW)
def test_any_id_of_a_call_can_be_carried(id, seal):
    carried = monorelay.carrying_id(id, seal)
    assert re.fullmatch("[a-zA-Z0-9_-]+", carried)
    assert monorelay.carried_call(carried) == (id, seal)


@pytest.mark.parametrize("tail", ["", "0", "W10", "WzEsMl0", "IkEi", "W" * 9000, "LFtd" * 2000], ids=brief)
def test_what_only_looks_like_a_carried_id_is_one_of_its_own(tail):
    assert monorelay.carried_call(f"toolu_x{tail}") == (f"toolu_x{tail}", "")


def test_t15_what_anthropics_own_members_say_passes():
    tools = [{"type": "function", "function": {"name": "f"}, "cache_control": {"type": "ephemeral"}}]
    body, dropped = to_messages(
        top_k=5,
        thinking={"type": "enabled", "budget_tokens": 1024},
        tools=tools,
        messages=[user(said("x", cache_control={"type": "ephemeral"}))],
    )
    assert body["top_k"] == 5 and body["thinking"] == {"type": "enabled", "budget_tokens": 1024} and dropped == ()
    assert (
        body["tools"][0]["cache_control"] == body["messages"][0]["content"][0]["cache_control"] == {"type": "ephemeral"}
    )


def test_hints_of_chat_are_left_out_and_named_unless_they_say_nothing():
    nothing = {
        "n": 1,
        "presence_penalty": 0,
        "logit_bias": {},
        "modalities": ["text"],
        "logprobs": False,
        "store": False,
        "top_logprobs": None,
        "stop": None,
        "stream": False,
        "stream_options": None,
    }
    assert to_messages(**nothing) == (to_messages()[0], ())
    hints = {
        "seed": 1,
        "store": True,
        "metadata": {"a": "b"},
        "frequency_penalty": 1,
        "logit_bias": {"5": 1},
        "verbosity": "low",
        "prediction": {"type": "content"},
        "prompt_cache_key": "k",
        "reasoning_effort": "high",
        "service_tier": "flex",
    }
    body, dropped = to_messages(**hints)
    assert body == to_messages()[0] and set(dropped) == set(hints)
    assert to_messages(user="u1")[0]["metadata"] == {"user_id": "u1"}
    assert to_messages(user="a@b.c")[1] == ("user",) and "metadata" not in to_messages(user="a@b.c")[0]
    assert to_messages(service_tier="default")[0]["service_tier"] == "standard_only"
    effort = to_messages(target_of("anthropic", reasoning="effort"), reasoning_effort="minimal")[0]
    assert effort["thinking"] == {"type": "adaptive"} and effort["output_config"] == {"effort": "low"}


def test_thinking_that_chat_clients_hand_back_leads_the_turn():
    blocks = [
        {"index": 0, "type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "thinking", "thinking": "unsigned"},
    ]
    turn = assistant_said("So.", thinking_blocks=blocks, reasoning_content="hm")
    body, dropped = to_messages(messages=[HELLO, turn, HELLO])
    assert (
        body["messages"][1] == assistant({"type": "thinking", "thinking": "hm", "signature": "s"}, said("So."))
        and dropped == ()
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": 5},
        {"messages": [5]},
        {"messages": [user(5)]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [user({"type": "text"})]},
        {"messages": [user({"type": "image_url", "image_url": "x"})]},
        {"messages": [HELLO, assistant_said(None, {})]},
        {"messages": [HELLO, assistant_said(5)]},
        {"tools": [5]},
        {"tools": [{}]},
        {"stop": [5]},
        {"max_tokens": "5"},
        {"response_format": {"type": "json_schema"}},
        {"tool_choice": "some"},
        {"messages": [{"role": [], "content": "x"}]},
        {"messages": [{"role": "system", "content": [image_part()]}, HELLO]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": 5},
        {"max_tokens": [5]},
    ],
    ids=brief,
)
def test_what_is_no_sound_chat_request_is_a_400(fields):
    assert ": " in not_translated(lambda: to_messages(**fields))


JSON_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=3)
    | st.sampled_from(["text", "tool_use", "user", "assistant"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "text",
                    "role",
                    "content",
                    "id",
                    "name",
                    "input",
                    "source",
                    "messages",
                    "tool_calls",
                    "function",
                    "arguments",
                    "tool_use_id",
                    "tool_call_id",
                    "image_url",
                    "url",
                    "file",
                    "data",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
MEMBERS = [
    "messages",
    "system",
    "tools",
    "tool_choice",
    "stop",
    "stop_sequences",
    "thinking",
    "output_config",
    "metadata",
    "response_format",
    "stream_options",
    "max_tokens",
    "temperature",
    "user",
    "modalities",
    "reasoning_effort",
]


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    st.dictionaries(st.sampled_from(MEMBERS), JSON_VALUE, max_size=4), st.sampled_from(["openai", "anthropic"])
)
def test_nothing_that_a_client_sends_breaks_the_translation(fields, format):
    with contextlib.suppress(monorelay.BadRequest):
        translated({**prompt(), **fields}, target_of(format, reasoning="effort", reasoning_back="reasoning"))


# -- answers of chat


def asked_of(format: str = "anthropic", **fields: Any) -> Any:
    """What is known of a request of that format when its answer comes."""
    known = {
        "model": "model-asked",
        "provider": "acme",
        "stream": False,
        "id": "req_1",
        "created": 7,
        "thinking": "shown",
        "input_tokens": 11,
        **fields,
    }
    return monorelay.Asked(format=format, **known)


def call(index: int | None, id: str | None = None, name: str | None = None, arguments: Any = None) -> dict[str, Any]:
    """A part of a call in a chunk."""
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    known = {key: value for key, value in (("index", index), ("id", id)) if value is not None}
    return {**known, "type": "function", "function": function}


def delta(finish: str | None = None, usage: Any = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a chat answer."""
    calls = {"tool_calls": fields.pop("calls")} if "calls" in fields else {}
    choice = {"index": 0, "delta": {**fields, **calls}, "finish_reason": finish}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [choice],
        **({"usage": usage} if usage is not None else {}),
    }


@hypothesis.given(st.lists(st.text(st.sampled_from('{}[]"\\a'), max_size=6)))
def test_whether_arguments_are_whole_is_told_wherever_they_are_cut(parts):
    scan, depth, whole, in_string = monorelay.ArgumentsScan(), 0, False, False
    for part in parts:
        scan.feed(part)
    for mark in re.sub(r'\\[\\"]', "", "".join(parts)):
        in_string ^= mark == '"'
        if mark in "{}[]" and not in_string:
            depth += 1 if mark in "{[" else -1
            whole = depth <= 0
    assert scan.whole == whole


@pytest.mark.timed
@pytest.mark.parametrize("part", ["[]", '"', "]", "\\", '\\"', '"x",', "1,", "é"])
def test_no_arguments_take_long_to_be_scanned(part):
    text = part * (500_000 // len(part))
    assert seconds_each(lambda: monorelay.ArgumentsScan().feed(text), 1) < 0.01


USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
USED = {"input_tokens": 20, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 5}
GUESSED = {**USED, "input_tokens": 11}


def completion(finish: str | None = "stop", usage: Any = USAGE, **fields: Any) -> dict[str, Any]:
    """A whole chat answer."""
    made = delta(finish, **fields)
    made["choices"][0]["message"] = {"role": "assistant", "content": None, **made["choices"][0].pop("delta")}
    return {**made, "object": "chat.completion", "usage": usage}


def whole_answer(asked: Any, document: Any, is_stream: bool = False) -> Any:
    """A whole answer as its client gets it."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return json.loads(monorelay.AnswerTranslator(asked).whole(body, is_stream))


def sse_of(chunks: list[Any], done: bool = True) -> bytes:
    """Chunks as a provider streams them."""
    return b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in chunks) + b"data: [DONE]\n\n" * done


def streamed(asked: Any, data: bytes, size: int = 1 << 20) -> tuple[bytes, bool]:
    """What a client gets of a stream that comes in pieces of that size, and whether it failed."""
    it = monorelay.AnswerTranslator(asked._replace(stream=True))
    sent = b"".join(it.feed(data[at : at + size]) for at in range(0, len(data), size) if not it.ended)
    sent += b"" if it.ended else it.close()
    assert it.ended
    return sent, it.failed


def follow_grammar(events: list[tuple[str, Any]]) -> None:
    """Checks that events come as Anthropic's clients need them: one block at a time, counted from 0."""
    kinds = [name for name, data in events if name != "ping"]
    assert all(name == data["type"] for name, data in events)
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    start, end = events[0][1]["message"], dict(events)["message_delta"]
    assert set(start) == {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
    assert start["id"].startswith("msg_") and start["content"] == [] and start["role"] == "assistant"
    assert all(isinstance(count, int) for usage in (start["usage"], end["usage"]) for count in usage.values())
    current, number = None, 0
    for name, data in events:
        if name == "content_block_start":
            assert current is None and data["index"] == number
            current = data["content_block"]["type"]
        elif name == "content_block_delta":
            allowed = {
                "text": ["text_delta"],
                "thinking": ["thinking_delta", "signature_delta"],
                "tool_use": ["input_json_delta"],
            }
            assert data["index"] == number and data["delta"]["type"] in allowed[current]
        elif name == "content_block_stop":
            assert data["index"] == number and current
            current, number = None, number + 1
    assert current is None and number
    calls = sum(data["content_block"]["type"] == "tool_use" for name, data in events if name == "content_block_start")
    assert end["delta"]["stop_reason"] and (end["delta"]["stop_reason"] != "tool_use" or calls)


def accumulated(asked: Any, data: bytes) -> dict[str, Any]:
    """The message that Anthropic's own SDK makes of a translated stream."""
    sent, failed = streamed(asked, data)
    assert not failed, sent
    follow_grammar(events_of(sent))
    with (
        serving(sent) as url,
        anthropic.Anthropic(api_key="x", base_url=url, max_retries=0) as client,
        client.messages.stream(model="m", max_tokens=5, messages=[HELLO]) as stream,
    ):
        message = stream.get_final_message().to_dict()
    return {name: value for name, value in message.items() if (name, value) != ("stop_details", None)}


@contextlib.contextmanager
def serving(stream: bytes) -> Iterator[str]:
    """The URL of a provider that answers with this stream."""
    provider = Upstream(replies_then_closes(STREAM_HEAD, chunked(stream)))
    try:
        yield provider.url
    finally:
        provider.stop()


def message_of(content: list[Any], reason: str = "end_turn", usage: Any = USED, sequence: Any = None) -> dict[str, Any]:
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "model-asked",
        "content": content,
        "stop_reason": reason,
        "stop_sequence": sequence,
        "usage": usage,
    }


def signed(thinking: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": thinking, "signature": monorelay.thinking_signature("acme", "")}


LOOK = tool_use("c1", at="door")
ARGUMENTS = '{"at": "door"}'
# A whole chat answer, the message that it becomes.
ANSWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "r1-stop": (completion(content="Hi"), message_of([said("Hi")])),
    "r2-stop-with-calls": (
        completion(content="Hi", calls=[call(None, "c1", "look", ARGUMENTS)]),
        message_of([said("Hi"), LOOK], "tool_use"),
    ),
    "r3-calls": (
        completion("tool_calls", calls=[call(None, "c1", "look", ARGUMENTS), call(None, "c2", "dig", "")]),
        message_of([LOOK, tool_use("c2", "dig")], "tool_use"),
    ),
    "r4-calls-without-any": (completion("tool_calls", content="Hi"), message_of([said("Hi")])),
    "r5-model-length": (completion("model_length", content="Hi"), message_of([said("Hi")], "max_tokens")),
    "r5-length": (completion("length", content="Hi"), message_of([said("Hi")], "max_tokens")),
    "r6-filter": (completion("content_filter", content=""), message_of([said("")], "refusal")),
    "r7-stop-sequence": (lambda it: (it["choices"][0].update(stop_reason="END"), it)[1])(completion(content="Hi")),
    "r8-unknown": (completion("eos", content="Hi"), message_of([said("Hi")])),
    "r9-none": (
        completion(None, content="Hi", calls=[call(None, "c1", "look", ARGUMENTS)]),
        message_of([said("Hi"), LOOK], "tool_use"),
    ),
    "r9-refusal": (completion(refusal="No."), message_of([said("No.")], "refusal")),
    "r10-cached": (
        completion(
            content="Hi", usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 15, "cache_write_tokens": 3}}
        ),
        message_of(
            [said("Hi")],
            usage={**USED, "input_tokens": 2, "cache_creation_input_tokens": 3, "cache_read_input_tokens": 15},
        ),
    ),
    "r10-all-cached": (
        completion(content="Hi", usage={**USAGE, "prompt_tokens_details": {"cached_tokens": 20}}),
        message_of([said("Hi")], usage={**USED, "input_tokens": 1, "cache_read_input_tokens": 20}),
    ),
    "r11-xai": (
        completion(
            content="Hi", usage={**USAGE, "total_tokens": 32, "completion_tokens_details": {"reasoning_tokens": 7}}
        ),
        message_of([said("Hi")], usage={**USED, "output_tokens": 12}),
    ),
    "r11-openai": (
        completion(content="Hi", usage={**USAGE, "completion_tokens_details": {"reasoning_tokens": 3}}),
        message_of([said("Hi")]),
    ),
    "r12-deepseek": (
        completion(content="Hi", usage={**USAGE, "prompt_cache_hit_tokens": 5}),
        message_of([said("Hi")], usage={**USED, "input_tokens": 15, "cache_read_input_tokens": 5}),
    ),
    "r12-moonshot": (
        completion(content="Hi", usage={**USAGE, "cached_tokens": 5}),
        message_of([said("Hi")], usage={**USED, "input_tokens": 15, "cache_read_input_tokens": 5}),
    ),
    "r13-null": (
        completion(content="Hello you", usage=None),
        message_of([said("Hello you")], usage={**GUESSED, "output_tokens": 3}),
    ),
    "r13-odd": (
        completion(content="Hi", usage={"prompt_tokens": 20.0, "completion_tokens": None}),
        message_of([said("Hi")], usage={**USED, "output_tokens": 0}),
    ),
    "r14-nothing": (completion(content=None), message_of([said("")])),
    "r15-length": (
        completion("length", content="Hi", calls=[call(None, "c1", "look", '{"at": "do')]),
        message_of([said("Hi")], "max_tokens"),
    ),
    "r17-mistral": (
        completion(content=[{"type": "thinking", "thinking": [said("hm")]}, said("Hi"), said(" you")]),
        message_of([signed("hm"), said("Hi you")]),
    ),
    "r18-content": (
        completion(content="Hi", reasoning_content="hm", reasoning="hm"),
        message_of([signed("hm"), said("Hi")]),
    ),
    "r18-reasoning": (
        completion(content="Hi", reasoning="hm", reasoning_details=[{"text": "hm"}]),
        message_of([signed("hm"), said("Hi")]),
    ),
    "r18-details": (
        completion(content="Hi", reasoning_details=[{"text": "h"}, {"summary": "m"}, {"data": "x"}]),
        message_of([signed("hm"), said("Hi")]),
    ),
    "blank-before-calls": (
        completion(content="\n\n", calls=[call(None, "c1", "look", ARGUMENTS)]),
        message_of([LOOK], "tool_use"),
    ),
    "blank-alone": (completion(content="\n\n"), message_of([said("\n\n")])),
    "legacy": (completion(function_call={"name": "look", "arguments": ARGUMENTS}), None),
    "dict-arguments": (completion(calls=[call(None, "c1", "look", {"at": "door"})]), message_of([LOOK], "tool_use")),
    "same-ids": (
        completion(calls=[call(None, "c1", "look", ARGUMENTS), call(None, "c1", "look", "{}")]),
        message_of([LOOK, tool_use("c1_2")], "tool_use"),
    ),
    "kimi-ids": (
        completion(calls=[call(None, "functions.look:0", "look", "{}")]),
        message_of([tool_use(monorelay.carrying_id("functions.look:0"))], "tool_use"),
    ),
}
ANSWERS["r7-stop-sequence"] = (ANSWERS["r7-stop-sequence"], message_of([said("Hi")], "stop_sequence", sequence="END"))


def chunks_of(answer: dict[str, Any], pieces: int = 3) -> list[dict[str, Any]]:
    """A whole chat answer as a stream of chunks, its texts and arguments in so many pieces."""
    choice = answer["choices"][0]
    message, chunks = choice["message"], [delta(role="assistant", content="")]

    def cut(text: Any) -> list[Any]:
        if not isinstance(text, str):
            return [] if text is None else [[part] for part in text] if isinstance(text, list) else [text]
        size = max(1, math.ceil(len(text) / pieces))
        return [text[at : at + size] for at in range(0, len(text), size)]

    thoughts = {name: message[name] for name in message if name.startswith("reasoning")}
    for parts in itertools.zip_longest(*map(cut, thoughts.values())):
        chunks.append(delta(**dict(zip(thoughts, parts))))
    chunks += [delta(content=part) for part in cut(message["content"])]
    chunks += [delta(refusal=part) for part in cut(message.get("refusal"))]
    for index, one in enumerate(message.get("tool_calls") or ()):
        arguments = cut(one["function"]["arguments"]) or [""]
        chunks.append(delta(calls=[call(index, one["id"], one["function"]["name"], arguments[0])]))
        chunks += [delta(calls=[call(index, None, None, part)]) for part in arguments[1:]]
    if message.get("function_call"):
        chunks.append(delta(function_call=message["function_call"]))
    last = delta(choice["finish_reason"])
    last["choices"][0].update({"stop_reason": choice["stop_reason"]} if "stop_reason" in choice else {})
    return [*chunks, last, {**delta(), "choices": [], "usage": answer["usage"]}]


@pytest.mark.parametrize("name", ANSWERS)
def test_r_and_s21_a_whole_answer_and_its_stream_are_the_same_message(name):
    answer, expected = ANSWERS[name]
    whole = whole_answer(asked_of(), answer)
    if expected:
        assert whole == expected
    assert set(whole) == set(message_of([]))
    data = sse_of(chunks_of(answer))
    assert whole_answer(asked_of(), data, is_stream=True) == whole
    at_once = monorelay.AnswerTranslator(asked_of(stream=True)).whole(json.dumps(answer).encode(), is_stream=False)
    follow_grammar(events_of(at_once))
    sent = {streamed(asked_of(), data, size) for size in (1, 7, 1 << 20)}
    assert len(sent) == 1
    if name != "r15-length":  # of which a stream has shown a part
        assert accumulated(asked_of(), data) == whole


def ended_with(asked: Any, data: bytes) -> tuple[str, str]:
    """The type and message of the error that a stream ends with."""
    sent, failed = streamed(asked, data)
    assert failed and b"message_stop" not in sent and b"[DONE]" not in sent
    name, last = events_of(sent)[-1]
    assert name == "error"
    return last["error"]["type"], last["error"]["message"]


@pytest.mark.parametrize(
    "document",
    [
        completion(calls=[call(None, "c1", "look", '{"at')]),
        completion(calls=[call(None, "c1", "look", "[1]")]),
        completion(calls=[call(None, "c1", None, "{}")]),
        completion(calls=[call(None, "c1", "x" * 300, "{}")]),
        completion(calls=[call(None, "c" * 3000, "look", "{}")]),
        completion(calls=[{**call(None, "c1", "x", "{}"), **sealed("x" * 70_000)}]),
        completion(content=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        completion(images=[{"type": "image_url", "image_url": {"url": "data:"}}]),
        completion(calls=[call(None, f"c{n}", "look", "{}") for n in range(200)]),
        {},
        {"choices": []},
        {"choices": None},
        b"[]",
        b"x",
        {"error": {"message": "no", "code": 502}},
        {"error": "no"},
        completion("error"),
    ],
    ids=brief,
)
def test_r15_and_r16_what_is_no_message_is_a_fault(document):
    with pytest.raises(monorelay.AnswerFault) as caught:
        whole_answer(asked_of(), document)
    assert caught.value.status == 502 and caught.value.message
    with pytest.raises(monorelay.AnswerFault) as caught:
        whole_answer(asked_of(), {"error": {"message": "slow down", "code": 429}})
    assert caught.value.status == 429 and caught.value.message == "slow down"


# How an answer of which "Hi" has come may end, and what is wrong with that, as a whole and in a stream.
BROKE_OFF, UNFINISHED = "the provider broke its answer off: ", "the provider's answer ended before it was finished"
BROKEN_ENDS: dict[str, tuple[Any, str, str]] = {
    **{
        finish: (finish, BROKE_OFF + finish, BROKE_OFF + finish)
        for finish in ("insufficient_system_resource", "network_error", "abort", "cancelled", "timeout")
    },
    "null": (None, UNFINISHED, ""),  # [DONE] ends a stream, whatever stands before it
    "the word null": ("null", "", ""),
    "unknown": ("recitation", "", ""),
}


@pytest.mark.parametrize("name", BROKEN_ENDS)
def test_r8_and_r9_an_answer_that_was_broken_off_is_a_fault(name):
    finish, wrong_whole, wrong_stream = BROKEN_ENDS[name]
    document, data = completion(finish, content="Hi"), sse_of([delta(content="Hi"), delta(finish)])
    if wrong_whole:
        with pytest.raises(monorelay.AnswerFault) as caught:
            whole_answer(asked_of(), document)
        assert (caught.value.message, caught.value.status) == (wrong_whole, 502) and not caught.value.is_about_request
    else:
        assert whole_answer(asked_of(), document) == message_of([said("Hi")])
    if wrong_stream:
        assert ended_with(asked_of(), data) == ("api_error", wrong_stream)
    else:
        assert accumulated(asked_of(), data)["stop_reason"] == "end_turn"


def test_r9_a_whole_answer_without_a_reason_for_its_end_is_one():
    document = completion(content="Hi")
    del document["choices"][0]["finish_reason"]
    assert whole_answer(asked_of(), document) == message_of([said("Hi")])


@pytest.mark.parametrize(
    "chunks", [[], [delta(role="assistant", content="")], [{"choices": [], "usage": USAGE}]], ids=brief
)
def test_s10_a_stream_that_is_done_before_anything_was_said_is_a_fault(chunks):
    expected = ("api_error", "the provider's answer ended before anything was said")
    assert ended_with(asked_of(), sse_of(chunks)) == expected
    with pytest.raises(monorelay.AnswerFault, match=expected[1]):
        whole_answer(asked_of(), sse_of(chunks), is_stream=True)


def test_r15_malformed_arguments_end_a_stream_with_an_error():
    for parts in (['{"at'], ["[1]"], ['{"a":1}', "}"], ["{'a'}"]):
        data = sse_of([*(delta(calls=[call(0, "c1", "look", part)]) for part in parts), delta("tool_calls")])
        assert ended_with(asked_of(), data) == ("api_error", "the provider sent malformed tool arguments")
    cut_off = sse_of([delta(calls=[call(0, "c1", "look", '{"at')]), delta("length")])
    assert dict(events_of(streamed(asked_of(), cut_off)[0]))["message_delta"]["delta"]["stop_reason"] == "max_tokens"


STREAMS: dict[str, tuple[list[dict[str, Any]], list[Any], str]] = {
    "s2-all": (
        [
            delta(role="assistant"),
            delta(reasoning_content="h"),
            delta(reasoning_content="m"),
            delta(content="Hi"),
            delta(content=" you"),
            delta(calls=[call(0, "c1", "look", '{"at":')]),
            delta(calls=[call(0, None, None, '"door"}')]),
            delta(calls=[call(1, "c2", "dig", "{}")]),
            delta("tool_calls", USAGE),
        ],
        [signed("hm"), said("Hi you"), LOOK, tool_use("c2", "dig")],
        "tool_use",
    ),
    "s3-interleaved": (
        [
            delta(calls=[call(0, "c1", "look", "")]),
            delta(calls=[call(1, "c2", "dig", "")]),
            delta(calls=[call(1, arguments='{"a"')]),
            delta(calls=[call(0, arguments='{"at":"door')]),
            delta(calls=[call(1, arguments=":1}"), call(0, arguments='"}')]),
            delta("tool_calls", USAGE),
        ],
        [LOOK, tool_use("c2", "dig", a=1)],
        "tool_use",
    ),
    "s4-late-id": (
        [
            delta(calls=[call(0, None, "look", '{"at"')]),
            delta(calls=[call(0, "c1", None, ':"door"}')]),
            delta("tool_calls", USAGE),
        ],
        [LOOK],
        "tool_use",
    ),
    "s4-late-name": (
        [
            delta(calls=[call(0, "c1", None, '{"at"')]),
            delta(calls=[call(0, None, "look", ':"door"}')]),
            delta("tool_calls", USAGE),
        ],
        [LOOK],
        "tool_use",
    ),
    "s4-split-name": (
        [
            delta(calls=[call(0, None, "lo", "")]),
            delta(calls=[call(0, "c1", "ok", ARGUMENTS)]),
            delta("tool_calls", USAGE),
        ],
        [LOOK],
        "tool_use",
    ),
    "s5-always-0": (
        [
            delta(calls=[call(0, "c1", "look", ARGUMENTS)]),
            delta(calls=[call(0, "c2", "dig", "{}")]),
            delta("tool_calls", USAGE),
        ],
        [LOOK, tool_use("c2", "dig")],
        "tool_use",
    ),
    "s5b-no-index": (
        [
            delta(calls=[call(None, "c1", "look", '{"at"')]),
            delta(calls=[call(None, None, None, ':"door"}')]),
            delta(calls=[call(None, "c2", "dig", "{}")]),
            delta("tool_calls", USAGE),
        ],
        [LOOK, tool_use("c2", "dig")],
        "tool_use",
    ),
    "s5c-first-is-1": (
        [delta(calls=[call(1, "c1", "look", ARGUMENTS)]), delta("tool_calls", USAGE)],
        [LOOK],
        "tool_use",
    ),
    "s6-empty-names": (
        [
            delta(calls=[call(0, "c1", "look", '{"at":')]),
            delta(calls=[call(0, "", "", '"door"}')]),
            delta("tool_calls", USAGE),
        ],
        [LOOK],
        "tool_use",
    ),
    "s7-all-in-one": (
        [delta("tool_calls", USAGE, content="Hi", calls=[call(None, "c1", "look", ARGUMENTS)])],
        [said("Hi"), LOOK],
        "tool_use",
    ),
    "s8-usage-always": (
        [delta(content="H", usage={"prompt_tokens": 20, "completion_tokens": 1}), delta("stop", USAGE, content="i")],
        [said("Hi")],
        "end_turn",
    ),
    "s9-usage-last": (
        [delta(content="Hi"), delta("stop"), {"id": "chatcmpl-1", "choices": [], "usage": USAGE}],
        [said("Hi")],
        "end_turn",
    ),
    "s13-two-ends": (
        [
            delta(content="Hi"),
            delta("stop"),
            delta("length", content="more"),
            {"id": "chatcmpl-1", "choices": [], "usage": USAGE},
        ],
        [said("Hi")],
        "end_turn",
    ),
    "s14-no-calls": ([delta(content="Hi"), delta("tool_calls", USAGE)], [said("Hi")], "end_turn"),
    "s15-stop-with-calls": (
        [delta(calls=[call(0, "c1", "look", ARGUMENTS)]), delta("stop", USAGE)],
        [LOOK],
        "tool_use",
    ),
    "s16-azure": (
        [
            {"id": "", "choices": [], "prompt_filter_results": []},
            delta(role="assistant"),
            delta(content="Hi"),
            delta("stop", USAGE),
        ],
        [said("Hi")],
        "end_turn",
    ),
    "s18-empty": ([delta(role="assistant", content=""), delta("stop", USAGE)], [said("")], "end_turn"),
    "s19-trailing": (
        [
            delta(calls=[call(0, "c1", "look", ARGUMENTS)]),
            delta(calls=[call(1, "c2", "dig", "{}")]),
            delta(calls=[call(0, "", "", "")]),
            delta("tool_calls", USAGE),
        ],
        [LOOK, tool_use("c2", "dig")],
        "tool_use",
    ),
    "text-behind-call": (
        [delta(calls=[call(0, "c1", "look", ARGUMENTS)]), delta(content="Hi"), delta("stop", USAGE)],
        [LOOK, said("Hi")],
        "tool_use",
    ),
    "text-within-call": (
        [
            delta(calls=[call(0, "c1", "look", '{"at":')]),
            delta(content="\n"),
            delta(content="Hi"),
            delta(calls=[call(0, arguments='"door"}')]),
            delta("stop", USAGE),
        ],
        [LOOK, said("Hi")],
        "tool_use",
    ),
    "text-around-the-end-of-a-call": (
        [
            delta(calls=[call(0, "c1", "look", '{"at":')]),
            delta(content="H"),
            delta(calls=[call(0, arguments='"door"}')]),
            delta(content="i"),
            delta(calls=[call(1, "c2", "dig", "{}")]),
            delta("stop", USAGE),
        ],
        [LOOK, said("Hi"), tool_use("c2", "dig")],
        "tool_use",
    ),
    "no-id": ([delta(calls=[call(0, None, "look", ARGUMENTS)]), delta("stop", USAGE)], None, "tool_use"),
    "thinking-again": (
        [delta(reasoning="a"), delta(content="b"), delta(reasoning="c"), delta(content="d"), delta("stop", USAGE)],
        [signed("a"), said("b"), signed("c"), said("d")],
        "end_turn",
    ),
    "other-choices": (
        [delta(content="Hi"), {**delta(), "choices": [{"index": 1, "delta": {"content": "no"}}]}, delta("stop", USAGE)],
        [said("Hi")],
        "end_turn",
    ),
    "oddities": (
        [
            delta(content="Hi", tool_calls=None, refusal="", audio=None),
            {"choices": [{"index": 0, "delta": None}]},
            {"a": 1},
            delta("stop", USAGE),
        ],
        [said("Hi")],
        "end_turn",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_s_streams_of_chat_become_messages(name):
    chunks, content, reason = STREAMS[name]
    first = {"id": "chatcmpl-1"}
    message = accumulated(asked_of(), sse_of([{**first, **one} if one.get("id") else one for one in chunks]))
    if content is not None:
        assert message["content"] == content
    assert (message["stop_reason"], message["usage"]) == (reason, USED)
    assert len({streamed(asked_of(), sse_of(chunks), size) for size in (1, 5, 1 << 20)}) == 1


def test_an_id_is_made_up_where_there_is_none_and_is_the_same_each_time():
    chunks = STREAMS["no-id"][0]
    ids = {accumulated(asked_of(), sse_of(chunks))["content"][0]["id"] for _ in range(2)}
    assert len(ids) == 1 and re.fullmatch("call_[0-9a-f]{24}", ids.pop())


def test_answers_have_ids_of_their_own_whatever_the_provider_calls_them():
    """Claude Code takes messages of one id for parts of one message; some servers have few ids."""
    anonymous = completion(calls=[call(0, None, "look", "{}")])
    first, second = (whole_answer(asked_of(id=id), anonymous) for id in ("req_1", "req_2"))
    assert (first["id"], second["id"]) == ("msg_1", "msg_2")
    assert first["content"][0]["id"] != second["content"][0]["id"]


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("finish", ["stop", None])
def test_s10_and_s11_what_ends_a_stream(done, finish):
    data = sse_of([delta(content="Hi"), delta(finish)], done)
    if done or finish:
        message = accumulated(asked_of(), data)
        assert message["content"] == [said("Hi")] and message["stop_reason"] == "end_turn"
        assert message["usage"] == {**GUESSED, "output_tokens": 1}
    else:
        assert ended_with(asked_of(), data) == ("api_error", "the provider's stream ended before it was finished")
    without_a_line_end = data.rstrip(b"\n")
    assert streamed(asked_of(), without_a_line_end)[1] == (not (done or finish))


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"message": "Overloaded", "type": "overloaded_error"}, "overloaded_error"),
        ({"message": "slow", "code": "rate_limit_exceeded"}, "rate_limit_error"),
        ({"message": "bad", "code": 400}, "invalid_request_error"),
        ({"message": "slow", "type": "None", "param": "None", "code": "429"}, "rate_limit_error"),
        ({"message": "x", "code": "1302"}, "api_error"),
        ({"message": "x"}, "api_error"),
        ({"message": "context window exceeds", "code": 429}, "rate_limit_error"),
        ("x", "api_error"),
    ],
)
def test_s12_an_error_in_the_midst_ends_the_stream(error, kind):
    data = sse_of([delta(content="Hi"), {"error": error}, delta("stop")])
    words = error["message"] if isinstance(error, dict) else error
    assert ended_with(asked_of(), data) == (kind, words)
    assert ended_with(asked_of(), b"data: nonsense\n\n")[0] == "api_error"


@pytest.mark.parametrize(("code", "is_about_request"), [(529, False), (400, True), ("context_length_exceeded", True)])
def test_a_fault_is_judged_in_whatever_language_it_is_told(code, is_about_request):
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    sent = it.feed(sse_of([delta(content="Hi"), {"error": {"message": f"\u5fd9\u2019 {WIDE}", "code": code}}]))
    assert f"\u5fd9\u2019 {WIDE}" in events_of(sent)[-1][1]["error"]["message"]
    assert it.fault.is_about_request == is_about_request


def test_s17_comments_are_no_events_and_silence_gets_a_ping():
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    assert it.feed(b": OPENROUTER PROCESSING\n\n") == b""
    assert [name for name, _ in events_of(it.ping())] == ["message_start", "ping"]
    assert [name for name, _ in events_of(it.ping())] == ["ping"]
    sent = it.feed(sse_of([delta(content="Hi")], done=False))
    assert [name for name, _ in events_of(sent)] == ["content_block_start", "content_block_delta"]
    it.feed(sse_of([delta("stop")], done=False))
    assert not it.ended
    assert [name for name, _ in events_of(it.ping())][-1] == "message_stop" and it.ended and not it.failed


def test_s22_each_part_of_a_call_leaves_before_the_next_comes():
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    parts = []
    for part in ('{"at', '": "do', 'or"}'):
        sent = it.feed(sse_of([delta(calls=[call(0, "c1", "look", part)])], done=False))
        parts += [data["delta"]["partial_json"] for name, data in events_of(sent) if name == "content_block_delta"]
        assert "".join(parts).endswith(part)


def test_an_answer_that_is_translated_as_a_whole_has_so_many_events_and_blocks(monkeypatch):
    chunks = [*[delta(content="a")] * 99, delta("stop")]
    with pytest.raises(monorelay.UnfitAnswer, match="an answer of more than 100 events"):
        monkeypatch.setattr(monorelay, "WHOLE_EVENTS", 100)
        whole_answer(asked_of(), sse_of(chunks), is_stream=True)
    assert whole_answer(asked_of(), sse_of(chunks, done=False), is_stream=True)["content"] == [said("a" * 99)]
    for count, stream in itertools.product((10_000, 10_001), (False, True)):
        message = json.dumps({**ANTHROPIC_HI, "content": [said("a")] * count}).encode()
        it = monorelay.AnswerTranslator(asked_of("openai", stream=stream))
        if count == 10_000:
            assert len(it.whole(message, is_stream=False)) > 10_000
        else:
            with pytest.raises(monorelay.UnfitAnswer, match="more than 10000 blocks"):
                it.whole(message, is_stream=False)


def test_a_chunk_has_as_many_parts_of_calls_as_an_answer_has_calls():
    chunk = b'data:{"choices":[{"delta":{"tool_calls":[%s]}}]}\n\n' % b",".join([b"{}"] * 100_000)
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    began = time.thread_time()
    assert b"calls more than 128 tools" in it.feed(chunk) and it.failed
    assert time.thread_time() - began < 0.1


def test_blank_lines_of_a_stream_take_next_to_no_time():
    it = monorelay.AnswerTranslator(asked_of(stream=True))
    it.feed(sse_of([delta(content="Hi")], done=False))
    began = time.thread_time()
    for line in (b"\n", b"\r", b"\r\n"):
        assert it.feed(line * 500_000) == b""
    assert time.thread_time() - began < 0.1
    assert b"text_delta" in it.feed(sse_of([delta(content="Hi")], done=False))


def test_the_arguments_of_all_calls_have_as_many_values_as_an_answer():
    calls = [call(number, f"c{number}", "look", '{"at":[' + "0," * 60_000 + "0]}") for number in range(5)]
    with pytest.raises(monorelay.AnswerFault, match="more than 250000 values"):
        whole_answer(asked_of(), sse_of([delta(calls=[one]) for one in calls] + [delta("tool_calls")]), is_stream=True)
    assert len(whole_answer(asked_of(), completion("tool_calls", calls=calls[:2]))["content"]) == 2


def test_thinking_is_shown_to_those_who_asked_for_it():
    data = sse_of([delta(reasoning="hm"), delta(content="Hi"), delta("stop", USAGE)])
    assert accumulated(asked_of(thinking="hidden"), data)["content"] == [said("Hi")]
    omitted = accumulated(asked_of(thinking="omitted"), data)["content"]
    assert omitted == [signed(""), said("Hi")]
    kept = accumulated(asked_of(thinking="omitted", thinking_returns=True), data)["content"][0]
    assert kept["thinking"] == "" and monorelay.own_thinking(kept, monorelay.Draft(target_of())) == "hm"


CALL_SCRIPT = st.lists(
    st.dictionaries(st.text(max_size=4), st.text(max_size=6) | st.integers(), max_size=3), min_size=1, max_size=4
)


@hypothesis.given(CALL_SCRIPT, st.randoms(use_true_random=False), st.booleans(), st.booleans())
def test_calls_in_any_order_of_their_parts_are_the_same_calls(inputs, chance, ascii, text_too):
    """S3: however the parts of parallel calls are mixed, each call is whole, and they stand in the order in which they
    began."""
    queues = []
    for index, given in enumerate(inputs):
        text = json.dumps(given, ensure_ascii=ascii)
        cuts = sorted(chance.sample(range(len(text) + 1), min(3, len(text) + 1)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
        queues.append(
            [call(index, f"c{index}", "look", parts[0])] + [call(index, None, None, part) for part in parts[1:]]
        )
    order, chunks = [], []
    while any(queues):
        index = chance.choice([number for number, queue in enumerate(queues) if queue])
        order += [index] * (index not in order)
        chunks.append(delta(calls=[queues[index].pop(0)]))
        if text_too and chance.random() < 0.3:
            chunks.append(delta(content=chance.choice(["\n", "x"])))
    message = accumulated(asked_of(), sse_of([*chunks, delta("tool_calls", USAGE)]))
    calls = [block for block in message["content"] if block["type"] == "tool_use"]
    assert calls == [{**tool_use(f"c{index}"), "input": inputs[index]} for index in order]
    texts = "".join(block["text"] for block in message["content"] if block["type"] == "text")
    assert texts.count("x") == sum(one["choices"][0]["delta"].get("content") == "x" for one in chunks)


CHUNK = st.builds(
    delta,
    st.none() | st.sampled_from(["stop", "length", "tool_calls", "error", ""]),
    st.none() | JSON_VALUE,
    content=JSON_VALUE,
    reasoning=JSON_VALUE,
    calls=JSON_VALUE
    | st.lists(
        st.builds(
            call,
            st.none() | st.integers(0, 2),
            st.none() | st.text(max_size=2),
            st.none() | st.text(max_size=2),
            st.none() | st.sampled_from(["{", "}", "{}", "", '"a":1', "x"]) | JSON_VALUE,
        ),
        max_size=3,
    ),
)


@hypothesis.settings(max_examples=300)
@hypothesis.given(
    st.lists(
        CHUNK
        | st.dictionaries(st.sampled_from(["id", "choices", "usage", "error", "type", "message", "delta"]), JSON_VALUE),
        max_size=6,
    ),
    st.booleans(),
    st.integers(1, 60),
    st.sampled_from(["anthropic", "openai"]),
)
def test_whatever_comes_the_client_gets_a_sound_stream_or_an_error(chunks, done, size, format):
    data = sse_of(chunks, done)
    sent, failed = streamed(asked_of(format), data, size)
    assert (sent, failed) == streamed(asked_of(format), data)
    events = events_of(sent)
    if format == "anthropic" and not failed:
        follow_grammar(events)
    assert (events[-1][0] == "error") == failed
    with contextlib.suppress(monorelay.AnswerFault):
        whole_answer(asked_of(format), data, is_stream=True)


@pytest.mark.timed
def test_what_is_held_of_an_answer_is_bounded_and_costs_no_more_the_longer_it_gets():
    def feed(piece: bytes, count: int) -> Any:
        it = monorelay.AnswerTranslator(asked_of(stream=True))
        for _ in range(count):
            it.feed(piece)
        return it

    long_line = feed(b"x" * 65536, 20)
    assert long_line.failed
    waiting = sse_of([delta(calls=[call(0, "c1", "look", "{"), call(1, "c2", "look", "x" * 60_000)])], done=False)
    assert feed(waiting, 20).failed
    assert feed(sse_of([delta(content=" " * 60_000)], done=False), 20).failed
    many = sse_of([delta(calls=[call(number, f"c{number}", "look", "{}")]) for number in range(200)], done=False)
    assert feed(many, 1).failed
    tiny = sse_of([delta(calls=[call(0, "c1", "look", "1")])], done=False)
    some, more = (min(process_time(functools.partial(feed, tiny, count)) for _ in range(3)) for count in (1000, 4000))
    assert more < 8 * some


ANSWER_PART = "\u20ac" * 60_000  # 180 kB in memory, 360 as an escape
ANSWERS_WITHOUT_END: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "text": ("anthropic", lambda number: sse_of([delta(content=ANSWER_PART)], done=False)),
    "thinking": ("anthropic", lambda number: sse_of([delta(reasoning=ANSWER_PART)], done=False)),
    "blanks": ("anthropic", lambda number: sse_of([delta(content="\u2003" * 60_000)], done=False)),
    "calls": ("anthropic", lambda number: sse_of([delta(calls=[
        call(number, f"c{number}", "look", json.dumps({"a": ANSWER_PART}))])], done=False)),
    "a call": ("anthropic", lambda number: sse_of([delta(calls=[
        call(0, "c", "look", json.dumps({"a": ANSWER_PART})[number > 0 : -1])])], done=False)),
    "ids of calls": ("anthropic", lambda number: sse_of([delta(calls=[
        call(number, f"{number}" * 2000, "look", "{}")])], done=False)),
    "calls by an index that is a text": ("anthropic", lambda number: sse_of([delta(calls=[
        {**call(0, f"c{number}", "look", "{}"), "index": f"{ANSWER_PART}{number}"}])], done=False)),
    "names of calls": ("anthropic", lambda number: sse_of([delta(calls=[call(0, None, ANSWER_PART)])], done=False)),
    "usages": ("anthropic", lambda number: sse_of([delta(None, {f"{ANSWER_PART}{number}": 1})], done=False)),
    "text of a message": ("openai", lambda number: sse(
        "content_block_delta", delta={"type": "text_delta", "text": ANSWER_PART})),
    "thinking of a message": ("openai", lambda number: sse(
        "content_block_delta", delta={"type": "thinking_delta", "thinking": ANSWER_PART})),
    "calls of a message": ("openai", lambda number: sse(
        "content_block_start", content_block={**tool_use(f"{number}" * 2000), "input": {"a": ANSWER_PART}})),
    "beginnings of a message": ("openai", lambda number: sse(
        "message_start", message={**MESSAGE, "id": f"{ANSWER_PART}{number}"})),
    "usages of a message": ("openai", lambda number: sse("message_delta", usage={f"{ANSWER_PART}{number}": 1})),
    "ends of a message": ("openai", lambda number: sse("message_delta", delta={"stop_reason": ANSWER_PART})),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS_WITHOUT_END)
def test_what_is_held_of_an_answer_stays_below_a_few_megabytes(kind):
    format, part = ANSWERS_WITHOUT_END[kind]
    it = monorelay.AnswerTranslator(asked_of(format, stream=True, thinking="omitted", thinking_returns=True))
    numbers = itertools.count()
    assert bytes_grown(lambda: it.feed(part(next(numbers))), 100) < 8 * monorelay.TRANSLATED_HELD_BYTES


def process_time(run: Callable[[], object]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


@pytest.mark.parametrize("line_end", sorted(LINE_ENDS))
def test_s23_events_are_read_however_they_are_cut(line_end):
    text = sse_of([delta(content="Grüße \u2028 \U0001f600"), delta("stop", USAGE)]).replace(b"\\u", b"\\u")
    raw = json.dumps(delta(content="Grüße \u2028 \U0001f600"), ensure_ascii=False).encode()
    data = b": hello\nevent: x\nid: 1\n\ndata:" + raw + b"\n\n" + text
    data = data.replace(b"\n", LINE_ENDS[line_end])
    for size in range(1, 40):
        sent, failed = streamed(asked_of(), data, size)
        assert not failed and sent == streamed(asked_of(), data)[0]
    texts = [data["delta"]["text"] for name, data in events_of(sent) if name == "content_block_delta"]
    assert texts == ["Grüße \u2028 \U0001f600"] * 2


STREAM_PIECES = st.sampled_from([b"data:", b"data: x", b"data", b"database: y", b"event: e", b": c", b" "])


@hypothesis.settings(max_examples=400)
@hypothesis.given(st.lists(STREAM_PIECES | st.sampled_from([b"\n", b"\r", b"\r\n"]), max_size=12), st.randoms())
def test_s23_events_are_those_that_their_lines_make(pieces, chance):
    """However line ends are mixed, and wherever the bytes are cut."""
    data, events, lines = b"".join(pieces), [], []
    for line in [*re.split(b"\r\n|\n|\r", data), b""]:
        name, _, value = line.partition(b":")
        lines += [value[1:] if value.startswith(b" ") else value] if name == b"data" else []
        if not line and lines:
            events.append(b"\n".join(lines))
            lines = []
    reader, cuts = monorelay.EventReader(), sorted(chance.randint(0, len(data)) for _ in range(4))
    read = [it for a, b in zip([0, *cuts], [*cuts, len(data)]) for it in reader.feed(data[a:b])]
    assert [*read, *reader.flush()] == events


@pytest.mark.parametrize("format", ["anthropic", "openai"])
def test_what_clients_may_take_for_the_end_of_a_line_is_escaped_in_a_stream(format):
    text = "é\x85\u2028\u2029\ud7ff\u2027'\U0001f600"
    told = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}
    event = delta(content=text) if format == "anthropic" else told
    data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
    made = monorelay.AnswerTranslator(asked_of(format)).feed(data).decode()
    assert len(made.splitlines()) == made.count("\n")
    shown = text.replace("\x85", "\\u0085").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    assert f'"{shown}"' in made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("escaped", [False, True])
@pytest.mark.parametrize("format", ["anthropic", "openai"])
def test_a_wide_character_makes_no_other_one_of_a_whole_answer_wide(format, escaped, stream):
    text = LETTERS + WIDE
    message = {"type": "message", "content": [said(text)], "stop_reason": "end_turn", "usage": {}}
    completion = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    body = json.dumps(completion if format == "anthropic" else message, ensure_ascii=escaped).encode()
    translator = monorelay.AnswerTranslator(monorelay.Asked(format, "m", "acme", stream, "req_1", 7))
    tracemalloc.start()
    try:
        made = translator.whole(body, is_stream=False)
        assert tracemalloc.get_traced_memory()[1] < 2.2 * len(body), "beside the body itself"
    finally:
        tracemalloc.stop()
    assert text.encode() in made


# -- answers of Messages


def message_events(*blocks: Any, reason: str = "end_turn", usage: Any = None, size: int = 4) -> list[bytes]:
    """A message as Anthropic streams it: deltas of that size."""
    events = [sse("message_start", message=MESSAGE)]
    for index, block in enumerate(blocks):
        empty = {
            "text": {**block, "text": ""},
            "thinking": {**block, "thinking": "", "signature": ""},
            "tool_use": {**block, "input": {}},
        }
        events.append(sse("content_block_start", index=index, content_block=empty.get(block["type"], block)))
        whole = (
            json.dumps(block["input"])
            if block["type"] == "tool_use" and block["input"]
            else block.get(block["type"], "")
        )
        name = "input_json" if block["type"] == "tool_use" else block["type"]
        for at in range(0, len(whole), size):
            part = {"partial_json" if name == "input_json" else name: whole[at : at + size]}
            events.append(sse("content_block_delta", index=index, delta={"type": f"{name}_delta", **part}))
        if block["type"] == "thinking":
            events.append(
                sse(
                    "content_block_delta",
                    index=index,
                    delta={"type": "signature_delta", "signature": block["signature"]},
                )
            )
        events += [sse("content_block_stop", index=index), sse("ping")]
    ending = {"delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage or {"output_tokens": 12}}
    return [*events, sse("message_delta", **ending), sse("message_stop")]


SEARCHED = [
    {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "x"}},
    {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
]
THOUGHTS = {"type": "thinking", "thinking": "hm, well", "signature": "sig"}
REDACTED = {"type": "redacted_thinking", "data": "xyz"}


def chat_message(content: str | None = None, calls: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": content,
        "refusal": None,
        **({"tool_calls": calls} if calls else {}),
        **more,
    }


THINKING = {"reasoning_content": "hm, well", "thinking_blocks": [THOUGHTS]}
# Blocks, why they end, and the chat message and finish_reason that they become.
MESSAGES: dict[str, tuple[list[Any], str, dict[str, Any], str]] = {
    "text": ([said("Hello"), said(" you")], "end_turn", chat_message("Hello you"), "stop"),
    "u1-all": (
        [THOUGHTS, said("Hi"), *SEARCHED, tool_use("toolu_1", at="door"), said("!"), tool_use("toolu_2", "dig")],
        "tool_use",
        chat_message("Hi!", [called("toolu_1", '{"at": "door"}'), called("toolu_2", "{}", "dig")], **THINKING),
        "tool_calls",
    ),
    "u2-no-text": ([tool_use("toolu_1")], "tool_use", chat_message(None, [called("toolu_1", "{}")]), "tool_calls"),
    "u5-pause": ([said("Hi")], "pause_turn", chat_message("Hi"), "stop"),
    "u5-refusal": ([said("No")], "refusal", chat_message("No"), "content_filter"),
    "u5-window": ([said("Hi")], "model_context_window_exceeded", chat_message("Hi"), "length"),
    "length": ([said("Hi")], "max_tokens", chat_message("Hi"), "length"),
    "sequence": ([said("Hi")], "stop_sequence", chat_message("Hi"), "stop"),
    "server-tools-alone": (SEARCHED, "tool_use", chat_message(""), "stop"),
    "unknown": ([{"type": "hologram"}, said("Hi")], "vanished", chat_message("Hi"), "stop"),
    "redacted": (
        [REDACTED, THOUGHTS],
        "end_turn",
        chat_message("", reasoning_content="hm, well", thinking_blocks=[REDACTED, THOUGHTS]),
        "stop",
    ),
    "empty-thinking": (
        [{"type": "redacted_thinking"}, {**REDACTED, "data": 5}, {**THOUGHTS, "thinking": "", "signature": ""},
         THOUGHTS],
        "end_turn",
        chat_message("", reasoning_content="hm, well", thinking_blocks=[THOUGHTS]),
        "stop",
    ),
    "nothing": ([], "end_turn", chat_message(""), "stop"),
}


def openai_accumulated(data: bytes, **fields: Any) -> tuple[dict[str, Any], str, Any]:
    """The message, the finish_reason and the usage that OpenAI's own SDK makes of a translated stream."""
    sent, failed = streamed(asked_of("openai", **fields), data)
    assert not failed and sent.endswith(b"data: [DONE]\n\n")
    with (
        serving(sent) as url,
        openai.OpenAI(api_key="x", base_url=url, max_retries=0) as client,
        client.chat.completions.stream(model="m", messages=[HELLO]) as stream,
    ):
        assert all(stream)  # it would raise for an answer that was cut off, only to say that it was
        final = stream.current_completion_snapshot
    return final.choices[0].message.to_dict(), final.choices[0].finish_reason, final.usage


@pytest.mark.parametrize("name", MESSAGES)
def test_u_a_whole_message_and_its_stream_are_the_same_chat_answer(name):
    blocks, reason, expected, finish = MESSAGES[name]
    used = {"input_tokens": 25, "output_tokens": 12}
    whole = whole_answer(asked_of("openai"), {**MESSAGE, "content": blocks, "stop_reason": reason, "usage": used})
    choice = whole["choices"][0]
    for one in choice["message"].get("tool_calls", ()):
        one["function"]["arguments"] = json.dumps(json.loads(one["function"]["arguments"]))
    assert choice == {"index": 0, "message": expected, "logprobs": None, "finish_reason": finish}
    assert (whole["id"], whole["object"], whole["created"], whole["model"]) == (
        "chatcmpl-1",
        "chat.completion",
        7,
        "model-asked",
    )
    assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"], whole["usage"]["total_tokens"]) == (
        25,
        12,
        37,
    )
    openai.types.chat.ChatCompletion.model_validate(whole, strict=True)
    for size in (1, 4, 1000):
        data = b"".join(message_events(*blocks, reason=reason, size=size))
        assert whole_answer(asked_of("openai"), data, is_stream=True)["choices"] == [choice]
        assert len({streamed(asked_of("openai"), data, step) for step in (1, 9, 1 << 20)}) == 1
    message, told, usage = openai_accumulated(data, with_usage=True)
    kept = {key: value for key, value in message.items() if value is not None}
    for block in kept.get("thinking_blocks", ()):
        del block["index"]
    for one in kept.get("tool_calls", ()):
        one.pop("index", None)
        one["function"].pop("parsed_arguments", None)
    wanted = {key: value for key, value in expected.items() if value is not None}
    assert (kept, told) == ({"content": "", **wanted}, finish) and usage.total_tokens == 37


def test_u1_calls_are_counted_among_themselves():
    data = b"".join(message_events(THOUGHTS, said("Hi"), *SEARCHED, tool_use("a", x=1), said("!"), tool_use("b")))
    chunks = [data for _, data in events_of(streamed(asked_of("openai"), data)[0])[:-1]]
    assert {one["id"] for one in chunks} == {"chatcmpl-1"} and all(
        one["object"] == "chat.completion.chunk" for one in chunks
    )
    entries = [entry for one in chunks for choice in one["choices"] for entry in choice["delta"].get("tool_calls", ())]
    assert [entry["index"] for entry in entries if "id" in entry] == [0, 1]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in chunks[0] and chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_u2_a_call_that_begins_with_its_input_has_it():
    start = sse("content_block_start", index=0, content_block=tool_use("a", x=1))
    data = (
        ANTHROPIC_EVENTS[0] + start + sse("content_block_stop", index=0) + ANTHROPIC_EVENTS[-2] + ANTHROPIC_EVENTS[-1]
    )
    message, _, _ = openai_accumulated(data)
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"x": 1}


def test_u3_and_u7_the_usage_is_told_to_those_who_ask():
    started = {"input_tokens": 3, "cache_read_input_tokens": 10, "cache_creation_input_tokens": 7, "output_tokens": 1}
    ending = {
        "input_tokens": 4,
        "output_tokens": 12,
        "cache_read_input_tokens": None,
        "output_tokens_details": {"thinking_tokens": 6},
    }
    events = message_events(said("Hi"), usage=ending)
    events[0] = sse("message_start", message={**MESSAGE, "usage": started})
    sent, _ = streamed(asked_of("openai", with_usage=True), b"".join(events))
    chunks = [data for _, data in events_of(sent)]
    assert chunks[-1] == "[DONE]" and chunks[-2]["choices"] == []
    assert chunks[-2]["usage"] == {
        "prompt_tokens": 21,
        "completion_tokens": 12,
        "total_tokens": 33,
        "prompt_tokens_details": {"cached_tokens": 10, "cache_write_tokens": 7},
        "completion_tokens_details": {"reasoning_tokens": 6},
    }
    assert all(one["usage"] is None for one in chunks[:-2])
    assert b'"usage"' not in streamed(asked_of("openai"), b"".join(events))[0]


@pytest.mark.parametrize("count", range(1, 8))
def test_u4_a_message_without_its_end_is_an_error(count):
    data = b"".join(ANTHROPIC_EVENTS[:count])
    assert ended_with(asked_of("openai"), data) == (
        "server_error",
        "the provider's stream ended before it was finished",
    )
    assert ended_with(asked_of("openai"), data + OVERLOADED) == ("server_error", "Overloaded")
    assert (
        ended_with(asked_of("openai"), data + b"event: error\ndata: " + OVERLOADED.split(b"data: ")[1])[0]
        == "server_error"
    )


@pytest.mark.parametrize("missing", ["message_delta", "content_block_stop"])
def test_u4_a_stop_without_what_belongs_before_it_is_no_end(missing):
    events = message_events(said("Hi"), tool_use("toolu_1", at="door"), reason="tool_use")
    unclosed = b"".join(event for event in events if b"event: %s" % missing.encode() not in event)
    assert ended_with(asked_of("openai"), unclosed) == (
        "server_error", "the provider's answer ended before it was finished"
    )  # fmt: skip
    with pytest.raises(monorelay.AnswerFault, match="before it was finished"):
        whole_answer(asked_of("openai"), {**ANTHROPIC_HI, "stop_reason": None})


def test_u6_and_u8_pings_are_comments_and_unknown_events_nothing():
    it = monorelay.AnswerTranslator(asked_of("openai", stream=True))
    assert b"assistant" in it.feed(ANTHROPIC_EVENTS[0])
    assert it.feed(sse("ping")) == b": ping\n\n" == it.ping()
    assert it.feed(sse("weather", sky="blue")) == b""
    assert it.feed(sse("content_block_delta", index=0, delta={"type": "citations_delta", "citation": {}})) == b""


def test_all_chunks_of_an_answer_have_one_id_though_the_first_goes_before_anything_came():
    it = monorelay.AnswerTranslator(asked_of("openai", id="req_7", stream=True))
    sent = it.ping() + it.feed(b"".join(message_events(said("Hi"))))
    assert {data["id"] for _, data in events_of(sent)[:-1]} == {"chatcmpl-7"} and it.ended


def test_a_called_tool_has_the_name_that_the_client_gave_it():
    body, made = translated(chat(tools=[{"type": "function", "function": {"name": "my.tool"}}]), target_of("anthropic"))
    assert re.fullmatch("my_tool_[0-9a-f]{8}", body["tools"][0]["name"])
    answer = whole_answer(
        made.asked, {**MESSAGE, "content": [tool_use("a", body["tools"][0]["name"])], "stop_reason": "tool_use"}
    )
    assert answer["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "my.tool"


@pytest.mark.parametrize(
    "text", ["1e400", "[" * 900 + "]" * 900, "1" * 500, '"\\ud83d"', "12345678901234567890123"], ids=brief
)
def test_odd_values_among_arguments_break_nothing(text):
    call = f'{{"id":"c","function":{{"name":"f","arguments":{{"a":{text}}}}}}}'.encode()
    whole = b'{"choices":[{"message":{"tool_calls":[%b]}}]}' % call
    block = b'{"type":"tool_use","id":"c","name":"f","input":{"a":%b}}' % text.encode()
    message = b'{"type":"message","content":[%b],"stop_reason":"tool_use"}' % block
    start = b'data: {"type":"content_block_start","content_block":%b}\n\n' % block
    ending = sse("message_delta", delta={"stop_reason": "tool_use"}) + sse("message_stop")
    for asked, answer, stream in (
        (asked_of(), whole, b"data: %b\n\ndata: [DONE]\n\n" % whole.replace(b"message", b"delta")),
        (asked_of("openai"), message, start + sse("content_block_stop") + ending),
    ):
        events = events_of(streamed(asked, stream)[0])
        with contextlib.suppress(monorelay.AnswerFault):
            arguments = json.dumps(whole_answer(asked, answer))
            assert text.strip('"\\') in arguments.replace(" ", "") and events[-1][0] != "error"


@pytest.mark.parametrize(
    "document", [b"x", b"[]", {}, {"type": "ping2"}, {"type": "error", "error": {"message": "no"}}], ids=brief
)
def test_what_is_no_message_of_anthropics_is_a_fault(document):
    with pytest.raises(monorelay.AnswerFault):
        whole_answer(asked_of("openai"), document)


# -- errors


def error_answer(status: int, content: bytes, asked: Any) -> tuple[int, bytes]:
    """A provider's error as the client gets it."""
    return monorelay.fault_answer(monorelay.fault_of_status(status, content, asked.provider), asked)


@pytest.mark.parametrize(
    ("status", "anthropic_kind", "openai_kind"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (402, "billing_error", "insufficient_quota"),
        (403, "permission_error", "permission_error"),
        (404, "not_found_error", "not_found_error"),
        (408, "timeout_error", "timeout_error"),
        (413, "request_too_large", "request_too_large"),
        (422, "invalid_request_error", "invalid_request_error"),
        (418, "invalid_request_error", "invalid_request_error"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "api_error", "server_error"),
        (502, "api_error", "server_error"),
        (503, "overloaded_error", "server_error"),
        (504, "timeout_error", "timeout_error"),
        (529, "overloaded_error", "server_error"),
    ],
)
def test_e1_an_error_has_the_type_of_its_status(status, anthropic_kind, openai_kind):
    content = json.dumps({"error": {"message": "No.", "type": "strange", "code": "odd"}}).encode()
    told, body = error_answer(status, content, asked_of())
    assert told == status and json.loads(body) == {
        "type": "error",
        "error": {"type": anthropic_kind, "message": "No."},
        "request_id": "req_1",
    }
    told, body = error_answer(status, content, asked_of("openai"))
    error = json.loads(body)["error"]
    assert (
        told == status
        and (error["message"], error["type"], error["param"]) == ("No.", openai_kind, None)
        and error["code"]
    )


OVERFLOWS = {
    (
        "This model's maximum context length is 4096 tokens. However, your messages resulted in 5000 tokens."
    ): "5000 tokens > 4096",
    (
        "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (3000 in"
        " the messages, 2000 in the completion)."
    ): "3000 + 2000 > 4096",
    "Your input exceeds the context window of this model. Please adjust your input.": "",
    (
        "'max_tokens' or 'max_completion_tokens' is too large: 2000. This model's maximum context length"
        " is 4096 tokens and your request has 3000 input tokens"
    ): "3000 + 2000 > 4096",
    (
        "This model's maximum context length is 4096 tokens. However, you requested 2000 output tokens "
        "and your prompt contains at least 3000 input tokens, for a total of at least 5000 tokens."
    ): "3000 + 2000 > 4096",
    (
        "Requested token count exceeds the model's maximum context length of 4096 tokens. You requested "
        "a total of 5000 tokens: 3000 tokens from the input messages and 2000 tokens for the completion."
    ): "3000 + 2000 > 4096",
    (
        "This endpoint's maximum context length is 4096 tokens. However, you requested about 5000 tokens"
        " (3000 of text input, 2000 in the output)."
    ): "3000 + 2000 > 4096",
    "The input token count (5000) exceeds the maximum number of tokens allowed (4096).": "5000 tokens > 4096",
    "This model's maximum prompt length is 4096 but the request contains 5000 tokens.": "5000 tokens > 4096",
    "Please reduce the length of the messages or completion.": "",
    (
        "Prompt contains 5000 tokens and 0 draft tokens, too large for model with 4096 maximum context length"
    ): "5000 tokens > 4096",
    "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it": "5000 tokens > 4096",
    "The number of tokens to keep from the initial prompt is greater than the context length.": "",
    "prompt token count of 5000 exceeds the limit of 4096": "5000 tokens > 4096",
    "invalid params, context window exceeds limit (2013)": "",
    "Your request exceeded model token limit: 4096 (requested: 5000)": "5000 tokens > 4096",
}


@pytest.mark.parametrize("words", OVERFLOWS)
def test_e2_a_context_overflow_is_told_in_the_words_that_clients_act_on(words):
    status, body = error_answer(400, json.dumps({"error": {"message": words}}).encode(), asked_of())
    message = json.loads(body)["error"]["message"]
    if "+" in OVERFLOWS[words]:
        assert message.startswith(
            f"input length and `max_tokens` exceed context limit: {OVERFLOWS[words]}, decrease input length"
        )
    else:
        assert message.startswith(
            f"prompt is too long: {OVERFLOWS[words]} maximum (" if OVERFLOWS[words] else "prompt is too long ("
        )
    assert status == 400 and f"({words})" in message
    assert (
        "too long"
        not in json.loads(error_answer(500, json.dumps({"error": words}).encode(), asked_of())[1])["error"][
            "message"
        ]
    )
    for error in ({"message": words, "code": 400}, {"message": words, "type": "server_error", "code": 500}, words):
        assert ended_with(asked_of(), sse_of([{"error": error}])) == ("invalid_request_error", message)


def test_e2_overflows_that_say_it_in_other_ways():
    def told(status: int, content: bytes, format: str = "anthropic") -> tuple[int, Any]:
        status, body = error_answer(status, content, asked_of(format))
        return status, json.loads(body)["error"]

    coded = json.dumps({"error": {"message": "no", "code": "context_length_exceeded"}}).encode()
    assert told(400, coded) == (
        400,
        {"type": "invalid_request_error", "message": "prompt is too long (no) capability_rejected: prompt_too_long"},
    )
    llama = b'{"error":{"message":"too big","type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":8}}'
    assert told(400, llama)[1]["message"].startswith("prompt is too long: 9 tokens > 8 maximum")
    assert told(413, b"")[0] == 400 and told(400, b"")[1]["message"] == "HTTP 400 from the provider acme"
    groq = b'{"error":{"message":"Request too large for model `m` on TPM: Limit 6000, Requested 9000, please"}}'
    assert told(429, groq)[0] == 400 and "9000 tokens > 6000" in told(429, groq)[1]["message"]
    assert told(429, b'{"error":{"message":"maximum context length"}}')[0] == 429
    for words in (
        "prompt is too long: 9 tokens > 8 maximum",
        "input length and `max_tokens` exceed context limit: 9 + 1 > 8",
    ):
        status, error = told(
            400,
            json.dumps({"type": "error", "error": {"type": "invalid_request_error", "message": words}}).encode(),
            "openai",
        )
        assert (status, error["message"], error["code"]) == (400, words, "context_length_exceeded")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b'{"error":{"message":"Provider returned error","metadata":{"raw":"the reason"}}}',
            "Provider returned error: the reason",
        ),
        (b'{"detail":[{"loc":["body","a"],"msg":"Field required"},{"msg":"b"}]}', "body.a: Field required; b"),
        (b'{"detail":"Not here"}', "Not here"),
        (b'{"error":"bad"}', "bad"),
        (b'{"message":"bad"}', "bad"),
        (b'[{"error":{"code":400,"message":"Gemini says no"}}]', "Gemini says no"),
        (b'{"errors":[{"message":"one"}]}', "one"),
        (b"<html>Bad gateway</html>", "HTTP 502 from the provider acme"),
        (b"plain words", "plain words"),
        (b"", "HTTP 502 from the provider acme"),
        (b'{"a":1}', '{"a":1}'),
        (b"\xff", "\ufffd"),
        (b'{"error":' * 5000, '{"error":' * 400),
    ],
    ids=brief,
)
def test_e3_an_error_keeps_the_providers_words_wherever_they_stand(content, words):
    _, body = error_answer(502, content, asked_of())
    message = json.loads(body)["error"]["message"]
    assert message == words if len(words) < 400 else message.startswith(words) and len(message) <= 4096


@hypothesis.given(
    st.binary(max_size=40) | JSON_VALUE.map(lambda value: json.dumps({"error": value}).encode()),
    st.integers(400, 599),
    st.sampled_from(["openai", "anthropic"]),
)
def test_any_error_can_be_told(content, status, format):
    _, body = error_answer(status, content, asked_of(format))
    assert json.loads(body)["error"]["message"]


# -- what becomes of each field that the official SDKs know

# By type: its fields by what becomes of them, or what becomes of all of it. Carried: the other side gets what it says.
# Named: it's left out, and the client is told so. Left: it's left out in silence, as it says nothing there. Refused:
# the request goes to the next target, or the answer is a fault. Only what is carried is looked into. Older SDKs know
# fields that newer ones don't, and clients still send them.
SERVER_BLOCKS = (
    "ServerToolUseBlock", "WebSearchToolResultBlock", "WebFetchToolResultBlock", "CodeExecutionToolResultBlock",
    "BashCodeExecutionToolResultBlock", "TextEditorCodeExecutionToolResultBlock", "ToolSearchToolResultBlock",
    "MCPToolUseBlock", "MCPToolResultBlock", "MCPToolListingBlock", "AdvisorToolResultBlock", "FallbackBlock",
)  # fmt: skip
MESSAGES_FIELDS: dict[str, Any] = {
    "MessageCreateParamsBase": {
        "carried": "max_tokens messages system temperature top_p stop_sequences stream tools tool_choice thinking "
        "output_config output_format",
        "named": "top_k metadata service_tier speed context_management diagnostics user_profile_id workspace_id "
        "billing_policy compaction fallback_credit_token betas",
        "left": "model cache_control",  # the model is routing's
        "refused": "container mcp_servers fallbacks inference_geo thread",
    },
    "UserMessage": {"carried": "content"},
    "AssistantMessage": {"carried": "content"},
    "Message": {"carried": "content"},
    "SystemMessage": {"carried": "content", "named": "clear_at output_config"},
    "TextBlock": {"carried": "text", "named": "citations", "left": "cache_control"},
    "ImageBlock": {"carried": "source", "named": "transformations", "left": "cache_control"},
    "Base64ImageSource": {"carried": "data media_type"},
    "URLImageSource": {"carried": "url"},
    "FileImageSource": "refused",
    "DocumentBlock": {"carried": "source title context", "named": "citations", "left": "cache_control"},
    "Base64PDFSource": {"carried": "data", "refused": "media_type"},  # if it is another one
    "PlainTextSource": {"carried": "data", "left": "media_type"},
    "ContentBlockSource": {"carried": "content"},
    "URLPDFSource": "refused",
    "FileDocumentSource": "refused",
    "SearchResultBlock": {"carried": "source title content", "named": "citations", "left": "cache_control"},
    "ThinkingBlock": {"carried": "thinking signature"},
    "RedactedThinkingBlock": "left",
    "ToolUseBlock": {"carried": "id name input", "named": "toolset_name", "left": "caller cache_control"},
    "ToolResultBlock": {"carried": "tool_use_id content is_error", "named": "toolset_name", "left": "cache_control"},
    "ToolReferenceBlock": {"carried": "tool_name", "left": "cache_control"},
    "BrowserStateBlock": "refused",
    "CompactionBlock": {
        "carried": "content", "named": "tool_changes", "left": "encrypted_content signature cache_control",
    },
    "ContainerUploadBlock": "refused",
    "ToolAdditionBlock": "refused",
    "ToolRemovalBlock": "refused",
    **dict.fromkeys(SERVER_BLOCKS, "named"),
    "Tool": {
        "carried": "name description input_schema strict", "named": "input_examples",
        "left": "cache_control defer_loading eager_input_streaming",
        "refused": "allowed_callers",  # if only code may call it
    },
    "InputSchemaTyped": {"carried": "properties required"},
    "ToolChoiceAuto": {"carried": "disable_parallel_tool_use"},
    "ToolChoiceAny": {"carried": "disable_parallel_tool_use"},
    "ToolChoiceTool": {"carried": "name disable_parallel_tool_use"},
    "ToolChoiceNone": {},
    "ThinkingConfigEnabled": {"carried": "budget_tokens display", "named": "block_binding"},
    "ThinkingConfigAdaptive": {"carried": "display", "named": "block_binding"},
    "ThinkingConfigDisabled": {},
    "ThinkingConfigBetweenTools": "carried named",  # thinking is shown, but nobody is told when to think
    "OutputConfig": {"carried": "effort format", "named": "task_budget"},
    "JSONOutputFormat": {"carried": "schema"},
}  # fmt: skip
CHAT_FIELDS: dict[str, Any] = {
    "CompletionCreateParamsBase": {
        "carried": "messages max_tokens max_completion_tokens parallel_tool_calls reasoning_effort response_format "
        "safety_identifier service_tier stop stream stream_options temperature tool_choice tools top_p user top_k "
        "thinking cache_control",
        "named": "frequency_penalty logit_bias metadata prediction presence_penalty prompt_cache_key "
        "prompt_cache_options prompt_cache_retention seed store verbosity",
        "left": "model",
        "refused": "audio function_call functions logprobs modalities moderation n top_logprobs web_search_options",
    },
    "ChatCompletionDeveloperMessage": {"carried": "content", "left": "name"},
    "ChatCompletionSystemMessage": {"carried": "content", "left": "name"},
    "ChatCompletionUserMessage": {"carried": "content", "left": "name"},
    "ChatCompletionAssistantMessage": {
        "carried": "content refusal tool_calls", "left": "name", "refused": "audio function_call",
    },
    "ChatCompletionToolMessage": {"carried": "content tool_call_id"},
    "ChatCompletionFunctionMessage": "refused",
    "ChatCompletionContentPartText": {"carried": "text cache_control", "named": "prompt_cache_breakpoint"},
    "ChatCompletionContentPartRefusal": {"carried": "refusal"},
    "ChatCompletionContentPartImage": {"carried": "image_url cache_control", "named": "prompt_cache_breakpoint"},
    "ImageURL": {"carried": "url", "named": "detail"},
    "ChatCompletionContentPartInputAudio": "refused",
    "File": {"carried": "file cache_control", "named": "prompt_cache_breakpoint"},
    "FileFile": {"carried": "file_data filename", "named": "file_id"},  # beside the data
    "ChatCompletionMessageFunctionToolCall": {"carried": "id function"},
    "ChatCompletionMessageFunctionToolCall.function": {"carried": "name arguments"},
    "ChatCompletionMessageCustomToolCall": "refused",
    "ChatCompletionFunctionTool": {"carried": "function cache_control"},
    "FunctionDefinition": {"carried": "name description parameters strict"},
    "ChatCompletionCustomTool": "refused",
    "ChatCompletionAllowedToolChoice": {"carried": "allowed_tools"},
    "ChatCompletionAllowedTools": {"carried": "mode tools"},
    "ChatCompletionNamedToolChoice": {"carried": "function"},
    "ChatCompletionNamedToolChoice.function": {"carried": "name"},
    "ChatCompletionNamedToolChoiceCustom": "refused",
    "ResponseFormatText": {},
    "ResponseFormatJSONSchema": {"carried": "json_schema"},
    "JSONSchema": {"carried": "schema", "left": "name description strict"},
    "ResponseFormatJSONObject": "carried named",  # as the system's word
    "ChatCompletionStreamOptions": {"carried": "include_usage", "named": "include_obfuscation"},
}  # fmt: skip
CHAT_ANSWER_FIELDS: dict[str, Any] = {
    "ChatCompletion": {
        "carried": "choices usage",
        "left": "id created model object metadata moderation service_tier system_fingerprint obfuscation",
    },
    "Choice": {"carried": "message delta finish_reason", "left": "logprobs", "refused": "index"},  # of another answer
    "ChatCompletionMessage": {"carried": "content refusal function_call tool_calls", "left": "role annotations audio"},
    "ChatCompletionMessageFunctionToolCall": {"carried": "id function", "left": "index"},
    "ChatCompletionMessageFunctionToolCall.function": {"carried": "name arguments"},
    "ChatCompletionMessageCustomToolCall": "refused",
    "FunctionCall": {"carried": "name arguments"},
    "CompletionUsage": {
        "carried": "prompt_tokens completion_tokens prompt_tokens_details completion_tokens_details total_tokens",
    },
    "PromptTokensDetails": {
        "carried": "cached_tokens cache_write_tokens", "left": "audio_tokens image_tokens text_tokens",
    },
    "CompletionTokensDetails": {
        "carried": "reasoning_tokens",
        "left": "accepted_prediction_tokens audio_tokens rejected_prediction_tokens text_tokens",
    },
}  # fmt: skip
MESSAGE_FIELDS: dict[str, Any] = {
    "Message": {
        "carried": "id content stop_reason stop_details usage",
        "left": "container context_management diagnostics input_transformations model role stop_sequence",
    },
    "TextBlock": {"carried": "text", "left": "citations"},
    "ThinkingBlock": {"carried": "thinking signature"},
    "RedactedThinkingBlock": {"carried": "data"},
    "ToolUseBlock": {"carried": "id name input", "left": "caller toolset_name"},
    **dict.fromkeys((*SERVER_BLOCKS, "CompactionBlock", "ContainerUploadBlock"), "left"),
    "RefusalStopDetails": {
        "carried": "explanation",
        "left": "category fallback_credit_token fallback_has_prefill_claim recommended_model",
    },
    "Usage": {
        "carried": "input_tokens cache_creation_input_tokens cache_read_input_tokens output_tokens "
        "output_tokens_details service_tier",
        "left": "cache_creation fallback_credit inference_geo iterations server_tool_use speed",
    },
    "OutputTokensDetails": {"carried": "thinking_tokens"},
}  # fmt: skip


class Known(NamedTuple):
    """A type of an SDK, with a name that is the same in each of its versions, and its fields."""

    name: str
    fields: dict[str, Any]  # their types, by their names in JSON
    required: set[str]


def known_type(form: Any, holder: str) -> Known:
    """What an SDK knows of a type that a field of the holder has."""
    if hasattr(form, "model_fields"):
        fields = {field.alias or name: field.annotation for name, field in form.model_fields.items()}
        required = set(fields)
    else:
        fields = typing_extensions.get_type_hints(form)
        marked = typing_extensions.get_type_hints(form, include_extras=True)
        required = {name for name in marked if form.__total__ or "Required[" in str(marked[name])}
    name = re.sub("^Beta(Request|Response)?|(Union)?Param$", "", form.__name__)
    name = re.sub("^(Request|Response)(?=Document|Tool|MCP)|^ChoiceDelta(?=ToolCall$)", "", name)
    name = {
        "ChatCompletionChunk": "ChatCompletion", "ChoiceDelta": "ChatCompletionMessage",
        "ChoiceDeltaFunctionCall": "FunctionCall", "ToolCall": "ChatCompletionMessageFunctionToolCall",
    }.get(name, name)  # fmt: skip
    if name in ("Function", "Custom", "ChoiceDeltaToolCallFunction"):  # of which there are several
        name = f"{holder}.{'custom' if name == 'Custom' else 'function'}"
    return Known(name, fields, required)


def types_within(annotation: Any) -> Iterator[Any]:
    """The types of objects that a field may hold."""
    if hasattr(annotation, "model_fields") or hasattr(annotation, "__required_keys__"):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from types_within(argument)


def verdicts(table: dict[str, Any], *roots: Any) -> Iterator[tuple[str, str, str, Any]]:
    """What the table says of the fields of these types, and of those within what is carried: type, field (none for the
    type as a whole), verdict (none where the table has none) and the type of its value. Tools of types that it doesn't
    list are refused."""
    waiting, seen = [(root, "", "") for root in roots], set()
    while waiting:
        form, holder, held_as = waiting.pop()
        known = known_type(form, holder)
        row = table.get(known.name, "refused" if held_as == "tools" else "")
        if isinstance(row, str):
            yield known.name, "", row, form
            continue
        listed = {field: verdict for verdict, fields in row.items() for field in fields.split()}
        for field in {**known.fields, **listed}:
            annotation = known.fields.get(field, str)
            if field not in ("type", "role") or field in listed:
                yield known.name, field, listed.get(field, ""), annotation
            inner = types_within(annotation) if listed.get(field) == "carried" else ()
            for one in inner:
                if (one, known.name) not in seen:
                    seen.add((one, known.name))
                    waiting.append((one, known.name, field))


LITERALS = (typing.Literal, typing_extensions.Literal)  # which is another one on some Pythons


def sample(annotation: Any) -> Any:
    """A value that a field of this type may have."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in LITERALS:
        return arguments[-1]
    if any(True for _ in types_within(annotation)) and not arguments:
        known = known_type(annotation, "")
        return {field: FIELD_SAMPLES.get(field, sample(known.fields[field])) for field in known.required}
    if typing.get_origin(annotation) in (list, collections.abc.Iterable, collections.abc.Sequence):
        return [sample(arguments[0])]
    if typing.get_origin(annotation) in (dict, collections.abc.Mapping):
        return {"a": "b"}
    return sample(arguments[0]) if arguments else {int: 7, float: 0.5, bool: True}.get(annotation, "sample")


def answered(**message: Any) -> dict[str, Any]:
    """A chat answer with these members of its message."""
    return completion(**message)


def with_usage(**fields: Any) -> dict[str, Any]:
    return completion(content="x", usage={**USAGE, **fields})


SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}}}
# Values by which fields say something else than the objects below do without them.
FIELD_SAMPLES: dict[str, Any] = {
    "max_tokens": 65, "messages": [user(said("other"))], "temperature": 0.5, "top_p": 0.5, "stream": True,
    "stop_sequences": ["x"], "tools": [], "tool_choice": {"type": "any"}, "output_config": {"effort": "low"},
    "thinking": {"type": "enabled", "budget_tokens": 20_000}, "content": "other", "name": "dig", "id": "t2",
    "input": {"x": 1}, "tool_use_id": "t2", "input_schema": SCHEMA, "effort": "low", "schema": {"title": "T"},
    "properties": {"z": {}}, "required": ["z"], "allowed_callers": ["code_execution_20250825"], "display": "omitted",
    "format": {"type": "json_schema", "schema": SCHEMA}, "output_format": {"type": "json_schema", "schema": SCHEMA},
    "source": {"type": "base64", "media_type": "application/pdf", "data": "BBBB"}, "budget_tokens": 20_000,
    "media_type": "image/gif", "container": "c", "system": "Be.", "metadata": {"user_id": "u"},
    "citations": {"enabled": True},
}  # fmt: skip
CHAT_SAMPLES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "other"}], "max_tokens": 65, "max_completion_tokens": 66, "n": 2,
    "parallel_tool_calls": False, "reasoning_effort": "low", "store": True, "metadata": {"a": "b"},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "json_schema": {"name": "a", "schema": SCHEMA}, "ChatCompletionFunctionTool.function": {"name": "dig"},
    "ChatCompletionNamedToolChoice.function": {"name": "dig"}, "function": {"name": "dig", "arguments": "{}"},
    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "look"}}]},
    "service_tier": "default", "stop": "x", "stream_options": {"include_usage": True}, "tool_choice": "required",
    "tools": [], "user": "u2", "safety_identifier": "u1", "modalities": ["audio"], "top_k": 3, "temperature": 0.5,
    "thinking": {"type": "adaptive"}, "cache_control": {"type": "ephemeral"}, "content": "other", "stream": True,
    "tool_calls": [called("t2")], "tool_call_id": "t2", "image_url": {"url": "https://b/c.png"}, "url": "https://b/c.png",
    "file": {"file_data": "BBBB"}, "file_data": "BBBB", "id": "t2", "name": "dig", "arguments": '{"x": 1}',
    "parameters": SCHEMA, "mode": "required", "schema": {"type": "object", "title": "T"}, "logit_bias": {"5": 1},
}  # fmt: skip
CHAT_ANSWER_SAMPLES: dict[str, Any] = {
    "choices": answered(content="y")["choices"], "object": "other", "message": {"content": "other"},
    "delta": {"content": "other"}, "index": 1,
    "finish_reason": "length", "function_call": {"name": "look", "arguments": "{}"}, "tool_calls": [called("t1")],
    "function": {"name": "dig", "arguments": "{}"}, "arguments": '{"x": 1}', "total_tokens": 25, "reasoning_tokens": 8,
    "completion_tokens_details": {"reasoning_tokens": 8}, "prompt_tokens_details": {"cached_tokens": 3},
}  # fmt: skip
MESSAGE_SAMPLES: dict[str, Any] = {"role": "user", "service_tier": "priority", "stop_reason": "max_tokens"}


def in_user(*blocks: Any) -> dict[str, Any]:
    return prompt(messages=[user(*blocks, said("x"))])


def in_history(*blocks: Any) -> dict[str, Any]:
    return prompt(messages=[HELLO, assistant(*blocks, said("x")), HELLO])


def in_turns(*messages: Any) -> dict[str, Any]:
    return prompt(messages=[HELLO, *messages, HELLO])


def in_result(*blocks: Any) -> dict[str, Any]:
    return prompt(messages=[HELLO, assistant(tool_use("t1")), user(tool_result("t1", [*blocks, said("x")]))])


def in_image(source: Any) -> dict[str, Any]:
    return in_user({"type": "image", "source": source})


def in_document(source: Any) -> dict[str, Any]:
    return in_user({"type": "document", "source": source})


def in_choice(choice: Any) -> dict[str, Any]:
    return prompt(tools=[TOOL], tool_choice=choice)


def thought_about(*thinking: Any) -> dict[str, Any]:
    return prompt(**dict(zip(["thinking"], thinking)))


# By type: the least of a value, and the request or answer that it is put into.
MESSAGES_PLACES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "MessageCreateParamsBase": ({}, lambda *it: prompt(**{"tools": [TOOL], **it[0]})),
    "Message": (HELLO, in_turns),
    "UserMessage": (HELLO, in_turns),
    "AssistantMessage": ({"role": "assistant", "content": "x"}, in_turns),
    "SystemMessage": ({"role": "system", "content": "x"}, in_turns),
    "TextBlock": (said("y"), in_user),
    "ImageBlock": (IMAGE, lambda it: in_user({**it, "source": {"type": "url", "url": str(it["source"])}})),
    "Base64ImageSource": (IMAGE["source"], in_image),
    "URLImageSource": ({"type": "url", "url": "https://a/b.png"}, in_image),
    "FileImageSource": ({"type": "file", "file_id": "f"}, in_image),
    "DocumentBlock": ({"type": "document", "source": {"type": "text", "data": "x"}}, in_user),
    "Base64PDFSource": (PDF, in_document),
    "PlainTextSource": ({"type": "text", "data": "x", "media_type": "text/plain"}, in_document),
    "ContentBlockSource": ({"type": "content", "content": [said("y")]}, in_document),
    "URLPDFSource": ({"type": "url", "url": "https://a/b.pdf"}, in_document),
    "FileDocumentSource": ({"type": "file", "file_id": "f"}, in_document),
    "SearchResultBlock": ({"type": "search_result", "source": "s", "title": "t", "content": [said("y")]}, in_user),
    "ThinkingBlock": (signed("hm"), in_history),
    "RedactedThinkingBlock": (REDACTED, in_history),
    "ToolUseBlock": (tool_use("t1"), lambda it: in_turns(assistant(it), user(tool_result(it["id"])))),
    "ToolResultBlock": (tool_result("t1", "x"), lambda it: in_turns(assistant(tool_use(it["tool_use_id"])), user(it))),
    "ToolReferenceBlock": ({"type": "tool_reference", "tool_name": "look"}, in_result),
    "BrowserStateBlock": ({"type": "browser_state", "tabs": []}, in_result),
    "CompactionBlock": ({"type": "compaction", "content": "y"}, in_history),
    "Tool": (TOOL, lambda *it: prompt(tools=[TOOL, *it])),
    "InputSchemaTyped": (TOOL["input_schema"], lambda it: prompt(tools=[{**TOOL, "input_schema": it}])),
    "JSONOutputFormat": ({"type": "json_schema", "schema": {}}, lambda it: prompt(output_config={"format": it})),
    "OutputConfig": ({}, lambda it: prompt(output_config=it)),
    "ToolChoiceAuto": ({"type": "auto"}, in_choice),
    "ToolChoiceAny": ({"type": "any"}, in_choice),
    "ToolChoiceTool": ({"type": "tool", "name": "look"}, in_choice),
    "ThinkingConfigEnabled": ({"type": "enabled", "budget_tokens": 1024}, thought_about),
    "ThinkingConfigAdaptive": ({"type": "adaptive"}, thought_about),
    "ThinkingConfigBetweenTools": ({"type": "between_tools"}, thought_about),
}


def in_chat(*messages: Any) -> dict[str, Any]:
    return chat(messages=[HELLO, *messages])


def in_part(*parts: Any) -> dict[str, Any]:
    return in_chat(user(*parts, said("x")))


def in_call(call: Any) -> dict[str, Any]:
    return in_chat(assistant_said("x", call), returned(call["id"]))


def with_choice(choice: Any) -> dict[str, Any]:
    return chat(tools=[CHAT_TOOL, {"type": "function", "function": {"name": "dig"}}], tool_choice=choice)


CHAT_TOOL = {"type": "function", "function": {"name": "look"}}
CHAT_PLACES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "CompletionCreateParamsBase": ({}, lambda *it: chat(**{"tools": [CHAT_TOOL], **it[0]})),
    "ChatCompletionDeveloperMessage": ({"role": "developer", "content": "x"}, in_chat),
    "ChatCompletionSystemMessage": ({"role": "system", "content": "x"}, in_chat),
    "ChatCompletionUserMessage": (HELLO, in_chat),
    "ChatCompletionAssistantMessage": (assistant_said("x"), in_chat),
    "ChatCompletionToolMessage": (
        returned("t1"), lambda it: in_chat(assistant_said(None, called(it["tool_call_id"])), it),
    ),
    "ChatCompletionFunctionMessage": ({"role": "function", "name": "f", "content": "x"}, in_chat),
    "ChatCompletionContentPartText": (said("y"), in_part),
    "ChatCompletionContentPartRefusal": (
        {"type": "refusal", "refusal": "y"}, lambda it: in_chat({"role": "assistant", "content": [it]}),
    ),
    "ChatCompletionContentPartImage": (image_part(), in_part),
    "ImageURL": (image_part()["image_url"], lambda it: in_part({"type": "image_url", "image_url": it})),
    "ChatCompletionContentPartInputAudio": ({"type": "input_audio", "input_audio": {"data": ""}}, in_part),
    "File": ({"type": "file", "file": CHAT_FILE}, in_part),
    "FileFile": (CHAT_FILE, lambda it: in_part({"type": "file", "file": it})),
    "ChatCompletionMessageFunctionToolCall": (called("t1"), in_call),
    "ChatCompletionMessageFunctionToolCall.function": (
        called("t1")["function"], lambda it: in_call({**called("t1"), "function": it}),
    ),
    "ChatCompletionMessageCustomToolCall": (
        {"id": "t1", "type": "custom", "custom": {"name": "a", "input": "b"}}, in_call,
    ),
    "ChatCompletionFunctionTool": (CHAT_TOOL, lambda *it: chat(tools=[CHAT_TOOL, *it])),
    "FunctionDefinition": (CHAT_TOOL["function"], lambda it: chat(tools=[{"type": "function", "function": it}])),
    "ChatCompletionCustomTool": ({"type": "custom", "custom": {"name": "a"}}, lambda *it: chat(tools=it)),
    "ChatCompletionAllowedToolChoice": (
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [CHAT_TOOL]}}, with_choice,
    ),
    "ChatCompletionAllowedTools": (
        {"mode": "auto", "tools": [CHAT_TOOL]}, lambda it: with_choice({"type": "allowed_tools", "allowed_tools": it}),
    ),
    "ChatCompletionNamedToolChoice": (CHAT_TOOL, with_choice),
    "ChatCompletionNamedToolChoice.function": (
        CHAT_TOOL["function"], lambda it: with_choice({"type": "function", "function": it}),
    ),
    "ChatCompletionNamedToolChoiceCustom": ({"type": "custom", "custom": {"name": "a"}}, with_choice),
    "ResponseFormatJSONObject": ({"type": "json_object"}, lambda *it: chat(**dict(zip(["response_format"], it)))),
    "ResponseFormatJSONSchema": (
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}, lambda it: chat(response_format=it),
    ),
    "JSONSchema": (
        {"name": "a", "schema": {}}, lambda it: chat(response_format={"type": "json_schema", "json_schema": it}),
    ),
    "ChatCompletionStreamOptions": ({}, lambda it: chat(stream=True, stream_options=it)),
}  # fmt: skip


CHAT_ANSWER_PLACES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "ChatCompletion": (answered(content="x"), lambda it: it),
    "Choice": (answered(content="x")["choices"][0], lambda it: {**answered(), "choices": [it]}),
    "ChatCompletionMessage": ({"content": "x"}, lambda it: answered(**it)),
    "ChatCompletionMessageFunctionToolCall": (called("t1"), lambda it: answered(calls=[it])),
    "ChatCompletionMessageFunctionToolCall.function": (
        called("t1")["function"], lambda it: answered(calls=[{**called("t1"), "function": it}]),
    ),
    "ChatCompletionMessageCustomToolCall": (
        {"id": "t1", "type": "custom", "custom": {"name": "a"}}, lambda *it: answered(content="x", calls=it),
    ),
    "FunctionCall": (called("t1")["function"], lambda it: answered(function_call=it)),
    "CompletionUsage": (
        {**USAGE, "total_tokens": 32, "completion_tokens_details": {"reasoning_tokens": 7}},
        lambda it: answered(content="x", usage=it),
    ),
    "PromptTokensDetails": ({}, lambda it: with_usage(prompt_tokens_details=it)),
    "CompletionTokensDetails": (
        {"reasoning_tokens": 7}, lambda it: with_usage(total_tokens=32, completion_tokens_details=it),
    ),
}  # fmt: skip
ANSWERED = {**MESSAGE, "content": [said("x")], "stop_reason": "refusal"}
MESSAGE_PLACES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "Message": (ANSWERED, lambda it: it),
    "TextBlock": (said("y"), lambda it: {**ANSWERED, "content": [it]}),
    "RefusalStopDetails": ({"type": "refusal"}, lambda it: {**ANSWERED, "stop_details": it}),
    "Usage": (ANSWERED["usage"], lambda it: {**ANSWERED, "usage": it}),
    "OutputTokensDetails": ({}, lambda it: {**ANSWERED, "usage": {"output_tokens_details": it}}),
    "ThinkingBlock": (THOUGHTS, lambda it: {**ANSWERED, "content": [it]}),
    "RedactedThinkingBlock": (REDACTED, lambda it: {**ANSWERED, "content": [it]}),
    "ToolUseBlock": (tool_use("t1"), lambda it: {**ANSWERED, "content": [it]}),
}


class Api(NamedTuple):
    """One direction of one API: what becomes of its fields, where they stand, and by which types its SDK has them."""

    fields: dict[str, Any]
    places: dict[str, tuple[Any, Callable[..., Any]]]
    samples: dict[str, Any]
    told: Callable[[Any], tuple[Any, Any]]  # what the other side gets of it, and what is told of as left out
    types: tuple[Any, ...]
    elsewhere: Callable[..., Any]  # where a value goes that has no place of its own


def request_told(target: Any) -> Callable[[Any], tuple[Any, Any]]:
    def told(request: Any) -> tuple[Any, Any]:
        body, made = translated(request, target)
        return (body, made.asked._replace(input_tokens=0)), made.dropped

    return told


CHAT_ANSWERS = openai.types.chat
APIS = {
    "Messages": Api(
        MESSAGES_FIELDS,
        MESSAGES_PLACES,
        FIELD_SAMPLES,
        request_told(target_of(reasoning="effort", reasoning_back="reasoning_content")),
        (
            anthropic.types.message_create_params.MessageCreateParamsBase,
            anthropic.types.beta.message_create_params.MessageCreateParamsBase,
        ),
        in_history,
    ),
    "chat": Api(
        CHAT_FIELDS,
        CHAT_PLACES,
        CHAT_SAMPLES,
        request_told(target_of("anthropic", reasoning="effort")),
        (CHAT_ANSWERS.completion_create_params.CompletionCreateParamsBase,),
        in_part,
    ),
    "an answer of chat": Api(
        CHAT_ANSWER_FIELDS,
        CHAT_ANSWER_PLACES,
        CHAT_ANSWER_SAMPLES,
        lambda document: (whole_answer(asked_of(), document), ()),
        (CHAT_ANSWERS.ChatCompletion, CHAT_ANSWERS.ChatCompletionChunk),
        answered,
    ),
    "a message": Api(
        MESSAGE_FIELDS,
        MESSAGE_PLACES,
        MESSAGE_SAMPLES,
        lambda document: (whole_answer(asked_of("openai"), document), ()),
        (anthropic.types.Message, anthropic.types.beta.BetaMessage),
        lambda *it: {**ANSWERED, "content": [*it, said("x")]},
    ),
}
VERDICTS = {
    (api, holder, field): (verdict, annotation)
    for api, known in APIS.items()
    for holder, field, verdict, annotation in verdicts(known.fields, *known.types)
}


@pytest.mark.parametrize(("api", "holder", "field"), VERDICTS)
def test_each_field_of_both_apis_is_carried_named_left_or_refused_as_it_should_be(api, holder, field):
    """A field, or a type, that is new in an SDK has no verdict: put it into the table above, with the one that
    it should have, and translate it so."""
    verdict, annotation = VERDICTS[api, holder, field]
    assert verdict, f"{api}: {holder}.{field} is new: what becomes of it?"
    known = APIS[api]
    default = (sample(annotation), known.elsewhere if verdict != "refused" or api != "Messages" else in_user)
    value, place = known.places.get(holder, default)
    value = {"type": "x", **value} if holder not in known.places else value
    if not field:
        more = (value,)
        without = None if verdict == "refused" else known.told(place())
    else:
        given = known.samples.get(f"{holder}.{field}", known.samples.get(field, sample(annotation)))
        assert value.get(field, ...) != given
        more, without = ({**value, field: given},), known.told(place(value))
    try:
        told = known.told(place(*more))
    except (monorelay.Untranslatable, monorelay.AnswerFault):
        assert verdict == "refused"
        return
    changes, named = told[0] != without[0], told[1] != without[1]
    assert (changes, named) == ("carried" in verdict, "named" in verdict)


# Why a message ends, and the finish_reason of chat.
ENDS = {
    "end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "compaction": "stop", "max_tokens": "length",
    "model_context_window_exceeded": "length", "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip
# The events of a message and what stands in them, by whether chat has something for them.
EVENTS = {
    "message_start": True, "message_delta": False, "message_stop": True, "content_block_start": False,
    "content_block_delta": True, "content_block_stop": False, "ping": True, "text_delta": True,
    "input_json_delta": True, "thinking_delta": True, "signature_delta": True, "citations_delta": False,
    "compaction_delta": False,
}  # fmt: skip


def literals_within(annotation: Any) -> Iterator[str]:
    """The words that a field may hold, of an object those of its type."""
    if hasattr(annotation, "model_fields"):
        annotation = annotation.model_fields["type"].annotation
    if typing.get_origin(annotation) in LITERALS:
        yield from typing.get_args(annotation)
    else:
        for argument in typing.get_args(annotation):
            yield from literals_within(argument)


def test_each_end_and_each_event_of_a_message_that_the_sdk_knows_is_understood():
    known = {*literals_within(anthropic.types.StopReason), *literals_within(anthropic.types.beta.BetaStopReason)}
    assert known <= {*ENDS}, "a new reason: what is it in chat?"
    for reason, finish in ENDS.items():
        content = [said("x"), *([tool_use("t1")] if reason == "tool_use" else [])]
        told = whole_answer(asked_of("openai"), {**MESSAGE, "content": content, "stop_reason": reason})
        assert told["choices"][0]["finish_reason"] == finish
    types = (anthropic.types.RawMessageStreamEvent, anthropic.types.RawContentBlockDelta)
    types += (anthropic.types.beta.BetaRawMessageStreamEvent, anthropic.types.beta.BetaRawContentBlockDelta)
    assert {kind for annotation in types for kind in literals_within(annotation)} <= {*EVENTS}, "a new event"
    for kind, is_told in EVENTS.items():
        it = monorelay.AnswerTranslator(asked_of("openai", stream=True))
        it.feed(sse("message_start", message=MESSAGE) * (kind != "message_start"))
        words = dict.fromkeys(("text", "thinking", "signature", "partial_json", "citation"), "x")
        part = {"type": kind, **words}
        it.feed(sse("content_block_start", content_block=tool_use("t1")) * (kind == "input_json_delta"))
        part = {"content_block_delta": {**part, "type": "text_delta"}, "message_delta": None}.get(kind, part)
        event = sse("content_block_delta", delta=part) if kind.endswith("_delta") and part else sse(kind)
        assert bool(it.feed(event)) == is_told, kind


# ------------------------------------------------------------------------------------------------------------
# Echo
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def echo(relay) -> Relay:
    return relay({"echo": {}}, aliases={"claude-opus-4-5": "echo"})




@pytest.mark.parametrize(
    ("fields", "text", "stop_reason", "stop_sequence"),
    [
        ({}, "Hello there", "end_turn", None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Two words"}, IMAGE]}]},
         "Two words", "end_turn", None),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
         {"role": "user", "content": "ü \u2028 c"}]},
         "ü \u2028 c", "end_turn", None),
        ({"max_tokens": 1}, None, "max_tokens", None),
        ({"stop_sequences": ["zz", "lo"]}, "Hel", "stop_sequence", "lo"),
        ({"system": "Be brief.", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "tools": [TOOL],
         "tool_choice": {"type": "auto"}},
         "Hello there", "end_turn", None),
        ({"system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
         "Hello there", "end_turn", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/beta"])
def test_echo_message_streamed_or_not(echo, path, fields, text, stop_reason, stop_sequence):
    plain = echo.post(path, prompt("echo", **fields), ANTHROPIC_VERSION)
    message = plain.json
    assert plain.status == 200 and plain.get("content-type").startswith("application/json")
    assert message["id"].startswith("msg_") and (message["type"], message["role"]) == ("message", "assistant")
    assert (message["model"], message["stop_reason"], message["stop_sequence"]) == (
        "echo",
        stop_reason,
        stop_sequence,
    )
    assert message["content"][0]["type"] == "text"
    text = message["content"][0]["text"] if text is None else text
    assert message["content"][0]["text"] == text
    counts = {"input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"}
    assert counts <= message["usage"].keys() and message["usage"]["input_tokens"] > 0

    events = events_of(echo.post(path, prompt("echo", stream=True, **fields), ANTHROPIC_VERSION).body)
    names = [name for name, _ in events if name != "ping"]
    deltas = names.count("content_block_delta")
    assert names == ["message_start", "content_block_start", *["content_block_delta"] * deltas,
                     "content_block_stop", "message_delta", "message_stop"]  # fmt: skip
    assert all(name == data["type"] for name, data in events)
    assert "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta") == text
    closing = dict(events)["message_delta"]
    assert closing["delta"] == {"stop_reason": stop_reason, "stop_sequence": stop_sequence}
    assert closing["usage"]["output_tokens"] == message["usage"]["output_tokens"]
    assert counts <= dict(events)["message_start"]["message"]["usage"].keys()


def test_echo_streams_word_by_word(echo):
    text = "one two three four"
    events = events_of(
        echo.post(
            "/v1/messages", prompt("echo", stream=True, messages=[{"role": "user", "content": text}])
        ).body
    )
    assert sum(name == "content_block_delta" for name, _ in events) == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens: Field required"),
        ({"messages": None}, "messages: Field required"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "10"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: Field required"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"text": "no type"}]}]}, "messages.0.content.0"),
        ({"temperature": 1.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"system": 5}, "system"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": ["x", " \n"]}, "stop_sequences"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"name": "look"}]}, "tools.0"),
        ({"tools": [TOOL], "tool_choice": {"type": "maybe"}}, "tool_choice"),
    ],
)
def test_echo_checks_requests_as_the_api_does(echo, change, words):
    body = {name: value for name, value in prompt("echo", **change).items() if value is not None}
    got = echo.post("/v1/messages", body)
    assert (got.status, got.json["type"], got.json["error"]["type"]) == (
        400,
        "error",
        "invalid_request_error",
    )
    assert words in got.json["error"]["message"]
    assert got.get("request-id") and got.get("x-monorelay-error") is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (403, "permission_error"), (404, "not_found_error"), (413,
     "request_too_large"),
     (429, "rate_limit_error"), (500, "api_error"), (529, "overloaded_error")],
)  # fmt: skip
def test_echo_answers_with_any_error(echo, status, kind, stream):
    model = f"echo-error-{status}"
    got = echo.post("/v1/messages", prompt(model, stream=stream))
    assert (got.status, got.json["type"], got.json["error"]["type"]) == (status, "error", kind)
    assert got.get("x-monorelay-error") is None and got.get("x-monorelay-provider") == "echo"
    assert echo.post("/v1/chat/completions", chat(model, stream=stream)).status == status
    again = echo.post("/v1/messages", prompt("echo"))
    assert (again.status, again.get("x-monorelay-attempts")) == (200, "1"), "its errors cool nothing"


def test_echo_answers_the_responses_api(echo):
    client = openai.OpenAI(api_key=TOKEN, base_url=echo.url + "/v1", max_retries=0, timeout=TIMEOUT_SECONDS)
    whole = client.responses.create(model="echo", input="Hello from responses")
    assert (whole.output_text, whole.status) == ("Hello from responses", "completed")
    cut = client.responses.create(model="echo", input="a b c d", max_output_tokens=2)
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == ("a b", "incomplete", "max_output_tokens")
    with client.responses.stream(model="echo", input="one by one") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert deltas == ["one", " by", " one"] and stream.get_final_response().output_text == "one by one"
    tool = {"type": "function", "name": "look", "parameters": {"type": "object", "required": ["q"]}}
    call = client.responses.create(model="echo-tool", input="x", tools=[tool]).output[0]
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "look", {"q": "echo"})
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    turns = [{"role": "user", "content": "x"}, call.model_dump(exclude_none=True), result]
    assert client.responses.create(model="echo-tool", input=turns, tools=[tool]).output_text == "42"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", prompt("echo-tool", tools=[{"name": "t", "input_schema": {"required": 5, "type": "object"}}])),
        ("/v1/completions", {"model": "echo", "prompt": "Hi", "stream": True, "stream_options": 5}),
        ("/v1/chat/completions", {**chat("echo"), "tools": 5}),
        ("/v1/chat/completions", {**chat("echo"), "tool_choice": {"function": "x"}}),
        ("/v1/chat/completions", {**chat("echo"), "temperature": "hot"}),
    ],
)
def test_echo_refuses_fields_of_an_odd_type(echo, path, body):
    got = echo.post(path, body)
    assert (got.status, got.json["error"]["type"]) == (400, "invalid_request_error")
    translates = "tools" in body or "tool_choice" in body  # which is over before echo gets any of it
    assert got.get("x-monorelay-provider") == (None if path == "/v1/chat/completions" and translates else "echo")


@pytest.mark.timed
def test_echo_slow_paces_its_words(echo):
    begin = time.monotonic()
    body = echo.post(
        "/v1/messages", prompt("echo-slow", stream=True, messages=[{"role": "user", "content": "a b c d e"}])
    ).body
    assert events_of(body)[-1][0] == "message_stop" and 0.18 < time.monotonic() - begin < 2


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_echo_cut_breaks_off_within_the_stream(echo, path):
    with echo.client() as client:
        body = prompt(
            "echo-cut", stream=True, messages=[{"role": "user", "content": "one two three four five six"}]
        )
        client.send(request("POST", path, json.dumps(body).encode()))
        assert_died(client, anthropic=path == "/v1/messages")


def test_echo_tool_calls_the_first_tool_offered(echo):
    got = echo.post("/v1/messages", prompt("echo-tool", tools=[TOOL, {**TOOL, "name": "other"}])).json
    (block,) = [block for block in got["content"] if block["type"] == "tool_use"]
    assert (block["name"], got["stop_reason"]) == ("look", "tool_use") and block["id"].startswith("toolu_")
    assert isinstance(block["input"], dict)
    events = events_of(echo.post("/v1/messages", prompt("echo-tool", tools=[TOOL], stream=True)).body)
    parts = [
        data["delta"]["partial_json"]
        for name, data in events
        if data.get("delta", {}).get("type") == "input_json_delta"
    ]
    assert json.loads("".join(parts)) == block["input"]
    assert dict(events)["message_delta"]["delta"]["stop_reason"] == "tool_use"
    tool = {"type": "function", "function": {"name": "look", "parameters": TOOL["input_schema"]}}
    choice = echo.post("/v1/chat/completions", chat("echo-tool", tools=[tool])).json["choices"][0]
    assert (choice["finish_reason"], choice["message"]["tool_calls"][0]["function"]["name"]) == (
        "tool_calls",
        "look",
    )


def test_echo_takes_a_tools_result(echo):
    messages = [{"role": "user", "content": "Look"},
                {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "look",
                 "input": {}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1",
                 "content": "seen"}]}]  # fmt: skip
    assert echo.post("/v1/messages", prompt("echo-tool", messages=messages, tools=[TOOL])).status == 200


def test_echo_counts_tokens_and_lists_models(echo):
    counted = echo.post("/v1/messages/count_tokens", {"model": "echo", "messages": prompt()["messages"]}).json
    assert list(counted) == ["input_tokens"] and counted["input_tokens"] > 0
    for path in ("/v1/models", "/v1/anthropic/models"):
        listed = echo.ask("GET", path, None, ANTHROPIC_VERSION).json
        assert "echo" in [model["id"] for model in listed["data"]]
        assert all({"type", "id", "display_name", "created_at"} <= model.keys() for model in listed["data"])


def test_echo_takes_system_turns_only_with_their_beta(echo):
    turns = [
        {"role": "user", "content": "Say this."},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": "And that."},
    ]
    asked = json.dumps(prompt("echo", messages=turns)).encode()
    beta = "anthropic-beta: claude-code-20250219,mid-conversation-system-2026-04-07"
    taken = echo.ask("POST", "/v1/messages", asked, ANTHROPIC_VERSION, beta)
    assert (taken.status, taken.json["content"][0]["text"]) == (200, "And that.")
    other = "anthropic-beta: mid-conversation-tool-changes-2026-07-01"
    assert echo.ask("POST", "/v1/messages", asked, ANTHROPIC_VERSION, other).status == 200
    refusal = echo.ask("POST", "/v1/messages", asked, ANTHROPIC_VERSION)
    assert refusal.status == 400 and refusal.json["error"]["message"].startswith("messages.1.role: ")
    nobody = json.dumps(prompt("echo", messages=None)).encode()
    refusal = echo.ask("POST", "/v1/messages", nobody, ANTHROPIC_VERSION, beta)
    assert refusal.status == 400 and refusal.json["error"]["message"].startswith("messages: ")


@pytest.mark.parametrize(("beta", "status"), [("interleaved-thinking-2025-05-14", 200), ("claude-code-20250219", 400)])
def test_echo_takes_a_budget_for_thinking_above_max_tokens_only_with_its_beta(echo, beta, status):
    asked = prompt("echo", max_tokens=1024, thinking={"type": "enabled", "budget_tokens": 4096})
    got = echo.post("/v1/messages", asked, ANTHROPIC_VERSION, f"anthropic-beta: {beta}")
    assert got.status == status and (status == 200 or "budget_tokens" in got.json["error"]["message"])


def test_echo_calls_functions_and_no_tools_of_other_kinds(echo):
    look, search = {"type": "function", "name": "look"}, {"type": "web_search"}
    for model, tools in (("echo", [search]), ("echo-tool", [search, look])):
        got = echo.post("/v1/responses", {"model": model, "input": "hi", "tools": tools})
        assert got.status == 200 and got.json["output"][0].get("name") == (None if model == "echo" else "look")


def test_echo_speaks_openai(echo):
    got = echo.post("/v1/chat/completions", chat("echo")).json
    assert (got["object"], got["choices"][0]["message"]["content"]) == ("chat.completion", "Hello there")
    assert got["choices"][0]["finish_reason"] == "stop" and got["usage"]["total_tokens"] > 0
    limited = echo.post("/v1/chat/completions", chat("echo", max_tokens=1)).json
    assert limited["choices"][0]["finish_reason"] == "length"
    events = [
        data for _, data in events_of(echo.post("/v1/chat/completions", chat("echo", stream=True)).body)
    ]
    assert events[-1] == "[DONE]"
    assert (
        "".join(event["choices"][0]["delta"].get("content", "") for event in events[:-1] if event["choices"])
        == "Hello there"
    )
    bad = echo.post("/v1/chat/completions", {"model": "echo"})
    assert (bad.status, bad.json["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_gets_chats_in_translation_and_says_so(echo, stream):
    path, said = "/v1/chat/completions", "openai>anthropic"
    got = echo.post(path, chat("echo", stream=stream, seed=1))
    assert (got.get("x-monorelay-translated"), got.get("x-monorelay-dropped")) == (said, "seed")
    failed = echo.post(path, chat("echo-error-529", stream=stream))
    assert (failed.status, failed.get("x-monorelay-translated")) == (529, said)
    assert (failed.json["error"]["message"], failed.json["error"]["code"]) == ("Overloaded", "overloaded")
    own = [echo.post("/v1/messages", prompt("echo", stream=stream))]
    own += [echo.post("/v1/responses", {"model": "echo", "input": "Hi", "stream": stream})]
    assert [(it.status, it.get("x-monorelay-translated")) for it in own] == [(200, None)] * 2


def test_echo_gets_no_chats_where_it_may_not_be_translated_for(relay):
    it = relay({"echo": {"translate": False}})
    message = refused(it.post("/v1/chat/completions", chat("echo")), 400, "invalid_request_error", openai_shape=True)
    assert message.endswith("served by echo, which speaks the other format: use /v1/messages")
    assert it.post("/v1/completions", {"model": "echo", "prompt": "Hi"}).status == 200


@pytest.mark.timed
def test_echo_paces_the_words_of_a_chat_and_breaks_off_a_whole_one(echo):
    asked = chat("echo-slow", stream=True, messages=[{"role": "user", "content": "a b c d e"}])
    begin = time.monotonic()
    assert echo.post("/v1/chat/completions", asked).body.endswith(b"data: [DONE]\n\n")
    assert 0.18 < time.monotonic() - begin < 2
    for _ in range(2):
        refused(echo.post("/v1/chat/completions", chat("echo-cut")), 502, "api_error", openai_shape=True)
    assert echo.post("/v1/chat/completions", chat("echo")).get("x-monorelay-attempts") == "1", "that cools nothing"


@pytest.mark.parametrize(
    ("fields", "words", "reason"),
    [({}, ["a", " b", "  c "], "stop"), ({"max_tokens": 2}, ["a", " b"], "length"), ({"stop": "b"}, ["a "], "stop")],
)
def test_echo_completes_prompts(echo, fields, words, reason):
    asked = {"model": "echo", "prompt": "a b  c ", **fields}
    plain = echo.post("/v1/completions", asked).json
    assert (plain["object"], plain["model"], plain["choices"]) == ("text_completion", "echo", [
        {"index": 0, "text": "".join(words), "logprobs": None, "finish_reason": reason}])  # fmt: skip
    count = len(words)
    assert plain["usage"] == {"prompt_tokens": 3, "completion_tokens": count, "total_tokens": 3 + count}
    for options, last in (({}, []), ({"include_usage": True}, [{**plain, "choices": []}])):
        got = echo.post("/v1/completions", {**asked, "stream": True, "stream_options": options})
        *told, done = (data for _, data in events_of(got.body))
        ends = [(it["choices"][0]["text"], it["choices"][0]["finish_reason"]) for it in told[: count + 1]]
        assert (ends, done) == ([*((word, None) for word in words), ("", reason)], "[DONE]")
        created = {"id": told[0]["id"], "created": told[0]["created"]}
        assert told[count + 1 :] == [{**it, **created} for it in last]


def test_echo_through_the_anthropic_sdk_as_the_page_shows_it(echo):
    with anthropic.Anthropic(api_key=TOKEN, base_url=echo.url, max_retries=0) as client:
        question = "Explain prompt caching in one paragraph."
        asked: Any = {
            "model": "claude-opus-4-5",
            "max_tokens": 1024,
            "messages": [{"role": "user", "content": question}],
        }
        assert client.messages.create(**asked).content[0].text == question
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == question
            assert stream.get_final_message().stop_reason == "end_turn"
        assert client.messages.count_tokens(model="echo", messages=asked["messages"]).input_tokens > 0
        assert "echo" in [model.id for model in client.models.list()]
        beta = client.beta.messages.create(betas=["interleaved-thinking-2025-05-14"], **asked)
        assert beta.content[0].text == question
        called = client.messages.create(**{**asked, "model": "echo-tool"}, tools=[TOOL])
        assert called.stop_reason == "tool_use"
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(**{**asked, "model": "echo-error-529"})
        assert caught.value.status_code == 529
        with pytest.raises(anthropic.BadRequestError, match="max_tokens: Field required"):
            client.post("/v1/messages", body={"model": "echo", "messages": asked["messages"]}, cast_to=object)


def test_echo_through_the_openai_sdk(echo):
    with openai.OpenAI(api_key=TOKEN, base_url=echo.url + "/v1", max_retries=0) as client:
        asked: Any = chat("echo")
        assert client.chat.completions.create(**asked).choices[0].message.content == "Hello there"
        chunks = client.chat.completions.create(stream=True, **asked)
        assert "".join(it.choices[0].delta.content or "" for it in chunks if it.choices) == "Hello there"
        chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked))
        assert [it.choices[0].delta.content for it in chunks if it.choices][1:-1] == ["Hello", " there"], "by words"
        usage = chunks[-1].usage
        assert usage and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (2, 2, 4)
        stopped = client.chat.completions.create(**asked, stop=["lo", "x"]).choices[0]
        assert (stopped.message.content, stopped.finish_reason) == ("Hel", "stop")
        tool: Any = {"type": "function", "function": {"name": "look", "parameters": TOOL["input_schema"]}}
        with client.chat.completions.stream(**{**asked, "model": "echo-tool"}, tools=[tool]) as stream:
            (turn,) = (choice.message for choice in stream.get_final_completion().choices)
        assert turn.tool_calls and turn.tool_calls[0].function.name == "look"
        result = {"role": "tool", "tool_call_id": turn.tool_calls[0].id, "content": "42"}
        turns = [*asked["messages"], turn.model_dump(exclude_none=True), result]
        told = client.chat.completions.create(model="echo-tool", messages=turns, tools=[tool])
        assert told.choices[0].message.content == "42"
        with pytest.raises(openai.APIStatusError) as caught:
            client.chat.completions.create(**{**asked, "model": "echo-error-529"})
        assert (caught.value.status_code, caught.value.code) == (529, "overloaded")
        assert "echo" in [model.id for model in client.models.list()]


@pytest.mark.timed
def test_echo_of_much_white_space_holds_up_nobody(echo):
    started = time.monotonic()
    got = echo.post("/v1/messages", prompt("echo", messages=[{"role": "user", "content": "x" + "\n" * 200_000}]))
    assert got.status == 200 and time.monotonic() - started < 2


def test_echo_reads_a_megabyte_and_no_more(echo):
    assert (
        echo.post(
            "/v1/messages", prompt("echo", messages=[{"role": "user", "content": "a " * 200_000}])
        ).status
        == 200
    )
    for path, body in (("/v1/messages", prompt), ("/v1/chat/completions", chat), ("/v1/embeddings", chat)):
        got = echo.post(path, body("echo", messages=[{"role": "user", "content": "x" * (1 << 20)}]))
        assert (got.status, got.json["error"]["type"]) == (413, "request_too_large")
    assert echo.ask("GET", "/health").status == 200


@pytest.mark.parametrize(("length", "status"), [(600_000, 413), (400_000, 200)])
@pytest.mark.parametrize(("path", "body"), [("/v1/messages", prompt), ("/v1/chat/completions", chat)])
def test_echo_repeats_no_long_text_with_a_character_of_four_bytes(echo, path, body, length, status):
    for text, expected in (("a" * length, 200), ("a" * length + "\U0001f600", status)):
        got = echo.post(path, body("echo", messages=[{"role": "user", "content": text}]))
        assert got.status == expected
    if status == 413:
        assert got.json["error"]["type"] == "request_too_large"


@hypothesis.settings(max_examples=300)
@hypothesis.given(st.text(st.sampled_from(" \t\n\x0b\x1c\xa0\u2003ab\U0001f600\ud800"), max_size=60), st.integers(1, 9))
def test_the_end_of_a_word_is_found_whatever_pieces_the_text_is_counted_in(text, size):
    ends = [match.end() for match in re.finditer(r"\S+", text, re.ASCII)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(monorelay, "ECHO_COUNTED_CHARACTERS", size)
        assert [monorelay.end_of_word(text, number) for number in range(1, len(ends) + 1)] == ends


def nested_tool(depth: int, **more: Any) -> dict[str, Any]:
    """A tool whose schema asks for the same property twelve times on each level."""
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a" * 12: schema}, "required": ["a" * 12] * 12}
    return {"name": "look", "input_schema": schema, **more}


@pytest.mark.parametrize("depth", [3, 7, 10, 300])
@pytest.mark.timed
def test_echo_takes_each_required_property_once_and_schemas_of_some_depth(echo, depth):
    begin = time.process_time()
    got = echo.post("/v1/messages", prompt("echo-tool", tools=[nested_tool(depth)]))
    assert time.process_time() - begin < 0.5
    if depth == 3:
        (block,) = (block for block in got.json["content"] if block["type"] == "tool_use")
        assert list(block["input"]) == ["a" * 12]
    assert got.status in (200, 400)


@pytest.mark.parametrize("width", [2000])
@pytest.mark.timed
def test_echo_tool_answers_are_bounded_however_wide_a_schema_is(echo, width):
    names = [f"property{number}" for number in range(width)]
    inner = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names[:40]},
        "required": names[:40],
    }
    schema = {"type": "object", "properties": {name: inner for name in names}, "required": names}
    schema["properties"] = {name: {"type": "object", "required": names} for name in names[:20]}
    begin = time.process_time()
    got = echo.post("/v1/messages", prompt("echo-tool", tools=[{"name": "look", "input_schema": schema}]))
    assert got.status in (200, 400) and len(got.body) < 4 << 20
    assert time.process_time() - begin < 0.5


@pytest.mark.parametrize("mark", [b"0,", b"[],", b"{},"], ids=brief)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/completions", "/v1/responses", "/v1/embeddings"])
def test_echo_reads_so_many_values_and_no_more(echo, path, mark):
    document = {"model": "echo", "max_tokens": 9, "messages": prompt()["messages"], "input": "Hi", "prompt": "Hi"}
    frame = json.dumps({**document, "x": ["XX"]}).encode()
    frame_values = sum(map(frame.count, (b"[", b"{", b",")))
    fitting = (monorelay.ECHO_VALUES - frame_values) // sum(map(mark.count, (b"[", b"{", b",")))
    for count, status in ((fitting - 3, 200), (fitting + 3, 400)):
        got = echo.post(path, frame.replace(b'"XX"', mark * count + b"0"))
        assert got.status == status, got
    assert got.json["error"]["type"] == "invalid_request_error"
    assert f"{monorelay.ECHO_VALUES} values" in got.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", ["Be brief.", "", None, ["Be brief."], [[[]]] * 9, {"a": {}}, 7, True], ids=brief)
def test_echo_keeps_instructions_that_are_a_string_and_no_others(echo, given, stream):
    got = echo.post("/v1/responses", {"model": "echo", "input": "Hi", "instructions": given, "stream": stream})
    assert got.status == 200
    kept = given if isinstance(given, str) else None
    whole = [data["response"] for _, data in events_of(got.body) if "response" in data] if stream else [got.json]
    assert whole and {one["instructions"] for one in whole} == {kept}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("model", ["echo", "claude-opus-4-5", "echo@echo"])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"])
def test_echo_answers_a_gzip_body_like_a_plain_one(echo, path, model, stream):
    document = {"model": model, "max_tokens": 9, "messages": prompt()["messages"], "input": "Hi", "stream": stream}
    body = json.dumps(document).encode()
    plain = echo.post(path, body)
    got = echo.post(path, gzip.compress(body), "Content-Encoding: gzip")
    assert (got.status, got.get("content-type")) == (plain.status, plain.get("content-type")) and got.status == 200
    # They may be answered in different seconds.
    bare = [re.sub(rb'"created(_at)?": ?\d+', b"", one.body) for one in (got, plain)]
    assert bare[0] == bare[1]


def test_echo_reads_no_more_of_a_gzip_body_than_of_a_plain_one(echo):
    body = json.dumps(prompt("echo", padding="x" * (1 << 20))).encode()
    for raw, headers in ((body, []), (gzip.compress(body), ["Content-Encoding: gzip"])):
        got = echo.post("/v1/messages", raw, *headers)
        assert (got.status, got.json["error"]["type"]) == (413, "request_too_large")
    damaged = gzip.compress(body)[:-9]
    refused(echo.post("/v1/messages", damaged, "Content-Encoding: gzip"), 400, "invalid_request_error")
    eventually(lambda: echo.server.service.bodies.bytes == 0)


def test_echo_cuts_or_refuses_an_answer_far_larger_than_its_request(echo):
    body = {"model": "echo", "input": ["a"] * 50, "dimensions": 4096}
    got = echo.post("/v1/embeddings", body)
    assert got.status == 400 or [len(item["embedding"]) for item in got.json["data"]] == [4096] * 50
    got = echo.post("/v1/embeddings", {"model": "echo", "input": ["a"] * 200_000, "dimensions": 4096})
    assert (got.status, got.json["error"]["type"]) == (400, "invalid_request_error")


# ------------------------------------------------------------------------------------------------------------
# The official SDKs against a scripted provider, every byte compared
# ------------------------------------------------------------------------------------------------------------


class Replay(Wire):
    """The recorded bytes of one direction of a connection, read again."""

    def __init__(self, data: bytes) -> None:
        self.buffer = bytearray(data)

    def fill(self) -> bool:
        return False

    def messages(self, is_answer: bool, may_be_cut: bool = False) -> list[Message]:
        found = []
        with contextlib.suppress(*([EOFError] if may_be_cut else [])):
            while self.buffer:
                found.append(self.message(is_answer))
        return found


class Tap:
    """Stands between an SDK and the relay and records what each of them sends."""

    def __init__(self, target: str) -> None:
        self.target = urllib.parse.urlsplit(target)
        self.recorded: list[tuple[bytearray, bytearray]] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                relay = socket.create_connection((self.target.hostname, self.target.port))
                pair = (bytearray(), bytearray())
                self.recorded.append(pair)
                for source, sink, record in ((client, relay, pair[0]), (relay, client, pair[1])):
                    threading.Thread(target=self.pump, args=(source, sink, record), daemon=True).start()

    @staticmethod
    def pump(source: socket.socket, sink: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def requests(self) -> list[Message]:
        return [
            message for sent, _ in self.recorded for message in Replay(bytes(sent)).messages(is_answer=False)
        ]

    def answers(self) -> list[Message]:
        return [
            message for _, got in self.recorded for message in Replay(bytes(got)).messages(is_answer=True)
        ]


@pytest.fixture
def tap() -> Iterator[Callable[[Relay], Tap]]:
    made: list[Tap] = []

    def make(relay: Relay) -> Tap:
        made.append(Tap(relay.url))
        return made[-1]

    yield make
    for one in made:
        one.listener.close()


PRIVATE = {"host", "content-length", "authorization", "x-api-key", "cookie", "expect", "accept-encoding",
           "connection", "transfer-encoding", "keep-alive", "te"}  # fmt: skip
ADDED = {"content-length", "transfer-encoding", "connection", "keep-alive", "date", "server", "set-cookie",
         "x-monorelay-provider", "x-monorelay-model", "x-monorelay-attempts", "x-monorelay-request-id",
         "x-accel-buffering", "cache-control"}  # fmt: skip


def carried(message: Message, dropped: set[str]) -> list[tuple[str, str]]:
    return [pair for pair in message.headers if pair[0] not in dropped]


def assert_transparent(
    tap: Tap, upstream: Upstream, answers: list[bytes], credential: tuple[str, str]
) -> None:
    """The provider got requests as the client sent them, the client answers as the provider sent them."""
    sent = tap.requests()
    assert len(sent) == len(upstream.requests) == len(answers)
    for ours, theirs in zip(sent, upstream.requests):
        assert (theirs.method, theirs.target, theirs.body) == (ours.method, ours.target, ours.body)
        assert carried(theirs, PRIVATE) == carried(ours, PRIVATE)
        assert [pair for pair in theirs.headers if pair[0] in ("authorization", "x-api-key")] == [credential]
        assert theirs.get("accept-encoding") == "identity" and TOKEN not in theirs.head.decode("latin-1")
    for raw, got in zip(answers, tap.answers()):
        original = Replay(raw).message(is_answer=True)
        assert (got.status, got.body) == (original.status, original.body)
        assert carried(got, ADDED) == carried(original, ADDED)
        assert got.get("x-monorelay-attempts") == "1" and "secret" not in got.head.decode("latin-1")


def message_answer(*content: dict[str, Any], **fields: Any) -> bytes:
    """An Anthropic message as a provider answers it, with spaces that a re-serialiser would lose."""
    body = {**MESSAGE, "content": content, "stop_reason": "end_turn", **fields}
    return answer(
        200,
        json.dumps(body, indent=1).encode(),
        "request-id: req_upstream",
        "anthropic-ratelimit-tokens-remaining: 9",
    )


def tool_stream() -> bytes:
    return STREAM_HEAD + chunked(
        ANTHROPIC_EVENTS[0],
        sse(
            "content_block_start",
            index=0,
            content_block={"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}},
        ),
        sse("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": '{"at": '}),
        sse("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": '"sky"}'}),
        sse("content_block_stop", index=0),
        sse(
            "message_delta",
            delta={"stop_reason": "tool_use", "stop_sequence": None},
            usage={"output_tokens": 9},
        ),
        sse("message_stop"),
    )


HI = {"type": "text", "text": "Hi"}
THOUGHT = {"type": "thinking", "thinking": "Hm", "signature": "c2ln+/="}
FILE = {"id": "file_1", "type": "file", "filename": "a.txt", "mime_type": "text/plain", "size_bytes": 5,
        "created_at": "2025-01-01T00:00:00Z", "downloadable": False}  # fmt: skip


def final_message(client: Any, **fields: Any) -> Any:
    with client.messages.stream(**prompt(**fields)) as stream:
        return stream.get_final_message()


ANTHROPIC_CALLS: dict[str, tuple[Callable[[Any], Any], bytes, Any]] = {
    "create": (lambda it: it.messages.create(**prompt()).content[0].text, message_answer(HI), "Hi"),
    "create with everything": (
        lambda it: (
            it.messages.create(
                **prompt(system=[{"type": "text", "text": "ü", "cache_control": {"type": "ephemeral"}}]),
                stop_sequences=["x"],
                metadata={"user_id": "u"},
                extra_body={"temperature": 1.0, "top_k": 5},
            ).usage.input_tokens
        ),
        message_answer(HI),
        25,
    ),
    "streamed": (
        lambda it: [event.type for event in it.messages.create(stream=True, **prompt())][-1],
        ANTHROPIC_STREAM,
        "message_stop",
    ),
    "stream helper": (lambda it: final_message(it).content[0].text, ANTHROPIC_STREAM, "Grüße, \u2028world"),
    "tools": (
        lambda it: it.messages.create(**prompt(), tools=[TOOL], tool_choice={"type": "any"}).content[0].input,
        message_answer(
            {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {"at": "sky"}},
            stop_reason="tool_use",
        ),
        {"at": "sky"},
    ),
    "tools streamed": (
        lambda it: final_message(it, tools=[TOOL]).content[0].input,
        tool_stream(),
        {"at": "sky"},
    ),
    "thinking": (
        lambda it: (
            it.messages.create(**prompt(thinking={"type": "enabled", "budget_tokens": 1024}))
            .content[0]
            .signature
        ),
        message_answer(THOUGHT, HI),
        "c2ln+/=",
    ),
    "thinking sent back": (
        lambda it: (
            it.messages.create(
                **prompt(
                    messages=[
                        {"role": "user", "content": "a"},
                        {"role": "assistant", "content": [THOUGHT, HI]},
                        {"role": "user", "content": "b"},
                    ]
                )
            ).id
        ),
        message_answer(HI),
        "msg_1",
    ),
    "betas": (
        lambda it: (
            it.beta.messages.create(
                **prompt(), betas=["interleaved-thinking-2025-05-14", "context-1m-2025-08-07"]
            ).id
        ),
        message_answer(HI),
        "msg_1",
    ),
    "count_tokens": (
        lambda it: it.messages.count_tokens(model="claude-test", messages=prompt()["messages"]).input_tokens,
        answer(200, b'{ "input_tokens": 14 }'),
        14,
    ),
    "batch created": (
        lambda it: it.messages.batches.create(requests=[{"custom_id": "a", "params": prompt()}]).id,
        answer(
            200,
            b'{"id":"msgbatch_1","type":"message_batch","processing_status":"in_progress","results_url":null}',
        ),
        "msgbatch_1",
    ),
    "file uploaded": (
        lambda it: it.beta.files.upload(file=("a.txt", b"hello\r\n--", "text/plain")).id,
        answer(200, json.dumps(FILE).encode()),
        "file_1",
    ),
    "file deleted": (
        lambda it: it.beta.files.delete("file_1").id,
        answer(200, b'{"id":"file_1","type":"file_deleted"}'),
        "file_1",
    ),
    "file downloaded": (
        lambda it: it.beta.files.download("file_1").read(),
        answer(200, bytes(range(256)), "content-disposition: attachment"),
        bytes(range(256)),
    ),
}


@pytest.mark.parametrize("name", ANTHROPIC_CALLS)
def test_anthropic_sdk(upstream, relay, tap, name):
    call, raw, expected = ANTHROPIC_CALLS[name]
    provider = upstream(raw)
    between = tap(relay({"anthropic": provider}))
    with anthropic.Anthropic(api_key=TOKEN, base_url=between.url, max_retries=0) as client:
        assert call(client) == expected
    assert_transparent(between, provider, [raw], ("x-api-key", "sk-anthropic-secret"))


def test_anthropic_sdk_async(upstream, relay, tap):
    provider = upstream(replies(message_answer(HI), ANTHROPIC_STREAM))
    between = tap(relay({"anthropic": provider}))

    async def talk() -> None:
        async with anthropic.AsyncAnthropic(api_key=TOKEN, base_url=between.url, max_retries=0) as client:
            assert (await client.messages.create(**prompt())).content[0].text == "Hi"
            async with client.messages.stream(**prompt()) as stream:
                assert await stream.get_final_text() == "Grüße, \u2028world"

    asyncio.run(talk())
    assert_transparent(
        between, provider, [message_answer(HI), ANTHROPIC_STREAM], ("x-api-key", "sk-anthropic-secret")
    )


@pytest.mark.parametrize("header", ["Authorization", "X-Api-Key"])
def test_anthropic_sdk_of_any_age_is_let_in(upstream, relay, header):
    provider = upstream(message_answer(HI))
    credential = {
        "api_key": "ignored",
        "default_headers": {header: TOKEN if header == "X-Api-Key" else f"Bearer {TOKEN}"},
    }
    with anthropic.Anthropic(
        base_url=relay({"anthropic": provider}).url, max_retries=0, **credential
    ) as client:
        assert client.messages.create(**prompt()).id == "msg_1"


def test_anthropic_sdk_sees_a_providers_error_as_the_providers(upstream, relay):
    body = b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 210000"}}'
    provider = upstream(answer(400, body, "request-id: req_upstream"))
    url = relay({"anthropic": provider}).url
    with (
        anthropic.Anthropic(api_key=TOKEN, base_url=url) as client,
        pytest.raises(anthropic.APIError) as caught,
    ):
        client.messages.create(**prompt())
    assert caught.value.request_id == "req_upstream" and "prompt is too long" in str(caught.value)
    assert caught.value.body == json.loads(body) and len(provider.requests) == 1


def test_anthropic_sdk_sees_a_stream_that_died_as_an_error(upstream, relay):
    provider = upstream(replies_then_closes(STREAM_HEAD, *map(chunk, ANTHROPIC_EVENTS[:4])))
    with (
        anthropic.Anthropic(
            api_key=TOKEN, base_url=relay({"anthropic": provider}).url, max_retries=0
        ) as client,
        pytest.raises(Exception) as caught,
        client.messages.stream(**prompt()) as stream,
    ):
        stream.get_final_message()
    assert isinstance(caught.value, anthropic.APIError)


def test_anthropic_sdk_follows_a_batch_to_its_results_through_the_relay(upstream, relay):
    line = {"custom_id": "a", "result": {"type": "succeeded", "message": {**MESSAGE, "content": [HI]}}}
    provider = upstream(lambda connection: batch_script(connection))

    def batch_script(connection: Connection) -> None:
        while True:
            asked = connection.read_request()
            if asked.target.endswith("/results"):
                connection.send(answer(200, json.dumps(line).encode() + b"\n"))
            else:
                url = f"{provider.url}/v1/messages/batches/msgbatch_1/results"
                batch = {
                    "id": "msgbatch_1",
                    "type": "message_batch",
                    "processing_status": "ended",
                    "results_url": url,
                }
                connection.send(answer(200, json.dumps(batch).encode()))

    it = relay({"anthropic": provider})
    with anthropic.Anthropic(api_key=TOKEN, base_url=it.url, max_retries=0) as client:
        assert (
            client.messages.batches.retrieve("msgbatch_1").results_url
            == f"{it.url}/v1/messages/batches/msgbatch_1/results"
        )
        assert [result.custom_id for result in client.messages.batches.results("msgbatch_1")] == ["a"]
    assert (
        all(TOKEN not in message.head.decode() for message in provider.requests)
        and len(provider.requests) == 3
    )


CHAT_ANSWER = answer(200,
b'{ "id":"c1","object":"chat.completion","created":1,"model":"gpt-test","choices":[{"index":0,'
                          b'"finish_reason":"stop","message":{"role":"assistant","content":"Hi"}}]}',
                          "x-request-id: req_openai")  # fmt: skip
OPENAI_CALLS: dict[str, tuple[Callable[[Any], Any], bytes, Any]] = {
    "chat": (lambda it: it.chat.completions.create(**chat()).choices[0].message.content, CHAT_ANSWER, "Hi"),
    "chat streamed": (
        lambda it: [
            part.choices[0].delta.content for part in it.chat.completions.create(stream=True, **chat())
        ],
        OPENAI_STREAM,
        ["Hi", None],
    ),
    "embeddings": (
        lambda it: it.embeddings.create(model="embed", input="x", encoding_format="float").data[0].embedding,
        answer(
            200,
            b'{"object":"list","model":"embed","data":[{"object":"embedding","index":0,"embedding":[1e-7,0.10]}]}',
        ),
        [1e-7, 0.1],
    ),
    "audio": (
        lambda it: (
            it.audio.transcriptions.create(model="whisper-1", file=("a.wav", b"RIFF\r\n\0", "audio/wav")).text
        ),
        answer(200, b'{"text":"hi"}'),
        "hi",
    ),
    "file": (
        lambda it: it.files.create(file=("a.jsonl", b"{}\n"), purpose="batch").id,
        answer(
            200,
            b'{"id":"file-1","object":"file","bytes":3,"created_at":1,"filename":"a.jsonl","purpose":"batch","status":"processed"}',
        ),
        "file-1",
    ),
    "responses": (
        lambda it: it.responses.create(model="gpt-test", input="x").id,
        answer(200, b'{"id":"resp_1","object":"response","created_at":1,"model":"gpt-test","output":[]}'),
        "resp_1",
    ),
}


@pytest.mark.parametrize("name", OPENAI_CALLS)
def test_openai_sdk(upstream, relay, tap, name):
    call, raw, expected = OPENAI_CALLS[name]
    provider = upstream(raw)
    between = tap(relay({"openai": provider}))
    with openai.OpenAI(api_key=TOKEN, base_url=between.url + "/v1", max_retries=0) as client:
        assert call(client) == expected
    assert_transparent(between, provider, [raw], ("authorization", "Bearer sk-openai-secret"))


def test_openai_sdk_async(upstream, relay, tap):
    provider = upstream(replies(CHAT_ANSWER, OPENAI_STREAM))
    between = tap(relay({"openai": provider}))

    async def talk() -> None:
        async with openai.AsyncOpenAI(api_key=TOKEN, base_url=between.url + "/v1", max_retries=0) as client:
            assert (await client.chat.completions.create(**chat())).choices[0].message.content == "Hi"
            parts = [part async for part in await client.chat.completions.create(stream=True, **chat())]
            assert parts[0].choices[0].delta.content == "Hi"

    asyncio.run(talk())
    assert_transparent(
        between, provider, [CHAT_ANSWER, OPENAI_STREAM], ("authorization", "Bearer sk-openai-secret")
    )


def test_both_sdks_list_the_models_of_all_providers(upstream, relay):
    claude = upstream(
        answer(
            200,
            b'{"data":[{"type":"model","id":"claude-x","display_name":"X","created_at":"2025-01-01T00:00:00Z"}],'
            b'"has_more":false,"first_id":"claude-x","last_id":"claude-x"}',
        )
    )
    gpt = upstream(
        answer(200, b'{"object":"list","data":[{"id":"gpt-x","object":"model","created":1,"owned_by":"o"}]}')
    )
    routes = {"claude-*": "anthropic", "gpt-*": "openai", "echo*": "echo"}
    providers = {"anthropic": {"upstream": claude, "translate": False}, "openai": {"upstream": gpt, "translate": False}}
    it = relay({**providers, "echo": {}}, aliases={"fast": "claude-x"}, routes=routes)
    with anthropic.Anthropic(api_key=TOKEN, base_url=it.url, max_retries=0) as client:
        ids = [model.id for model in client.models.list(limit=2)]
        assert {"claude-x", "fast", "echo"} <= set(ids) and len(ids) == len(set(ids)), "every page, each name once"
        assert "gpt-x" not in ids, "it can't be called in this format"
        assert client.models.retrieve("claude-x").id == "claude-x"
        with pytest.raises(anthropic.NotFoundError):
            client.models.retrieve("nobody")
    with openai.OpenAI(api_key=TOKEN, base_url=it.url + "/v1", max_retries=0) as client:
        listed = {model.id for model in client.models.list()}
        assert {"gpt-x", "echo"} <= listed and not {"claude-x", "fast"} & listed
        assert client.models.retrieve("gpt-x").object == "model"
    assert len(claude.requests) == len(gpt.requests) == 1, "the catalogue is kept for five minutes"


# ------------------------------------------------------------------------------------------------------------
# Event loop: tasks, and what they wait for
# ------------------------------------------------------------------------------------------------------------


class Looping:
    """An event loop that runs in a thread of its own, with its clock, and what it warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.clock = Clock()
        self.loop = self.clock.loop = monorelay.EventLoop(self.warnings.append, self.clock)
        self.thread = threading.Thread(target=self.loop.run, daemon=True)
        self.thread.start()

    def call(self, action: Callable[[], Any]) -> Any:
        """What the action returns in the loop's thread, or raises there."""
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def act() -> None:
            try:
                outcome.set_result(action())
            except Exception as error:
                outcome.set_exception(error)

        self.loop.post(act)
        return outcome.result(TIMEOUT_SECONDS)

    def start(self, coroutine: Any) -> Any:
        """The task of a coroutine, which has come to its first wait."""
        return self.call(lambda: self.loop.start(coroutine))

    def run(self, coroutine: Any) -> Any:
        """What the coroutine returns as a task, or raises."""
        outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

        async def task() -> None:
            try:
                outcome.set_result(await coroutine)
            except Exception as error:
                outcome.set_exception(error)

        self.start(task())
        return outcome.result(TIMEOUT_SECONDS)

    def stop(self) -> None:
        self.loop.post(self.loop.stop)
        self.thread.join(TIMEOUT_SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def looping() -> Iterator[Looping]:
    it = Looping()
    yield it
    it.stop()


async def waits_in(blocks: list[str]) -> None:
    """Waits for ever, and notes which of its blocks are left."""
    try:
        try:
            await monorelay.until()
            blocks.append("went on")
        finally:
            blocks.append("inner")
    finally:
        blocks.append("outer")


@pytest.mark.parametrize("seconds", [0.5, 4.5, 75.0, 86400.0])
def test_a_deadline_raises_overdue_when_it_has_come_and_the_task_may_go_on(looping, seconds):
    told: list[float] = []

    async def overdue_twice() -> None:
        for _ in range(2):
            with pytest.raises(monorelay.Overdue):
                await monorelay.until(looping.loop.now + seconds)
            told.append(looping.clock.now)

    task = looping.start(overdue_twice())
    for number in (1, 2):
        looping.clock.move(seconds - 0.25)
        assert len(told) == number - 1
        looping.clock.move(0.25)
        assert told == [1000.0 + seconds, 1000.0 + 2 * seconds][:number]
    assert task.done and not looping.warnings


@pytest.mark.parametrize("seconds", [-1.0, 0.0])
def test_a_deadline_that_is_over_raises_overdue_once_a_tick(looping, seconds):
    told: list[float] = []

    async def overdue_for_ever() -> None:
        while True:
            with contextlib.suppress(monorelay.Overdue):
                await monorelay.until(looping.loop.now + seconds)
            told.append(looping.clock.now)

    looping.start(overdue_for_ever())
    looping.clock.move(0.0)
    assert told == [1000.0]
    looping.clock.move(monorelay.TICK_SECONDS)
    assert told == [1000.0, looping.clock.now]


def test_a_deadline_is_its_tasks_own(looping):
    told: list[str] = []

    async def waits(name: str, seconds: float) -> None:
        with contextlib.suppress(monorelay.Overdue):
            await monorelay.until(looping.loop.now + seconds)
            told.append(f"{name} resumed")
        told.append(name)

    patient, _ = looping.start(waits("patient", 30.0)), looping.start(waits("hasty", 2.0))
    looping.start(waits("endless", math.inf))
    looping.clock.move(2.0)
    assert told == ["hasty"] and not patient.done
    looping.clock.move(28.0)
    assert told == ["hasty", "patient"]
    assert patient.done and len(looping.loop.tasks) == 1


def test_sleep_lasts_as_long_as_was_asked_whatever_happens_meanwhile(looping):
    told: list[str] = []

    async def sleeps(seconds: float) -> None:
        try:
            await monorelay.sleep(looping.loop, seconds)
            told.append("awake")
        except monorelay.ClientGone:
            told.append("its client has left")

    sleeper, other = looping.start(sleeps(10.0)), looping.start(sleeps(10.0))
    for _ in range(3):
        looping.call(sleeper.resume)
        looping.clock.move(3.0)
    looping.call(lambda: other.resume(monorelay.ClientGone()))
    assert told == ["its client has left"] and not sleeper.done
    looping.clock.move(1.0)
    assert told == ["its client has left", "awake"]


def test_tasks_whose_time_is_over_are_told_in_several_turns_where_that_takes_long(looping):
    turns: list[int] = []

    async def takes_long() -> None:
        with contextlib.suppress(monorelay.Overdue):
            await monorelay.until(looping.loop.now + 1.0)
        turns.append(looping.loop.turn)
        looping.clock.now += 0.6 * monorelay.LATE_SECONDS

    looping.call(lambda: [looping.loop.start(takes_long()) for _ in range(10)])
    looping.clock.move(1.0)
    eventually(lambda: not looping.loop.tasks)
    assert sorted(Counter(turns).values()) == [2] * 5


def test_tasks_that_give_way_share_a_few_milliseconds_of_a_turn(looping):
    turns: list[int] = []

    async def takes_long() -> None:
        for _ in range(4):
            await monorelay.checkpoint(looping.loop)
            turns.append(looping.loop.turn)
            looping.clock.now += 0.6 * monorelay.PATIENT_SECONDS

    looping.call(lambda: [looping.loop.start(takes_long()) for _ in range(3)])
    eventually(lambda: not looping.loop.tasks)
    assert sorted(Counter(turns).values()) == [2] * 6


def test_a_client_that_left_behind_a_full_buffer_is_missed_soon(looping):
    told, left = [], []

    async def waits() -> None:
        looping.loop.current.client = types.SimpleNamespace(
            is_full=True, closed=False, has_hung_up=lambda: bool(left)
        )
        with pytest.raises(monorelay.ClientGone):
            await monorelay.until(looping.loop.now + 600.0)
        told.append(looping.clock.now)

    looping.start(waits())
    looping.clock.move(monorelay.SWEEP_SECONDS)
    left.append(True)
    assert told == []
    looping.clock.move(monorelay.AHEAD_SECONDS)
    assert told == [looping.clock.now]


def test_a_send_is_overdue_when_nothing_was_taken_for_the_pause(looping):
    near, far = socket.socketpair()
    data, told = bytes(1 << 22), []

    async def sends() -> None:
        channel = monorelay.Channel(near, looping.loop)
        try:
            await channel.send(data, 30.0)
        except monorelay.Overdue:
            told.append(looping.clock.now)
        channel.close()

    with near, far:
        task = looping.start(sends())
        looping.clock.move(29.0)
        taken = len(far.recv(1 << 20, socket.MSG_WAITALL))
        looping.clock.move(0.0)  # there it has filled the buffer again, and has another 30 seconds
        looping.clock.move(29.0)
        assert taken and not task.done
        looping.clock.move(1.0)
        assert told == [1059.0] and task.done


def test_what_resumes_a_task_before_its_deadline_raises_nothing(looping):
    async def waits() -> str:
        await monorelay.until(looping.loop.now + TIMEOUT_SECONDS)
        return "in time"

    async def resumes(other: Any) -> None:
        other.resume()

    outcome: list[str] = []

    async def keeps() -> None:
        outcome.append(await waits())

    looping.run(resumes(looping.start(keeps())))
    assert outcome == ["in time"]


def test_cancel_runs_finally_blocks_from_within_and_nothing_else(looping):
    blocks: list[str] = []
    task = looping.start(waits_in(blocks))
    assert blocks == [] and not task.done and task in looping.loop.tasks
    looping.call(task.cancel)
    assert blocks == ["inner", "outer"] and task.done and not looping.loop.tasks
    looping.call(task.resume)
    looping.call(lambda: task.resume(monorelay.Overdue()))
    looping.call(task.cancel)
    assert blocks == ["inner", "outer"] and looping.warnings == []


def test_the_loops_end_cancels_all_tasks():
    it, blocks = Looping(), []
    for _ in range(3):
        it.start(waits_in(blocks))
    it.stop()
    assert blocks == ["inner", "outer"] * 3 and not it.loop.tasks
    it.loop.post(lambda: blocks.append("too late"))
    assert blocks[-1] == "outer" and it.warnings == []


@pytest.mark.parametrize("end", ["returns", "is cancelled", "fails", "was done before"])
def test_finished_waits_until_a_task_is_done(looping, end):
    gate: list[bool] = []

    async def work() -> None:
        while not gate:
            await monorelay.until()
        if end == "fails":
            raise LookupError

    async def waits_for(task: Any) -> bool:
        assert task.done == (end == "was done before")
        await task.finished(looping.loop.now + TIMEOUT_SECONDS)
        return task.done

    worker = looping.start(work())
    gate += [True] * (end == "was done before")
    if gate:
        looping.call(worker.resume)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(looping.run, waits_for(worker)) for _ in range(3)]
        if end != "was done before":
            eventually(lambda: len(looping.loop.tasks) == 4)
            # Whatever else happens to those who wait doesn't end that.
            looping.call(lambda: [task.resume() for task in list(looping.loop.tasks) if task is not worker])
            assert len(looping.loop.tasks) == 4 and not any(one.done() for one in waiting)
        gate.append(True)
        looping.call(worker.cancel if end == "is cancelled" else worker.resume)
        assert [one.result(TIMEOUT_SECONDS) for one in waiting] == [True] * 3
    assert len(looping.warnings) == (end == "fails")


def test_finished_is_overdue_at_its_deadline_and_the_task_goes_on(looping):
    blocks: list[str] = []
    worker = looping.start(waits_in(blocks))

    async def waits_for() -> None:
        with pytest.raises(monorelay.Overdue):
            await worker.finished(looping.loop.now + 30.0)

    waiting = looping.start(waits_for())
    looping.clock.move(29.0)
    assert not waiting.done
    looping.clock.move(1.0)
    assert waiting.done and not worker.done and blocks == [] and not looping.warnings
    looping.call(worker.resume)
    assert worker.done and blocks == ["went on", "inner", "outer"]


def test_a_defect_costs_its_own_task_only(looping):
    told: list[str] = []

    async def fails(turns: int) -> None:
        for _ in range(turns):
            await monorelay.checkpoint(looping.loop)
        told.append("fails")
        raise ZeroDivisionError("sk-secret-text")

    async def works() -> str:
        for _ in range(20):
            await monorelay.checkpoint(looping.loop)
        return "works"

    for turns in (0, 3):
        looping.start(fails(turns))
    assert looping.run(works()) == "works" and told == ["fails"] * 2
    eventually(lambda: not looping.loop.tasks)
    assert len(looping.warnings) == 2
    for line in looping.warnings:
        # Without its text, which might hold a secret.
        assert re.fullmatch(r"internal error: ZeroDivisionError in line \d+", line)

    def defect() -> None:
        raise LookupError

    looping.loop.post(defect)
    assert looping.run(works()) == "works"
    assert [line.split(" in ")[0] for line in looping.warnings[2:]] == ["internal error: LookupError"]


def test_a_task_that_gives_way_goes_on_in_its_turn_whatever_happens_meanwhile(looping):
    told: list[str] = []

    async def counts(name: str, pipelined: bool) -> None:
        for number in range(3):
            told.append(f"{name}{number}")
            await monorelay.checkpoint(looping.loop, pipelined)
        told.append(f"{name} ends")

    def begin() -> None:
        tasks = [looping.loop.start(counts(name, name == "c")) for name in "abc"]
        for task in tasks:
            task.resume()  # as when something has come on its channel

    looping.call(begin)
    eventually(lambda: sum("ends" in one for one in told) == 3)
    assert told[:3] == ["a0", "b0", "c0"]
    assert [one for one in told if one[0] == "a"] == ["a0", "a1", "a2", "a ends"]
    assert told.index("b1") < told.index("a2") and told.index("a1") < told.index("b2")
    assert told.index("c1") < told.index("a2"), "both kinds have their turns"


def test_a_worker_serves_its_callers_in_turns():
    worker, gate, called = monorelay.Worker(), threading.Event(), []
    worker.call(functools.partial(gate.wait, TIMEOUT_SECONDS))
    for caller in "aaabcb":
        worker.call(functools.partial(called.append, caller), caller)
    gate.set()
    eventually(lambda: len(called) == 6)
    assert "".join(called) == "abcaba"


# ------------------------------------------------------------------------------------------------------------
# Upstream: connections, TLS, proxies
# ------------------------------------------------------------------------------------------------------------


def test_upstream_connections_are_kept_and_reused(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    with it.client() as client:
        assert [client.ask("POST", "/v1/messages", STREAMED).status for _ in range(5)] == [200] * 5
    assert len(provider.connections) == 1


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_stale_upstream_connection_is_replaced_unnoticed_and_cools_no_key(upstream, relay, end):
    first = iter([True])

    def script(connection: Connection) -> None:
        stale = next(first, False)
        while True:
            connection.read_request()
            connection.send(answer())
            if stale:
                # The second request on this connection is read and never answered.
                connection.until(b"\r\n\r\n")
                return getattr(connection, end)()

    provider = upstream(script)
    it = relay({"anthropic": {"upstream": provider, "keys": ["sk-a", "sk-b"], "key_strategy": "fill-first"}})
    assert [it.post("/v1/messages", prompt()).status for _ in range(3)] == [200] * 3
    assert [message.get("x-api-key") for message in provider.requests] == ["sk-a"] * 3


@pytest.mark.parametrize(("seconds", "keys"), [(0.5, "aaa"), (1.5, "aab")])
def test_a_kept_connection_that_breaks_when_its_provider_has_worked_was_not_stale(upstream, relay, seconds, keys):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        while connection.read_request():
            if len(connection.upstream.requests) == 2:
                return connection.wait(gate)
            connection.send(answer())

    clock, provider = Clock(), upstream(script)
    it = relay({"anthropic": two_keys(provider)}, clock)
    with it.client() as client:
        assert client.ask("POST", "/v1/messages", STREAMED).status == 200
        client.send(request("POST", "/v1/messages", STREAMED))
        eventually(lambda: len(provider.requests) == 2)
        clock.move(seconds)
        gate.set()
        assert client.answer().get("x-monorelay-attempts") == str(len(set(keys)))
    assert "".join(asked.get("x-api-key")[-1] for asked in provider.requests) == keys


def test_a_request_that_meets_stale_and_broken_connections_goes_out_three_times_at_most(upstream, relay):
    together, warm = threading.Barrier(4), threading.Event()

    def script(connection: Connection) -> None:
        if not warm.is_set():
            connection.read_request()
            together.wait(TIMEOUT_SECONDS)
            connection.send(answer())
        connection.read_request()

    provider = upstream(script)
    it = relay({"anthropic": {"upstream": provider, "keys": ["sk-a", "sk-b", "sk-c", "sk-d"]}})
    in_threads(lambda number: it.post("/v1/messages", prompt()), 4)
    warm.set()
    refused(it.post("/v1/messages", prompt()), 502, "api_error")
    # On a kept connection, on a fresh one instead, and on a fresh one elsewhere.
    assert len(provider.requests) - 4 == 3 and len(provider.connections) - 4 == 2


def test_an_answer_with_connection_close_ends_only_that_connection(upstream, relay):
    provider = upstream(answer(200, b"{}", "connection: close"))
    it = relay({"anthropic": provider})
    with it.client() as client:
        got = [client.ask("POST", "/v1/messages", STREAMED) for _ in range(3)]
    assert [one.status for one in got] == [200] * 3 and {one.get("connection") for one in got} <= {
        None,
        "keep-alive",
    }


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority) -> Callable[[str], ssl.SSLContext]:
    def context(name: str) -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(made)
        return made

    return context


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch) -> None:
    """Makes default contexts trust the authority of these tests."""
    file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(file))
    monkeypatch.setenv("SSL_CERT_FILE", str(file))


def test_a_trusted_tls_provider_is_relayed_line_by_line(upstream, relay, tls, trusted):
    gates = [threading.Event() for _ in ANTHROPIC_EVENTS]
    with relay({"anthropic": upstream(gated_pieces(ANTHROPIC_EVENTS, gates), tls("127.0.0.1"))}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"\r\n\r\n")
        for event, gate in zip(ANTHROPIC_EVENTS, gates):
            received = b""
            while len(received) < len(event):
                received += client.chunk()
            assert received == event
            gate.set()
        assert client.chunk() == b""


class TlsPair:
    """Both ends of a TLS connection: ours, a TlsSocket, and a provider's, which writes its records to `wire`."""

    def __init__(self, provider: ssl.SSLContext, authority: trustme.CA) -> None:
        self.near, self.wire = socket.socketpair()
        self.near.setblocking(False)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        trusting.options &= ~monorelay.IGNORE_UNEXPECTED_EOF
        self.ours = monorelay.TlsSocket(self.near, trusting, "127.0.0.1")
        self._arrived, self._made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.theirs = provider.wrap_bio(self._arrived, self._made, server_side=True)

    def records(self) -> bytes:
        """What the provider has written since, encrypted."""
        return self._made.read()

    def take(self, size: int) -> None:
        """Hands the provider what we have sent."""
        self._arrived.write(self.wire.recv(size))

    def shake_hands(self) -> None:
        open_ends = {self.ours, self.theirs}
        while open_ends:
            with contextlib.suppress(BlockingIOError):
                self.ours.do_handshake()
                open_ends.discard(self.ours)
            if self.theirs in open_ends:
                self.take(65536)
                with contextlib.suppress(ssl.SSLWantReadError):
                    self.theirs.do_handshake()
                    open_ends.discard(self.theirs)
            if self.ours in open_ends:
                self.wire.sendall(self.records())

    def readable(self) -> bool:
        """Whether the selector would report our end."""
        return bool(select.select([self.near], [], [], 0)[0])

    def close(self) -> None:
        self.near.close()
        self.wire.close()


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])
def tls_pair(request, tls, authority) -> Iterator[TlsPair]:
    context = tls("127.0.0.1")
    context.minimum_version = context.maximum_version = request.param
    context.num_tickets = 2000
    pair = TlsPair(context, authority)
    pair.shake_hands()
    yield pair
    pair.close()


def test_records_without_content_are_taken_piece_by_piece(tls_pair):
    tls_pair.theirs.write(b"hi")
    records, news, receives = tls_pair.records(), [], 0
    sender = threading.Thread(target=tls_pair.wire.sendall, args=(records,))
    sender.start()
    while not news:
        select.select([tls_pair.near], [], [], 5)
        receives += 1
        try:
            news.append(tls_pair.ours.recv(65536))
        except BlockingIOError:
            pass
    sender.join()
    assert news == [b"hi"]
    assert receives >= len(records) // monorelay.TLS_RECEIVE_BYTES
    tickets = tls_pair.theirs.version() == "TLSv1.3"
    assert (len(records) > 100_000) == tickets, "the tickets of TLS 1.3 hold no content"


@pytest.mark.parametrize("end", ["close_notify", "FIN", "forged"])
def test_the_end_of_tls_is_reported_behind_what_came_with_it(tls_pair, end):
    """close_notify is a good end, all else is none; the provider's socket stays open where it can."""
    tls_pair.theirs.write(b"the last words")
    if end == "close_notify":
        with contextlib.suppress(ssl.SSLWantReadError):
            tls_pair.theirs.unwrap()
    forged = b"\x17\x03\x03\x00\x40" + b"x" * 64 if end == "forged" else b""

    def send() -> None:
        tls_pair.wire.sendall(tls_pair.records() + forged)
        if end == "FIN":
            tls_pair.wire.shutdown(socket.SHUT_WR)

    sender, content = threading.Thread(target=send), b""
    sender.start()
    while not content:
        select.select([tls_pair.near], [], [], 5)
        with contextlib.suppress(BlockingIOError):
            content = tls_pair.ours.recv(65536)
    sender.join()
    assert content == b"the last words"
    assert tls_pair.readable(), "the selector tells of what comes behind it"
    if end == "close_notify":
        assert tls_pair.ours.recv(65536) == b""
    else:
        with pytest.raises(OSError) as caught:
            tls_pair.ours.recv(65536)
        assert not isinstance(caught.value, BlockingIOError)


def test_a_blocked_tls_send_goes_on_where_it_was(tls_pair):
    sent, read, blocked = random.Random(7).randbytes(1_000_000), b"", 0
    rest = memoryview(sent)
    while rest or len(read) < len(sent):
        try:
            while rest:
                rest = rest[tls_pair.ours.send(rest) :]
        except BlockingIOError:
            blocked += 1
        tls_pair.take(70_000)
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                read += tls_pair.theirs.read(70_000)
    assert read == sent
    assert blocked > 3


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files"])
def test_a_tls_ticket_is_no_answer_to_a_large_body(upstream, relay, tls, trusted, path):
    paused = threading.Event()

    def script(connection: Connection) -> None:
        # The session tickets of TLS 1.3 are on their way before the first byte is read here.
        paused.wait(0.2)
        connection.read_request()
        connection.send(answer())

    provider = upstream(script, tls("127.0.0.1"))
    body = json.dumps(prompt(padding="x" * 8_000_000)).encode()
    with relay({"anthropic": provider}).client() as client:
        client.send(request("POST", path, body, ANTHROPIC_VERSION))
        assert client.answer().status == 200
    assert provider.requests[0].body == body


def test_a_client_that_leaves_during_the_handshake_ends_it(upstream, relay):
    def script(connection: Connection) -> None:
        connection.upstream.called.set()
        connection.sock.recv(65536)
        connection.upstream.left = connection.ended_within(TIMEOUT_SECONDS)

    provider = upstream(script)
    it = relay({"anthropic": {"base_url": provider.url.replace("http:", "https:")}})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt()).encode()))
        assert provider.called.wait(TIMEOUT_SECONDS)
    assert eventually(lambda: provider.left)


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files"])
def test_an_interim_answer_does_not_end_an_upload(upstream, relay, path):
    pause = threading.Event()

    def script(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n")
        pause.wait(0.2)
        connection.read_request()
        connection.send(answer())

    provider = upstream(script)
    body = json.dumps(prompt(padding="x" * 8_000_000)).encode()
    got = relay({"anthropic": provider}).ask("POST", path, body, ANTHROPIC_VERSION)
    assert got.status == 200 and provider.requests[0].body == body


def test_a_kept_connection_that_breaks_after_an_interim_answer_is_not_replayed(upstream, relay):
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(answer())
        connection.read_request()
        connection.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")

    provider = upstream(script)
    it = relay({"anthropic": provider})
    assert it.post("/v1/messages", prompt()).status == 200
    refused(it.post("/v1/messages", prompt()), 502, "api_error")
    assert len(provider.requests) == 2


@pytest.mark.parametrize("case", ["unknown authority", "another name"])
def test_a_tls_provider_that_cannot_be_verified_is_refused(upstream, relay, tls, case, request):
    if case == "another name":
        request.getfixturevalue("trusted")
    provider = upstream(answer(), tls("127.0.0.1" if case == "unknown authority" else "elsewhere.example"))
    refused(relay({"anthropic": provider}).post("/v1/messages", prompt()), 502, "api_error")
    assert provider.requests == []


def suites_of(hello: bytes) -> list[int]:
    """The cipher suites that a ClientHello in one TLS record offers (RFC 8446 §4.1.2)."""
    assert hello[0] == 22 and hello[5] == 1, "a handshake, and its ClientHello"
    at = 5 + 4 + 2 + 32
    at += 1 + hello[at]
    (size,) = struct.unpack_from(">H", hello, at)
    return list(struct.unpack_from(f">{size // 2}H", hello, at + 2))


def test_no_suite_with_dhe_is_offered_and_all_others_that_python_offers(upstream, relay):
    hellos: list[bytes] = []

    def script(connection: Connection) -> None:
        head = connection.take(5)
        hellos.append(head + connection.take(int.from_bytes(head[3:], "big")))

    provider = upstream(script)
    it = relay({"anthropic": {"base_url": provider.url.replace("http:", "https:")}})
    refused(it.post("/v1/messages", prompt()), 502, "api_error")
    with_dhe, usual = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.create_default_context()
    with_dhe.set_ciphers("kDHE:@SECLEVEL=0")
    dhe = {suite["id"] & 0xFFFF for suite in with_dhe.get_ciphers() if "TLSv1.3" not in suite["protocol"]}
    assert len(dhe) > 10 and 0x009E in dhe, "TLS_DHE_RSA_WITH_AES_128_GCM_SHA256"
    offered = set(suites_of(hellos[0])) - {0x00FF}  # TLS_EMPTY_RENEGOTIATION_INFO_SCSV is none
    assert not offered & dhe
    assert {0x1301, 0x1302, 0xC02F, 0xC030, 0xC02B} <= offered, "TLS 1.3, and ECDHE with AES in GCM"
    if sys.version_info >= (3, 10):
        assert offered == {suite["id"] & 0xFFFF for suite in usual.get_ciphers()} - dhe


def test_the_tls_context_verifies_and_has_the_usual_level(relay):
    it = relay({"anthropic": {"base_url": "https://127.0.0.1:9"}})
    context, usual = it.server.service.relay.connections._tls_context(), ssl.create_default_context()
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    assert context.minimum_version == usual.minimum_version
    assert not any("DHE" in suite["name"].replace("ECDHE", "") for suite in context.get_ciphers())
    if hasattr(context, "security_level"):
        assert context.security_level == usual.security_level


@pytest.fixture
def no_proxy_yet(monkeypatch) -> None:
    """A process without proxy variables, for which provider.example is this machine."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    real = socket.getaddrinfo

    def getaddrinfo(name: Any, *rest: Any, **options: Any) -> Any:
        return real(
            "127.0.0.1" if name in ("provider.example", b"provider.example") else name, *rest, **options
        )

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


def proxy_script(context: ssl.SSLContext | None, raw: bytes) -> Script:
    """A forward proxy that is at once the provider behind it."""

    def script(connection: Connection) -> None:
        while True:
            if connection.read_request().method == "CONNECT":
                connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
                if context:
                    connection.sock = context.wrap_socket(connection.sock, server_side=True)
            else:
                connection.send(raw)

    return script


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_proxy_is_used_as_the_environment_says(
    upstream, relay, tls, trusted, no_proxy_yet, monkeypatch, scheme
):
    proxy = upstream(proxy_script(tls("provider.example") if scheme == "https" else None, message_answer(HI)))
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://user:p%40ss@127.0.0.1:{proxy.port}")
    it = relay({"anthropic": {"base_url": f"{scheme}://provider.example"}})
    assert [it.post("/v1/messages", prompt()).json["id"] for _ in range(2)] == ["msg_1", "msg_1"]
    basic = "Basic " + base64.b64encode(b"user:p@ss").decode()
    first, last = proxy.requests[0], proxy.requests[-1]
    assert first.get("proxy-authorization") == basic
    if scheme == "https":
        assert first.target == "provider.example:443"
        assert (last.target, last.get("proxy-authorization")) == ("/v1/messages", None)
        assert first.get("x-api-key") is None
    assert last.get("host") == "provider.example" and last.get("x-api-key") == "sk-anthropic-secret"


@pytest.mark.parametrize(
    ("host", "no_proxy", "past"),
    [
        ("api.corp.example", "corp.example", True), ("api.corp.example", ".corp.example", True),
        ("api.corp.example", "*.corp.example", True), ("apicorp.example", "corp.example", False),
        ("10.1.2.3", "192.168.0.0/16, 10.0.0.0/8", True), ("11.1.2.3", "10.0.0.0/8", False),
        ("fd00::7", "fd00::/8", True), ("10.1.2.3", "10.1.2.3", True), ("api.example", "*", True),
        ("api.example", "api.example:443", True), ("api.example", "API.example:8443", False),
        ("api.example", "", False), ("api.example", "nonsense/99,,:", False),
    ],
)  # fmt: skip
def test_no_proxy_knows_names_suffixes_blocks_and_ports(host, no_proxy, past):
    assert monorelay.goes_past_proxy(host, 443, no_proxy) == past


def test_a_provider_has_a_proxy_of_its_own_or_none(upstream, relay, no_proxy_yet, monkeypatch):
    proxy, provider = upstream(proxy_script(None, message_answer(HI))), upstream(answer())
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    host = f"http://provider.example:{provider.port}"
    it = relay(
        {"direct": {"format": "anthropic", "base_url": host, "proxy": "direct"},
         "behind": {"format": "anthropic", "base_url": host, "proxy": proxy.url}},
        routes={"claude-a": "direct", "claude-b": "behind"},
    )  # fmt: skip
    for _ in range(2):
        assert it.post("/v1/messages", prompt("claude-a")).json == {}
        assert it.post("/v1/messages", prompt("claude-b")).json["id"] == "msg_1"
    assert len(provider.requests) == len(proxy.requests) == 2, "none has taken the other's connection"


@pytest.mark.parametrize(
    ("address", "words"),
    [("socks5://127.0.0.1:1080", "a proxy by socks5 can't be used"), ("http://127.0.0.1:9", "refused"),
     ("http://[", "its address is not a url"), ("http://127.0.0.1:x", "its address is not a url")],
)  # fmt: skip
def test_a_failure_behind_a_proxy_names_the_proxy(relay, no_proxy_yet, monkeypatch, address, words):
    monkeypatch.setenv("HTTP_PROXY", address)
    got = relay({"anthropic": {"base_url": "http://provider.example"}}).post("/v1/messages", prompt())
    message = refused(got, 502, "api_error")
    assert "through the proxy" in message and words in message


def test_a_proxy_that_refuses_makes_a_502(upstream, relay, no_proxy_yet, monkeypatch):
    proxy = upstream(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    got = relay({"anthropic": {"base_url": "https://provider.example"}}).post("/v1/messages", prompt())
    refused(got, 502, "api_error")


INJECTED = answer(200, b'{"id": "injected without any TLS"}')


@pytest.mark.parametrize("pieces", [lambda raw: [raw], bytewise], ids=["whole", "a byte at a time"])
@pytest.mark.parametrize("behind", [INJECTED, INJECTED[:9], b"x", b"\r\n", b"\0" * 5], ids=brief)
def test_what_a_proxy_sends_behind_its_answer_to_connect_is_a_502_and_no_answer(
    upstream, relay, tls, trusted, no_proxy_yet, monkeypatch, behind, pieces
):
    context, connects = tls("provider.example"), []

    def script(connection: Connection) -> None:
        connects.append(connection.read_request())
        for piece in pieces(b"HTTP/1.1 200 OK\r\n\r\n" + behind):
            connection.send(piece)
        # An honest provider stands behind it, for whom the handshake is not spoiled.
        with contextlib.suppress(ssl.SSLError):
            connection.sock = context.wrap_socket(connection.sock, server_side=True)
            connection.read_request()
            connection.send(message_answer(HI))

    proxy = upstream(script)
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    it = relay({"anthropic": {"base_url": "https://provider.example"}})
    for _ in range(3):
        got = it.post("/v1/messages", prompt())
        refused(got, 502, "api_error")
        assert b"injected" not in got.head + got.body
    assert {asked.method for asked in connects} == {"CONNECT"}
    assert [asked for asked in proxy.requests if asked.method != "CONNECT"] == [], "the request stayed here"


@pytest.mark.parametrize("exempt", ["no_proxy", "loopback"])
def test_a_proxy_is_passed_by(upstream, relay, no_proxy_yet, monkeypatch, exempt):
    proxy, provider = upstream(answer(500)), upstream(answer())
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    if exempt == "no_proxy":
        monkeypatch.setenv("NO_PROXY", "elsewhere.example,provider.example")
    name = "provider.example" if exempt == "no_proxy" else "127.0.0.1"
    it = relay({"anthropic": {"base_url": f"http://{name}:{provider.port}"}})
    assert it.post("/v1/messages", prompt()).status == 200
    assert (len(proxy.connections), len(provider.requests)) == (0, 1)


def keepalive_seconds(local_port: int, remote_port: int) -> float | None:
    """When the kernel sends the first keep-alive probe on a connection of this machine; None when it never does."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, remote, timer = (line.split()[place] for place in (1, 2, 5))
        if (int(local.split(":")[1], 16), int(remote.split(":")[1], 16)) == (local_port, remote_port):
            kind, ticks = timer.split(":")
            return int(ticks, 16) / os.sysconf("SC_CLK_TCK") if kind == "02" else None
    raise LookupError(f"no connection from port {local_port} to port {remote_port}")


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets' timers are read from /proc")
def test_both_sides_are_probed_after_a_minute_of_silence(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    with it.client() as client:
        assert client.ask("POST", "/v1/messages", STREAMED).status == 200
        relay_port = urllib.parse.urlsplit(it.url).port
        ends = [(relay_port, client.sock.getsockname()[1]),
                (provider.connections[0].sock.getpeername()[1], provider.port)]  # fmt: skip
        for local, remote in ends:
            # Other timers come first while something is on its way.
            assert 50 < eventually(lambda local=local, remote=remote: keepalive_seconds(local, remote)) <= 61


STRAY = answer(200, b'"stray"')


def test_an_answer_that_comes_with_the_one_asked_for_reaches_nobody(upstream, relay):
    def script(connection: Connection) -> None:
        while True:
            own = answer(200, connection.read_request().get("x-mark").encode())
            connection.send(own, STRAY)

    it = relay({"anthropic": upstream(script)})
    with it.client() as client:
        for number in range(100):
            got = client.ask("POST", "/v1/messages", STREAMED, f"x-mark: mark-{number}")
            assert (got.status, got.body) == (200, b"mark-%d" % number)


def test_an_answer_that_comes_before_the_next_request_reaches_nobody(upstream, relay):
    sent = threading.Event()

    def script(connection: Connection) -> None:
        while True:
            connection.send(answer(200, connection.read_request().get("x-mark").encode()))
            connection.send(STRAY)
            sent.set()

    it = relay({"anthropic": upstream(script)})
    with it.client() as client:
        for number in range(100):
            got = client.ask("POST", "/v1/messages", STREAMED, f"x-mark: mark-{number}")
            assert (got.status, got.body) == (200, b"mark-%d" % number)
            assert sent.wait(TIMEOUT_SECONDS)
            sent.clear()


def test_a_kept_connection_is_looked_at_right_before_a_request_goes_out_on_it(upstream, relay):
    gate, sent = threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        connection.send(answer(200, connection.read_request().get("x-mark").encode()))
        if connection is connection.upstream.connections[0]:
            connection.wait(gate)
            connection.send(STRAY)
            sent.set()
        connection.rest()

    it = relay({"anthropic": upstream(script)})
    begun, held = [threading.Event() for _ in range(2)], [threading.Event() for _ in range(2)]

    def hold(number: int) -> None:
        """Makes a turn of the loop last."""
        begun[number].set()
        held[number].wait(TIMEOUT_SECONDS)

    with it.client() as client:
        assert client.ask("POST", "/v1/messages", STREAMED, "x-mark: first").body == b"first"
        it.server.service.loop.post(lambda: hold(0))
        assert begun[0].wait(TIMEOUT_SECONDS)
        # Both are there for the next turn, in which the stray answer comes before the request is looked at.
        it.server.service.loop.post(lambda: hold(1))
        client.send(request("POST", "/v1/messages", STREAMED, "x-mark: victim"))
        held[0].set()
        assert begun[1].wait(TIMEOUT_SECONDS)
        gate.set()
        assert sent.wait(TIMEOUT_SECONDS)
        held[1].set()
        assert client.answer().body == b"victim"


@pytest.mark.parametrize("pieces", [lambda raw: [raw], bytewise], ids=["whole", "a byte at a time"])
@pytest.mark.parametrize(
    ("raw", "status"),
    [(answer(), 200), (answer().replace(b"\r\n", b"\n"), 502), (b"HTTP/1.1 200 OK\r\ncontent-length: 2\n\r\n{}", 502)],
    ids=["CRLF", "LF", "one LF"],
)
def test_a_head_with_a_line_that_ends_in_lf_is_a_502_at_once(upstream, relay, raw, status, pieces):
    def script(connection: Connection) -> None:
        connection.read_request()
        for piece in pieces(raw):
            connection.send(piece)
        connection.ended_within(TIMEOUT_SECONDS)

    got = relay({"anthropic": upstream(script)}).post("/v1/messages", prompt())
    assert got.status == status and (status == 200 or "LF" in refused(got, 502, "api_error"))


def test_connection_may_name_anthropic_version_and_the_default_takes_its_place(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    for lines in (
        ["Connection: anthropic-version", "anthropic-version: 2026-10-21"],
        ["Connection: anthropic-version"],
    ):
        assert it.post("/v1/messages", prompt(), *lines).status == 200
        assert provider.requests[-1].all("anthropic-version") == ["2023-06-01"]


class Blocked:
    """A port whose queue is full: whoever connects to it waits, as if its packets were dropped."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.sockets = [socket.socket() for _ in range(3)]
        full, *fillers = self.sockets
        full.bind((host, 0))
        full.listen(0)
        self.port = full.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", self.port))

    def __enter__(self) -> Blocked:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.sockets:
            one.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="threads are counted in /proc")
@pytest.mark.timed
def test_clients_that_leave_while_a_provider_drops_packets_cost_no_thread(upstream, program):
    with Blocked() as blocked:
        routes = {"claude-blocked": "anthropic", "*": "anthropic2"}
        it = program(
            settings(
                {"anthropic": {"base_url": blocked.url}, "anthropic2": upstream(answer())}, routes=routes
            )
        )

        def threads() -> int:
            return int(re.search(r"Threads:\s+(\d+)", Path(f"/proc/{it.process.pid}/status").read_text())[1])

        def asks(model: str) -> Client:
            client = Client(it.url)
            client.send(request("POST", "/v1/messages", json.dumps(prompt(model)).encode()))
            return client

        assert asks("claude-test").answer().status == 200
        before = threads()
        waiting = [asks("claude-blocked") for _ in range(300)]
        begin = time.monotonic()
        with Client(it.url) as other:
            assert other.ask("POST", "/v1/messages", STREAMED).status == 200
        assert time.monotonic() - begin < 0.5, "another provider answers meanwhile"
        assert threads() <= before + 64
        for client in waiting:
            client.close()
        eventually(lambda: threads() <= before + 4, seconds=2)


@pytest.mark.parametrize("slow", ["addresses", "look-up", "TLS"])
def test_connect_timeout_covers_everything_until_a_request_can_be_sent(upstream, relay, monkeypatch, slow):
    over, real = threading.Event(), socket.getaddrinfo
    other = upstream(answer())
    with Blocked("0.0.0.0") as blocked:

        def getaddrinfo(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
            if host not in ("provider.example", b"provider.example") or options.get("flags"):
                return real(host, port, *rest, **options)
            if slow == "look-up":
                over.wait(TIMEOUT_SECONDS)
            return [
                found for last in (1, 2, 3, 4) for found in real(f"127.0.0.{last}", port, *rest, **options)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        url = f"http://provider.example:{blocked.port}"
        if slow == "TLS":
            url = upstream(lambda connection: connection.rest()).url.replace("http:", "https:")
        it = relay(
            {"anthropic": {"base_url": url, "connect_timeout": 0.5, "headers": {}}, "anthropic2": other},
            routes={
                "claude-slow": "anthropic",
                "claude-both": ["anthropic", "anthropic2"],
                "*": "anthropic2",
            },
        )
        monkeypatch.setenv("NO_PROXY", "*")
        with it.client() as client:
            begin = time.monotonic()
            client.send(request("POST", "/v1/messages", json.dumps(prompt("claude-slow")).encode()))
            assert it.post("/v1/messages", prompt()).status == 200
            assert time.monotonic() - begin < 0.4, "another provider answers meanwhile"
            refused(client.answer(), 502, "api_error")
            assert 0.4 < time.monotonic() - begin < 1.2
        assert it.post("/v1/messages", prompt("claude-both")).get("x-monorelay-provider") == "anthropic2"
        over.set()


# ------------------------------------------------------------------------------------------------------------
# Relay: what goes up and what comes back
# ------------------------------------------------------------------------------------------------------------

# Numbers, escapes, spaces, key order and duplicate keys that no serialiser would give back.
ODD_BODY = (
    b'{"z":1.0e+2 ,"a":\t-0.0,"a":12345678901234567890123,"messages":'
    b'[{"model":"inner","content":"\\u00e9\\/\xc3\xa9"}],\r\n'
    b'"thinking":{"signature":"c2ln+/=="}, "model" :"claude-test","n":[ ]}\n'
)


@pytest.mark.parametrize("model", ["claude-test", "claude-\\u0074est", "fast", "claude-test@anthropic"])
def test_body_goes_up_byte_for_byte_but_for_the_model(upstream, relay, model):
    provider = upstream(answer())
    body = ODD_BODY.replace(b'"claude-test"', b'"%s"' % model.encode())
    got = relay({"anthropic": provider}, aliases={"fast": "claude-test"}).post("/v1/messages", body)
    assert provider.requests[0].body == (body if "\\" in model else ODD_BODY)
    assert (got.get("x-monorelay-model"), got.get("x-monorelay-provider")) == ("claude-test", "anthropic")


def test_request_headers_go_up_as_sent_but_for_what_is_the_relays_business(upstream, relay):
    provider = upstream(answer())
    sent = ["anthropic-version: 2026-10-21", "anthropic-beta: one", "Anthropic-Beta: two,three",
    "User-Agent: claude-cli/2 (x)",
            "X-Claude-Code-Session-Id: s", "x-stainless-retry-count: 0", "idempotency-key: i",
            "X-Odd: caf\xe9", "x-empty:"]  # fmt: skip
    dropped = [f"Authorization: Bearer {TOKEN}", "Cookie: a=b", "Cookie2: $Version=1", "Accept-Encoding: gzip, br",
               "Api-Key: client", "X-Goog-Api-Key: client", f"X-MonoRelay-Key: {TOKEN}",
    "Connection: keep-alive, x-hop",
               "X-Hop: 1", "Keep-Alive: 5", "TE: trailers", "Proxy-Authorization: Basic x",
               "Upgrade: h2c"]  # fmt: skip
    relay({"anthropic": provider}).post(
        "/v1/messages?beta=true&x=%20y", prompt(), *sent[:4], *dropped, *sent[4:]
    )
    (got,) = provider.requests
    wanted = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in sent)]
    own = {"host", "content-length", "connection", "accept-encoding", "x-api-key"}
    assert [pair for pair in got.headers if pair[0] not in own] == wanted
    assert got.target == "/v1/messages?beta=true&x=%20y"
    assert got.get("accept-encoding") == "identity" and got.get("host") == f"127.0.0.1:{provider.port}"
    assert got.all("x-api-key") == ["sk-anthropic-secret"]


USER_KEY, OTHER_KEY = "alice-key-0123456789", "alices-other-key-456"


def test_a_users_key_is_that_user_with_all_limits(upstream, relay):
    provider = upstream(answer())
    users = {"alice": {"key": [USER_KEY, OTHER_KEY, ""], "models": ["claude-*"], "requests_per_minute": 1},
             "bob": {"key": "bob-key-0123456789", "enabled": False}}  # fmt: skip
    it = relay({"anthropic": provider}, users=users, routes={"*": "anthropic"})
    assert it.ask("GET", "/api/auth/me", None, token=OTHER_KEY).json["username"] == "alice"
    assert it.post("/v1/messages", prompt("gpt-5"), token=USER_KEY).status == 403
    assert [it.post("/v1/messages", prompt(), token=key).status for key in (USER_KEY, OTHER_KEY)] == [200, 429]
    for wrong in ("bob-key-0123456789", USER_KEY[:-1], USER_KEY + "x"):
        assert it.ask("GET", "/api/auth/me", None, token=wrong).status == 401


def test_a_disabled_user_has_no_token_that_is_valid(relay):
    it = relay({"echo": {}}, users={"alice": {"enabled": False, "password": PASSWORD_HASH}},
               server={"jwt_secret": JWT_SECRET})  # fmt: skip
    token = jwt.encode(claims(sub="alice"), JWT_SECRET, "HS256")
    assert it.ask("GET", "/api/auth/me", None, token=token).status == 401
    login = json.dumps({"username": "alice", "password": PASSWORD}).encode()
    assert it.ask("POST", "/api/auth/login", login, token="").status == 401


def test_two_users_have_no_key_in_common():
    users = {name: {"key": USER_KEY} for name in ("alice", "bob")}
    with pytest.raises(monorelay.ConfigError, match=r"users\.bob\.key: is the key of alice, too"):
        parse(users=users)
    with pytest.raises(monorelay.ConfigError, match=r"users\.eve\.key: must have at least 16 characters"):
        parse(users={"eve": {"key": "short"}})


def test_with_keys_of_users_alone_no_access_key_is_made_up():
    config = monorelay.with_run_secrets(parse(users={"alice": {"key": USER_KEY}}, server={"access_key": ""}), None)
    assert config.server.access_keys == ()


def test_a_client_brings_its_own_credential_where_the_provider_takes_that(upstream, relay):
    theirs, ours = upstream(replies(answer(401, b'{"theirs": 1}'), answer())), upstream(answer())
    it = relay(
        {"theirs": {"upstream": theirs, "format": "anthropic", "keys": "client"},
         "ours": {"upstream": ours, "format": "anthropic", "keys": ["sk-ours"]}},
        routes={"claude-a*": "theirs", "claude-b*": "ours"},
    )  # fmt: skip
    own = ("Authorization: Bearer sk-client", f"x-monorelay-key: {TOKEN}")
    got = it.post("/v1/messages", prompt("claude-a"), *own, token="")
    assert (got.status, got.body) == (401, b'{"theirs": 1}'), "it is about the client's own credential"
    for model in ("claude-a", "claude-b"):
        assert it.post("/v1/messages", prompt(model), *own, token="").status == 200
    assert [(sent.get("authorization"), sent.get("x-api-key"), sent.get("x-monorelay-key"))
            for sent in (theirs.requests[-1], ours.requests[-1])] == [
        ("Bearer sk-client", None, None), (None, "sk-ours", None)
    ]  # fmt: skip
    got = it.post("/v1/messages", prompt("claude-a"))
    assert (got.status, got.get("x-monorelay-error")) == (401, "client_key_needed"), "the relay's token goes nowhere"
    wrong = it.post("/v1/messages", prompt("claude-b"), "x-monorelay-key: wrong")
    assert wrong.status == 401, "it alone is the token"
    assert len(theirs.requests) == 2


def test_a_clients_own_credential_is_shown_to_one_place_only(upstream, relay):
    """Also while that cools, and not where it is searched for what one of the providers may know."""
    first = upstream(replies(*4 * [answer(529)], answer(404)))
    other, ours = upstream(answer(404)), upstream(answer(404))
    it = relay(
        {"first": {"upstream": first, "format": "anthropic", "keys": "client"},
         "same": {"upstream": first, "format": "openai", "keys": "client"},
         "other": {"upstream": other, "format": "openai", "keys": "client"},
         "ours": {"upstream": ours, "format": "openai", "keys": ["sk-ours"]}},
        aliases={"smart": ["claude-a@first", "gpt-a@other", "gpt-b@same"]},
    )  # fmt: skip
    own = ("Authorization: Bearer sk-client", f"x-monorelay-key: {TOKEN}")
    for _ in range(2):
        it.post("/v1/messages", prompt("smart"), *own, token="")
    assert len(first.requests) == 4
    assert it.ask("GET", "/v1/responses/resp_1", None, *own, token="").status == 404
    assert (len(first.requests), len(ours.requests), other.requests) == (5, 1, [])
    assert it.post("/v1/chat/completions", prompt("gpt-a@other"), *own, token="").status == 404
    assert other.requests[0].get("authorization") == "Bearer sk-client", "it was asked for by its name"


def test_secrets_come_from_files_and_from_an_env_file(tmp_path, monkeypatch):
    monkeypatch.setenv("IN_BOTH", "of-the-environment")
    (tmp_path / "secret").write_text("\n of-a-file \n")
    (tmp_path / "keys.env").write_text(
        "# a comment\n\nexport FROM_LINE='of a line'\nIN_BOTH=of-the-file\nEMPTY=\n", encoding="utf-8"
    )
    (tmp_path / "relay.json").write_text(
        '{"env_file": "keys.env", "providers": {"a": {"format": "anthropic", "base_url": "https://a.example",'
        '"headers": {"x-line": "${FROM_LINE}", "x-both": "${IN_BOTH}", "x-empty": "${EMPTY}"},'
        '"keys": ["${file:secret}", "${file:no such file:-}"]}}}'
    )
    (provider,) = monorelay.load_config(str(tmp_path / "relay.json"), {}).providers.values()
    assert [key.secret.reveal() for key in provider.keys] == ["of-a-file"]
    assert dict(provider.headers) == {"x-line": "of a line", "x-both": "of-the-environment", "x-empty": ""}
    (tmp_path / "secret").unlink()
    with pytest.raises(monorelay.ConfigError, match=r"providers\.a\.keys\[0\]: the file secret can't be read"):
        monorelay.load_config(str(tmp_path / "relay.json"), {})
    (tmp_path / "keys.env").unlink()
    with pytest.raises(monorelay.ConfigError, match=r"relay\.json: env_file: keys\.env can't be read: No such file"):
        monorelay.load_config(str(tmp_path / "relay.json"), {})


def test_the_paths_of_secrets_are_read_as_json_writes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CREDENTIALS", str(tmp_path / "credentials"))
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "keys.env").write_text("LINE=of-a-line\nCREDENTIALS=elsewhere\n", encoding="utf-8")
    (tmp_path / 'a "ü"').write_text("of-a-file", encoding="utf-8")
    keys = ["${LINE}", '${file:a "ü"}', "${NONE:-}"]
    provider = {"format": "anthropic", "base_url": "https://a.example", "keys": keys}
    for name in ("${CREDENTIALS}/keys.env", "${NONE:-credentials}/keys.env"):
        document = {"//": "${file:no such file}", "env_file": name, "providers": {"a": provider}}
        (tmp_path / "relay.json").write_text(json.dumps(document), encoding="utf-8")
        config = monorelay.load_config(str(tmp_path / "relay.json"), {})
        assert [key.secret.reveal() for key in config.providers["a"].keys] == ["of-a-line", "of-a-file"]
        assert os.path.samefile(tmp_path / config.env_file, tmp_path / "credentials" / "keys.env")
    (tmp_path / "relay.json").write_text('{"env_file": "${NONE}/keys.env"}', encoding="utf-8")
    with pytest.raises(monorelay.ConfigError, match=r"relay\.json: env_file: the environment variable NONE is not set"):
        monorelay.load_config(str(tmp_path / "relay.json"), {})


@pytest.mark.parametrize(("given", "expected"), [("true", True), ("false", False), ("", None), ("yes", None)])
def test_a_truth_value_may_come_from_the_environment(given, expected):
    source = '{"server": {"dashboard": "${SHOWN}"}}'
    if expected is None:
        with pytest.raises(monorelay.ConfigError, match="dashboard: must be true or false, not a string"):
            monorelay.parse_config(source, {"SHOWN": given})
    else:
        assert monorelay.parse_config(source, {"SHOWN": given}).server.dashboard is expected
    with pytest.raises(monorelay.ConfigError, match="dashboard: must be true or false, not a string"):
        monorelay.parse_config('{"server": {"dashboard": "true"}}', {})


DOUBTFUL = {
    "providers.a.keys: key1 looks like a placeholder": {"a": {"keys": ["$ANTHROPIC_API_KEY"]}},
    "providers.b.keys: named looks like a placeholder": {"b": {"keys": [{"key": "sk-ant-...", "label": "named"}]}},
    "providers.c.base_url: its keys travel in clear text": {"c": {"base_url": "http://api.example", "keys": ["k"]}},
    "providers.d.base_url: has no path": {"d": {"format": "openai", "base_url": "https://api.example"}},
}


@pytest.mark.parametrize("warning", DOUBTFUL)
def test_what_is_doubtful_of_a_provider_is_warned_of(warning):
    ((name, provider),) = DOUBTFUL[warning].items()
    given = {"format": "anthropic", "base_url": "https://api.example/v1", **provider}
    warnings = list(monorelay.config_warnings(parse({name: given}, routes={"*": name})))
    assert len(warnings) == 1 and warnings[0].startswith(warning)


def test_what_is_doubtful_of_names_is_warned_of():
    config = parse(
        routes={"claude-*": "anthropic", "claude-haiku-*": "anthropic", "(gpt|o1).*": "anthropic"},
        aliases={"fast": "claude-x@antropic"}, users={"admin": {}},
    )  # fmt: skip
    assert [warning.partition(": ")[0] for warning in monorelay.config_warnings(config)] == [
        "routes.claude-haiku-*", "routes.(gpt|o1).*", "aliases.fast", "users.admin"
    ]  # fmt: skip
    (warning,) = monorelay.config_warnings(monorelay.parse_config("{}", {}))
    assert warning.startswith("nothing is served")
    (warning,) = monorelay.config_warnings(parse(server={"access_key": ["fine", "$MONORELAY_ACCESS_KEY"]}))
    assert warning.startswith("server.access_key: one looks like a placeholder")


def test_providers_that_a_clients_own_key_never_goes_to_are_warned_of():
    own = {name: {"format": "openai", "base_url": f"https://{name}.example/v1", "keys": "client"} for name in "abc"}
    own["a2"] = own["a"]
    config = parse(own, routes={"gpt-*": ["a", "b"], "o?": ["a", "a2"]}, aliases={"smart": ["x@b", "x@c", "y@c"]})
    assert [warning.partition(",")[0] for warning in monorelay.config_warnings(config)] == [
        "routes.gpt-*: b gets nothing", "aliases.smart: c gets nothing",
    ]  # fmt: skip


BUDGETED = {"users": {"alice": {"usd_per_day": 1}}, "ledger": {"path": "usage.db"}}


def test_routed_models_without_a_price_are_warned_of_where_there_are_budgets():
    sections = {
        "routes": {"claude-*": ["anthropic", "echo"], "llama": "second", "gpt-5": "openai", "o?": "openai"},
        "aliases": {"fast": ["claude-haiku-2025-01-01", "gpt-6@openai"], "any/*": "*@second"},
    }  # fmt: skip

    def warnings(prices: Any, **rest: Any) -> list[str]:
        config = parse({**PRICED, "echo": {"format": "echo"}}, **sections, **rest, prices=prices)
        return [line for line in monorelay.config_warnings(config) if line.startswith("prices: ")]

    for_names = "prices: there is none for {}, which no budget in USD limits; add one"
    assert warnings(LITELLM_PRICES, **BUDGETED) == [
        for_names.format("o? at openai"), for_names.format("gpt-6 at openai"),
    ]  # fmt: skip
    rates = {"input": 1, "output": 2}
    assert warnings({"claude-haiku*": rates, "gpt-?": rates, "o3": rates, "*": rates}, **BUDGETED) == []
    assert warnings({"claude-haiku*": rates, "gpt-?": rates, "o3": rates}, **BUDGETED) == [
        for_names.format("llama at second")
    ]
    (missing,) = (line for line in monorelay.config_warnings(parse(**BUDGETED)) if line.startswith("prices: "))
    assert missing.startswith("prices: are missing, so that the budget of alice limits nothing")
    assert warnings(LITELLM_PRICES, ledger={"path": "usage.db"}, users={"alice": {"tokens_per_day": 1}}) == []


def test_a_ledger_lies_beside_relay_json_and_needs_sqlite(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "relay.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**settings({"echo": {}}), "ledger": {"path": "usage.db"}}))
    config = monorelay.load_config(str(path), {})
    assert config.ledger == (str(path.parent / "usage.db"), 90)
    assert not any("ledger" in line for line in monorelay.config_warnings(config))
    assert not any(line.startswith("ledger") for line in monorelay.file_warnings(str(path), config))
    path.write_text(json.dumps({**settings({"echo": {}}), "ledger": {"path": "relay.json"}}))
    config = monorelay.load_config(str(path), {})
    (warning,) = (line for line in monorelay.file_warnings(str(path), config) if line.startswith("ledger"))
    assert warning.startswith(f"ledger.path: {path} is no SQLite database")
    path.write_text(json.dumps({**settings({"echo": {}}), "ledger": {"path": "no such folder/usage.db"}}))
    config = monorelay.load_config(str(path), {})
    (warning,) = (line for line in monorelay.file_warnings(str(path), config) if line.startswith("ledger"))
    assert f"to the folder {path.parent}/no such folder; make it" in warning
    monkeypatch.setattr(monorelay, "sqlite3", None)
    config = monorelay.load_config(str(path), {})
    assert "ledger: this Python has no sqlite3; nothing is kept" in monorelay.config_warnings(config)
    path.write_text(json.dumps({**settings({"echo": {}}), **BUDGETED}))
    with pytest.raises(monorelay.ConfigError, match=r"users\.alice: has a budget, and this Python has no sqlite3"):
        monorelay.load_config(str(path), {})


@pytest.mark.parametrize(
    ("text", "hint"),
    [('{\n  // a comment\n  "a": 1}', "JSON has no comments"), ('{"a": [1,]}', "a comma behind"),
     ("", "the file is empty"), ('{"a": "// no comment" "b"}', None)],
)  # fmt: skip
def test_what_is_often_the_matter_with_a_file_is_said(text, hint):
    with pytest.raises(monorelay.ConfigError) as caught:
        monorelay.parse_config(text, {})
    message = str(caught.value)
    assert hint in message if hint is not None else "(" not in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_file_in_utf_16_is_told_as_such(tmp_path, encoding):
    (tmp_path / "relay.json").write_text('{"providers": {}}', encoding=encoding)
    with pytest.raises(monorelay.ConfigError, match=r"relay\.json: is in UTF-16; save it as UTF-8"):
        monorelay.load_config(str(tmp_path / "relay.json"), {})


def test_what_is_probably_meant_is_said_or_all_that_there_is():
    text = changed("providers/one/api_key", "k")
    assert problems(text) == ["relay.json: providers.one.api_key: unknown key, did you mean keys?"]
    (problem,) = problems(changed("users/alice/budget", 5))
    assert problem.startswith("relay.json: users.alice.budget: unknown key; there are enabled, key, models, ")
    (problem,) = problems(changed("providers/one/models", "claude-*"))
    assert problem.endswith('must be a list: write ["claude-*"]')
    (problem,) = problems(changed("routes/claude-*", 5))
    assert problem.endswith("must be a string or a list of strings, not a number")


def test_an_alias_to_nowhere_is_reported_with_all_else():
    document = json.loads(changed("aliases/fast", ["claud-a", "gpt-5"]))
    document["routes"]["claude-*"] = "onne"
    document["users"]["alice"]["password"] = "secret"
    document["aliases"]["by-route"] = "claude-x"
    found = problems(json.dumps(document))
    assert len(found) == 3, found
    for place in ("aliases.fast: claud-a is neither", "routes.claude-*: there is no provider onne", "alice.password"):
        assert any(place in problem for problem in found), found


def test_a_password_without_jwt_secret_is_warned_of():
    users = {"alice": {"password": PASSWORD_HASH}}
    for secret, count in ((JWT_SECRET, 0), ("", 1)):
        config = parse(users=users, server={"jwt_secret": secret})
        for given in (config, monorelay.with_run_secrets(config, None)):
            warnings = list(monorelay.config_warnings(given))
            assert sum("server.jwt_secret: is not set" in warning for warning in warnings) == count


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("clade-sonnet-4-5", "no route for the model 'clade-sonnet-4-5', did you mean claude-*?"),
        ("fsat", "no route for the model 'fsat', did you mean fast?"),
        ("zzz", "no route for the model 'zzz'; this relay knows a0, a1, a2, a3, a4, a5, a6, a7, …"),
    ],
)
def test_a_model_without_route_is_told_what_is_close_or_what_there_is(name, told):
    aliases = {"fast": "claude-x", **{f"a{number}": "claude-x" for number in range(9)}}
    config = parse(routes={"claude-*": "anthropic"}, aliases=aliases)
    with pytest.raises(monorelay.NotFound) as caught:
        monorelay.resolve(config, name)
    assert caught.value.message == told


@pytest.mark.parametrize("count", [10, 10_000])
@pytest.mark.timed
def test_an_unknown_model_is_compared_with_few_patterns(count):
    config = parse(routes={f"{'claude-' * 9}{number}*": "anthropic" for number in range(count)})
    assert seconds_each(lambda: monorelay.close_models(config, "claude_" * 9), 3) < 0.05


def test_a_route_is_explained(tmp_path):
    (tmp_path / "relay.json").write_text(json.dumps({
        "providers": {"one": {"format": "anthropic", "base_url": "https://one.example", "keys": ["k"]},
                      "two": {"format": "openai", "base_url": "https://two.example/v1", "keys": [""]},
                      "three": {"format": "openai", "base_url": "https://three.example/v1", "keys": "client"},
                      "four": {"format": "openai", "base_url": "https://four.example/v1", "keys": "client"},
                      "echo": {"format": "echo"}},
        "aliases": {"smart": ["claude-x", "gpt-x@two"], "any/*": "*", "own": ["x@three", "x@four"]},
        "routes": {"claude-*": "one"},
    }))  # fmt: skip
    done = run("route", "smart", cwd=tmp_path)
    assert (done.returncode, done.stdout.splitlines()) == (0, [
        "smart: is the alias smart -> claude-x, gpt-x@two",
        "claude-x: matches the route claude-* -> one",
        "gpt-x@two: names the provider two",
        "  1. claude-x at one (anthropic): for /v1/messages, and /v1/chat/completions translated",
        "  2. gpt-x at two (openai): skipped, it has no key",
    ])  # fmt: skip
    told = run("route", "x@echo", cwd=tmp_path).stdout
    assert told.endswith("1. x at echo (echo): for /v1/messages, and /v1/chat/completions translated\n")
    assert run("route", "any/claude-y[1m]", cwd=tmp_path).returncode == 0
    assert run("route", "gpt-x@two", cwd=tmp_path).returncode == 1, "nobody can serve it"
    own = run("route", "own", cwd=tmp_path).stdout
    assert own.endswith("2. x at four (openai): skipped, a client's own key is for the first that takes one\n")
    nowhere = run("route", "nobody", cwd=tmp_path)
    assert nowhere.returncode == 1 and "no route for the model 'nobody'" in nowhere.stdout
    assert "route takes one MODEL" in run("route", cwd=tmp_path).stderr


def error_codes() -> set[str]:
    """The codes of the relay's own errors: those of their classes, and those given where one is raised."""
    tree, classes = ast.parse((HERE / "monorelay.py").read_text("utf-8")), [monorelay.RelayError]
    for made in classes:
        classes += made.__subclasses__()
    names = {made.__name__ for made in classes}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names]
    given = [call.args[1].value for call in calls if len(call.args) > 1 and isinstance(call.args[1], ast.Constant)]
    return {made.code for made in classes} | {code for code in given if isinstance(code, str)}


def test_the_readme_has_each_code_of_the_relays_own_errors():
    readme = (HERE / "README.md").read_text("utf-8")
    codes = error_codes()
    assert "no_route" in codes
    assert [code for code in sorted(codes) if f"`{code}`" not in readme] == []


@pytest.mark.parametrize(("given", "taken"), [("key-of-the-environment\n", True), ('"key-in-quotes"', False)])
def test_without_an_access_key_the_environments_counts(tmp_path, monkeypatch, given, taken):
    monkeypatch.setenv("MONORELAY_ACCESS_KEY", given)
    file = tmp_path / "relay.json"
    file.write_text('{"providers": {"echo": {"format": "echo"}}}')
    if taken:
        assert monorelay.load_config(str(file), {}).server.access_keys == (monorelay.Secret(given.strip()),)
    else:
        with pytest.raises(monorelay.ConfigError, match="MONORELAY_ACCESS_KEY: stands in quotes"):
            monorelay.load_config(str(file), {})


@pytest.mark.parametrize(
    ("provider", "path", "expected"),
    [
        ({"format": "anthropic"}, "/v1/messages", {"x-api-key": "k", "authorization": None,
         "anthropic-version": "2023-06-01"}),
        ({"format": "openai"}, "/v1/chat/completions", {"authorization": "Bearer k", "x-api-key": None,
         "anthropic-version": None}),
        ({"format": "anthropic", "auth_header": "authorization"}, "/v1/messages",
         {"authorization": "Bearer k", "x-api-key": None}),
        ({"format": "openai", "auth_header": "x-api-key"}, "/v1/chat/completions", {"authorization": None,
         "x-api-key": "k"}),
        ({"format": "anthropic", "headers": {"X-Team": "a", "user-agent": "relay", "x-gone": None,
         "anthropic-version": "1"}},
         "/v1/messages", {"x-team": "a", "user-agent": "relay", "x-gone": None, "anthropic-version": "1"}),
    ],
)  # fmt: skip
def test_provider_gets_its_own_credential_and_headers(upstream, relay, provider, path, expected):
    scripted = upstream(answer())
    it = relay({"p": {**provider, "upstream": scripted, "keys": ["k"]}})
    assert it.post(path, prompt(), "User-Agent: client", "x-gone: 1").status == 200
    assert {name: scripted.requests[0].get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("method", "path", "target", "base"),
    [
        ("POST", "/v1/messages", "/v1/messages", ""),
        ("POST", "/v1/messages", "/v1/messages", "/v1"),
        ("POST", "/v1/messages", "/proxy/v1/messages", "/proxy/"),
        ("POST", "/v1/messages/beta", "/v1/messages?beta=true", ""),
        ("POST", "/v1/messages/beta?a=1", "/v1/messages?a=1&beta=true", ""),
        ("POST", "/v1/messages/beta?beta=true", "/v1/messages?beta=true", ""),
        ("POST", "/v1/messages/count_tokens?beta=true", "/v1/messages/count_tokens?beta=true", ""),
        ("GET", "/v1/anthropic/models?limit=3", "/v1/models?limit=3", ""),
        ("GET", "/v1/anthropic/models/claude-x", "/v1/models/claude-x", ""),
        ("GET", "/v1/messages/batches/b1/results", "/v1/messages/batches/b1/results", ""),
        ("POST", "/v1/messages/batches/b1/cancel", "/v1/messages/batches/b1/cancel", ""),
        ("DELETE", "/v1/files/f1?beta=true", "/v1/files/f1?beta=true", ""),
        ("HEAD", "/v1/files/f1", "/v1/files/f1", ""),
        ("GET", "/v1/skills/new%2Fthing", "/v1/skills/new%2Fthing", ""),
    ],
)
def test_anthropic_paths(upstream, relay, method, path, target, base):
    provider = upstream(lambda connection: connection.send(
        answer(200, b"" if connection.read_request().method == "HEAD" else b'{"id": "x"}',
        "x-a: 1")))  # fmt: skip
    other = {"upstream": upstream(answer(500)), "translate": False}
    it = relay({"openai": other, "anthropic": {"base_url": provider.url + base}})
    body = json.dumps(prompt()).encode() if method == "POST" else None
    got = it.ask(method, path, body, "anthropic-version: 2026-10-21")
    assert (got.status, got.get("x-a"), got.body) == (200, "1", b"" if method == "HEAD" else b'{"id": "x"}')
    assert (provider.requests[0].method, provider.requests[0].target) == (method, target)
    assert provider.requests[0].get("anthropic-version") == "2026-10-21"


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/responses?x=1"),
     ("POST", "/v1/embeddings"), ("POST", "/v1/moderations"), ("GET", "/v1/files"),
     ("DELETE", "/v1/files/f1"), ("GET", "/v1/responses/resp_1")],
)  # fmt: skip
def test_openai_paths(upstream, relay, method, path):
    provider, other = upstream(answer(200, b'{"x":1}')), upstream(answer(500))
    it = relay({"anthropic": other, "openai": provider}, aliases={"fast": "gpt-test"})
    body = b'{"model":"fast"}' if method == "POST" else None
    got = it.ask(method, path, body, "Content-Type: application/json")
    assert (got.status, got.body) == (200, b'{"x":1}')
    assert provider.requests[0].target == path and other.requests == []
    assert provider.requests[0].body == (b'{"model":"gpt-test"}' if method == "POST" else b"")


def test_a_disabled_provider_and_one_that_does_not_serve_the_model_are_never_called(upstream, relay):
    disabled, narrow, other = upstream(answer()), upstream(answer()), upstream(answer())
    it = relay(
        {
            "anthropic1": {"upstream": disabled, "enabled": False},
            "anthropic2": {"upstream": narrow, "models": ["claude-a*"]},
            "anthropic3": other,
        }
    )
    for model, provider in (("claude-a", "anthropic2"), ("claude-b", "anthropic3")):
        assert it.post("/v1/messages", prompt(model)).get("x-monorelay-provider") == provider
    assert it.ask("GET", "/v1/files/f", None, ANTHROPIC_VERSION).status == 200
    assert disabled.requests == [] and not disabled.connections


def test_a_request_without_a_model_always_goes_to_the_first_key(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": {"upstream": provider, "keys": ["sk-a", "sk-b"], "key_strategy": "round-robin"}})
    for _ in range(3):
        it.ask("GET", "/v1/files/f1", None, ANTHROPIC_VERSION)
    assert [message.get("x-api-key") for message in provider.requests] == ["sk-a"] * 3


def test_response_comes_back_as_the_provider_sent_it(upstream, relay):
    headers = ["request-id: req_1", "retry-after: 7", "anthropic-ratelimit-unified-status: allowed",
               "X-Should-Retry: false",
               "x-many: 1", "X-Many: 2", "vary: x", "x-hop: gone", "connection: x-hop",
               "x-odd: caf\xe9"]  # fmt: skip
    provider = upstream(
        answer(418, b'\xff\x00 not JSON\r\n{"model":"claude-test"}', *headers, "set-cookie: session=secret",
               "Set-Cookie2: session=secret", "x-monorelay-request-id: theirs")
    )  # fmt: skip
    got = relay({"anthropic": provider}).post("/v1/messages", prompt())
    assert (got.status, got.start.split(" ", 2)[2]) == (418, "Whatever")
    assert got.body == b'\xff\x00 not JSON\r\n{"model":"claude-test"}'
    kept = [tuple(line.lower().split(": ")) for line in headers if "hop" not in line]
    assert [pair for pair in got.headers if pair in kept] == kept
    for name in ("set-cookie", "set-cookie2", "x-hop", "x-monorelay-error"):
        assert got.get(name) is None
    assert got.get("x-monorelay-request-id").startswith("req_"), "the relay's own, and not theirs"


@pytest.mark.parametrize("status", [400, 404, 408, 409, 413, 422, 501])
def test_an_error_about_the_request_comes_back_at_once_and_unchanged(upstream, relay, status):
    provider = upstream(answer(status, b'{"odd" : 1.0}', "location: /elsewhere"))
    it = relay({"anthropic": {"upstream": provider, "keys": ["sk-a"]}})
    got = it.post("/v1/messages", prompt())
    assert (got.status, got.body, got.get("x-monorelay-attempts")) == (status, b'{"odd" : 1.0}', "1")
    assert len(provider.requests) == 1


@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_without_a_body_leaves_the_connection_in_step(upstream, relay, status):
    provider = upstream(replies(b"HTTP/1.1 %d Nothing\r\nx-a: 1\r\n\r\n" % status, answer()))
    with relay({"anthropic": provider}).client() as client:
        assert [client.ask("DELETE", "/v1/files/f1", None, ANTHROPIC_VERSION).status for _ in range(2)] == [
            status,
            200,
        ]


@pytest.mark.parametrize("framing", ["chunked", "close", "http/1.0"])
def test_an_answer_of_any_framing_arrives_whole(upstream, relay, framing):
    body = os.urandom(300_000)
    raw = {"chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked(body[:7], body[7:]),
           "close": b"HTTP/1.1 200 OK\r\n\r\n" + body,
           "http/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + body}[framing]  # fmt: skip
    with relay({"anthropic": upstream(replies_then_closes(raw))}).client() as client:
        assert client.ask("POST", "/v1/messages", STREAMED).body == body
        assert client.ask("GET", "/health").status == 200


def test_gzip_that_nobody_asked_for_passes_with_its_true_name(upstream, relay):
    body = gzip.compress(b'{"id":"msg"}')
    got = relay({"anthropic": upstream(answer(200, body, "content-encoding: gzip"))}).post(
        "/v1/messages", prompt()
    )
    assert (got.get("content-encoding"), got.body) == ("gzip", body)


@pytest.mark.parametrize(
    ("url", "rewritten"), [("{upstream}/v1/messages/batches/b/results", True), ("https://evil.example/v1/x",
     False),
                           ("{upstream}.evil.example/v1/x", False), ("http://user@127.0.0.1/v1/x", False)]
)  # fmt: skip
def test_results_url_is_rewritten_only_where_it_points_at_the_provider(upstream, relay, url, rewritten):
    provider = upstream(lambda connection: (connection.read_request(), connection.send(answer(200, body))))
    url = url.format(upstream=provider.url)
    body = b'{"id" : "b","results_url" :"%s", "n":1.0}' % url.encode()
    it = relay({"anthropic": provider})
    got = it.ask("GET", "/v1/messages/batches/b", None, ANTHROPIC_VERSION, f"X-Forwarded-Host: {it.url}")
    if rewritten:
        found = got.json["results_url"]
        assert found.endswith("/v1/messages/batches/b/results") and provider.url not in found
        assert got.body == body.replace(url.encode(), found.encode())
    else:
        assert got.body == body


@pytest.mark.parametrize("spelled", [
    "http://127.0.0.1:9/v1/messages/batches/b", r"http:\u002f\u002f127.0.0.1:9\/v1/messages/batches/b",
    r"h\u0074tp://127.0.0.1:9/v1/messages/batches/b", r"\thttp://a@127.0.0.1:9/v1/messages/batches/b",
    "HTTP://127.0.0.1:9/v1/messages/batches/b?", "http://127.0.0.1:09/v1/messages/batches/b",
])  # fmt: skip
def test_results_url_is_rewritten_however_it_is_spelled(spelled):
    provider = parse({"anthropic": {"base_url": "http://127.0.0.1:9"}}).providers["anthropic"]
    for pieces in ([f'{{"results_url": "{spelled}"}}'.encode()], bytewise(f'{{"results_url": "{spelled}"}}'.encode())):
        it = monorelay.ResultsUrlRewriter(provider, "http://relay")
        told = json.loads(b"".join([*map(it.feed, pieces), it.flush()]))
        assert told == {"results_url": "http://relay/v1/messages/batches/b"}


def test_a_provider_opens_no_response_to_scripts_of_others(upstream, relay):
    provider = upstream(answer(200, b"{}", "Access-Control-Allow-Origin: *", "access-control-allow-credentials: true"))
    got = relay({"anthropic": provider}).ask("POST", "/v1/messages", STREAMED, "Origin: https://evil.example")
    assert got.status == 200 and b"access-control-allow" not in got.head.lower()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/files/f"])
def test_a_providers_redirect_is_a_502_and_its_location_reaches_nobody(upstream, relay, path, status):
    elsewhere = "http://elsewhere.example/v1/messages"
    provider = upstream(answer(status, b'{"moved":"%s"}' % elsewhere.encode(), f"location: {elsewhere}"))
    it = relay(both_formats(provider))
    got = it.ask("GET", path) if "files" in path else it.post(path, prompt())
    message = refused(got, 502, "api_error", openai_shape=path != "/v1/messages")
    assert got.get("x-monorelay-error") == "upstream_redirect" and "base_url" in message
    assert got.get("location") is None and b"elsewhere.example" not in got.head
    assert len(provider.requests) == 1


@pytest.mark.parametrize("raw", [answer(300), answer(302), b"HTTP/1.1 304 Not Modified\r\netag: x\r\n\r\n",
                                 b"HTTP/1.1 304 Not Modified\r\nlocation: /same\r\n\r\n"], ids=brief)  # fmt: skip
def test_a_3xx_that_leads_nowhere_passes(upstream, relay, raw):
    got = relay({"anthropic": upstream(raw)}).ask("GET", "/v1/files/f", None, ANTHROPIC_VERSION)
    assert got.status == int(raw[9:12]) and got.get("x-monorelay-error") is None


@pytest.mark.parametrize("status", [400, 403, 404, 422, 429])
@pytest.mark.parametrize("place", ["body", "header", "name", "reason", "far in the body", "chunks", "close"])
def test_an_answer_that_quotes_the_providers_key_is_a_502(upstream, relay, status, place):
    key = "sk-proj-very-secret-0123456789"
    told = b'{"error":{"message":"%sIncorrect API key provided: %s."}}' % (
        b"x" * (30_000 if place == "far in the body" else 0),
        b"another" if place in ("header", "name", "reason") else key.encode(),
    )  # fmt: skip
    if place in ("chunks", "close"):
        at = told.index(b"very")
        pieces = [told[:at], told[at:]]
        head = b"HTTP/1.1 %d Bad\r\ncontent-type: application/json\r\n" % status
        raw = head + (
            b"transfer-encoding: chunked\r\n\r\n" + chunked(*pieces) if place == "chunks" else b"\r\n" + told
        )
    else:
        raw = answer(status, told, *([f"x-debug: key {key}"] if place in ("header", "name") else []))
        raw = raw.replace(b"x-debug: key", key.encode() + b":") if place == "name" else raw
        raw = raw.replace(b"Whatever", key.encode()) if place == "reason" else raw
    provider = upstream(replies_then_closes(raw))
    got = relay({"anthropic": {"upstream": provider, "keys": [key]}}).post("/v1/messages", prompt())
    message = refused(got, 502, "api_error")
    assert got.get("x-monorelay-error") == "upstream_quoted_key" and "anthropic" in message
    assert b"very-secret" not in got.head + got.body


SLASHED_KEY = "ab/cd+ef=very-secret-0123456789"
SPELLINGS = {
    "as it is": SLASHED_KEY,
    "JSON, slash": SLASHED_KEY.replace("/", "\\/"),
    "JSON, number": SLASHED_KEY.replace("+", "\\u002B").replace("=", "\\u003d"),
    "HTML": SLASHED_KEY.replace("/", "&#x2F;").replace("+", "&#43;"),
    "URL": urllib.parse.quote(SLASHED_KEY, safe=""),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "given",
    [{"keys": [SLASHED_KEY]}, {"headers": {"api-key": SLASHED_KEY}}, {"headers": {"X-Auth-Token": SLASHED_KEY}},
     {"headers": {"Authorization": f"Bearer {SLASHED_KEY}"}}],
    ids=["key", "api-key", "token", "bearer"],
)  # fmt: skip
def test_an_answer_that_quotes_a_secret_in_another_spelling_is_a_502(upstream, relay, given, spelling):
    told = b'{"error":{"message":"Incorrect API key provided: %s"}}' % SPELLINGS[spelling].encode()
    it = relay({"anthropic": {"upstream": upstream(answer(403, told)), **given}})
    got = it.post("/v1/messages", prompt())
    refused(got, 502, "api_error")
    assert got.get("x-monorelay-error") == "upstream_quoted_key" and b"very-secret" not in got.head + got.body


TOLD = b'{"type":"error","error":{"type":"overloaded_error","message":"no credit for %s"}}' % SLASHED_KEY.encode()
QUOTING = {
    "a stream that begins with an error": STREAM_HEAD + chunk(b"event: error\ndata: %s\n\n" % TOLD),
    "a 300 that leads nowhere": answer(300, TOLD),
    "gzip": answer(403, gzip.compress(TOLD), "content-encoding: gzip"),
    "deflate": answer(403, zlib.compress(TOLD), "content-encoding: deflate"),
    "behind a number of 5000 digits": answer(403, b"&#%s; %s" % (b"1" * 5000, SPELLINGS["URL"].encode())),
    "behind 5000 zeros": answer(403, b"&#%s; %s" % (b"0" * 5000, SPELLINGS["URL"].encode())),
}


@pytest.mark.parametrize("place", QUOTING)
def test_an_error_that_quotes_the_key_where_few_would_look_is_a_502(upstream, relay, place):
    provider = upstream(replies_then_closes(QUOTING[place]))
    it = relay({"anthropic": {"upstream": provider, "keys": [SLASHED_KEY]}})
    got = it.post("/v1/messages", prompt(stream=True))
    refused(got, 502, "api_error")
    assert got.get("x-monorelay-error") == "upstream_quoted_key" and b"very-secret" not in got.head + got.body


def test_a_key_that_is_a_short_word_is_quoted_by_no_error(upstream, relay):
    """Local servers are given such ones: ollama, none, EMPTY."""
    told = b'{"error":{"message":"model not found, try: ollama pull llama3.3"}}'
    got = relay({"anthropic": {"upstream": upstream(answer(404, told)), "keys": ["ollama"]}}).post(
        "/v1/messages", prompt()
    )
    assert (got.status, got.body) == (404, told)


def test_an_error_in_the_midst_of_a_stream_goes_on_without_the_key(upstream, relay):
    pieces = [TOLD[:40], TOLD[40:]]
    stream = STREAM_HEAD + chunked(ANTHROPIC_EVENTS[0], b"event: error\ndata: " + pieces[0], pieces[1] + b"\n\n")
    it = relay({"anthropic": {"upstream": upstream(stream), "keys": [SLASHED_KEY]}})
    got = it.post("/v1/messages", prompt(stream=True))
    erased = TOLD.replace(SLASHED_KEY.encode(), b"*" * len(SLASHED_KEY))
    assert got.body == ANTHROPIC_EVENTS[0] + b"event: error\ndata: %s\n\n" % erased


@pytest.mark.parametrize(("path", "model"), [("/v1/messages", "claude-a"), ("/v1/chat/completions", "claude-a")])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_200_goes_on_without_the_key(upstream, relay, path, model, stream):
    key = b"sk-proj-very-secret-0123456789"
    content = [{"type": "text", "text": f"your key is {key.decode()}"}]
    said = json.dumps({**MESSAGE, "content": content, "stop_reason": "end_turn"}).encode()
    delta = sse("content_block_delta", index=0, delta={"type": "text_delta", "text": f" {key.decode()}"})
    events = b"".join([*ANTHROPIC_EVENTS[:2], delta, *ANTHROPIC_EVENTS[2:]])
    sent = answer(200, said, "x-debug: Bearer " + key.decode(), "x-kept: 1")
    sent = STREAM_HEAD + chunked(events) if stream else sent
    it = relay({"anthropic": {"upstream": upstream(sent), "keys": [key.decode()]}})
    got = it.post(path, prompt(model, stream=stream))
    assert got.status == 200 and key not in got.head + got.body and b"***" in got.body
    assert stream or path != "/v1/messages" or (got.get("x-kept"), len(got.body)) == ("1", len(said))


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize("status", [200, 400])
def test_a_key_far_behind_the_beginning_of_a_response_is_erased(upstream, relay, status, framing, version):
    head_read, part_read = threading.Event(), threading.Event()
    key = b"sk-proj-very-secret-0123456789"
    parts = [b"x" * 70_000, b"y" * 1000 + key[:13], key[13:] + b"z" * 100]
    lines = {"length": b"content-length: %d\r\n" % sum(map(len, parts)),
             "chunked": b"transfer-encoding: chunked\r\n", "close": b""}  # fmt: skip
    frame, end = (chunk, b"0\r\n\r\n") if framing == "chunked" else (bytes, b"")

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 %d Told\r\ncontent-type: text/plain\r\n" % status, lines[framing], b"\r\n")
        connection.send(frame(parts[0]))
        connection.wait(head_read)
        connection.send(frame(parts[1]))
        connection.wait(part_read)
        connection.send(frame(parts[2]), end)

    it = relay({"anthropic": {"upstream": upstream(script), "keys": [key.decode()]}})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED).replace(b"HTTP/1.1", version.encode()))
        head = client.until(b"\r\n\r\n")
        head_read.set()
        while b"y" not in client.buffer:
            assert client.fill()
        part_read.set()
        client.buffer[:0] = head
        got = client.answer()
    assert got.status == status and got.body == b"".join(parts).replace(key, b"*" * len(key))


@pytest.mark.parametrize("text", [b"abab", b"aababab", b"xabaabab", b"ababababab", b"aba", b"aab*abab", b""], ids=brief)
def test_a_key_is_erased_wherever_the_text_is_split(text):
    for cuts in itertools.product([False, True], repeat=max(0, len(text) - 1)):
        edges = [0, *(place for place, cut in enumerate(cuts, 1) if cut), len(text)]
        eraser = monorelay.KeyEraser(b"abab")
        passed = [eraser.feed(text[start:end], is_last=False) for start, end in zip(edges, edges[1:])]
        passed.append(eraser.feed(b"", is_last=True))
        assert b"".join(passed) == text.replace(b"abab", b"****"), edges


def test_only_what_may_begin_the_key_is_held_back():
    eraser = monorelay.KeyEraser(b"sk-secret")
    parts = {b"a: s\n": b"a: s\n", b"is": b"i", b" it sk-sec": b"s it ", b"ond": b"sk-second", b"sk": b""}
    for part, passed in parts.items():
        assert eraser.feed(part, is_last=False) == passed
    assert eraser.feed(b"", is_last=True) == b"sk"
    assert monorelay.KeyEraser(b"").feed(b"all", is_last=False) == b"all"


def test_the_code_of_a_401_is_not_told_when_it_is_the_key(upstream, relay):
    told = b'{"error":{"code":"sk\\u002danthropic\\u002dsecret"}}'
    got = relay({"anthropic": upstream(answer(401, told))}).post("/v1/messages", prompt())
    assert "secret" not in refused(got, 502, "api_error")


@pytest.mark.parametrize(
    ("text", "plain"),
    [("a\\/b", "a/b"), ("\\u002B\\u002b\\u003D", "++="), ("&#43;&#x2f;&amp;&equals;", "+/&="), ("%2B%2f%3D", "+/="),
     ("\\u0026#43;", "+"), ("&#37;2B", "+"), ("plain + 100 % & \\u12", "plain + 100 % & \\u12"), ("", "")],
    ids=brief,
)  # fmt: skip
def test_a_text_is_unescaped_as_json_html_and_urls_escape(text, plain):
    assert monorelay.unescaped(text) == plain


def test_an_error_that_quotes_no_key_comes_back_as_it_is(upstream, relay):
    body = b'{"error":"' + b"x" * 200_000 + b'"}'
    provider = upstream(
        replies(answer(400, body), answer(404, b"sk-anthropic-secre"), answer(200, b'"sk-anthropic-secret"'))
    )
    it = relay({"anthropic": provider})
    got = [it.post("/v1/messages", prompt()) for _ in range(3)]
    assert [(one.status, one.body) for one in got[:2]] == [(400, body), (404, b"sk-anthropic-secre")]
    assert got[2].status == 200, "an answer may be about keys"


# ------------------------------------------------------------------------------------------------------------
# Relay: failing over
# ------------------------------------------------------------------------------------------------------------

KEYS = [{"key": "sk-a", "label": "label-a"}, {"key": "sk-b", "label": "label-b"}]


def two_keys(provider: Upstream | dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"upstream": provider, "keys": KEYS, "key_strategy": "fill-first", **more}


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 504, 529])
def test_failover_tries_the_next_key_then_the_next_target(upstream, relay, status):
    first, second = upstream(answer(status)), upstream(message_answer(HI))
    it = relay(
        {"anthropic": two_keys(first), "anthropic2": second}, aliases={"a": ["x@anthropic", "y@anthropic2"]}
    )
    got = it.post("/v1/messages", prompt("a"))
    assert (got.status, got.json["id"]) == (200, "msg_1")
    assert (
        got.get("x-monorelay-attempts"),
        got.get("x-monorelay-provider"),
        got.get("x-monorelay-model"),
    ) == ("3", "anthropic2", "y")
    assert [(message.get("x-api-key"), message.json["model"]) for message in first.requests] == [
        ("sk-a", "x"),
        ("sk-b", "x"),
    ]
    assert len(second.requests) == 1


@pytest.mark.parametrize("status", [301, 307])
def test_a_redirect_ends_no_cooling(upstream, relay, status):
    moved = answer(status, b"{}", "location: http://elsewhere.example/")
    # sk-a rests for 30 seconds, sk-b for one, and what sk-a gets as the last resort changes nothing.
    answers = {"sk-a": iter([answer(429), moved]), "sk-b": iter([answer(), answer(529), answer()])}

    def script(connection: Connection) -> None:
        while asked := connection.read_request():
            connection.send(next(answers[asked.get("x-api-key")], answer(500)))

    provider = upstream(script)
    it = relay({"anthropic": two_keys(provider)})
    assert [it.post("/v1/messages", prompt()).status for _ in range(3)] == [200, 502, 200]
    assert [asked.get("x-api-key")[3:] for asked in provider.requests] == ["a", "b", "b", "a", "b"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_an_account_keeps_is_asked_for_with_each_key(upstream, relay, method):
    first, second = upstream(answer(404, b'{"n": 1}')), upstream(replies(answer(404, b'{"n": 2}'), answer()))
    it = relay({"a": {"upstream": first, "format": "openai", "keys": ["sk-a"]},
                "b": {"upstream": second, "format": "openai", "keys": ["sk-b", "sk-c"]}})  # fmt: skip
    assert it.ask(method, "/v1/responses/resp_1", None).status == 200
    assert [sent.get("authorization") for sent in first.requests + second.requests] == [
        "Bearer sk-a", "Bearer sk-b", "Bearer sk-c"
    ]  # fmt: skip
    second.requests.clear()
    assert it.ask(method, "/v1/files/file_1", None).status == 404 and not second.requests, "files are the first's"
    assert it.ask("POST", "/v1/responses/resp_1/cancel", b"").status == 404 and not second.requests


@pytest.mark.parametrize(
    ("statuses", "told"),
    [((500, 404), 500), ((404, 429, 404), 429), ((404, 403), 404), ((403, 404), 404), ((404, 404), 404)],
    ids=brief,
)
def test_what_no_key_knows_is_a_404_only_if_each_has_answered(upstream, relay, statuses, told):
    providers = {f"p{n}": {"upstream": upstream(answer(status, b'{"n": %d}' % n)), "format": "openai", "keys": ["k"]}
                 for n, status in enumerate(statuses)}  # fmt: skip
    got = relay(providers).ask("GET", "/v1/responses/resp_1", None)
    assert got.status == told and statuses[got.json["n"]] == told


@pytest.mark.parametrize("status", [403, 429, 500, 503, 529])
def test_when_everything_fails_the_last_answer_comes_back_unchanged(upstream, relay, status):
    answers = [answer(status, b'{"n": %d}' % n, f"request-id: req_{n}", "retry-after: 9") for n in range(3)]
    provider = upstream(replies(*answers))
    got = relay({"anthropic": two_keys(provider)}).post("/v1/messages", prompt())
    assert (got.status, got.body, got.get("request-id"), got.get("retry-after")) == (
        status,
        b'{"n": 1}',
        "req_1",
        "9",
    )
    assert (got.get("x-monorelay-attempts"), got.get("x-monorelay-error")) == ("2", None)


def test_a_refused_key_is_the_relays_fault_and_not_the_clients(upstream, relay):
    provider = upstream(answer(401, b'{"error":"invalid x-api-key sk-a"}'))
    it = relay({"anthropic": two_keys(provider)})
    message = refused(it.post("/v1/messages", prompt()), 502, "api_error")
    assert "anthropic" in message and "label-b" in message and "sk-" not in message
    it.logged("warning", "label-a")
    message = refused(it.ask("GET", "/v1/files/f", None, ANTHROPIC_VERSION), 502, "api_error")
    assert "label-a" in message and len(provider.requests) == 3


CREDIT = b'{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to ..."}}'


@pytest.mark.parametrize(
    "failure",
    [*((status, b"{}") for status in (402, 520, 521, 522, 523, 524, 530)), (400, CREDIT)], ids=brief)  # fmt: skip
def test_what_another_key_may_cure_is_tried_with_it(upstream, relay, failure):
    provider = upstream(replies(answer(*failure), answer()))
    it = relay({"anthropic": two_keys(provider)})
    assert [it.post("/v1/messages", prompt()).status for _ in range(2)] == [200, 200]
    assert [message.get("x-api-key") for message in provider.requests] == ["sk-a", "sk-b", "sk-b"]
    it.logged("tried=anthropic/label-a:", "402" if failure[1] is CREDIT else str(failure[0]))


@pytest.mark.parametrize("message", [
    "your credit balance is too low: Extra inputs are not permitted",
    'your credit balance is too low": Extra inputs are not permitted',
    "Unrecognized request argument supplied: your credit balance is too low",
    'messages.0.content: "message":"your credit balance is too low" is no content',
])  # fmt: skip
def test_an_error_that_quotes_a_client_takes_no_key_for_one_without_credit(upstream, relay, message):
    body = json.dumps({"error": {"type": "invalid_request_error", "message": message}}).encode()
    provider = upstream(answer(400, body))
    it = relay({"anthropic": two_keys(provider)})
    assert it.post("/v1/messages", prompt()).body == body
    assert len(provider.requests) == 1 and "comes last" not in it.log.getvalue()


def test_an_account_without_credit_is_told_as_the_provider_told_it(upstream, relay):
    got = relay({"anthropic": two_keys(upstream(answer(400, CREDIT)))}).post("/v1/messages", prompt())
    assert (got.status, got.body) == (400, CREDIT)


@pytest.mark.parametrize("lasting", [401, 402, 403])
def test_of_several_failures_the_client_gets_one_that_a_later_try_may_cure(upstream, relay, lasting):
    provider = upstream(replies(answer(429, b'{"n": 0}', "retry-after: 9"), answer(lasting, b'{"n": 1}')))
    got = relay({"anthropic": two_keys(provider)}).post("/v1/messages", prompt())
    assert (got.status, got.body, got.get("retry-after")) == (429, b'{"n": 0}', "9")


LATER_ERROR = b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error","message":"x"}}\n\n'


@pytest.mark.parametrize("later", [b"", LATER_ERROR], ids=["cut", "error event"])
def test_a_stream_that_fails_in_its_midst_sends_the_next_try_elsewhere(upstream, relay, later):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    first, second = upstream(replies_then_closes(head, ANTHROPIC_EVENTS[0], later)), upstream(answer())
    providers = {"a": {"upstream": first, "format": "anthropic"}, "b": {"upstream": second, "format": "anthropic"}}
    it = relay(providers, routes={"*": ["a", "b"]})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED, "connection: close"))
        assert b"x-monorelay-provider: a\r\n" in client.rest()
    assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "b"
    assert len(first.requests) == 1


@pytest.mark.parametrize(
    ("path", "events", "error"),
    [
        ("/v1/messages", [ANTHROPIC_EVENTS[0], LATER_ERROR], "upstream:overloaded_error"),
        ("/v1/messages", [ANTHROPIC_EVENTS[0], *LATER_ERROR.splitlines(True)], "upstream:overloaded_error"),
        ("/v1/messages", [LATER_ERROR], "upstream:overloaded_error"),
        ("/v1/chat/completions", [b'data: {"error":{"type":"server_error"}}\n\n'], "upstream:server_error"),
        ("/v1/chat/completions", [b'data: {"id":1}\n\n', b'data: {"error":"x"}\n\n'], "upstream:error"),
    ],
    ids=["whole", "in pieces", "at once", "chat", "untyped"],
)  # fmt: skip
def test_an_error_in_a_stream_is_told_in_the_log_and_counted(upstream, relay, path, events, error):
    provider = upstream(STREAM_HEAD + chunked(*events))
    it = relay({"openai" if "chat" in path else "anthropic": provider})
    assert it.post(path, prompt("gpt-test" if "chat" in path else "claude-test", stream=True)).body == b"".join(events)
    assert f"error={error}" in it.logged("status=200")
    row = it.ask("GET", "/api/requests").json["rows"][0]
    assert (row["error"], row["complete"]) == (error, 1)
    assert it.ask("GET", "/api/usage").json["total"]["errors"] == 1


def test_what_begins_to_cool_and_what_recovers_is_one_warning_each(upstream, relay):
    provider = upstream(replies(answer(529), answer(529), answer(), answer()))
    it = relay({"anthropic": {"upstream": provider, "keys": ["sk-a"]}})
    assert [it.post("/v1/messages", prompt()).status for _ in range(4)] == [529, 529, 200, 200]
    it.logged("warning", "the provider anthropic, key key1, model", "comes last for 1 s: 529")
    it.logged("warning", "recovered")


def test_what_fails_without_a_model_says_nothing_of_the_whole_key(upstream, relay):
    it = relay({"openai": {"upstream": upstream(answer(500)), "keys": ["sk-a"]}})
    assert it.ask("GET", "/v1/responses/resp_1").status == 500
    it.logged("warning", "the provider openai, key key1, any request without a model comes last for 1 s: 500")
    assert 'monorelay_key_cooling{provider="openai",key="key1"} 0\n' in it.ask("GET", "/metrics").body.decode()


@pytest.mark.parametrize("format", ["anthropic", "openai"])
def test_a_lone_key_that_cools_answers_as_the_provider_would(upstream, relay, format):
    provider = upstream(replies(answer(429, b"{}", "retry-after: 60"), answer(529), answer(200, b'{"ok":1}')))
    it = relay({format: {"upstream": provider, "keys": ["k"]}})
    path = "/v1/messages" if format == "anthropic" else "/v1/chat/completions"
    assert [it.post(path, prompt()).status for _ in range(4)] == [429, 529, 200, 200]


def test_retry_after_keeps_later_requests_off_the_key(upstream, relay):
    provider = upstream(replies(answer(429, b"{}", "retry-after: 60"), answer()))
    it = relay({"anthropic": two_keys(provider)})
    assert [it.post("/v1/messages", prompt()).get("x-monorelay-attempts") for _ in range(3)] == [
        "2",
        "1",
        "1",
    ]
    assert [message.get("x-api-key") for message in provider.requests] == ["sk-a", "sk-b", "sk-b", "sk-b"]


def test_a_bad_request_of_one_client_leaves_the_keys_to_the_others(upstream, relay):
    provider = upstream(replies(answer(400), answer(413), answer(404), answer(422), answer()))
    it = relay({"anthropic": two_keys(provider)})
    assert [it.post("/v1/messages", prompt()).status for _ in range(5)] == [400, 413, 404, 422, 200]
    assert {message.get("x-api-key") for message in provider.requests} == {"sk-a"}


SESSIONS = {
    "the session header": lambda n: (prompt(), f"x-claude-code-session-id: session-{n}", TOKEN),
    "metadata.user_id": lambda n: (prompt(metadata={"user_id": f"user-{n}"}), "x-a: 1", TOKEN),
    "Codex's header": lambda n: (prompt(), f"session-id: session-{n}", TOKEN),
    "opencode's header": lambda n: (prompt(), f"x-session-affinity: session-{n}", TOKEN),
    "prompt_cache_key": lambda n: (prompt(prompt_cache_key=f"key-{n}"), "x-a: 1", TOKEN),
    "prompt_cache_key in a long body": lambda n: (
        prompt(prompt_cache_key=f"key-{n}", padding="x" * 300_000), "x-a: 1", TOKEN
    ),
    "the caller": lambda n: (prompt(), "x-a: 1", jwt.encode(claims(sub=f"caller-{n}"), JWT_SECRET, "HS256")),
}


@pytest.mark.parametrize("known_by", SESSIONS)
def test_a_session_stays_on_its_key(upstream, relay, known_by):
    provider = upstream(answer())
    it = relay(
        {"anthropic": {"upstream": provider, "keys": ["sk-a", "sk-b"]}}, server={"jwt_secret": JWT_SECRET}
    )
    keys: dict[int, set[str]] = {}
    for n in list(range(12)) * 2:
        body, header, token = SESSIONS[known_by](n)
        it.post("/v1/messages", body, header, token=token)
        keys.setdefault(n, set()).add(provider.requests[-1].get("x-api-key"))
    assert all(len(seen) == 1 for seen in keys.values()) and len(set(map(min, keys.values()))) == 2


BREAKS: dict[str, Script] = {
    "closes at once": lambda connection: connection.close(),
    "resets at once": lambda connection: connection.reset(),
    "closes before the answer": lambda connection: (connection.read_request(), connection.close()),
    "resets before the answer": lambda connection: (connection.read_request(), connection.reset()),
    "closes within the head": lambda connection: (connection.read_request(),
    connection.send(b"HTTP/1.1 200 OK\r\nx-a"), connection.close()),
    "resets within the head": lambda connection: (connection.read_request(), connection.send(b"HTTP/1.1 2"),
    connection.reset()),
}  # fmt: skip
GARBAGE = {
    "status line": b"ICY 200 OK\r\n\r\n",
    "no status": b"\x16\x03\x01 garbage\r\n\r\n",
    "head of a megabyte": b"HTTP/1.1 200 OK\r\nx-a: " + b"a" * (1 << 20) + b"\r\n\r\n",
    "length abc": b"HTTP/1.1 200 OK\r\ncontent-length: abc\r\n\r\n",
    "length +3": b"HTTP/1.1 200 OK\r\ncontent-length: +3\r\n\r\nabc",
    "lengths that differ": b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\nabcd",
    "length and coding": STREAM_HEAD[:-2] + b"content-length: 3\r\n\r\n0\r\n\r\n",
    "coding unknown": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "header without a colon": b"HTTP/1.1 200 OK\r\nnonsense\r\n\r\n",
    "header split": b"HTTP/1.1 200 OK\r\nx-a: b\rset-cookie: c\r\ncontent-length: 0\r\n\r\n",
    "interim for ever": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 21 + answer(),
    "switching protocols": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n",
}


@pytest.mark.parametrize("fault", [*BREAKS, *GARBAGE, "refuses"])
def test_a_provider_that_breaks_is_a_502_or_the_next_ones_turn(upstream, relay, fault):
    script = BREAKS.get(fault) or replies_then_closes(GARBAGE.get(fault, b""))
    broken = upstream(script)
    if fault == "refuses":
        broken.stop()
    got = relay({"anthropic": broken}).post("/v1/messages", prompt())
    message = refused(got, 502, "api_error")
    assert "anthropic" in message and "secret" not in message
    it = relay({"anthropic": broken, "anthropic2": upstream(message_answer(HI))})
    if fault not in GARBAGE:
        got = it.post("/v1/messages", prompt())
        assert (got.status, got.get("x-monorelay-provider"), got.get("x-monorelay-attempts")) == (
            200,
            "anthropic2",
            "2",
        )


def test_interim_answers_are_skipped(upstream, relay):
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
    got = relay({"anthropic": upstream(interim * 10 + message_answer(HI))}).post("/v1/messages", prompt())
    assert (got.status, got.json["id"], got.get("link")) == (200, "msg_1", None)


def test_a_request_that_broke_after_it_was_sent_is_tried_elsewhere_only_once(upstream, relay):
    broken, third = [upstream(BREAKS["closes before the answer"]) for _ in range(2)], upstream(answer())
    it = relay({"anthropic1": broken[0], "anthropic2": broken[1], "anthropic3": third})
    refused(it.post("/v1/messages", prompt()), 502, "api_error")
    assert [len(one.requests) for one in (*broken, third)] == [1, 1, 0]


def test_a_silent_provider_is_a_504_and_is_not_asked_again(upstream, relay):
    provider, other = upstream(silence), upstream(answer())
    it = relay({"anthropic": two_keys(provider, timeout=0.2), "anthropic2": other})
    refused(it.post("/v1/messages", prompt()), 504, "timeout_error")
    assert (len(provider.requests), other.requests) == (1, [])
    assert eventually(lambda: provider.left)


def test_a_provider_that_falls_silent_within_a_stream_ends_it_in_an_error(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, *map(chunk, ANTHROPIC_EVENTS[:3]))
        connection.wait(gate)

    clock, begun = Clock(), b"".join(ANTHROPIC_EVENTS[:3])
    with relay({"anthropic": {"upstream": upstream(script), "timeout": 60}}, clock).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        received = client.until(ANTHROPIC_EVENTS[2])
        clock.move(59.0)
        assert client.is_quiet()
        client.buffer[:0] = received
        clock.move(1.0)
        assert_died(client, after=begun)
    gate.set()


def test_a_connect_timeout_moves_on(upstream, relay):
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # Two connections nobody accepts fill the queue: the next one waits for ever.
        for _ in range(2):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        blocked = {"base_url": f"http://127.0.0.1:{full.getsockname()[1]}", "connect_timeout": 0.2}
        it = relay({"anthropic": blocked, "anthropic2": upstream(answer())})
        assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "anthropic2"
        refused(relay({"anthropic": blocked}).post("/v1/messages", prompt()), 502, "api_error")


@pytest.mark.parametrize(
    "fault", ["closes before the answer", "resets within the head", 429, 500, 529, "stale"]
)
@pytest.mark.parametrize("path", ["/v1/messages/batches", "/v1/files"])
def test_a_batch_or_a_file_is_never_sent_twice(upstream, relay, path, fault):
    def script(connection: Connection) -> None:
        if fault == "stale" and connection.read_request().target != path:
            connection.send(answer())
            connection.read_request()
        elif isinstance(fault, int):
            replies(answer(fault))(connection)
        elif fault != "stale":
            BREAKS[fault](connection)

    provider = upstream(script)
    it = relay({"anthropic": two_keys(provider), "anthropic2": upstream(answer())})
    if fault == "stale":
        assert it.post("/v1/messages", prompt()).status == 200
    got = it.post(path, {"requests": []}, ANTHROPIC_VERSION)
    assert got.status == (fault if isinstance(fault, int) else 502)
    assert sum(message.target == path for message in provider.requests) == 1


def test_a_stream_that_opens_with_an_error_moves_on(upstream, relay):
    first = upstream(replies(STREAM_HEAD + chunked(OVERLOADED)))
    it = relay({"anthropic": first, "anthropic2": upstream(ANTHROPIC_STREAM)})
    got = it.post("/v1/messages", STREAMED)
    assert (got.body, got.get("x-monorelay-attempts"), len(first.requests)) == (
        b"".join(ANTHROPIC_EVENTS),
        "2",
        1,
    )


def test_a_stream_that_opens_with_an_error_comes_back_unchanged_when_nothing_is_left(upstream, relay):
    got = relay({"anthropic": two_keys(upstream(STREAM_HEAD + chunked(OVERLOADED)))}).post(
        "/v1/messages", STREAMED
    )
    assert (got.status, got.body, got.get("x-monorelay-attempts")) == (200, OVERLOADED, "2")


def test_failover_stops_once_a_byte_reached_the_client(upstream, relay):
    provider = upstream(
        replies_then_closes(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]), chunk(OVERLOADED), b"0\r\n\r\n")
    )
    other = upstream(ANTHROPIC_STREAM)
    got = relay({"anthropic": provider, "anthropic2": other}).post("/v1/messages", STREAMED)
    assert (got.body, other.requests) == (ANTHROPIC_EVENTS[0] + OVERLOADED, [])


def test_a_held_answer_that_came_to_its_end_meanwhile_is_delivered_whole(upstream, relay):
    held = threading.Event()

    def refuses(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 429 Slow down\r\ncontent-type: application/json\r\n\r\n")
        held.set()
        connection.send(b'{"error":"wait"}')

    def breaks(connection: Connection) -> None:
        connection.wait(held)
        # Until the relay has seen both the body and the end of the answer that it holds.
        eventually(lambda: not first.connections[0].sock.fileno() > 0)
        connection.read_request()

    first, second = upstream(refuses), upstream(breaks)
    it = relay({"anthropic": first, "anthropic2": second}, routes={"claude-*": ["anthropic", "anthropic2"]})
    with it.client() as client:
        got = client.ask("POST", "/v1/messages", STREAMED)
    assert (got.status, got.body) == (429, b'{"error":"wait"}')


@pytest.mark.parametrize("path", ["/v1/files", "/v1/messages"])
@pytest.mark.parametrize("end", ["close", "reset"])
def test_an_upload_that_its_client_does_not_finish_cools_nothing(upstream, relay, path, end):
    def drops(connection: Connection) -> None:
        if b"content-length: 100000" in connection.until(b"\r\n\r\n").lower():
            connection.take(1)
            connection.upstream.called.set()
            return getattr(connection, end)()
        connection.rest()

    provider, other = upstream(drops), upstream(answer())
    it = relay({"anthropic": provider, "anthropic2": other})
    with it.client() as client:
        # A file streams through; a message that is dropped on its way never left this relay.
        client.send(request("POST", path, b"{", ANTHROPIC_VERSION, "Content-Length: 100000"))
        if path == "/v1/files":
            assert provider.called.wait(TIMEOUT_SECONDS)
            refused(client.answer(), 502, "api_error")
    provider.script = replies(answer())
    assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "anthropic"


@pytest.mark.parametrize("name", ["OpenAI-Organization", "openai-project"])
def test_a_401_about_the_clients_own_organization_cools_nothing(upstream, relay, name):
    def script(connection: Connection) -> None:
        while True:
            asked = connection.read_request()
            wrong = b'{"error":{"code":"mismatched_organization"}}'
            connection.send(answer(401, wrong) if asked.get(name.lower()) == "bogus" else answer())

    provider = upstream(script)
    it = relay({"openai": two_keys(provider), "openai2": upstream(answer(503))})
    it.post("/v1/chat/completions", chat(), f"{name}: bogus")
    tried = len(provider.requests)
    for _ in range(3):
        got = it.post("/v1/chat/completions", chat())
        assert (got.status, got.get("x-monorelay-provider"), got.get("x-monorelay-attempts")) == (200, "openai", "1")
    assert {message.get("authorization") for message in provider.requests[tried:]} == {"Bearer sk-a"}


@pytest.mark.parametrize("query", ["?api-key=bogus", "?subscription-Key=bogus", "?%6Bey=bogus"])
def test_a_401_about_a_key_in_the_clients_query_cools_nothing(upstream, relay, query):
    it = relay({"openai": two_keys(upstream(answer(401)))})
    refused(it.post(f"/v1/chat/completions{query}", chat()), 502, "api_error", openai_shape=True)
    assert "comes last" not in it.log.getvalue()


CORS_REFUSED = "CORS requests must set 'anthropic-dangerous-direct-browser-access' header"
AFFORDS = "This request requires more credits, or fewer max_tokens. You requested up to 64000, but can only afford"
TOO_LARGE = "Request too large for gpt-4o in organization org-x on tokens per min (TPM): Limit 30000, Requested 45007."
MODERATED = "claude-x requires moderation on Anthropic. Your input was flagged for \"violence\"."
# What providers say with the status of an error that is about the key, and whether it is about the request.
ABOUT_KEY_OR_REQUEST = [
    (401, CORS_REFUSED, True), (401, "invalid x-api-key", False), (401, "no content_policy for this key", False),
    (402, f"{AFFORDS} 1234. To increase, visit", True), (402, f"{AFFORDS} 0. To increase, visit", False),
    (402, "Prompt tokens limit exceeded: 64128 > 6964.", True), (402, "Insufficient Balance", False),
    (403, MODERATED, True), (403, "Content violates usage guidelines. Failed check: SAFETY_CHECK_TYPE_BIO", True),
    (403, "Your organization has no access to this model", False),
    (429, TOO_LARGE, True), (429, "Extra usage is required for long context requests.", True),
    (429, "Rate limit reached for gpt-4o in organization org-x", False), (429, "429 Resource Unavailable", True),
]  # fmt: skip


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
@pytest.mark.parametrize(("status", "message", "is_own"), ABOUT_KEY_OR_REQUEST)
def test_an_error_that_only_its_words_tell_to_be_the_requests_is_tried_elsewhere_and_cools_nothing(
    upstream, relay, path, status, message, is_own
):
    provider = upstream(json_reply({"error": {"type": "invalid_request_error", "message": message}}, status))
    it = relay({"openai": two_keys(provider)})
    got = it.post(path, prompt("gpt-test", max_tokens=64_000))
    refuses_key = status == 401 and not (is_own and path == "/v1/chat/completions")
    assert (got.status, len(provider.requests)) == (502 if refuses_key else status, 2)
    assert refuses_key or message in str(got.json["error"])
    it.logged("status=")  # behind all that it warns of
    assert ("comes last" in it.log.getvalue()) == (not is_own)


@pytest.mark.parametrize(
    ("status", "left", "is_of_fast_mode"),
    [(429, ("0", "900"), True), (429, ("900", "0"), True), (429, ("900", "900"), False), (529, ("900", "900"), True)],
)
def test_fast_mode_without_room_cools_nothing_for_requests_of_the_usual_speed(
    upstream, relay, status, left, is_of_fast_mode
):
    fields = [f"anthropic-fast-{kind}-tokens-remaining: {count}" for kind, count in zip(("input", "output"), left)]
    provider = upstream(answer(status, b"{}", *fields, "retry-after: 600"))
    it = relay({"anthropic": two_keys(provider)})
    got = it.post("/v1/messages", prompt(speed="fast"))
    assert (got.status, len(provider.requests)) == (status, 2)
    assert got.get("anthropic-fast-input-tokens-remaining") == left[0]
    it.logged("status=")
    assert ("comes last" in it.log.getvalue()) == (not is_of_fast_mode)


@pytest.mark.parametrize("status", [403, 429, 500, 529])
def test_what_a_request_about_a_model_meets_says_nothing_of_its_work(upstream, relay, status):
    """Anthropic's limits for counting are apart, and a restricted key of OpenAI's may not read models."""

    def script(connection: Connection) -> None:
        while asked := connection.read_request():
            aside = "count_tokens" in asked.target or "/models" in asked.target
            connection.send(answer(status if aside else 200, b"{}", "retry-after: 600"))

    provider, other = upstream(script), upstream(message_answer(HI))
    it = relay({"anthropic": provider, "anthropic2": other}, routes={"claude-*": ["anthropic", "anthropic2"]})
    for method, path, body in (
        ("POST", "/v1/messages/count_tokens", prompt()),
        ("GET", "/v1/models/claude-test", None),
    ):
        it.ask(method, path, body and json.dumps(body).encode(), ANTHROPIC_VERSION)
        assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "anthropic"
    assert "comes last" not in it.log.getvalue()


@pytest.mark.timed
def test_errors_are_judged_in_milliseconds():
    for words in (b"c", b"p", b"can only afford ", b"prompt tokens ", b"content_"):
        told = words * (monorelay.PEEKED_BYTES // len(words))
        assert seconds_each(lambda told=told: monorelay.is_about_request(429, told), 3) < 0.02


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("model", ["gpt-test", "gpt-other"])
def test_a_refusal_on_a_path_of_which_nothing_is_known_rests_the_key_for_no_other_request(
    upstream, relay, model, status
):
    def script(connection: Connection) -> None:
        while asked := connection.read_request():
            connection.send(answer(status if "organization" in asked.target else 200))

    provider = upstream(script)
    it = relay({"openai": two_keys(provider), "openai2": upstream(answer())})
    it.post("/v1/organization/admin_api_keys", chat("gpt-test"), "Content-Type: application/json")
    got = it.post("/v1/chat/completions", chat(model))
    assert (got.get("x-monorelay-provider"), got.get("x-monorelay-attempts")) == ("openai", "1")
    assert provider.requests[-1].get("authorization") == "Bearer sk-a"


def test_a_provider_that_breaks_off_cools_that_key_with_that_model_only(upstream, relay):
    def script(connection: Connection) -> None:
        while connection.read_request().json["model"] != "bad" or len(provider.requests) > 1:
            connection.send(answer())

    provider, other = upstream(script), upstream(answer())
    it = relay({"anthropic": two_keys(provider), "anthropic2": other})
    for model in ("bad", "good", "bad"):
        assert it.post("/v1/messages", prompt(model)).status == 200
    assert [(message.json["model"], message.get("x-api-key")) for message in provider.requests] == [
        ("bad", "sk-a"), ("bad", "sk-b"), ("good", "sk-a"), ("bad", "sk-b"),
    ]  # fmt: skip
    assert not other.requests


def test_a_429_for_one_model_leaves_the_key_to_the_others_and_is_heeded_until_its_time(upstream, relay):
    def script(connection: Connection) -> None:
        while True:
            asked = connection.read_request()
            is_limited = (
                asked.method == "POST" and asked.json["model"] == "busy" and asked.get("x-api-key") == "sk-a"
            )
            connection.send(answer(429, b"{}", "retry-after: 3600") if is_limited else answer())

    provider = upstream(script)
    it = relay({"anthropic": two_keys(provider)})

    def keys(model: str) -> list[str | None]:
        seen = len(provider.requests)
        assert it.post("/v1/messages", prompt(model)).status == 200
        return [message.get("x-api-key") for message in provider.requests[seen:]]

    assert keys("busy") == ["sk-a", "sk-b"]
    assert keys("other") == ["sk-a"] and keys("busy") == ["sk-b"]
    assert it.ask("GET", "/v1/files/f", None, ANTHROPIC_VERSION).status == 200
    assert provider.requests[-1].get("x-api-key") == "sk-a"
    assert keys("busy") == ["sk-b"], "neither another model nor a file ends what this one was told"


# ------------------------------------------------------------------------------------------------------------
# Translation, as clients see it
# ------------------------------------------------------------------------------------------------------------


def json_reply(document: Any, status: int = 200, *headers: str) -> bytes:
    return answer(status, json.dumps(document).encode(), *headers)


def sse_reply(data: bytes) -> bytes:
    return STREAM_HEAD + chunked(data)


CHAT_HI = completion(content="Hi")
ANTHROPIC_HI = {**MESSAGE, "content": [said("Hi")], "stop_reason": "end_turn"}
CHAT_HI_STREAM = sse_reply(sse_of([delta(content="H"), delta(content="i"), delta("stop", USAGE)]))


def test_a_message_is_asked_of_a_provider_of_chat(upstream, relay):
    provider = upstream(
        json_reply(CHAT_HI, 200, "x-request-id: up-1", "x-ratelimit-remaining-requests: 9", "etag: a", "set-cookie: b")
    )
    it = relay({"openai": provider})
    headers = (
        "anthropic-version: 2023-06-01",
        "anthropic-beta: x",
        "x-stainless-lang: js",
        "user-agent: mine/1",
        "x-request-id: r-1",
        "traceparent: 00-1",
        "x-app: cli",
    )
    got = it.post("/v1/messages?beta=true", prompt("gpt-test", top_k=5, metadata={"user_id": "u"}), *headers)
    own_id = got.get("x-monorelay-request-id").replace("req_", "msg_")
    assert got.status == 200 and got.json == {**message_of([said("Hi")]), "model": "gpt-test", "id": own_id}
    assert (got.get("x-monorelay-translated"), got.get("x-monorelay-dropped")) == (
        "anthropic>openai",
        "top_k, metadata.user_id",
    )
    assert (got.get("x-monorelay-provider"), got.get("x-monorelay-model")) == ("openai", "gpt-test")
    assert (
        got.get("x-request-id") == "up-1" and got.get("x-ratelimit-remaining-requests") == "9" and got.get("request-id")
    )
    assert got.all("content-type") == ["application/json"] and not got.get("etag") and not got.get("set-cookie")
    sent = provider.requests[0]
    assert sent.target == "/v1/chat/completions"  # Q21
    assert sent.json == {"model": "gpt-test", "messages": [HELLO], "max_tokens": 64}
    names = {name.lower() for name, _ in sent.headers}
    assert names == {
        "host",
        "user-agent",
        "x-request-id",
        "traceparent",
        "content-type",
        "accept-encoding",
        "authorization",
        "content-length",
    }
    assert sent.get("authorization") == "Bearer sk-openai-secret" and sent.get("user-agent") == "mine/1"
    line = it.logged("path=/v1/messages", "status=200")
    assert "translated=anthropic>openai" in line and 'dropped="top_k, metadata.user_id"' in line
    assert " input=20 output=5" in line and " upstream_id=up-1" in line


def test_a_chat_is_asked_of_a_provider_of_messages(upstream, relay):
    provider = upstream(json_reply(ANTHROPIC_HI, 200, "request-id: up-1"))
    got = relay({"anthropic": provider}).post("/v1/chat/completions", chat("claude-test", seed=5))
    assert (
        got.status == 200
        and got.json["choices"][0]["message"]["content"] == "Hi"
        and got.json["model"] == "claude-test"
    )
    assert (got.get("x-monorelay-translated"), got.get("x-monorelay-dropped")) == ("openai>anthropic", "seed")
    sent = provider.requests[0]
    assert sent.json == {"model": "claude-test", "messages": [user(said("Hello there"))], "max_tokens": 8192}
    assert sent.get("anthropic-version") == "2023-06-01" and sent.get("x-api-key") == "sk-anthropic-secret"
    assert not sent.get("authorization") and got.get("x-request-id") and got.get("request-id") == "up-1"


@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_a_translated_stream_leaves_event_by_event(upstream, relay, version):
    chunks = [delta(content="H"), delta(content="i"), delta("stop", USAGE)]
    pieces = [sse_of([one], done=False) for one in chunks] + [b"data: [DONE]\n\n"]
    gates = [threading.Event() for _ in pieces]
    it = relay({"openai": upstream(gated_pieces(pieces, gates))})
    with it.client() as client:
        asked = request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode())
        client.send(asked.replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        head = Message(client.until(b"\r\n\r\n"), b"")
        assert head.status == 200 and head.get("content-type") == "text/event-stream"
        assert head.get("cache-control") == "no-cache" and head.get("x-accel-buffering") == "no"
        for words, gate in zip((b'"text":"H"', b'"text":"i"'), gates):
            client.until(words)
            gate.set()
        for gate in gates:
            gate.set()
        rest = client.until(b'"message_stop"}\n\n')
        assert b"message_delta" in rest
    line = it.logged("path=/v1/messages")
    assert "input=20 output=5" in line and "error" not in line


@pytest.mark.parametrize("format", ["anthropic", "openai"])
def test_the_first_part_of_a_call_leaves_before_the_next_one_comes(upstream, relay, format):
    """`format` is the client's: in a chat as in a message, a program may act on what it has of a call."""
    parts, model = [b'{\\"at', b'\\": \\"do', b'or\\"}'], {"anthropic": "gpt-test", "openai": "claude-test"}[format]
    given = [part.replace(b"\\", b"").decode() for part in parts]
    if format == "anthropic":
        pieces = [sse_of([delta(calls=[call(0, *named, part)])], done=False)
                  for part, named in zip(given, [("c1", "look"), (None, None), (None, None)])]  # fmt: skip
        path, asked, last = "/v1/messages", prompt(model, stream=True), sse_of([delta("tool_calls", USAGE)])
    else:
        start = sse("content_block_start", index=0, content_block={**tool_use("c1", "look"), "input": {}})
        pieces = [sse("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": part})
                  for part in given]  # fmt: skip
        pieces[0] = ANTHROPIC_EVENTS[0] + start + pieces[0]
        path, asked = "/v1/chat/completions", chat(model, stream=True)
        last = sse("content_block_stop", index=0) + b"".join(ANTHROPIC_EVENTS[-2:])
    gates = [threading.Event() for _ in pieces]
    gates[-1].set()
    provider = upstream(gated_pieces([*pieces[:-1], pieces[-1] + last], gates))
    with relay({"openai" if format == "anthropic" else "anthropic": provider}).client() as client:
        client.send(request("POST", path, json.dumps(asked).encode()))
        for part, gate in zip(parts, gates):
            client.until(part)
            gate.set()
        client.until(b"\r\n0\r\n\r\n")


def test_targets_keep_their_order_whatever_their_format(upstream, relay):
    native, other = upstream(json_reply({}, 529)), upstream(json_reply(CHAT_HI))
    it = relay({"anthropic": native, "openai": other})
    got = it.post("/v1/messages", prompt())
    assert got.json["content"] == [said("Hi")] and got.get("x-monorelay-attempts") == "2"
    assert len(native.requests) == len(other.requests) == 1 and native.requests[0].json == prompt()
    first, second = upstream(json_reply(ANTHROPIC_HI)), upstream(json_reply(CHAT_HI))
    got = relay({"openai": second, "anthropic": first}).post("/v1/messages", prompt())
    assert got.get("x-monorelay-provider") == "openai" and first.requests == []


WITH_SEARCH = prompt(tools=[WEB_SEARCH])


def test_what_cannot_be_translated_goes_to_the_next_target(upstream, relay):
    """Q13."""
    other, native = upstream(json_reply(CHAT_HI)), upstream(json_reply(ANTHROPIC_HI))
    it = relay({"openai": {"upstream": other, "keys": ["k1", "k2"]}, "anthropic": native})
    got = it.post("/v1/messages", WITH_SEARCH)
    assert got.status == 200 and got.get("x-monorelay-attempts") == "1" and other.requests == []
    assert native.requests[0].json == WITH_SEARCH and not got.get("x-monorelay-translated")
    assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "openai"  # it doesn't cool


def test_what_no_target_can_take_is_a_400_that_names_field_and_provider(upstream, relay):
    other, second = upstream(json_reply(CHAT_HI)), upstream(json_reply(CHAT_HI))
    it = relay({"openai1": other, "openai2": second})
    got = it.post("/v1/messages", WITH_SEARCH)
    words = "tools.0: a tool of the type web_search_20250305 can't be sent to the provider openai1 (OpenAI format)"
    assert refused(got, 400, "invalid_request_error") == words and got.get("x-monorelay-error") == "untranslatable"
    assert got.get("x-should-retry") == "false" and other.requests == second.requests == []
    assert "recovered" not in it.log.getvalue() and "comes last" not in it.log.getvalue()
    got = relay({"anthropic": upstream(json_reply(CHAT_HI))}).post("/v1/chat/completions", chat(n=2))
    assert "n: more than one choice" in refused(got, 400, "invalid_request_error", openai_shape=True)


def test_an_answer_goes_before_a_refusal(upstream, relay):
    native = upstream(json_reply({"type": "error", "error": {"type": "rate_limit_error", "message": "slow"}}, 429))
    got = relay({"openai": upstream(json_reply(CHAT_HI)), "anthropic": native}).post("/v1/messages", WITH_SEARCH)
    assert got.status == 429 and not got.get("x-monorelay-translated")


def test_a_provider_may_refuse_translation(upstream, relay):
    provider = upstream(json_reply(CHAT_HI))
    it = relay({"openai": {"upstream": provider, "translate": False}})
    got = it.post("/v1/messages", prompt())
    assert "speaks the other format" in refused(got, 400, "invalid_request_error") and provider.requests == []
    assert got.get("x-monorelay-error") == "other_format"
    assert it.ask("GET", "/v1/models", None, ANTHROPIC_VERSION).json["data"] == []
    both = relay(
        {"openai": {"upstream": provider, "translate": False}, "anthropic": upstream(json_reply(ANTHROPIC_HI))}
    )
    assert both.post("/v1/messages", prompt()).get("x-monorelay-provider") == "anthropic"
    got = relay({"anthropic": upstream(json_reply(CHAT_HI))}).post("/v1/responses", {"model": "m", "input": "x"})
    assert got.get("x-monorelay-error") == "other_format"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_what_needs_no_translation_is_passed_on_byte_for_byte(upstream, relay, path):
    body = b'{ "model" : "m",  "messages": [], "x": 1.50 }'
    provider = upstream(answer(200, b'{ "a":1.50 }'))
    it = relay(
        {"anthropic" if path == "/v1/messages" else "openai": {"upstream": provider, "translate": {"drop": ["x"]}}}
    )
    got = it.post(path, body)
    assert provider.requests[0].body == body and got.body == b'{ "a":1.50 }' and not got.get("x-monorelay-translated")


def test_count_tokens_of_a_translated_target_is_estimated(upstream, relay):
    other, native = upstream(json_reply(CHAT_HI)), upstream(json_reply({"input_tokens": 7}))
    it = relay({"openai": other, "anthropic": native}, aliases={"native": "claude-test@anthropic"})
    got = it.post("/v1/messages/count_tokens", {"model": "claude-test", "messages": [HELLO]})
    assert (got.status, got.json) == (200, {"input_tokens": 8}) and other.requests == native.requests == []
    assert got.get("x-monorelay-estimated") == "true" and got.get("x-monorelay-provider") == "openai"
    got = it.post("/v1/messages/count_tokens", {"model": "native", "messages": [HELLO]})
    assert got.json == {"input_tokens": 7} and not got.get("x-monorelay-estimated")
    assert it.post("/v1/messages/count_tokens", {"model": "m", "messages": 5}).status == 400


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_has_the_clients_shape_and_the_providers_words(upstream, relay, stream):
    """E1, E4, E5."""
    provider = upstream(
        json_reply({"error": {"message": "No such thing", "type": "x", "code": "y"}}, 404, "retry-after: 7")
    )
    it = relay({"openai": provider})
    got = it.post("/v1/messages", prompt("gpt-test", stream=stream))
    assert got.status == 404 and got.get("retry-after") == "7" and got.get("content-type") == "application/json"
    assert got.json == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "No such thing"},
        "request_id": got.get("x-monorelay-request-id"),
    }
    assert not got.get("x-monorelay-error") and "error=upstream:x" in it.logged("status=404")
    refusing = relay({"openai": upstream(json_reply({"error": {"message": "no", "code": "bad_key"}}, 401))})
    assert "refused this relay's key" in refused(refusing.post("/v1/messages", prompt()), 502, "api_error")
    full = json_reply(
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"},
        },
        400,
    )
    got = relay({"anthropic": upstream(full)}).post("/v1/chat/completions", chat(stream=stream))
    assert got.status == 400 and got.json["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("opening", ["[", '{"error":'], ids=brief)
@pytest.mark.parametrize("depth", [300, 900, 5000])
@pytest.mark.parametrize("kind", ["status", "whole", "first event", "later event"])
def test_an_error_that_is_nested_deeply_is_one_of_the_provider(upstream, relay, opening, depth, kind):
    told = b'{"error":%s"x"%s}' % (opening.encode() * depth, opening.translate({91: 93, 123: 125})[:1].encode() * depth)
    stream = b"data: %s\n\n" % told
    if kind == "later event":
        stream = sse_of([delta(content="Hi")], done=False) + stream
    it = relay({"openai": upstream(answer(422 if kind == "status" else 200, told) if kind in ("status", "whole")
                                   else sse_reply(stream))})  # fmt: skip
    got = it.post("/v1/messages", prompt())
    assert got.status == (422 if kind == "status" else 502) and got.json["error"]["message"]
    assert "internal" not in it.log.getvalue()


def test_s12_an_error_at_the_beginning_of_a_stream_is_an_http_error(upstream, relay):
    error = {"id": "gen-1", "choices": [], "error": {"message": "slow", "code": 429}}
    failing = STREAM_HEAD + chunked(b": PROCESSING\n\n", sse_of([error]))
    it = relay({"openai": upstream(failing)})
    got = it.post("/v1/messages", prompt(stream=True))
    assert got.status == 429 and got.json["error"] == {"type": "rate_limit_error", "message": "slow"}
    both = relay({"openai": upstream(failing), "openai2": upstream(CHAT_HI_STREAM)})
    got = both.post("/v1/messages", prompt(stream=True))
    assert got.status == 200 and got.get("x-monorelay-provider") == "openai2"
    follow_grammar(events_of(got.body))


FAILED_ANSWERS = {
    "error": {"error": {"message": "slow", "code": 429}},
    "choice": {"choices": [{"index": 0, "finish_reason": "error", "error": {"message": "slow", "code": 429}}]},
}


KEY_REFUSED = {"error": {"message": "Incorrect API key provided: sk-openai-secret", "code": 401}}
KEY_QUOTED = {"error": {"message": "no credit for sk-openai%2Dsecret", "code": 429}}


@pytest.mark.parametrize(
    ("told", "code"), [(KEY_REFUSED, "upstream_refused_key"), (KEY_QUOTED, "upstream_quoted_key")], ids=brief
)
@pytest.mark.parametrize("kind", ["whole", "whole, late", "first event", "later event"])
def test_r16_an_error_in_an_answer_of_200_shows_nobody_the_relays_key(upstream, relay, monkeypatch, kind, told, code):
    late = kind == "whole, late"
    monkeypatch.setattr(monorelay, "PEEK_SECONDS", 0.1 if late else 5)

    def script(connection: Connection) -> None:
        connection.read_request()
        if kind.startswith("whole"):
            raw = json_reply({"id": "gen-1", **told})
            connection.send(raw[:-20])
            threading.Event().wait(0.2 * late)
            return connection.send(raw[-20:])
        first = [] if kind == "first event" else [delta(content="Hi")]
        connection.send(sse_reply(sse_of([*first, told])))

    it = relay({"openai": upstream(script)})
    got = it.post("/v1/messages", prompt())
    assert b"secret" not in got.head + got.body
    assert "relay's key" in refused(got, 502, "api_error") and got.get("x-monorelay-error") == code


@pytest.mark.parametrize("told", [KEY_REFUSED, KEY_QUOTED], ids=brief)
def test_s12_an_error_within_a_stream_shows_nobody_the_relays_key(upstream, relay, told):
    it = relay({"openai": upstream(sse_reply(sse_of([delta(content="Hi"), told])))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        client.until(b"event: error\n")
        event = client.until(b"\n\n")
        assert b"this relay's key" in event and b"secret" not in event


@pytest.mark.parametrize("kind", FAILED_ANSWERS)
def test_r16_an_error_in_an_answer_of_200_has_its_status_and_another_target_is_asked(upstream, relay, kind):
    failing = json_reply(FAILED_ANSWERS[kind])
    it = relay({"openai": upstream(failing)})
    got = it.post("/v1/messages", prompt())
    assert got.status == 429 and got.json["error"] == {"type": "rate_limit_error", "message": "slow"}
    assert got.get("x-monorelay-translated") == "anthropic>openai"
    it.logged("status=429")
    assert "comes last" in it.log.getvalue()
    both = relay({"openai": upstream(failing), "openai2": upstream(json_reply(CHAT_HI))})
    got = both.post("/v1/messages", prompt())
    assert got.status == 200 and got.get("x-monorelay-provider") == "openai2"
    assert "tried=openai/key1:429" in both.logged("path=/v1/messages")


def test_r16_only_an_error_is_taken_for_one(upstream, relay):
    """A word in a text isn't, and a long answer needn't be whole to be judged."""
    for text in ('"error"', '{"error": {"code": 500}}', "x" * 200_000):
        got = relay({"openai": upstream(json_reply(completion(content=text)))}).post("/v1/messages", prompt())
        assert got.status == 200 and got.json["content"] == [said(text)]


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices":[]}', b"\xff"], ids=brief)
@pytest.mark.parametrize("stream", [False, True])
def test_r15_what_is_no_message_is_a_502_that_tells_of_the_translation(upstream, relay, body, stream):
    it = relay({"openai": upstream(answer(200, body))})
    got = it.post("/v1/messages", prompt(stream=stream, top_k=5))
    assert got.status == 502 and got.json["error"]["type"] == "api_error"
    assert got.get("x-monorelay-error") == "upstream_broken" and got.get("x-monorelay-provider") == "openai"
    told = (got.get("x-monorelay-translated"), got.get("x-monorelay-dropped"))
    assert told == ("anthropic>openai", "top_k") and "error=upstream_broken" in it.logged("status=502")


@pytest.mark.parametrize("ending", ["closed", "chunk"])
def test_s11_a_stream_that_ends_too_early_is_cut_behind_an_error(upstream, relay, ending):
    data = STREAM_HEAD + chunk(sse_of([delta(content="Hi")], done=False)) + (b"0\r\n\r\n" if ending == "chunk" else b"")
    it = relay({"openai": upstream(replies_then_closes(data))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        assert_died(client)
    line = it.logged("path=/v1/messages")
    assert "error=upstream_broken" in line and "comes last" in it.log.getvalue()
    it = relay({"anthropic": upstream(replies_then_closes(STREAM_HEAD + chunk(b"".join(ANTHROPIC_EVENTS[:-1]))))})
    with it.client() as client:
        client.send(request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)).encode()))
        assert_died(client, anthropic=False)


def test_s20_an_answer_that_is_no_stream_becomes_one_and_the_other_way_round(upstream, relay):
    got = relay({"openai": upstream(json_reply(CHAT_HI))}).post("/v1/messages", prompt("gpt-test", stream=True))
    follow_grammar(events_of(got.body))
    assert got.get("content-type") == "text/event-stream"
    got = relay({"openai": upstream(CHAT_HI_STREAM)}).post("/v1/messages", prompt("gpt-test"))
    assert got.json["content"] == [said("Hi")] and got.json["usage"] == USED
    assert got.get("content-type") == "application/json"
    broken = STREAM_HEAD + chunked(sse_of([delta(content="H")], done=False))
    assert relay({"openai": upstream(broken)}).post("/v1/messages", prompt()).status == 502


def test_s17_silence_gets_a_ping(upstream, relay):
    gate, comment, commented, clock = threading.Event(), threading.Event(), threading.Event(), Clock()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD)
        connection.wait(comment)
        connection.send(chunk(b": PROCESSING\n\n"))
        commented.set()
        connection.wait(gate)
        connection.send(chunked(sse_of([delta(content="Hi"), delta("stop", USAGE)])))

    provider = upstream(script)
    with relay({"openai": provider}, clock).client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        assert provider.called.wait(TIMEOUT_SECONDS)
        eventually(lambda: clock.move(monorelay.PEEK_SECONDS) or not client.is_quiet())
        clock.move(monorelay.PING_SECONDS)
        begun = client.until(b'"ping"}\n\n')
        assert b"message_start" in begun
        clock.move(monorelay.PING_SECONDS / 2)
        comment.set()
        assert commented.wait(TIMEOUT_SECONDS)
        clock.move(monorelay.PING_SECONDS / 2 - 1.0)
        assert client.is_quiet()
        clock.move(1.0)
        client.until(b'"ping"}\n\n')  # though comments come
        clock.move(monorelay.PING_SECONDS)
        client.until(b'"ping"}\n\n')
        gate.set()
        client.until(b'"message_stop"}\n\n')


@pytest.mark.parametrize("rest", [b"", b": KEEP-ALIVE\n\n"])
@pytest.mark.parametrize("last", [delta("stop"), delta("stop", USAGE)], ids=brief)
def test_s10_a_stream_that_told_its_end_ends_soon_though_nothing_more_comes(upstream, relay, monkeypatch, last, rest):
    monkeypatch.setattr(monorelay, "ENDING_SECONDS", 0.3)

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(sse_of([delta(content="Hi"), last], done=False)))
        while not connection.ended_within(0.1):
            connection.send(chunk(rest) if rest else b"")

    it = relay({"openai": upstream(script)})
    got = it.post("/v1/messages", prompt("gpt-test", stream=True))
    follow_grammar(events_of(got.body))
    assert "error" not in it.logged("path=/v1/messages") and "comes last" not in it.log.getvalue()


def test_a_translated_stream_that_stalls_is_cut_behind_an_error(upstream, relay):
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(sse_of([delta(content="Hi")], done=False)))
        connection.ended_within(TIMEOUT_SECONDS)

    clock, provider = Clock(), upstream(script)
    it = relay({"openai": {"upstream": provider, "timeout": 10}}, clock)
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        received = client.until(b"Hi")
        clock.move(9.0)
        assert client.is_quiet()
        client.buffer[:0] = received
        clock.move(1.0)
        assert_died(client)
    assert "error=upstream_timeout" in it.logged("path=/v1/messages")
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt()).encode()))
        eventually(lambda: len(provider.requests) == 2)
        eventually(lambda: clock.move(10.0) or not client.is_quiet())
        assert client.answer().status in (502, 504)


@pytest.mark.parametrize("stream", [False, True])
def test_s24_when_the_client_leaves_so_does_the_relay(upstream, relay, stream):
    def script(connection: Connection) -> None:
        connection.read_request()
        if stream:
            connection.send(STREAM_HEAD, chunk(sse_of([delta(content="Hi")], done=False)))
        else:
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        connection.upstream.left = connection.ended_within(TIMEOUT_SECONDS)

    provider = upstream(script)
    it = relay({"openai": provider})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=stream)).encode()))
        if stream:
            client.until(b"Hi")
        else:
            assert provider.called.wait(TIMEOUT_SECONDS)
    eventually(lambda: provider.left, seconds=1.5)
    it.logged("error=client_gone")
    assert "comes last" not in it.log.getvalue()


def test_the_catalogue_lists_what_translation_makes_callable(upstream, relay):
    lists = upstream(json_reply({"object": "list", "data": [{"id": "gpt-test", "object": "model"}]}))
    it = relay({"openai": lists}, aliases={"claude-mine": "gpt-test"})
    listed = it.ask("GET", "/v1/models", None, ANTHROPIC_VERSION).json["data"]
    assert [entry["id"] for entry in listed] == ["claude-mine", "gpt-test"] and listed[1]["type"] == "model"
    assert it.ask("GET", "/v1/models/gpt-test", None, ANTHROPIC_VERSION).json["display_name"] == "gpt-test"
    assert it.ask("GET", "/v1/models/other", None, ANTHROPIC_VERSION).status == 404 and len(lists.requests) == 1


@pytest.mark.parametrize(("kind", "cools"), [("overloaded_error", True), ("invalid_request_error", False)])
def test_an_error_within_a_translated_stream_cools_unless_it_is_the_requests(upstream, relay, kind, cools):
    data = sse_of([delta(content="Hi"), {"error": {"message": "no", "type": kind}}], done=False)
    it = relay({"openai": upstream(STREAM_HEAD + chunked(data))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        assert_died(client)
    it.logged("path=/v1/messages", "error=upstream:error")
    assert ("comes last" in it.log.getvalue()) == cools


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_broken_off_cools_and_is_a_502(upstream, relay, stream):
    broken = delta("insufficient_system_resource") if stream else completion("network_error", content="Hi")
    reply = sse_reply(sse_of([delta(content="Hi"), broken])) if stream else json_reply(broken)
    it = relay({"openai": upstream(reply)})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=stream)).encode()))
        got = client.until(b"the provider broke its answer off: ")
        assert got.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 502") and b"message_stop" not in got
    it.logged("path=/v1/messages")
    assert "comes last" in it.log.getvalue()


# An answer that says nothing about the provider and its key, and its status as a whole.
OWN_FAULTS: dict[str, tuple[dict[str, Any], int]] = {
    "overflow": ({"error": {"code": 400, "message": "maximum context length is 1000 tokens"}}, 400),
    "moderation": ({"error": {"code": 403, "message": "your input was flagged"}}, 403),
    "choice": ({"choices": [{"finish_reason": "error", "error": {"code": 422, "message": "a bad picture"}}]}, 422),
    "129 calls": (completion("tool_calls", calls=[call(at, f"c{at}", "f", "{}") for at in range(129)]), 502),
    "cut off by a stop sequence": (completion("stop", calls=[call(0, "c", "f", '{"a": "b')]), 502),
    "a name too long": (completion("tool_calls", calls=[call(0, "c", "f" * 257, "{}")]), 502),
    "a picture": (completion("stop", content=[image_part()]), 502),
}


@pytest.mark.parametrize("kind", OWN_FAULTS)
def test_what_a_request_has_brought_about_cools_no_key(upstream, relay, kind):
    document, status = OWN_FAULTS[kind]
    late = sse_reply(sse_of([delta(content="Hi"), document]))
    it = relay({"openai": upstream(replies(json_reply(document), late))})
    assert it.post("/v1/messages", prompt()).status == status
    assert it.post("/v1/messages", prompt()).status == status
    it.logged("path=/v1/messages", f"status={status}")
    assert "comes last" not in it.log.getvalue()


@pytest.mark.timed
def test_a_flood_of_tiny_events_holds_up_nobody(upstream, relay):
    """They are translated in parts, between which others are served."""
    data = b"data:{}\n\n" * 200_000 + sse_of([delta(content="Hi"), delta("stop", USAGE)])
    it = relay({"openai": upstream(sse_reply(data))})
    with it.client() as client, it.client() as other:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("gpt-test", stream=True)).encode()))
        client.until(b"message_start")
        waits = []
        while not waits or (client.buffer.find(b"message_stop") < 0 and len(waits) < 200):
            begin = time.monotonic()
            assert other.ask("GET", "/health").status == 200
            waits.append(time.monotonic() - begin)
            if select.select([client.sock], [], [], 0)[0] and not client.fill():
                break
        assert sorted(waits)[len(waits) // 2] < 0.1


def test_texts_may_have_any_number_of_commas_and_a_body_only_so_many_values(upstream, relay):
    provider = upstream(json_reply(CHAT_HI))
    it = relay({"openai": provider})
    commas = {"role": "user", "content": "1,2,3;[{" * 200_000}
    assert it.post("/v1/messages", prompt(messages=[commas])).status == 200
    assert provider.requests[0].json["messages"] == [commas]
    for body in (many_values(250_010), prompt(messages=[{"role": "user", "content": "\n" * 2_000_001}])):
        assert "aren't translated" in refused(it.post("/v1/messages", body), 400, "invalid_request_error")
    assert len(provider.requests) == 1


def test_large_requests_and_answers_are_translated_aside(upstream, relay):
    text = "x" * 3_000_000
    provider = upstream(json_reply(completion(content=text)))
    it = relay({"openai": provider})
    got = it.post("/v1/messages", prompt(messages=[{"role": "user", "content": text}]))
    assert got.json["content"] == [said(text)] and provider.requests[0].json["messages"] == [
        {"role": "user", "content": text}
    ]
    packed = gzip.compress(json.dumps(prompt(messages=[{"role": "user", "content": text}])).encode())
    assert it.post("/v1/messages", packed, "content-encoding: gzip").json["content"] == [said(text)]
    assert not provider.requests[1].get("content-encoding")
    eventually(lambda: it.server.service.bodies.bytes == 0)
    limited = relay({"openai": upstream(json_reply(completion(content=text)))}, server={"max_body_mb": 1})
    assert "is over" in refused(limited.post("/v1/messages", prompt()), 502, "api_error")


def test_an_alias_goes_by_its_name_in_the_answer_and_by_its_targets_upstream(upstream, relay):
    provider = upstream(json_reply(CHAT_HI))
    it = relay({"openai": provider}, aliases={"claude-mine": "gpt-test@openai"})
    got = it.post("/v1/messages", prompt("claude-mine"))
    assert got.json["model"] == "claude-mine" and provider.requests[0].json["model"] == "gpt-test"


@pytest.mark.parametrize(
    ("format", "name", "value"), [("openai", "authorization", "Bearer sk-own"), ("anthropic", "x-api-key", "sk-own")]
)
def test_a_clients_own_key_goes_along_as_the_provider_reads_it(upstream, relay, format, name, value):
    provider = upstream(json_reply(CHAT_HI if format == "openai" else ANTHROPIC_HI))
    it = relay({format: {"upstream": provider, "keys": "client"}})
    path = "/v1/messages" if format == "openai" else "/v1/chat/completions"
    for header in ("x-api-key: sk-own", "authorization: Bearer sk-own"):
        with it.client() as client:
            headers = (header, f"x-monorelay-key: {TOKEN}")
            client.send(request("POST", path, json.dumps(prompt()).encode(), *headers, token=""))
            assert client.answer().status == 200
        sent = provider.requests[-1]
        credentials = [pair for pair in sent.headers if pair[0] in ("authorization", "x-api-key")]
        assert credentials == [(name, value)] and TOKEN not in str(sent.headers)


def test_the_official_sdks_talk_to_the_other_ones_provider(upstream, relay):
    """S25 and U9, through the whole relay."""
    stream = sse_reply(sse_of(STREAMS["s2-all"][0]))
    it = relay(
        {
            "openai": upstream(stream),
            "anthropic": upstream(sse_reply(b"".join(message_events(*MESSAGES["u1-all"][0], reason="tool_use")))),
        },
        routes={"gpt-*": "openai", "claude-*": "anthropic"},
    )
    with (
        anthropic.Anthropic(api_key=TOKEN, base_url=it.url, max_retries=0) as client,
        client.messages.stream(
            model="gpt-test", max_tokens=4000, messages=[HELLO], thinking={"type": "enabled", "budget_tokens": 2000}
        ) as events,
    ):
        message = events.get_final_message()
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[2].input == {"at": "door"} and message.stop_reason == "tool_use"
    with (
        openai.OpenAI(api_key=TOKEN, base_url=f"{it.url}/v1", max_retries=0) as client,
        client.chat.completions.stream(
            model="claude-test", messages=[HELLO], stream_options={"include_usage": True}
        ) as chunks,
    ):
        final = chunks.get_final_completion()
    assert [call.function.name for call in final.choices[0].message.tool_calls] == ["look", "dig"]
    assert final.choices[0].finish_reason == "tool_calls" and final.usage.completion_tokens == 12


def test_a_session_of_claude_code_goes_on_at_a_provider_of_chat(upstream, relay):
    """Its turns as recorded; the provider calls all its answers the same, and Claude Code must not."""
    calls = [call(0, "call_1", "Read", '{"file_path": "/a"}'), call(1, "call_2", "Bash", '{"command":"echo b"}')]
    calls.append(call(2, "call_3", "Read", '{"file_path":"/none"}'))
    chunks = [delta(reasoning_content="Hm"), delta(content="Calling."), *(delta(calls=[it]) for it in calls)]
    turns = [[*chunks, delta("tool_calls", USAGE)], [delta(content="Done."), delta("stop", USAGE)]]
    native = upstream(json_reply({}, 529))
    provider = upstream(replies(*(sse_reply(sse_of(turn)) for turn in turns)))
    it = relay(
        {"anthropic": native, "openai": {"upstream": provider, "translate": {"reasoning_back": "reasoning_content"}}},
        aliases={"claude-both": ["claude-opus-4-6@anthropic", "gpt-test@openai"]},
    )
    request, answers = claude_code(model="claude-both"), []
    headers = dict(header.split(": ", 1) for header in CLAUDE_CODE_HEADERS)
    beta = {name: request.pop(name) for name in ("context_management", "output_config")}
    del request["stream"]
    with anthropic.Anthropic(auth_token=TOKEN, base_url=it.url, max_retries=0) as client:
        for _ in turns:
            with client.messages.stream(**request, extra_body=beta, extra_headers=headers) as events:
                answers.append(events.get_final_message())
            said_by_it = assistant(*(block.to_dict() for block in answers[-1].content))
            request["messages"] = [*request["messages"], said_by_it, CLAUDE_CODE_TURN[1]]
    assert [block.type for block in answers[0].content] == ["thinking", "text", *["tool_use"] * 3]
    assert answers[0].stop_reason == "tool_use" and answers[1].content[0].text == "Done."
    assert answers[0].id != answers[1].id and len(native.requests) == 1
    first, second = provider.requests
    assert second.json["messages"][:3] == first.json["messages"] == CLAUDE_CODE_IN_CHAT
    called, *told = second.json["messages"][3:]
    assert called["reasoning_content"] == "Hm" and called["content"] == "Calling."
    assert [(it["id"], json.loads(it["function"]["arguments"])) for it in called["tool_calls"]] == [
        ("call_1", {"file_path": "/a"}),
        ("call_2", {"command": "echo b"}),
        ("call_3", {"file_path": "/none"}),
    ]
    assert [it["tool_call_id"] for it in told] == ["call_1", "call_3", "call_2"]
    assert not {name.lower() for name, _ in second.headers} & {"anthropic-beta", "x-app", "x-claude-code-session-id"}


def test_claude_codes_search_is_refused_before_it_can_invent_what_was_found(upstream, relay):
    provider = upstream(json_reply(CHAT_HI))
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    it = relay({"openai": provider})
    got = it.post("/v1/messages?beta=true", claude_code(tools=[search], tool_choice={"type": "auto"}))
    assert "web_search_20250305" in refused(got, 400, "invalid_request_error") and provider.requests == []


class Weather(pydantic.BaseModel):
    city: str
    degrees: int


def test_a_session_of_openais_sdk_goes_on_at_a_provider_of_messages(upstream, relay):
    calls = [tool_use("toolu_1", "weather", city="Oslo"), tool_use("toolu_2", "now")]
    turns = [
        message_events(THOUGHT, said("Looking."), *calls, reason="tool_use"),
        message_events(said('{"city": "Oslo", "degrees": 7}')),
        message_events(said("Half"))[:-3],
    ]
    provider = upstream(replies(*(sse_reply(b"".join(events)) for events in turns)))
    it = relay({"anthropic": provider})
    tools = [openai.pydantic_function_tool(Weather, name="weather"), {"type": "function", "function": {"name": "now"}}]
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, HELLO]
    with openai.OpenAI(api_key=TOKEN, base_url=f"{it.url}/v1", max_retries=0) as client:
        asked: Any = {"model": "claude-test", "messages": messages, "tools": tools[1:]}
        with client.chat.completions.stream(**asked) as chunks:
            message = chunks.get_final_completion().choices[0].message
        messages.append(message.model_dump(exclude_none=True, exclude={"parsed"}))
        messages += [{"role": "tool", "tool_call_id": it.id, "content": it.function.name} for it in message.tool_calls]
        with client.chat.completions.stream(**{**asked, "tools": tools[:1]}, response_format=Weather) as chunks:
            found = chunks.get_final_completion().choices[0].message.parsed
        with pytest.raises(openai.APIError, match="ended before it was finished"):
            list(client.chat.completions.create(**asked, stream=True))
    assert found == Weather(city="Oslo", degrees=7)
    second = provider.requests[1].json
    results = [tool_result("toolu_1", "weather"), tool_result("toolu_2", "now")]
    turn = [assistant(THOUGHT, said("Looking."), *calls), user(*results)]
    assert second["messages"] == [user(said("Hello there")), *turn]
    assert second["system"] == "Be brief." and second["output_config"]["format"]["schema"]["title"] == "Weather"
    assert second["tools"][0]["strict"] is True and second["stream"] is True


# ------------------------------------------------------------------------------------------------------------
# Relay: truncation is never passed off as an end
# ------------------------------------------------------------------------------------------------------------

DEATHS = {
    "chunked, closed": lambda data: STREAM_HEAD + chunk(data),
    "chunked, within a chunk": lambda data: STREAM_HEAD + b"fff\r\n" + data,
    "chunked, bad size": lambda data: STREAM_HEAD + chunk(data),
    "close-delimited": lambda data: FRAMINGS["close-delimited"][0] + data,
    "short of its length": lambda data: (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99999\r\n\r\n" + data
    ),
}


@pytest.mark.parametrize("cut", [b"", b"event: content_blo", b"event: ping\ndata: {", b"event: ping\n"])
@pytest.mark.parametrize("death", DEATHS)
def test_a_stream_that_dies_ends_in_an_error_event_and_a_cut_connection(upstream, relay, death, cut):
    data, gate = b"".join(ANTHROPIC_EVENTS[:3]) + cut, threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(DEATHS[death](data))
        connection.wait(gate)
        connection.send(b"0x3\r\nabc\r\n" if "bad size" in death else b"")

    with relay({"anthropic": upstream(script)}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        while b"message_start" not in client.buffer:
            assert client.fill()
        gate.set()
        assert_died(client, after=data)


BEGUN = {
    "/v1/messages": (ANTHROPIC_EVENTS[:3], b'event: content_block_delta\ndata: {"delta":{"text":"ha'),
    "/v1/chat/completions": (OPENAI_EVENTS[:1], b'data: {"choices":[{"index":0,"delta":{"content":"ha'),
}


@pytest.mark.parametrize("size", [0, 100_000])
@pytest.mark.parametrize("path", BEGUN)
def test_a_chunked_stream_that_ends_within_a_line_ends_in_an_error_event(upstream, relay, path, size):
    whole, cut = BEGUN[path]
    provider = upstream(STREAM_HEAD + chunked(*whole, cut + b"x" * size))
    it = relay(both_formats(provider))
    with it.client() as client:
        client.send(request("POST", path, STREAMED))
        assert_died(client, after=b"".join(whole) + cut, anthropic=path == "/v1/messages")
    it.logged(path, "upstream_broken")


@pytest.mark.parametrize("path", BEGUN)
def test_a_chunked_stream_whose_last_line_only_lacks_its_end_is_whole(upstream, relay, path):
    text = b"".join(BEGUN[path][0]) + b'data: {"half":false}'
    provider = upstream(STREAM_HEAD + chunked(text))
    it = relay(both_formats(provider))
    assert it.post(path, STREAMED).body == text
    assert "upstream_broken" not in it.logged(path)


def test_an_openai_stream_that_dies_says_so_in_its_own_format(upstream, relay):
    with relay(
        {"openai": upstream(replies_then_closes(STREAM_HEAD, chunk(OPENAI_EVENTS[0])))}
    ).client() as client:
        client.send(request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)).encode()))
        assert_died(client, after=OPENAI_EVENTS[0], anthropic=False)


@pytest.mark.parametrize("coding", ["Identity", "IDENTITY", "identity", ""])
def test_a_stream_in_no_coding_that_is_cut_ends_in_an_error_event_however_that_is_spelled(upstream, relay, coding):
    head = CLOSE_DELIMITED["events"].replace(b"\r\n\r\n", f"\r\ncontent-encoding: {coding}\r\n\r\n".encode())
    it = relay({"anthropic": upstream(replies_then_closes(head, *ANTHROPIC_EVENTS[:3]))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        assert_died(client, after=b"".join(ANTHROPIC_EVENTS[:3]))


def test_a_stream_reset_within_a_line_ends_in_an_error_event(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]))
        connection.wait(gate)
        connection.reset()

    with relay({"anthropic": upstream(script)}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"message_start")
        gate.set()
        client.until(b"event: error")


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + b"x" * 50,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nff\r\nhello",
    ],
)
def test_an_answer_that_is_cut_reaches_the_client_cut(upstream, relay, raw):
    it = relay({"anthropic": upstream(replies_then_closes(raw))})
    with it.client() as client, pytest.raises((EOFError, ConnectionError)):
        client.ask("POST", "/v1/messages", STREAMED)


@pytest.mark.parametrize("rest", [b"-1\r\n", b"5\r\nhelloXX\r\n0\r\n\r\n"])
def test_an_answer_whose_chunks_are_garbage_is_a_502_or_cut(upstream, relay, rest):
    raw = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n" + rest
    it = relay({"anthropic": upstream(replies_then_closes(raw))})
    try:
        refused(it.post("/v1/messages", prompt()), 502, "api_error")
    except (EOFError, ConnectionError):
        return  # Its first bytes were on their way before the garbage was seen.


CLOSE_DELIMITED = {
    "json": b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n",
    "events": b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n",
}


def cut_short(connection: Connection) -> None:
    """Ends a connection as a fault on the way would: RST, or over TLS a FIN without close_notify."""
    if isinstance(connection.sock, ssl.SSLSocket):
        raw = socket.socket(fileno=connection.sock.detach())
        raw.shutdown(socket.SHUT_WR)
        raw.close()
    else:
        connection.reset()


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files/f"])
@pytest.mark.parametrize("secure", [False, True], ids=["reset", "no close_notify"])
@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
def test_a_body_without_length_that_is_cut_short_is_broken_for_the_client(
    upstream, relay, tls, trusted, path, secure, version
):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(CLOSE_DELIMITED["json"], b"x" * 1000)
        connection.wait(gate)
        cut_short(connection)

    it = relay({"anthropic": upstream(script, tls("127.0.0.1") if secure else None)})
    with it.client() as client:
        is_file = "files" in path
        asked = request("GET" if is_file else "POST", path, None if is_file else STREAMED, ANTHROPIC_VERSION)
        client.send(asked.replace(b"HTTP/1.1", version.encode()))
        client.until(b"\r\n\r\n")
        while client.buffer.count(b"x" * 100) < 10:
            assert client.fill()
        gate.set()
        if version == "HTTP/1.0":
            with pytest.raises(ConnectionResetError):
                while client.fill():
                    pass
        else:
            with pytest.raises((EOFError, ConnectionError)):
                for _ in iter(client.chunk, b""):
                    pass
    it.logged(path, "upstream_broken")


def test_a_body_without_length_that_ends_in_good_order_over_tls_is_whole(upstream, relay, tls, trusted):
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(CLOSE_DELIMITED["json"], b"x" * 1000)
        with contextlib.suppress(OSError):
            connection.sock.unwrap()

    it = relay({"anthropic": upstream(script, tls("127.0.0.1"))})
    assert it.post("/v1/messages", prompt()).body == b"x" * 1000


def test_a_chunked_answer_that_breaks_off_is_a_reset_for_an_http_1_0_client(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", chunk(b"half"))
        connection.wait(gate)

    with relay({"anthropic": upstream(script)}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED).replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.until(b"half")
        gate.set()
        with pytest.raises(ConnectionResetError):
            while client.fill():
                pass


def test_a_stream_without_length_that_is_reset_ends_in_an_error_event_whatever_its_last_line(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(CLOSE_DELIMITED["events"], *ANTHROPIC_EVENTS[:3])
        connection.wait(gate)
        connection.reset()

    with relay({"anthropic": upstream(script)}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        while b"ping" not in client.buffer:
            assert client.fill()
        gate.set()
        assert_died(client, after=b"".join(ANTHROPIC_EVENTS[:3]))


ENDINGS = {
    "data-only message_stop": (
        "/v1/messages",
        b'data: {"type":"message_start"}\n\ndata: {"type":"message_stop"}\n\n',
    ),
    "with blanks": (
        "/v1/messages",
        b'data: {"type": "message_start"}\r\n\r\ndata: {"type": "message_stop"}\r\n\r\n',
    ),
    "without a blank": ("/v1/messages", b'data:{"type":"message_start"}\n\ndata:{"type":"message_stop"}\n\n'),
    "data-only response.completed": (
        "/v1/responses",
        b'data: {"type":"response.completed","response":{}}\n\n',
    ),
    "finish_reason": ("/v1/chat/completions", b"".join(OPENAI_EVENTS[:2])),
    "finish_reason and usage": (
        "/v1/chat/completions",
        b"".join(OPENAI_EVENTS[:2]) + b'data: {"choices":[],"usage":{}}\n\n',
    ),
    "finish_reason spaced": (
        "/v1/chat/completions",
        b'data: {"choices": [{"index": 0, "finish_reason": "length"}]}\n\n',
    ),
    "an error of its own": ("/v1/chat/completions", b'data: {"error":{"message":"overloaded"}}\n\n'),
    "finish_reason without a line end": ("/v1/chat/completions", b"".join(OPENAI_EVENTS[:2]).rstrip(b"\n")),
    "a comment behind [DONE] without a line end": ("/v1/chat/completions", b"".join(OPENAI_EVENTS) + b": bye"),
}


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("name", ENDINGS)
def test_a_stream_that_says_in_its_data_that_it_ends_gets_no_error_event(upstream, relay, name, framing):
    path, text = ENDINGS[name]
    head, frame, end = FRAMINGS[framing]
    provider = upstream(replies_then_closes(head, frame(text), end))
    it = relay(both_formats(provider))
    got = it.post(path, prompt(stream=True))
    assert (got.status, got.body) == (200, text)


LAST_EVENTS = {
    "message_stop": ("/v1/messages", b"".join(ANTHROPIC_EVENTS)),
    "data-only message_stop": ENDINGS["data-only message_stop"],
    "finish_reason": ENDINGS["finish_reason"],
    "finish_reason and usage": ENDINGS["finish_reason and usage"],
    "response.completed": (
        "/v1/responses",
        sse("response.created") + sse("response.completed", response={"output": [{"text": "Grüße"}]}),
    ),
}


@pytest.mark.parametrize("part", ["data: ", "{"])
@pytest.mark.parametrize("name", LAST_EVENTS)
def test_a_stream_without_length_cut_anywhere_in_its_last_data_line_is_never_whole(upstream, relay, name, part):
    path, text = LAST_EVENTS[name]
    last, brace = text.rindex(b"data: "), text.index(b"{", text.rindex(b"data: "))
    cuts = range(last + 1, brace + 1) if part == "data: " else range(brace + 1, len(text.rstrip(b"\n")))
    pieces = iter([text[:cut] for cut in cuts])

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(CLOSE_DELIMITED["events"], next(pieces))

    provider = upstream(script)
    it = relay(both_formats(provider))
    for cut in cuts:
        with it.client() as client:
            client.send(request("POST", path, STREAMED))
            assert_died(client, after=text[:cut], anthropic=path == "/v1/messages")


def test_a_stream_without_length_cut_in_a_last_line_over_64_kib_is_never_whole(upstream, relay):
    text = sse("response.created") + sse("response.completed", response={"text": "x" * 100_000})[:-20]
    it = relay({"openai": upstream(replies_then_closes(CLOSE_DELIMITED["events"], text))})
    with it.client() as client:
        client.send(request("POST", "/v1/responses", STREAMED))
        assert_died(client, after=text, anthropic=False)


def test_a_requests_own_fault_that_a_stream_tells_is_tried_nowhere_else(upstream, relay):
    told = b'event: error\ndata: {"type":"error","error":{"type":"invalid_request_error","message":"no"}}\n\n'
    first, second = upstream(STREAM_HEAD + chunked(told)), upstream(ANTHROPIC_STREAM)
    it = relay({"anthropic": first, "anthropic2": second})
    for _ in range(2):
        assert it.post("/v1/messages", prompt(stream=True)).body == told
    assert len(first.requests) == 2 and not second.requests


@pytest.mark.parametrize(("size", "whole"), [(0, True), (1, False), (20_000, False)])
def test_a_providers_head_has_at_most_256_kib(size, whole):
    """Even if it is whole when it is first looked at."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx-a: %s\r\n\r\n"
    head %= b"x" * (monorelay.RESPONSE_HEAD_BYTES - len(head % b"") + size)
    channel = types.SimpleNamespace(received=bytearray(head), ended=False, take=lambda count: head[:count])
    heads = monorelay.ResponseHeads(types.SimpleNamespace(now=0.0), channel)
    if whole:
        assert heads.take_final().status == 200
    else:
        with pytest.raises(monorelay.FramingError, match="its head is longer than"):
            heads.take_final()


def test_an_error_that_opens_a_stream_is_not_held_back(upstream, relay):
    told = b'data: {"error":{"message":"overloaded"}}\n\n'
    gate = threading.Event()
    it = relay({"openai": upstream(gated_pieces([told], [gate]))})
    with it.client() as client:
        client.send(request("POST", "/v1/chat/completions", json.dumps(chat(stream=True)).encode()))
        client.sock.settimeout(2)
        client.until(b"\r\n\r\n")
        assert client.chunk() == told
        gate.set()


@pytest.mark.timed
def test_failing_over_waits_for_no_body(upstream, relay):
    gate = threading.Event()
    stuck = b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\nab"

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(stuck)
        connection.wait(gate)

    it = relay({"anthropic": upstream(script), "anthropic2": upstream(answer())})
    begin = time.monotonic()
    assert it.post("/v1/messages", prompt()).status == 200 and time.monotonic() - begin < 2
    gate.set()


def test_a_stream_whose_only_line_has_no_end_is_whole(upstream, relay):
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    it = relay({"openai": upstream(replies_then_closes(head, b"data: [DONE]"))})
    got = it.post("/v1/chat/completions", chat(stream=True))
    assert (got.status, got.body) == (200, b"data: [DONE]")


def test_an_error_that_is_null_is_none(upstream, relay):
    first = b'data: {"error":null,"choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
    provider = upstream(STREAM_HEAD + chunked(first, *OPENAI_EVENTS))
    it = relay({"openai": provider, "openai2": provider})
    got = it.post("/v1/chat/completions", chat(stream=True))
    assert (got.body, got.get("x-monorelay-attempts")) == (first + b"".join(OPENAI_EVENTS), "1")


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/v1/chat/completions", b'data: {"error":null,"choices":[]}\n\n'),
        ("/v1/chat/completions", OPENAI_EVENTS[1] + b'data: {"choices":[{"index":1'),
        ("/v1/chat/completions", OPENAI_EVENTS[0]),
        (
            "/v1/chat/completions",
            b'data: {"choices":[{"delta":{"content":"\\"finish_reason\\":\\"stop\\""}}]}\n\n',
        ),
        (
            "/v1/messages",
            b'data: {"type":"content_block_delta","delta":{"text":"{\\"type\\":\\"message_stop\\"}"}}\n\n',
        ),
        ("/v1/messages", b'data: {"type":"message_start"}\n\ndata: {"type":"message_sto'),
    ],
    ids=brief,
)
def test_words_that_only_look_like_an_end_are_none(upstream, relay, path, text):
    provider = upstream(replies_then_closes(CLOSE_DELIMITED["events"], text))
    with relay(both_formats(provider)).client() as client:
        client.send(request("POST", path, STREAMED))
        assert_died(client, after=text, anthropic=path == "/v1/messages")


def test_a_204_has_no_length_whatever_the_provider_says(upstream, relay):
    provider = upstream(replies(b"HTTP/1.1 204 Nothing\r\ncontent-length: 5\r\nx-a: 1\r\n\r\n", answer()))
    it = relay({"anthropic": provider})
    with it.client() as client:
        got = client.ask("DELETE", "/v1/files/f1", None, ANTHROPIC_VERSION)
        assert (got.status, got.get("x-a")) == (204, "1")
        assert got.get("content-length") is None and got.get("transfer-encoding") is None
        assert client.ask("POST", "/v1/messages", STREAMED).status == 200


# ------------------------------------------------------------------------------------------------------------
# Relay: clients that leave, clients that do not read
# ------------------------------------------------------------------------------------------------------------


def leaves_early(connection: Connection, opening: bytes, seen: dict[str, Any]) -> None:
    """Sends the opening and notes when the relay hangs up."""
    connection.read_request()
    connection.send(opening)
    connection.ended_within(TIMEOUT_SECONDS)
    seen["at"] = time.monotonic()


OPENINGS = {
    "a non-streaming wait": (json.dumps(prompt()).encode(), b""),
    "a stream before its head": (STREAMED, b""),
    "a stream before its first event": (STREAMED, STREAM_HEAD),
    "a stream": (STREAMED, STREAM_HEAD + chunk(ANTHROPIC_EVENTS[0])),
    "a long answer": (STREAMED, b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf"),
}


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("during", OPENINGS)
def test_a_client_that_leaves_closes_upstream_at_once(upstream, relay, during, end):
    body, opening = OPENINGS[during]
    seen: dict[str, Any] = {}
    provider = upstream(lambda connection: leaves_early(connection, opening, seen))
    it = relay({"anthropic": two_keys(provider)})
    client = it.client()
    client.send(request("POST", "/v1/messages", body))
    assert provider.called.wait(TIMEOUT_SECONDS)
    for mark in (b"half", b"message_start"):
        if mark in opening:
            client.until(mark)
    left = time.monotonic()
    getattr(client, end)()
    assert eventually(lambda: seen["at"]) - left < 1
    it.logged("client_gone")
    assert len(provider.requests) == 1
    provider.script = replies(answer())
    it.post("/v1/messages", prompt())
    assert provider.requests[-1].get("x-api-key") == "sk-a", "a departure cools nothing"


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_client_that_leaves_within_an_upload_closes_upstream(upstream, relay, end):
    seen: dict[str, Any] = {}

    def script(connection: Connection) -> None:
        connection.until(b"\r\n\r\n")
        connection.until(b"first half")
        connection.upstream.called.set()
        seen["whole"] = b"second" in connection.rest()
        seen["at"] = time.monotonic()

    provider = upstream(script)
    it = relay({"anthropic": provider})
    client = it.client()
    client.send(request("POST", "/v1/files", b"first half", ANTHROPIC_VERSION, "content-length: 1000000"))
    assert provider.called.wait(TIMEOUT_SECONDS)
    left = time.monotonic()
    getattr(client, end)()
    assert eventually(lambda: seen["at"]) - left < 1 and not seen["whole"]
    it.logged("client_gone")


@pytest.mark.parametrize("kind", ["stream", "answer"])
def test_a_client_that_does_not_read_holds_upstream_back(upstream, relay, kind):
    taken, piece = [0], chunk(b"data: " + b"x" * (1 << 16) + b"\n\n")
    head = STREAM_HEAD if kind == "stream" else STREAM_HEAD.replace(b"text/event-stream", b"application/json")

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(head, chunk(b"event: message_start\n"))
        connection.sock.settimeout(0.5)
        with contextlib.suppress(socket.timeout):
            while taken[0] < 500 << 20:
                connection.sock.sendall(piece)
                taken[0] += len(piece)
        connection.upstream.called.set()

    provider = upstream(script)
    with relay({"anthropic": provider}).client(SO_RCVBUF=1 << 16) as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        eventually(lambda: taken[0] and provider.connections and provider.connections[0].sock.fileno() == -1)
    assert 0 < taken[0] <= 10 << 20


def test_a_client_that_has_sent_much_ahead_and_leaves_is_noticed_within_a_second(upstream, relay):
    provider = upstream(silence)
    with relay({"anthropic": provider}).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED), b"x" * 300_000)
        assert provider.called.wait(TIMEOUT_SECONDS)
        client.close()
        eventually(lambda: provider.left, seconds=1.5)


# ------------------------------------------------------------------------------------------------------------
# Responses: an Outgoing makes bytes of them, without any socket
# ------------------------------------------------------------------------------------------------------------


def outgoing(response: Any, method: str = "POST", version: str = "1.1") -> Any:
    """What makes bytes of a response to such a request."""
    asked = monorelay.parse_request_head(f"{method} /v1/messages HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    record = monorelay.AccessRecord(0.0, 0.0)
    record.request_id = "req_1"
    made = monorelay.Outgoing(response, asked, "anthropic", record)
    made.record = record
    return made


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("method", "status", "body"),
    [("GET", 200, b'{"status":"ok"}'), ("HEAD", 200, b'{"status":"ok"}'), ("HEAD", 200, b""), ("POST", 404, b"{}"),
     ("OPTIONS", 204, b""), ("HEAD", 204, b""), ("POST", 200, b"x" * 60_000), ("HEAD", 200, b"x" * 100_000)],
    ids=brief,
)  # fmt: skip
def test_an_own_response_has_its_length_and_goes_out_at_once(method, status, body, version, keep):
    it = outgoing(monorelay.own_response(status, body, [("x-a", "b")], "req_1"), method, version)
    head, _, rest = it.begin(keep, 1.0).partition(b"\r\n\r\n")
    got = Message(head, rest)
    assert (it.ended, it.keep_alive, it.must_reset) == (True, keep, False)
    assert got.status == status and rest == (b"" if method == "HEAD" else body)
    assert got.all("content-length") == ([] if status == 204 else [str(len(body))])
    assert got.all("transfer-encoding") == [] and got.get("x-a") == "b" and got.get("request-id") == "req_1"
    assert got.get("connection") == ("close" if not keep else "keep-alive" if version == "1.0" else None)
    assert got.all("content-type") == ["application/json"] * bool(body)
    assert (it.record.status, it.record.first_byte, it.record.bytes_sent) == (status, 1.0, len(rest))


def test_a_long_body_of_the_relays_own_goes_out_without_being_copied():
    body, record = b"x" * 100_000, monorelay.AccessRecord(0.0, 0.0)
    outgoing = monorelay.Outgoing(monorelay.own_response(200, body, [], "req_1"), None, "openai", record)
    head = outgoing.begin(True, 0.0)
    assert b"content-length: 100000\r\n" in head and head.endswith(b"\r\n\r\n")
    assert not outgoing.ended and outgoing.rest() is body and outgoing.ended and record.bytes_sent == len(body)


def test_a_response_to_what_could_not_be_read_has_a_body():
    made = monorelay.own_response(400, b"{}", [], "req_1", close=True)
    it = monorelay.Outgoing(made, None, "openai", monorelay.AccessRecord(0.0, 0.0))
    assert it.begin(False, 0.0).endswith(b"\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}") and it.ended


class PassedOn(NamedTuple):
    """What became of a provider's answer: its head, its body out of the framing, whether that ended properly."""

    head: bytes
    body: bytes
    whole: bool
    keep_alive: bool
    must_reset: bool
    error: str
    bytes_sent: int


def passed_on(
    head: bytes, pieces: list[bytes], method: str = "POST", version: str = "1.1", broken: bool = False,
    at_once: bool = False, rewriter: Any = None,
) -> PassedOn:  # fmt: skip
    """What a client gets of a provider's answer whose first piece has come with the head, until the provider closes,
    `at_once` with the last piece."""
    parsed = monorelay.parse_response_head(head)
    decoder = monorelay.response_decoder(parsed, method)
    came = monorelay.UpstreamResponse(monorelay.Candidate(None, None), None, parsed, decoder)
    came.absorb(pieces[0])
    fields = [("content-type", parsed.fields.get("content-type", ""))]
    made = monorelay.Response(parsed.status, parsed.reason, fields, relayed=came, rewriter=rewriter)
    it = outgoing(made, method, version)
    sent = it.begin(True, 0.0)
    for number, piece in enumerate(pieces[1:], 2):
        if not it.ended:
            sent += it.feed(piece, at_once and number == len(pieces), broken)
    if not it.ended:
        sent += it.feed(b"", True, broken)
    assert it.ended
    first, _, body = sent.partition(b"\r\n\r\n")
    whole = not it.record.error
    if b"transfer-encoding: chunked" in first:
        decoder = monorelay.ChunkedDecoder()
        body, whole = decoder.feed(body), decoder.finished
        assert decoder.rest == b""
    return PassedOn(first, body, whole, it.keep_alive, it.must_reset, it.record.error, it.record.bytes_sent)


def framed(text: bytes, framing: str, kind: str, status: int = 200) -> tuple[bytes, bytes]:
    """The head and the body of a provider's answer."""
    lines = [f"HTTP/1.1 {status} Fine", f"content-type: {kind}"]
    lines += {"length": [f"content-length: {len(text)}"], "chunked": ["transfer-encoding: chunked"]}.get(framing, [])
    body = chunked(text[:7], text[7:]) if framing == "chunked" else text
    return "\r\n".join([*lines, "", ""]).encode(), body


STREAM_TYPE = "text/event-stream; charset=utf-8"
OUTGOING_BODIES = {
    "JSON": ("application/json", b'{"usage":{"input_tokens":3,"output_tokens":4},"x":"Gr\xc3\xbc\xc3\x9fe"}'),
    "an empty body": ("application/json", b""),
    "bytes": ("application/octet-stream", bytes(range(256)) * 3),
    "an Anthropic stream": (STREAM_TYPE, b"".join(ANTHROPIC_EVENTS)),
    "an OpenAI stream": (STREAM_TYPE, b"".join(OPENAI_EVENTS)),
    "a stream in CRLF": (STREAM_TYPE, b"".join(ANTHROPIC_EVENTS).replace(b"\n", b"\r\n")),
    "a stream in CR": (STREAM_TYPE, b"".join(ANTHROPIC_EVENTS).replace(b"\n", b"\r")),
}


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("asked", ["POST", "HEAD", "204"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("name", OUTGOING_BODIES)
def test_a_providers_response_is_the_same_whether_it_comes_whole_or_byte_by_byte(name, framing, asked, version):
    kind, text = OUTGOING_BODIES[name]
    method, status = ("HEAD", 200) if asked == "HEAD" else ("POST", int(asked) if asked == "204" else 200)
    head, body = framed(text, framing, kind, status)
    body = body if asked == "POST" else b""
    ways = [[body], [b"", body], [body[:1], *bytewise(body[1:])], [b"", *bytewise(body)]]
    got = {passed_on(head, pieces, method, version, at_once=now) for pieces in ways for now in (False, True)}
    assert len(got) == 1, got
    it = got.pop()
    sent = Message(it.head, it.body)
    streams, bodyless = kind == STREAM_TYPE, asked != "POST"
    # A length is passed on but for a stream's, in which an error must have room.
    has_length = framing == "length" and not streams and status != 204
    until_close = not (has_length or bodyless) and version == "1.0"
    assert it.body == (b"" if bodyless else text) and it.whole and it.error == ""
    assert sent.all("content-length") == [str(len(text))] * has_length
    assert sent.all("transfer-encoding") == ["chunked"] * (not has_length and not bodyless and version == "1.1")
    kept = None if version == "1.1" else "keep-alive"
    assert sent.get("connection") == ("close" if until_close else kept)
    assert (it.keep_alive, it.must_reset, it.bytes_sent) == (not until_close, False, len(it.body))
    assert (sent.get("x-accel-buffering") == "no") == streams


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("name", ["JSON", "an Anthropic stream", "a stream in CRLF"])
def test_a_response_that_breaks_off_is_the_same_whether_it_comes_whole_or_byte_by_byte(
    name, framing, broken, version
):
    kind, text = OUTGOING_BODIES[name]
    head, body = framed(text, framing, kind)
    body = body[: len(body) - 30]
    ways = [[body], [b"", body], [b"", *bytewise(body)]]
    got = {passed_on(head, pieces, "POST", version, broken, now) for pieces in ways for now in (False, True)}
    assert len(got) == 1, got
    it = got.pop()
    if framing == "close" and name == "JSON" and not broken:
        assert it.error == "" and it.body == text[:-30], "how long it is, nobody can know"
        return
    assert (it.whole, it.keep_alive, it.error) == (False, False, "upstream_broken")
    assert it.must_reset == (version == "1.0" and not (framing == "length" and name == "JSON"))
    if "stream" in name:
        lines = it.body.rstrip(b"\n").split(b"\n")
        assert lines[-2] == b"event: error" and json.loads(lines[-1][6:])["request_id"] == "req_1"
    else:
        assert text.startswith(it.body)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_batchs_response_is_rewritten_whether_it_comes_whole_or_byte_by_byte(framing, version):
    provider = parse({"anthropic": {"base_url": "http://127.0.0.1:9"}}).providers["anthropic"]
    text = b'{"data":[%s{"x":"results_url"}]}' % (b'{"results_url": "http://127.0.0.1:9/v1/messages/batches/b"},' * 3)
    head, body = framed(text, framing, "application/json")
    got = {
        passed_on(head, pieces, "GET", version, rewriter=monorelay.ResultsUrlRewriter(provider, "http://relay"))
        for pieces in ([body], [b"", body], [b"", *bytewise(body)])
    }
    assert len(got) == 1
    it = got.pop()
    assert it.whole and it.body == text.replace(b"http://127.0.0.1:9/", b"http://relay/")
    assert Message(it.head, b"").get("content-length") is None and it.bytes_sent == len(it.body)


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("kind", ["application/json", STREAM_TYPE])
def test_a_response_whose_framing_breaks_never_ends_properly(kind, version):
    head, _ = framed(b"", "chunked", kind)
    body = chunk(ANTHROPIC_EVENTS[0]) + b"x\r\n" + chunk(ANTHROPIC_EVENTS[-1]) + b"0\r\n\r\n"
    for pieces in ([b"", body], [b"", *bytewise(body)], [body[:30], body[30:]]):
        it = passed_on(head, pieces, "POST", version)
        assert (it.whole, it.keep_alive, it.error, it.must_reset) == (False, False, "upstream_broken", version == "1.0")
        passed = it.body.partition(b"\nevent: error\n")[0] if kind == STREAM_TYPE else it.body
        assert ANTHROPIC_EVENTS[0].startswith(passed) and (b"event: error" in it.body) == (kind == STREAM_TYPE)


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"], ids=brief)
@pytest.mark.parametrize("name", [b"message_stop", b"error", b"response.completed"], ids=brief)
def test_a_stream_that_ends_behind_the_name_of_its_last_event_has_the_same_end_in_bytes(name, end):
    text = ANTHROPIC_EVENTS[0] + b"event: " + name + end
    head, body = framed(text, "close", STREAM_TYPE)
    got = [passed_on(head, pieces) for pieces in ([body], [b"", *bytewise(body)], [body[:-1], body[-1:]])]
    assert got[0] == got[1] == got[2]


STREAM_LINES = [
    "event: message_start", 'data: {"type":"message_start"}', "event: message_stop", 'data: {"type": "message_stop"}',
    "data: [DONE]", 'data: {"finish_reason": "stop"}', ": comment", "", "id: 7", "data:", "event: error",
    'data: {"error": {"a": 1}}', "event: response.completed", 'data: {"a":',
]  # fmt: skip


@hypothesis.settings(max_examples=400)
@hypothesis.given(
    st.lists(st.sampled_from(STREAM_LINES), min_size=1, max_size=6), st.sampled_from(["\n", "\r\n", "\r"]),
    st.integers(0, 30), st.lists(st.floats(0, 1), max_size=6), st.sampled_from(["chunked", "close"]), st.booleans(),
)  # fmt: skip
def test_a_stream_has_the_same_end_wherever_it_is_cut_in_pieces(lines, end, missing, cuts, framing, broken):
    text = end.join([*lines, ""]).encode()
    text = text[: max(0, len(text) - missing)]
    head, body = framed(text, framing, STREAM_TYPE)
    edges = [0, *sorted(int(cut * len(body)) for cut in cuts), len(body)]
    got = passed_on(head, [b"", *(body[a:b] for a, b in zip(edges, edges[1:]))], broken=broken)
    assert got == passed_on(head, [b"", body], broken=broken)


# ------------------------------------------------------------------------------------------------------------
# Handler: who is let in
# ------------------------------------------------------------------------------------------------------------

USERS = {
    "alice": {"password": PASSWORD_HASH, "models": ["claude-*", "echo"]},
    "bob": {"password": PASSWORD_HASH},
}
GUARDED = {"server": {"jwt_secret": JWT_SECRET}, "users": USERS}


def test_both_headers_carry_a_token_and_one_valid_one_suffices(relay):
    it = relay({"echo": {}}, server={"access_key": [TOKEN, "second-access-key"], "jwt_secret": JWT_SECRET})
    for token in (TOKEN, "second-access-key", jwt.encode(claims(), JWT_SECRET, "HS256")):
        for lines in ([f"x-api-key: {token}"], [f"Authorization: Bearer {token}"],
        [f"authorization: bearer {token}"],
                      [f"x-api-key: {token}", "Authorization: Bearer other"], ["x-api-key: other",
                       f"Authorization: Bearer {token}"]):  # fmt: skip
            assert it.post("/v1/messages", prompt("echo"), *lines, token="").status == 200, lines


@pytest.mark.parametrize(
    "lines",
    [
        [], ["x-api-key:"], ["Authorization: Bearer"], ["Authorization: Bearer "], ["x-api-key: wrong"],
         [f"Authorization: {TOKEN}"],
        [f"Authorization: Basic {TOKEN}"], [f"x-api-key: {TOKEN}x"], [f"x-api-key: {TOKEN[:-1]}"],
         [f"Authorization: Bearer {TOKEN} x"],
        ["x-api-key: caf\xe9"], ["Authorization: Bearer \xff\xfe"], [f"Cookie: x-api-key={TOKEN}"],
         [f"api-key: {TOKEN}"],
        *([f"x-api-key: {BAD_TOKENS[name]}"] for name in ("alg none", "exp past", "another secret",
        "two parts")),
        [f"x-api-key: {token_of(HS256, {'sub': 'alice', 'exp': 4e9, 'type': 'refresh'})}"],
        [f"x-api-key: {token_of(HS256, {'sub': 'alice', 'exp': 4e9, 'type': 'other'})}"],
        [f"x-api-key: {token_of(HS256, {'sub': 'mallory', 'exp': 4e9})}"],
        [f"x-api-key: {token_of(HS256, {'exp': 4e9})}"],
        [f"x-api-key: {token_of(HS256, {'sub': ['alice'], 'exp': 4e9})}"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_nobody_else_is_let_in(upstream, relay, lines, path):
    provider = upstream(answer())
    it = relay({"anthropic": provider, "openai": provider}, **GUARDED)
    refused(
        it.post(path, prompt(), *lines, token=""), 401, "authentication_error", openai_shape="chat" in path
    )
    assert not provider.connections


def test_any_subject_is_let_in_when_there_are_no_users(relay):
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET})
    token = jwt.encode(claims(sub="anyone"), JWT_SECRET, "HS256")
    me = it.ask("GET", "/api/auth/me", token=token).json
    assert (me["username"], me["admin"], me["models"]) == ("anyone", False, None)


def test_health_probes_and_telemetry_need_no_token_or_give_nothing(relay):
    it = relay({"echo": {}})
    got = it.ask("GET", "/health", token="")
    assert (got.status, got.json["status"], got.json["version"]) == (200, "ok", monorelay.__version__)
    assert [it.ask("HEAD", path, token="").status for path in ("/", "/health")] == [200, 200]
    assert it.ask("HEAD", "/api/hello").status == 200
    got = it.post("/api/event_logging/batch", {"events": []})
    assert (got.status, got.body) == (204, b"")


def test_login_refresh_and_me(relay):
    it = relay({"echo": {}}, **GUARDED)
    got = it.post("/api/auth/login", {"username": "alice", "password": PASSWORD}, token="")
    for _ in range(2):
        assert got.status == 200 and set(got.json) == {
            "access_token",
            "refresh_token",
            "token_type",
            "expires_in",
            "user",
        }
        assert (got.json["token_type"], got.json["user"]) == ("bearer", {"username": "alice"})
        access = jwt.decode(got.json["access_token"], JWT_SECRET, ["HS256"])
        assert access["sub"] == "alice" and 0 < access["exp"] - time.time() <= got.json["expires_in"]
        me = it.ask("GET", "/api/auth/me", token=got.json["access_token"]).json
        assert (me["username"], me["admin"], me["expires"]) == ("alice", False, access["exp"])
        assert it.post("/v1/messages", prompt("echo"), token=got.json["access_token"]).status == 200
        assert it.post("/v1/messages", prompt("echo"), token=got.json["refresh_token"]).status == 401
        got = it.post("/api/auth/refresh", {"refresh_token": got.json["refresh_token"]}, token="")
    assert it.ask("GET", "/api/auth/me").json["admin"] is True


def test_me_tells_limits_and_what_is_left_of_them(upstream, relay):
    key = "key-of-alice-0123456789"
    users = {"alice": {"key": key, "models": ["claude-*"], "requests_per_minute": 2}}
    it = relay({"anthropic": upstream(answer())}, users=users)
    for left in (2, 1, 0, 0):
        assert it.ask("GET", "/api/auth/me", token=key).json == {
            "username": "alice", "admin": False, "viewer": False, "expires": None, "models": ["claude-*"],
            "requests_per_minute": 2, "requests_left": left,
            "budgets": [
                {"user": "alice", "limit": "requests_per_minute", "used": 2 - left, "of": 2, "reset": None}
            ],
        }  # fmt: skip
        it.post("/v1/messages", prompt(), token=key)
    assert it.ask("GET", "/api/auth/me").json == {
        "username": "admin", "admin": True, "viewer": False, "expires": None, "models": None,
        "requests_per_minute": None, "requests_left": None, "budgets": [],
    }  # fmt: skip


def test_who_may_not_or_not_now_is_told_what_may_be_and_when(upstream, relay):
    key = "key-of-alice-0123456789"
    nothing = relay({"echo": {}}, users={"alice": {"key": key, "models": []}})
    message = refused(nothing.post("/v1/messages", prompt("echo"), token=key), 403, "permission_error")
    assert message == "alice may not use the model 'echo', nor any other"
    users = {"alice": {"key": key, "models": ["claude-*", "fast"], "requests_per_minute": 1}}
    it = relay({"anthropic": upstream(answer())}, users=users)
    got = it.post("/v1/messages", prompt("gpt-5"), token=key)
    message = refused(got, 403, "permission_error")
    assert message == "alice may not use the model 'gpt-5', only claude-*, fast"
    assert it.post("/v1/messages", prompt(), token=key).status == 200
    got = it.post("/v1/messages", prompt(), token=key)
    message = refused(got, 429, "rate_limit_error")
    assert message == f"alice is over 1 requests a minute; again in {got.get('retry-after')} s"


def test_a_disabled_provider_has_a_code_of_its_own(relay):
    it = relay({"anthropic": {"base_url": "http://127.0.0.1:9", "enabled": False}})
    got = it.post("/v1/messages", prompt())
    assert "is disabled" in refused(got, 503, "api_error")
    assert (got.get("x-monorelay-error"), got.get("x-should-retry")) == ("provider_disabled", "false")


@pytest.mark.parametrize("secret", ["", JWT_SECRET])
def test_a_providers_key_is_told_from_a_token(relay, secret):
    it = relay({"echo": {}}, server={"jwt_secret": secret})
    for token in ("sk-ant-api03-abc", "sk-proj-abc"):
        message = refused(it.ask("GET", "/v1/models", token=token), 401, "authentication_error", openai_shape=True)
        assert message == "this is a provider's key; use the relay's own"
    expired = jwt.encode(claims(exp=1), JWT_SECRET, "HS256")
    got = it.ask("GET", "/v1/models", None, f"Authorization: Bearer {expired}", token="sk-ant-api03-abc")
    assert "provider's key" not in got.json["error"]["message"], "the other token tells more"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("login", {"username": "alice", "password": "wrong"}, 401),
        ("login", {"username": "nobody", "password": PASSWORD}, 401),
        ("login", {"username": "alice", "password": PASSWORD_HASH}, 401),
        ("login", {"username": "alice"}, 400),
        ("login", {"username": ["alice"], "password": PASSWORD}, 400),
        ("login", b"not json", 400),
        ("login", b"[" * 10_000, 400),
        ("login", b'{"username":"\\ud800","password":"x"}', 401),
        ("refresh", {"refresh_token": "x"}, 401),
        ("refresh", {"refresh_token": jwt.encode(claims(), JWT_SECRET, "HS256")}, 401),
        (
            "refresh",
            {"refresh_token": jwt.encode(claims(type="refresh", sub="mallory"), JWT_SECRET, "HS256")},
            401,
        ),
        ("refresh", {}, 400),
    ],
    ids=brief,
)
def test_login_and_refresh_refuse(relay, path, body, status):
    got = relay({"echo": {}}, **GUARDED).post(f"/api/auth/{path}", body, token="")
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    message = refused(got, status, kind, openai_shape="type" not in got.json)
    assert "alice" not in message and "nobody" not in message, "who exists is nobody's business"


@pytest.mark.timed
def test_an_unknown_user_costs_the_time_of_a_wrong_password(relay):
    it = relay({"echo": {}}, **GUARDED)

    def cost(username: str) -> float:
        begin = time.perf_counter()
        assert it.post("/api/auth/login", {"username": username, "password": "wrong"}, token="").status == 401
        return time.perf_counter() - begin

    known, unknown = (min(cost(name) for _ in range(3)) for name in ("alice", "nobody"))
    assert 0.4 < known / unknown < 2.5


@pytest.mark.parametrize(
    "names", [["alice"], [f"user{n}" for n in range(200)]], ids=["per user", "per address"]
)
def test_login_attempts_are_throttled(relay, names):
    it = relay({"echo": {}}, **GUARDED)
    for name in itertools.islice(itertools.cycle(names), 200):
        got = it.post("/api/auth/login", {"username": name, "password": "wrong"}, token="")
        if got.status != 401:
            break
    refused(got, 429, "rate_limit_error", openai_shape="type" not in got.json)
    assert int(got.get("retry-after")) > 0
    assert it.post("/api/auth/login", {"username": names[0], "password": PASSWORD}, token="").status == 429
    assert it.ask("GET", "/health").status == 200


@pytest.mark.parametrize(("model", "status"), [("claude-x", 200), ("claude-x@anthropic", 200), ("echo", 200),
("fast", 403),
                                               ("gpt-5", 403), ("gpt-5@anthropic", 403), ("secret-alias",
                                                403)])  # fmt: skip
def test_a_users_models_are_checked_against_the_name_asked_for(upstream, relay, model, status):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, **GUARDED, aliases={"fast": "claude-x", "secret-alias": "claude-x"})
    got = it.post("/v1/messages", prompt(model), token=jwt.encode(claims(), JWT_SECRET, "HS256"))
    assert got.status == status and bool(provider.requests) == (status == 200)
    if status == 403:
        refused(got, 403, "permission_error")


def test_a_user_over_its_limit_waits(upstream, relay):
    provider = upstream(answer())
    users = {name: {"password": PASSWORD_HASH, "requests_per_minute": 2} for name in ("alice", "bob")}
    it = relay({"anthropic": provider}, server={"jwt_secret": JWT_SECRET}, users=users)
    token = jwt.encode(claims(), JWT_SECRET, "HS256")
    got = [it.post("/v1/messages", prompt(), token=token) for _ in range(3)]
    assert [one.status for one in got] == [200, 200, 429]
    refused(got[2], 429, "rate_limit_error")
    assert 0 < int(got[2].get("retry-after")) <= 60 and len(provider.requests) == 2
    assert (
        it.post("/v1/messages", prompt(), token=jwt.encode(claims(sub="bob"), JWT_SECRET, "HS256")).status
        == 200
    )


def bearer(**changes: Any) -> str:
    """A token that was minted elsewhere with the secret."""
    return jwt.encode(claims(**changes), JWT_SECRET, "HS256")


def log_in(it: Relay, username: str = "alice", password: str = PASSWORD, source: str = "") -> Message:
    with it.client(source) as client:
        body = json.dumps({"username": username, "password": password}).encode()
        return client.ask("POST", "/api/auth/login", body, token="")


def is_let_in(it: Relay, token: str) -> bool:
    status = it.ask("GET", "/api/auth/me", token=token).status
    assert status in (200, 401)
    return status == 200


@pytest.mark.parametrize(
    "lines",
    [
        ["x-api-key: a", "x-api-key: b", f"x-api-key: {TOKEN}"],
        [f"x-api-key: {TOKEN}", "x-api-key: b", "x-api-key: c"],
        ["Authorization: Bearer a", "x-api-key: b", f"x-api-key: {TOKEN}"],
        ["Authorization: Bearer a", f"Authorization: Bearer {TOKEN}", "x-api-key: b"],
        [f"x-api-key: {TOKEN}", *["x-api-key: guess"] * 190],
    ],
    ids=brief,
)
def test_more_than_two_tokens_are_a_bad_request(upstream, relay, lines):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    refused(it.post("/v1/messages", prompt(), *lines, token=""), 400, "invalid_request_error")
    assert not provider.connections


@pytest.mark.parametrize("lines", [["x-api-key: a", f"x-api-key: {TOKEN}"],
                                   ["Authorization: Bearer a", f"Authorization: Bearer {TOKEN}"]])  # fmt: skip
def test_one_valid_token_of_two_suffices_wherever_they_stand(relay, lines):
    assert relay({"echo": {}}).post("/v1/messages", prompt("echo"), *lines, token="").status == 200


def test_guesses_from_one_address_lock_nobody_out_at_another(relay):
    it = relay({"echo": {}}, **GUARDED)
    got = next(
        got for _ in range(100) if (got := log_in(it, password="wrong", source="127.0.0.2")).status != 401
    )
    refused(got, 429, "rate_limit_error", openai_shape=True)
    assert log_in(it, source="127.0.0.2").status == 429
    assert log_in(it, source="127.0.0.3").status == 200
    assert log_in(it, username="bob", source="127.0.0.2").status == 200, "another user of the same house"


def test_addresses_of_one_ipv6_network_count_as_one():
    def same(first: str, second: str) -> bool:
        return monorelay.network_of(first) == monorelay.network_of(second)

    assert same("2001:db8:1:2::1", "2001:db8:1:2:ffff:ffff:ffff:ffff")
    assert same("fe80::1%eth0", "fe80::2%eth0") and same("::ffff:192.0.2.1", "192.0.2.1")
    assert not same("2001:db8:1:2::1", "2001:db8:1:3::1")
    assert not same("192.0.2.1", "192.0.2.2") and not same("::ffff:192.0.2.1", "::ffff:192.0.2.2")


def test_few_passwords_wait_to_be_hashed_and_the_others_are_told_so_at_once(relay):
    it = relay({"echo": {}}, **GUARDED)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(it.client(f"127.0.2.{number}")) for number in range(1, 61)]
        for number, client in enumerate(clients):
            body = json.dumps({"username": f"user{number}", "password": "wrong"}).encode()
            client.send(request("POST", "/api/auth/login", body, token=""))
        got = [client.answer() for client in clients]
    assert {one.status for one in got} == {401, 429}
    for one in got:
        if one.status == 429:
            refused(one, 429, "rate_limit_error", openai_shape=True)
            assert int(one.get("retry-after")) > 0
    assert log_in(it, source="127.0.2.99").status == 200


def test_an_empty_section_of_users_lets_no_token_in_and_a_missing_one_any(relay):
    server = {"jwt_secret": JWT_SECRET}
    assert is_let_in(relay({"echo": {}}, server=server), bearer(sub="anyone"))
    assert not is_let_in(relay({"echo": {}}, server=server, users={}), bearer(sub="anyone"))


def test_the_last_user_to_be_removed_is_locked_out_too(relay):
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users={"alice": {"password": PASSWORD_HASH}})
    tokens = log_in(it).json
    foreign = bearer()
    assert is_let_in(it, tokens["access_token"]) and is_let_in(it, foreign)
    it.server.reload(parse({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users={}))
    assert not is_let_in(it, tokens["access_token"]) and not is_let_in(it, foreign)
    got = it.post("/api/auth/refresh", {"refresh_token": tokens["refresh_token"]}, token="")
    refused(got, 401, "authentication_error", openai_shape=True)


@pytest.mark.parametrize("password", ["changed", "removed"])
def test_a_new_password_hash_ends_what_was_issued_here_and_nothing_else(relay, password):
    it = relay({"echo": {}}, **GUARDED)
    tokens, foreign = log_in(it).json, bearer()
    refreshed = it.post("/api/auth/refresh", {"refresh_token": tokens["refresh_token"]}, token="").json
    bobs = log_in(it, "bob").json["access_token"]
    users = {**USERS, "alice": {"models": ["claude-*"]}}
    if password == "changed":
        users["alice"]["password"] = monorelay.hash_password("a new one")
    it.server.reload(parse({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=users))
    for issued in (tokens, refreshed):
        assert not is_let_in(it, issued["access_token"])
        got = it.post("/api/auth/refresh", {"refresh_token": issued["refresh_token"]}, token="")
        refused(got, 401, "authentication_error", openai_shape=True)
    assert is_let_in(it, foreign) and is_let_in(it, bobs)
    if password == "changed":
        assert is_let_in(it, log_in(it, password="a new one").json["access_token"])


def test_a_reload_that_leaves_the_password_alone_ends_no_token(relay):
    it = relay({"echo": {}}, **GUARDED)
    token = log_in(it).json["access_token"]
    users = {**USERS, "alice": {**USERS["alice"], "requests_per_minute": 9}}
    it.server.reload(parse({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=users))
    assert is_let_in(it, token)


@pytest.mark.parametrize(
    ("issued", "is_taken"), [({"iat": UNIX_TIME - 1}, False), ({}, False), ({"iat": UNIX_TIME + 1}, True)]
)
def test_tokens_since_ends_what_was_issued_before_or_does_not_say_when(relay, issued, is_taken):
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(UNIX_TIME))
    users = {"alice": {"password": PASSWORD_HASH, "tokens_since": since}, "bob": {}}
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=users)
    assert is_let_in(it, bearer(**issued)) == is_taken
    assert is_let_in(it, bearer(sub="bob", **issued)), "of another user"
    got = it.post("/api/auth/refresh", {"refresh_token": bearer(type="refresh", **issued)}, token="")
    assert got.status == (200 if is_taken else 401)
    assert is_let_in(it, log_in(it).json["access_token"])


def test_a_refresh_that_comes_slowly_is_judged_by_what_holds_at_its_end(relay):
    it = relay({"echo": {}}, **GUARDED)
    body = json.dumps({"refresh_token": log_in(it).json["refresh_token"]}).encode()
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))
    users = {**USERS, "alice": {**USERS["alice"], "tokens_since": since}}
    with it.client() as client:
        client.send(request("POST", "/api/auth/refresh", body, token="")[:-9])
        eventually(lambda: it.server.service.running)
        it.server.reload(parse({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=users))
        assert is_let_in(it, log_in(it, "bob").json["access_token"]), "the reload is through"
        client.send(body[-9:])
        refused(client.answer(), 401, "authentication_error", openai_shape=True)


@pytest.mark.parametrize("left", [{}, {"jwt_secret": JWT_SECRET}], ids=["nothing", "a jwt_secret"])
def test_an_access_key_that_was_removed_lets_nobody_in(relay, left):
    it = relay({"echo": {}}, server=left)
    assert is_let_in(it, TOKEN)
    it.server.reload(parse({"echo": {}}, server={"access_key": "", **left}))
    assert not is_let_in(it, TOKEN)
    assert it.logged("/api/auth/me", "401")
    assert ("no credential any more" in it.log.getvalue()) == (not left)
    assert not left or is_let_in(it, bearer(sub="anyone"))


def test_a_jwt_secret_that_was_removed_makes_no_more_tokens(relay):
    users = {"alice": {"password": PASSWORD_HASH}}
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=users)
    tokens = [bearer(), log_in(it).json["access_token"]]
    assert [is_let_in(it, token) for token in tokens] == [True, True]
    it.server.reload(parse({"echo": {}}, users=users))
    assert [is_let_in(it, token) for token in tokens] == [False, False] and is_let_in(it, TOKEN)
    token = log_in(it).json["access_token"]
    it.server.reload(parse({"echo": {}}, users={**users, "bob": {}}))
    assert is_let_in(it, token), "what was made up for this run stays"
    it.server.reload(parse({"echo": {}}, server={"access_key": ""}, users=users))
    assert not is_let_in(it, TOKEN) and is_let_in(it, token)
    it.logged("warning", "no credential any more")


def test_a_key_made_up_for_the_run_survives_reloads(relay):
    nothing = {"access_key": ""}
    it = relay({"echo": {}}, server=nothing)
    (made,) = it.server.service.config.server.access_keys
    it.server.reload(parse({"echo": {}}, server=nothing, aliases={"fast": "echo"}))
    assert is_let_in(it, made.reveal())
    it.server.reload(parse({"echo": {}}))
    assert is_let_in(it, TOKEN) and not is_let_in(it, made.reveal())
    assert it.logged("status=401", "/api/auth/me") and "credential" not in it.log.getvalue()
    it.server.reload(parse({"echo": {}}, server=nothing))
    assert is_let_in(it, made.reveal()) and not is_let_in(it, TOKEN)
    it.logged("warning", "no credential any more")
    assert made.reveal() not in it.log.getvalue()


def test_only_requests_to_models_that_were_let_through_count(upstream, relay):
    provider = upstream(answer())
    users = {"alice": {"models": ["claude-*"], "requests_per_minute": 2}}
    it = relay({"anthropic": provider}, server={"jwt_secret": JWT_SECRET}, users=users)
    token = bearer()
    for _ in range(3):
        assert it.ask("GET", "/v1/models", token=token).status == 200
        assert it.ask("GET", "/api/auth/me", token=token).status == 200
        assert it.post("/v1/messages", prompt("gpt-5"), token=token).status == 403
        assert it.post("/v1/messages", b"{", token=token).status == 400
    assert [it.post("/v1/messages", prompt(), token=token).status for _ in range(3)] == [200, 200, 429]


MULTIPART = "Content-Type: multipart/form-data; boundary=b"
WITHOUT_MODEL = {
    "no JSON": ("POST", "/v1/unknown", b"--", []),
    "no body": ("POST", "/v1/unknown", b"", []),
    "a form": ("POST", "/v1/audio/transcriptions", b"--b--", [MULTIPART]),
    "a form of Anthropic's": ("POST", "/v1/unknown", b"--b--", [MULTIPART, ANTHROPIC_VERSION]),
    "bytes": ("PUT", "/v1/unknown", b"\0\xff", ["Content-Type: application/octet-stream"]),
}


@pytest.mark.parametrize("name", WITHOUT_MODEL)
def test_a_request_that_may_hide_a_model_counts_and_a_question_about_files_does_not(upstream, relay, name):
    provider = upstream(answer())
    users = {"alice": {"requests_per_minute": 2}}
    it = relay({"anthropic": provider, "openai": provider}, server={"jwt_secret": JWT_SECRET}, users=users)
    method, path, body, headers = WITHOUT_MODEL[name]

    def statuses() -> list[int]:
        return [it.ask("GET", "/v1/files", token=bearer()).status,
                it.ask(method, path, body, *headers, token=bearer()).status]  # fmt: skip

    assert [statuses() for _ in range(4)] == [[200, 200], [200, 200], [200, 429], [200, 429]]
    got = it.ask(method, path, body, *headers, token=bearer())
    refused(got, 429, "rate_limit_error", openai_shape="type" not in got.json)
    assert it.post("/v1/messages", prompt(), token=bearer()).status == 429, "it is the same count"
    assert len(provider.requests) == 4 + 2


def limited(upstream, relay, **sections: Any) -> tuple[Relay, Upstream, str]:
    """A relay whose user alice may use claude-* only, its provider of both formats, and her token."""
    provider = upstream(answer())
    it = relay({"anthropic": provider, "openai": provider}, **GUARDED, **sections)
    return it, provider, bearer()


@pytest.mark.parametrize("name", ["Model", "MODEL", "mOdel", "\\u004dodel", "MODE\\u004c", "mode\\u006C",
                                  "models", "model\\u0000", "MODELS", "model\u017f", "model\\u017f", " model ",
                                  "model\\t", "\u3000Model", "model_name", "engine", "deployment_id",
                                  "Extra_Body"])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions", "/v1/embeddings"])
def test_a_second_model_under_a_like_name_is_refused_to_whom_models_are_set(upstream, relay, name, path):
    it, provider, token = limited(upstream, relay)
    for body in ('{"model":"claude-a","%s":"claude-opus"}', '{"%s":"claude-opus","model":"claude-a"}'):
        got = it.post(path, (body % name).encode(), token=token)
        # Twice the very same name is a bad request of anybody.
        status = 400 if json.loads(f'"{name}"') == "model" else 403
        kind = "invalid_request_error" if status == 400 else "permission_error"
        refused(got, status, kind, openai_shape=path != "/v1/messages")
    assert not provider.requests
    assert it.post(path, b'{"model":"claude-a","x":{"Model":"y"},"modelx":1}', token=token).status == 200
    assert it.post(path, (body % "Model").encode()).status == 200, "an owner's body is the owner's business"


NAMED_ELSEWHERE = {
    "a tool": ("/v1/messages", '"model":"claude-a","tools":[{"type":"advisor_20260301","model":"claude-opus"}]'),
    "an image tool": ("/v1/responses", '"model":"claude-a","tools":[{"type":"image_generation","model":"gpt-image"}]'),
    "fallbacks": ("/v1/messages", '"fallbacks":[{"model":"claude-opus"}],"model":"claude-a"'),
    "a fallback of LiteLLM's": ("/v1/chat/completions", '"model":"claude-a","context_window_fallbacks":[{"a":["b"]}]'),
    "a preset": ("/v1/chat/completions", '"model":"claude-a","preset":"dear"'),
    "a gateway's options": ("/v1/chat/completions", '"model":"claude-a","providerOptions":{"x":{"models":["b"]}}'),
    "fallbacks, a list of names": ("/v1/chat/completions", '"model":"claude-a","fallbacks":["claude-opus"]'),
    "extra_body": ("/v1/chat/completions", '"model":"claude-a","extra_body":{"model":"claude-opus"}'),
    "a list of models": ("/v1/chat/completions", '"model":"claude-a,claude-opus"'),
    "a name too long to be read": ("/v1/chat/completions", f'"{"n" * 2000}":"claude-opus","model":"claude-a"'),
}


def padded(members: str, size: int) -> bytes:
    """A JSON object with these members and one of so many bytes."""
    return f'{{{members},"x":"{"y" * size}"}}'.encode()


# A body is read at once, after the others' turn, or walked.
@pytest.mark.parametrize("size", [1, 70_000, 300_000])
@pytest.mark.parametrize("name", NAMED_ELSEWHERE)
def test_a_model_named_elsewhere_is_refused_to_whom_models_are_set(upstream, relay, name, size):
    it, provider, token = limited(upstream, relay)
    path, members = NAMED_ELSEWHERE[name]
    got = it.post(path, padded(members, size), token=token)
    refused(got, 403, "permission_error", openai_shape=path != "/v1/messages")
    assert not provider.requests
    assert it.post(path, padded(members, size), token=bearer(sub="bob")).status == 200


@pytest.mark.parametrize("size", [1, 70_000, 300_000])
@pytest.mark.parametrize(
    "tool",
    ['{"name":"model","input_schema":{"type":"object","properties":{"model":{"type":"string"}},"required":["model"]}}',
     '{"type":"function","function":{"name":"x","parameters":{"properties":{"model":{"enum":["claude-opus"]}}}}}'],
    ids=["input_schema", "function"],
)  # fmt: skip
def test_a_tool_may_ask_for_a_model_of_its_own_kind(upstream, relay, tool, size):
    it, provider, token = limited(upstream, relay)
    assert it.post("/v1/messages", padded(f'"model":"claude-a","tools":[{tool}]', size), token=token).status == 200
    assert len(provider.requests) == 1


AMBIGUOUS = {
    "query": ("POST", "/v1/chat/completions?model=gpt-5", []),
    "escaped query": ("POST", "/v1/embeddings?a=1&%6dodel=gpt-5", []),
    "form": ("POST", "/v1/chat/completions", ["Content-Type: application/x-www-form-urlencoded"]),
    "form behind a blank": ("POST", "/v1/chat/completions",
                            ["Content-Type: \xc2\xa0application/x-www-form-urlencoded"]),
    "two types": ("POST", "/v1/chat/completions",
                  ["Content-Type: application/json", "Content-Type: multipart/form-data; boundary=b"]),
    "two alphabets": ("POST", "/v1/responses",
                      ["Content-Type: application/json", "content-type: application/json; charset=utf-16"]),
    "GET with a body": ("GET", "/v1/batches", ["Content-Type: application/octet-stream"]),
    "GET with JSON": ("GET", "/v1/batches", ["Content-Type: application/json"]),
    "DELETE with a body": ("DELETE", "/v1/files/file-1", ["Content-Type: application/octet-stream"]),
}  # fmt: skip


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_a_request_that_may_name_another_model_is_refused_to_whom_models_are_set(upstream, relay, name):
    it, provider, token = limited(upstream, relay)
    method, path, headers = AMBIGUOUS[name]
    body = b'{"model":"claude-a","x":"&model=gpt-5&"}'
    refused(it.ask(method, path, body, *headers, token=token), 403, "permission_error", openai_shape=True)
    assert not provider.requests
    assert it.ask(method, path, body, *headers, token=bearer(sub="bob")).status == 200


@pytest.mark.parametrize(
    "path",
    ["/v1/batches", "/v1/threads", "/v1/threads/runs", "/v1/evals", "/v1/realtime/sessions", "/v1/fine_tuning/jobs",
     "/v1/unknown", "/v1/filesX", "/v1/files/x/y", "/v1/batches/", "/v1/%62atches", "/v1/messages/batches",
     "/v1/assistants", "/v1/chat/completions/x"],
)  # fmt: skip
@pytest.mark.parametrize("version", [[], [ANTHROPIC_VERSION]], ids=["", "with version"])
def test_a_model_at_the_top_opens_no_path_where_it_decides_nothing(upstream, relay, path, version):
    it, provider, token = limited(upstream, relay)
    got = it.post(path, {"model": "claude-a", "input_file_id": "file-1"}, *version, token=token)
    refused(got, 403, "permission_error", openai_shape="type" not in got.json)
    assert not provider.requests


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
)
def test_a_model_at_the_top_decides_where_it_is_the_model(upstream, relay, path):
    it, provider, token = limited(upstream, relay)
    assert it.post(path, {"model": "claude-a"}, token=token).status == 200
    assert it.post(path, {"model": "gpt-5"}, token=token).status == 403
    assert len(provider.requests) == 1


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_a_model_without_route_names_others_only_to_whom_none_are_set(upstream, relay, path):
    routes = {"claude-opsu-4": "anthropic", "gpt-opus": "openai"}
    it, provider, token = limited(upstream, relay, routes=routes, aliases={"claude-opus-alias": "claude-opsu-4"})
    got = [it.post(path, prompt("claude-opus-4"), token=one) for one in (token, bearer(sub="bob"))]
    told, told_freely = (refused(one, 404, "not_found_error", openai_shape=path != "/v1/messages") for one in got)
    assert "claude-opus-4" in told and "claude-opsu-4" in told_freely
    for name in (*routes, "claude-opus-alias"):
        assert name.encode() not in got[0].head + got[0].body
    assert not provider.requests


def test_files_may_be_sent_by_whom_models_are_set(upstream, relay):
    it, provider, token = limited(upstream, relay)
    for version in ([], [ANTHROPIC_VERSION]):
        got = it.post(
            "/v1/files", b"--b", "Content-Type: multipart/form-data; boundary=b", *version, token=token
        )
        assert got.status == 200
    assert it.ask("GET", "/v1/files/file-1", token=token).status == 200
    assert len(provider.requests) == 3


@pytest.mark.parametrize("name", ["x-http-method-override", "X-HTTP-Method", "x-method-override", "X-HTTP-Override",
                                  "X_HTTP_Method_Override", "X-HTTP-Method_Override",
                                  "x.http.override"])  # fmt: skip
def test_no_header_makes_another_method_of_a_get(upstream, relay, name):
    it, provider, token = limited(upstream, relay)
    got = it.ask("GET", "/v1/files/file-1", None, f"{name}: POST", token=token)
    refused(got, 403, "permission_error", openai_shape=True)
    assert not provider.requests
    assert it.ask("GET", "/v1/files/file-1", None, f"{name}: POST", token=bearer(sub="bob")).status == 200


def test_a_batch_with_a_model_beside_it_is_never_sent_twice(upstream, relay):
    provider = upstream(answer(500))
    it = relay({"openai": two_keys(provider)})
    assert it.post("/v1/batches", {"model": "gpt-test", "input_file_id": "f"}).status == 500
    assert len(provider.requests) == 1


# ------------------------------------------------------------------------------------------------------------
# Handler: the relay's own answers
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "words"),
    [
        ("POST", "/v1/messages", prompt("claude-fsat"), 404, "not_found_error", "claude-fast"),
        ("POST", "/v1/chat/completions", chat("claude-fsat"), 404, "not_found_error", "claude-fast"),
        ("POST", "/v1/messages", prompt("gpt-5"), 400, "invalid_request_error", "use /v1/chat/completions"),
        ("POST", "/v1/chat/completions", chat("claude-x"), 400, "invalid_request_error", "use /v1/messages"),
        *(
            ("POST", path, prompt(), 400, "invalid_request_error", "base_url")
            for path in (
                "/v1/v1/messages", "/v1/v1/chat/completions", "/messages", "/chat/completions",
                "/anthropic/v1/messages", "/openai/v1/chat/completions", "/api/v1/messages",
            )
        ),
        ("GET", "/models", None, 400, "invalid_request_error", "must end in /v1"),
        ("POST", "/nowhere", {}, 404, "not_found_error", "/nowhere"),
        ("GET", "/favicon.ico", None, 404, "not_found_error", ""),
        ("GET", "/v1/messages", None, 405, "invalid_request_error", ""),
        ("DELETE", "/v1/models", None, 405, "invalid_request_error", ""),
        ("POST", "/v1/messages", b' {\n "model": x}', 400, "invalid_request_error", "line 2 column 11: Expecting"),
        ("POST", "/v1/messages", b'\xef\xbb\xbf{"model": "x"}', 400, "invalid_request_error", "a byte order mark"),
        ("POST", "/health", {}, 405, "invalid_request_error", ""),
        ("GET", "/api/auth/login", None, 405, "invalid_request_error", ""),
        ("TRACE", "/v1/messages", None, 405, "invalid_request_error", ""),
        ("CONNECT", "elsewhere.example:443", None, 405, "invalid_request_error", ""),
        ("POST", "/v1/messages", prompt("keyless"), 503, "api_error", "keyless"),
        *(("POST", path, body, 400, "invalid_request_error", "")
          for path in ("/v1/messages", "/v1/chat/completions", "/v1/messages/count_tokens")
          for body in (b"{", b"[]", {"x": 1}, {"model": 1}, b'{"model":"a","model":"b"}')),
    ],
)  # fmt: skip
def test_the_relays_own_errors(upstream, relay, method, path, body, status, kind, words):
    provider = upstream(answer())
    it = relay(
        {**both_formats(provider), "keyless": {"format": "anthropic", "base_url": provider.url, "keys": [""]}},
        routes={"claude-*x": "anthropic", "gpt-*": "openai", "keyless": "keyless"},
        aliases={"claude-fast": "claude-x"},
    )  # fmt: skip
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    got = it.ask(method, path, data)
    openai_shape = not path.startswith("/v1/messages") and "type" not in got.json
    assert openai_shape or not path.startswith("/v1/chat")
    assert words in refused(got, status, kind, openai_shape)
    assert not provider.requests
    assert bool(got.get("allow")) == (status == 405) and got.get("retry-after") is None
    assert got.get("x-should-retry") == "false", "trying again can't help"


@pytest.mark.parametrize(
    "path",
    ["/v1/files/../models", "/v1/files/%2e%2e/models", "/v1/files/.%2E/x", "/v1/files/%252e%252e/x",
     "/v1//files", "/v1/files/a%2f%2fb",
     "/v1/files/a%2f..%2fb", "/v1/files/./x", "/v1/files/.", "/v1/files/..", "/v1/files/a\\b",
     "/v1/files/a%5cb", "/v1/files/a%255cb",
     "/v1/files/a%00", "/v1/files/a%2500", "//evil.example/v1/files", "/../v1/files",
     "/v1/messages/batches/%2e%2e"],
)  # fmt: skip
def test_paths_that_climb_are_404_and_reach_nobody(upstream, relay, path):
    provider = upstream(answer())
    got = relay({"anthropic": provider}).ask("GET", path, None, ANTHROPIC_VERSION)
    assert (got.status, got.json["error"]["type"]) == (404, "not_found_error") and not provider.connections


@pytest.mark.parametrize("opening", ["/v1/files/", "/v1/models/", "/v1/messages/", "/"])
def test_a_path_of_more_than_512_escapes_is_a_404_that_says_so(upstream, relay, opening):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    fits = it.ask("GET", opening + "%41" * 512, None, ANTHROPIC_VERSION)
    assert "percent-encoded" not in fits.body.decode() and (opening != "/v1/files/" or fits.status == 200)
    count = len(provider.connections)
    for path in (opening + "%41" * 513, opening + "%41" * 5_000, opening + "%2e%2e/" * 1_000, "/" + "%" * 600):
        message = refused(it.ask("GET", path, None, ANTHROPIC_VERSION), 404, "not_found_error")
        assert "more than 512 percent-encoded characters" in message
    assert len(provider.connections) == count


@pytest.mark.parametrize(
    "path", ["/v1/files/a%0d%0aX-Evil:%201", "/v1/files/a%20b", "/v1/files/a%250d%250aX-Evil:1"]
)
def test_escaped_line_ends_stay_escaped(upstream, relay, path):
    provider = upstream(answer())
    relay({"anthropic": provider}).ask("GET", path, None, ANTHROPIC_VERSION)
    assert all(message.target == path and message.get("x-evil") is None for message in provider.requests)


@pytest.mark.parametrize("target", ["http://evil.example/v1/files/f", "https://evil.example:1/v1/files/f"])
def test_absolute_targets_and_host_choose_nothing(upstream, relay, target):
    provider = upstream(answer())
    with relay({"anthropic": provider}).client() as client:
        client.send(
            request("GET", target, None, ANTHROPIC_VERSION).replace(b"Host: relay", b"Host: evil.example")
        )
        assert client.answer().status == 200
    assert (provider.requests[0].target, provider.requests[0].get("host")) == (
        "/v1/files/f",
        f"127.0.0.1:{provider.port}",
    )


def test_name_at_provider_only_names_configured_providers(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, routes={"claude-*": "anthropic"})
    refused(it.post("/v1/messages", prompt("x@evil.example")), 404, "not_found_error")
    assert not provider.connections
    it.post("/v1/messages", prompt("claude-x@evil.example"))
    assert provider.requests[0].json["model"] == "claude-x@evil.example"


def catalogue_answer(*ids: str) -> bytes:
    return answer(
        200,
        json.dumps({"data": [{"id": name, "type": "model", "display_name": name} for name in ids]}).encode(),
    )


@pytest.mark.timed
def test_the_catalogue_has_each_usable_name_once_and_pages(upstream, relay):
    silent, clock = upstream(silence), Clock()
    it = relay(
        {"anthropic": upstream(catalogue_answer("claude-a", "claude-b")),
         "openai": upstream(catalogue_answer("gpt-a", "claude-a")),
         "anthropic2": upstream(answer(500)), "anthropic3": silent, "echo": {},
         "anthropic4": {"upstream": upstream(catalogue_answer("unused")), "enabled": False}},
         clock, aliases={"fast": "claude-a"},
    )  # fmt: skip
    with it.client() as client:
        client.send(request("GET", "/v1/models?limit=1000", None, ANTHROPIC_VERSION))
        eventually(lambda: len(it.server.service.catalogue._lists) == 3 and silent.called.is_set())
        clock.move(1.75)
        assert client.is_quiet()
        clock.move(0.25)  # two seconds at most, Claude Code waits three
        whole = client.answer().json
    ids = [model["id"] for model in whole["data"]]
    assert (
        {"claude-a", "claude-b", "gpt-a", "fast", "echo"} <= set(ids)
        and len(ids) == len(set(ids))
        and "unused" not in ids
    )
    assert (whole["has_more"], whole["first_id"], whole["last_id"]) == (False, ids[0], ids[-1])
    begin = time.monotonic()
    page = it.ask("GET", f"/v1/models?limit=2&after_id={ids[0]}", None, ANTHROPIC_VERSION).json
    assert ([model["id"] for model in page["data"]], page["has_more"]) == (ids[1:3], True)
    page = it.ask("GET", f"/v1/models?limit=2&before_id={ids[3]}", None, ANTHROPIC_VERSION).json
    assert [model["id"] for model in page["data"]] == ids[1:3]
    shape = it.ask("GET", "/v1/models").json
    assert time.monotonic() - begin < 1, "the catalogue is kept for five minutes"
    assert shape["object"] == "list" and [model["id"] for model in shape["data"]] == ids
    assert all(model["object"] == "model" and "owned_by" in model for model in shape["data"])
    assert it.ask("GET", "/v1/models/fast", None, ANTHROPIC_VERSION).json["type"] == "model"


def test_clients_that_ask_for_the_catalogue_together_have_the_provider_asked_once(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.wait(gate)
        connection.send(catalogue_answer("claude-a"))

    provider = upstream(script)
    it = relay({"anthropic": provider})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(it.client()) for _ in range(9)]
        assert {client.ask("GET", "/health").status for client in clients} == {200}
        for client in clients[1:]:
            client.send(request("GET", "/v1/models", None, ANTHROPIC_VERSION))
        # What was sent before this has been read when this is answered.
        assert clients[0].ask("GET", "/health").status == 200 and provider.called.wait(TIMEOUT_SECONDS)
        gate.set()
        answers = [client.answer() for client in clients[1:]]
    assert {answer.json["data"][0]["id"] for answer in answers} == {"claude-a"} and len(provider.requests) == 1


@pytest.mark.parametrize("fault", [answer(401), answer(402), b""], ids=brief)
def test_a_provider_that_lists_no_models_serves_on(upstream, relay, fault):
    def script(connection: Connection) -> None:
        while (asked := connection.read_request()).method == "POST" or fault:
            connection.send(answer() if asked.method == "POST" else fault)

    first, second = upstream(script), upstream(answer())
    it = relay({"anthropic": first, "anthropic2": second})
    assert it.ask("GET", "/v1/models").status == 200
    assert it.post("/v1/messages", prompt()).get("x-monorelay-provider") == "anthropic"


def test_a_list_with_an_endless_integer_is_none(upstream, relay):
    it = relay({"anthropic": upstream(answer(200, b'{"data":[{"id":"claude-a","n":%s}]}' % (b"9" * 4000)))})
    assert it.ask("GET", "/v1/models").json["data"] == []


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity"], ids=brief)
def test_a_list_with_what_is_no_json_number_is_none_and_the_catalogue_is_json(upstream, relay, value):
    odd = answer(200, b'{"data":[{"id":"claude-a","type":"model","n":%s}]}' % value)
    it = relay({"anthropic": upstream(odd), "anthropic2": upstream(catalogue_answer("claude-b"))})
    got = it.ask("GET", "/v1/models", None, ANTHROPIC_VERSION)
    assert [model["id"] for model in json.loads(got.body, parse_constant=pytest.fail)["data"]] == ["claude-b"]


@pytest.mark.parametrize("status", [401, 402])
def test_a_path_that_a_key_is_not_good_for_spoils_it_for_no_model(upstream, relay, status):
    def script(connection: Connection) -> None:
        while asked := connection.read_request():
            connection.send(answer(status if asked.method == "GET" else 200))

    provider = upstream(script)
    it = relay({"anthropic": two_keys(provider)})
    it.ask("GET", "/v1/organizations/users", None, ANTHROPIC_VERSION)
    assert it.post("/v1/messages", prompt()).status == 200
    assert provider.requests[-1].get("x-api-key") == "sk-a"


@pytest.mark.parametrize("kind", ["application/json; charset=utf-7", "multipart/form-data; boundary=x"])
def test_a_body_that_may_be_read_otherwise_is_refused_to_whom_models_are_set(upstream, relay, kind):
    it, provider, token = limited(upstream, relay)
    body = b'{"model":"claude-a","x":"+ACI-,+ACI-model+ACI-:+ACI-claude-opus"}'
    refused(it.post("/v1/messages", body, f"Content-Type: {kind}", token=token), 403, "permission_error")
    assert not provider.requests
    plain = "Content-Type: application/json; charset=UTF-8"
    assert it.post("/v1/messages", body, plain, token=token).status == 200


@pytest.mark.parametrize("status", [204, 304, 200])
def test_what_follows_an_answer_that_has_no_body_reaches_nobody(upstream, relay, status):
    def script(connection: Connection) -> None:
        asked = connection.read_request()
        if asked.method == "POST":
            connection.send(answer(200, b'"mine"'))
        else:
            connection.send(b"HTTP/1.1 %d Fine\r\nx-a: 1\r\n\r\n" % status)
            connection.read_request()
            connection.send(answer(200, b'"stray"'))

    it = relay({"anthropic": upstream(script)})
    it.ask("HEAD" if status == 200 else "GET", "/v1/files/f", None, ANTHROPIC_VERSION)
    assert it.post("/v1/messages", prompt()).body == b'"mine"'


def test_an_odd_entry_of_a_provider_does_not_spoil_the_catalogue(upstream, relay):
    odd = json.dumps({"data": [{"id": ["x"]}, {"id": 5}, {"nope": 1}, 7, {"id": "claude-a"}]}).encode()
    it = relay({"anthropic": upstream(answer(200, odd))})
    listing = it.ask("GET", "/v1/models", None, ANTHROPIC_VERSION).json
    assert [model["id"] for model in listing["data"]] == ["claude-a"]


def test_the_catalogue_lists_what_this_caller_can_call(upstream, relay):
    provider = upstream(answer(200, b'[{"id":"gpt-a"},{"id":"whisper-1"},{"id":"gpt-b"}]'))
    it = relay(
        {"openai": {"upstream": provider, "models": ["gpt-*", "sonar"]}, "off": {"format": "openai", "keys": [""],
         "base_url": provider.url, "models": ["sonar-pro"]}},
        routes={"gpt-*": "openai", "sonar": "openai", "sonar-pro": "off", "nothing-*": "openai"},
        aliases={"small": "gpt-a", "any/*": "*@openai"}, server={"jwt_secret": JWT_SECRET},
        users={"bob": {"models": ["gpt-b", "s*"]}},
    )  # fmt: skip

    def names(token: str) -> set[str]:
        return {model["id"] for model in it.ask("GET", "/v1/models", None, token=token).json["data"]}

    assert names(TOKEN) == {"gpt-a", "gpt-b", "sonar", "small"}, "a bare array is a list, too"
    assert names(jwt.encode(claims(sub="bob"), JWT_SECRET, "HS256")) == {"gpt-b", "sonar", "small"}


def test_a_model_that_is_not_listed_but_routed_is_asked_for_at_its_provider(upstream, relay):
    provider = upstream(replies(answer(200, b'{"data": []}'), answer(404, b'{"theirs": 1}')))
    it = relay({"openai": provider}, routes={"gpt-*": "openai"}, aliases={"mine": "gpt-a/b c"})
    assert [model["id"] for model in it.ask("GET", "/v1/models").json["data"]] == ["mine"]
    got = it.ask("GET", "/v1/models/gpt-new")
    assert (got.status, got.body) == (404, b'{"theirs": 1}')
    assert it.ask("GET", "/v1/models/nobody").get("x-monorelay-error") == "not_found"
    assert [sent.target for sent in provider.requests] == ["/v1/models", "/v1/models/gpt-new"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_what_comes_with_a_request_for_a_model_is_no_request_of_its_own(upstream, relay, method, is_chunked):
    """Behind a proxy that shares its connections, the answer to it would be another client's."""
    provider = upstream(replies(answer(200, b'{"data": []}'), answer(404, b"")))
    it = relay({"openai": provider}, routes={"gpt-*": "openai"})
    hidden = request("GET", "/health")
    framing = "Transfer-Encoding: chunked" if is_chunked else f"Content-Length: {len(hidden)}"
    with it.client() as client:
        client.send(request(method, "/v1/models/gpt-new", chunked(hidden) if is_chunked else hidden, framing))
        got = client.until(b"\r\n\r\n")
        assert got.startswith(b"HTTP/1.1 404 ") and b"\r\nconnection: close\r\n" in got.lower()
        assert b"HTTP/1.1" not in client.rest()


def test_a_list_that_cannot_be_read_is_warned_of_once(upstream, relay):
    it = relay({"openai": upstream(answer(200, b"<html>"))})
    for _ in range(2):
        assert it.ask("GET", "/v1/models").json["data"] == []
        it.server.service.catalogue._lists.clear()
    it.logged("warning", "the provider openai gives no list of models")
    assert it.log.getvalue().count("gives no list of models") == 1


def listed(text: str) -> list[dict[str, Any]]:
    return list(monorelay.listed_entries(monorelay.json_text([text.encode()])))


BLANK = " \t\r\n "


@pytest.mark.parametrize(
    ("text", "names"),
    [('{"data":[]}', []), ('{"data":[{"id":"a"}]}', ["a"]),
     ('{"data":[{"id":"a"},{"id":"b","x":[1,{"id":"c"}]}]}', "ab"),
     ('{"object":"list","data":[{"id":"a"}],"has_more":false}', ["a"]),
     ('{"a":{"data":[{"id":"no"}]},"b":[{"data":[{"id":"no"}]}],"data":[{"id":"a"}],"data2":[{"id":"no"}]}', ["a"]),
     ('{"a":"\\"data\\":[{\\"id\\":\\"no\\"}]","data":[{"id":"a"}]}', ["a"]),
     ('{"\\"data":[{"id":"no"}],"data":[{"id":"a"}]}', ["a"]), ('{"Data":[{"id":"no"}],"data":[{"id":"a"}]}', ["a"]),
     ('{"a":"\\\\","data":[{"id":"a"}]}', ["a"]), ('{"n":-1.5e3,"t":true,"z":null,"data":[{"id":"a"}]}', ["a"]),
     ('{"data":[{"id":"a","data":[{"id":"no"}]},{"id":"b"}]}', "ab"),
     (f'{BLANK}{{{BLANK}"x"{BLANK}:{BLANK}1{BLANK},{BLANK}"data"{BLANK}:{BLANK}[{BLANK}{{{BLANK}"id"{BLANK}:{BLANK}"a"'
      f'{BLANK}}}{BLANK},{BLANK}{{"id":"b"}}{BLANK}]{BLANK},{BLANK}"y"{BLANK}:{BLANK}2{BLANK}}}{BLANK}', "ab")],
    ids=brief,
)  # fmt: skip
def test_the_entries_of_a_list_of_models_are_found(text, names):
    assert [entry["id"] for entry in listed(text)] == list(names)
    assert listed(text) == json.loads(text)["data"]


@pytest.mark.parametrize(
    "odd", ["7", "null", '"a"', "[]", '[{"id":"no"}]', "{}", '{"id":7}', '{"id":null}', '{"id":["a"]}', '{"ID":"a"}',
            '{"id":{"id":"no"}}', '{"id":"%s"}' % ("x" * 257)], ids=brief)  # fmt: skip
def test_an_entry_that_names_no_model_is_an_empty_one(odd):
    assert listed(f'{{"data":[{odd},{{"id":"a"}},{odd}]}}') == [{}, {"id": "a"}, {}]


def test_an_entry_that_tells_much_keeps_only_its_name():
    usual = {"id": "a", "x": "y" * 1_700, "z": [[]] * 40}
    long, many = {"x": "y" * 2_100, "id": "b"}, {"id": "c", "z": [0] * 140}
    for values in ("[" * 130 + "]" * 130, '{"":' * 130 + "0" + "}" * 130, "[%s0]" % ("[]," * 130)):
        assert listed(f'{{"data":[{{"id":"n","x":{values}}}]}}') == [{"id": "n"}]
    assert listed(json.dumps({"data": [usual, long, many, usual]})) == [usual, {"id": "b"}, {"id": "c"}, usual]
    name = "\U0001f600" * 256
    assert listed(json.dumps({"data": [{"id": name}]}, ensure_ascii=False)) == [{"id": name}]


@pytest.mark.parametrize("more", [-1, 0, 1, 2_000])
def test_no_more_entries_are_listed_than_so_many(more):
    entries = [{"id": f"m-{number}"} for number in range(monorelay.LISTED_MODELS + more)]
    assert listed(json.dumps({"data": entries})) == entries[: monorelay.LISTED_MODELS]


@pytest.mark.parametrize(
    "text",
    ["", " ", '"[]"', '"data"', "null", "7", "{}", '{"a":1}', '{"a":[{"data":[]}]}', "data",
     '{"data"}', '{"data":}', '{data:[{"id":"a"}]}', '"data":[{"id":"a"}]', ',"data":[{"id":"a"}]',
     '{"a":1{"data":[{"id":"a"}]}', '{,"data":[{"id":"a"}]}', '{"a":1 "data":[{"id":"a"}]}', '{"a":x,"data":[]}'],
    ids=brief,
)  # fmt: skip
def test_what_is_no_object_with_a_list_is_none(text):
    with pytest.raises(ValueError):
        listed(text)


@pytest.mark.parametrize("value", ["null", "7", "true", '"a"', "{}", '{"id":"a"}', ',{"id":"a"}', ""], ids=brief)
def test_data_that_is_no_list_is_none(value):
    for behind in ("", ',"x":1', ',{"id":"a"}'):
        with pytest.raises(ValueError):
            listed(f'{{"data":{value}{behind}}}')


@pytest.mark.parametrize(
    "inner", ['{"id":"a"},,{"id":"b"}', ',{"id":"a"}', '{"id":"a"} {"id":"b"}', '{"id":"a"}[{"id":"b"}', '{"id":"a"},',
              '{"id":"a"}}', '{"id":"a"}:', '{"id":"a",}', '{"id":a}', '[{"id":"a"'], ids=brief)  # fmt: skip
def test_a_list_that_is_no_json_is_none(inner):
    with pytest.raises(ValueError):
        listed(f'{{"data":[{inner}]}}')


@pytest.mark.parametrize("part", ["before the list", "within the list", "behind the list"])
def test_a_list_that_is_cut_off_anywhere_is_none(part):
    text = '{"a": {"b": [1, "x"]}, "data" : [ {"id": "a", "n": 1.5}, {"id": "b", "x": [null]} ] , "z": [1]}'
    begin, end = text.index("[ {") + 1, text.index("] ,") + 1
    cuts = {"before the list": range(begin), "within the list": range(begin, end),
            "behind the list": range(end, len(text))}[part]  # fmt: skip
    assert [entry["id"] for entry in listed(text)] == ["a", "b"]
    taken = []
    for cut in cuts:
        with contextlib.suppress(ValueError):
            listed(text[:cut])
            taken.append(text[:cut])
    assert taken == []


LISTED = st.dictionaries(st.sampled_from(["id", "ID", "data", "x"]), JSON_VALUES | st.text(max_size=300)) | JSON_VALUES


@hypothesis.settings(max_examples=200)
@hypothesis.given(
    st.lists(st.tuples(st.text() | st.sampled_from(["Data", "id", "data ", '"data']), JSON_VALUES | st.lists(LISTED))),
    st.lists(LISTED), st.integers(0, 9), st.sampled_from([None, 0, 3, "\t"]), st.booleans(),
)  # fmt: skip
def test_the_names_are_those_that_json_finds(members, entries, place, indent, ascii_only):
    members = [(name, value) for name, value in members if name != "data"]
    members.insert(place, ("data", entries))
    text = json.dumps(dict(members), indent=indent, ensure_ascii=ascii_only)
    hypothesis.assume(not re.search(r"\d{21}", text))
    found = [entry.get("id") if isinstance(entry, dict) else None for entry in json.loads(text)["data"]]
    expected = [name if isinstance(name, str) and 0 < len(name) <= 256 else None for name in found]
    # Whether an empty name is one, is_text() says.
    got = [entry.get("id") or None for entry in listed(text)]
    assert got == expected


def test_a_list_that_is_broken_somewhere_lists_nothing_of_it(upstream, relay):
    whole = json.dumps({"data": [{"id": f"claude-{number}"} for number in range(9)]}).encode()
    damaged = whole.replace(b'}, {"id": "claude-5"', b'}, x{"id": "claude-5"')
    assert damaged != whole
    for text in (whole[:-40], whole[:-2], damaged, b"\xff" + whole, b'{"data": {"id": "claude-1"}}', whole[1:]):
        it = relay({"anthropic": upstream(answer(200, text))})
        assert it.ask("GET", "/v1/models").json["data"] == [], text


def test_what_a_provider_tells_of_its_models_at_length_is_not_kept(upstream, relay):
    entries = [{"id": "claude-a", "type": "model", "display_name": "A", "x": "y" * 3_000},
               {"id": "claude-b", "type": "model", "display_name": "B", "x": "y" * 300}]  # fmt: skip
    it = relay({"anthropic": upstream(answer(200, json.dumps({"data": entries}).encode()))})
    long, usual = it.ask("GET", "/v1/models", None, ANTHROPIC_VERSION).json["data"]
    assert long["id"] == "claude-a" and "x" not in long and len(json.dumps(long)) < 300
    assert usual == {**entries[1], "created_at": usual["created_at"]}


def test_a_model_is_found_whatever_curl_calls_the_body(upstream, relay):
    first, second = upstream(answer()), upstream(answer())
    it = relay({"openai": first, "openai2": second}, routes={"second": "openai2", "*": "openai"})
    for kind in ("application/json", "text/plain", "application/x-www-form-urlencoded", "application/x+json"):
        assert it.ask("POST", "/v1/audio/speech", b'{"model": "second"}', f"Content-Type: {kind}").status == 200
    assert (len(first.requests), len(second.requests)) == (0, 4)
    got = it.ask("POST", "/v1/audio/speech", b'{"model": "a", "model": "b"}', "Content-Type: application/json")
    refused(got, 400, "invalid_request_error", openai_shape=True)


@pytest.mark.parametrize("kind", ["application/json", "application/x+json", "application/octet-stream"])
@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/images/generations", "/v1/moderations"])
def test_what_is_not_json_is_a_400_where_the_model_decides(upstream, relay, path, kind):
    first, second = upstream(answer()), upstream(answer())
    it = relay({"openai": first, "openai2": second}, routes={"second": "openai2", "*": "openai"})
    body = b'{"model":"second"}'
    for odd in (b"\xef\xbb\xbf" + body, body.replace(b"}", b',"speed":NaN}'), body.decode().encode("utf-16"), b"x"):
        refused(it.post(path, odd, f"Content-Type: {kind}"), 400, "invalid_request_error", openai_shape=True)
    assert not first.requests and not second.requests
    for without in (b'{"input":"Hi"}', b"{}", b""):
        assert it.post(path, without, f"Content-Type: {kind}").status == 200
    assert (len(first.requests), len(second.requests)) == (3, 0)


CORS = {"server": {"cors_origins": ["https://app.example"]}}
ORIGIN = "Origin: https://app.example"


@pytest.mark.parametrize(("origin", "allowed"), [("http://localhost:3000", True), ("http://localhost.example", False)])
def test_cors_origins_may_be_patterns(relay, origin, allowed):
    it = relay({"echo": {}}, server={"cors_origins": ["http://localhost:*"]})
    got = it.ask("GET", "/health", None, f"Origin: {origin}")
    assert got.get("access-control-allow-origin") == (origin if allowed else None)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/nowhere"])
def test_a_websocket_gets_426(relay, path):
    got = relay({"echo": {}}).ask("GET", path, None, "Upgrade: websocket", "Connection: Upgrade")
    assert (got.status, got.get("upgrade"), got.get("x-monorelay-error")) == (426, "websocket", "no_websocket")


@pytest.mark.parametrize("query", ["", "?beta=true"])
def test_the_query_of_a_base_url_goes_upstream_with_each_request(upstream, relay, query):
    provider = upstream(answer())
    it = relay({"azure": {"format": "openai", "base_url": f"{provider.url}/v1?api-version=2", "keys": ["sk-a"],
                          "auth_header": "api-key"}}, routes={"*": "azure"})  # fmt: skip
    assert it.post(f"/v1/chat/completions{query}", chat()).status == 200
    (sent,) = provider.requests
    assert sent.start.split()[1] == f"/v1/chat/completions{query}{'&' if query else '?'}api-version=2"
    assert (sent.get("api-key"), sent.get("authorization")) == ("sk-a", None)


UNREADABLE_HEADS = {
    "a header without a colon": ("GET /v1/models", "odd", 400),
    "no Host": ("GET /health", "", 400),
    "a long line": ("GET /v1/models?after_id=" + "x" * 17_000, "host: a", 414),
    "too many headers": ("POST /v1/messages", "x-a: 1\r\n" * 201 + "host: a", 431),
    "too long headers": ("POST /v1/messages", f"host: a\r\nx-a: {'x' * 70_000}", 431),
}


@pytest.mark.parametrize("name", UNREADABLE_HEADS)
@pytest.mark.parametrize("origin", ["https://app.example", "https://evil.example"])
def test_cors_is_on_the_answer_to_a_head_that_cannot_be_read(relay, name, origin):
    line, fields, status = UNREADABLE_HEADS[name]
    it = relay({"echo": {}}, **CORS)
    told = origin if origin == "https://app.example" else None
    for start, expected in ((line, told), (re.sub(" /[^ ?]+", " /api/us%61ge", line), None)):
        with it.client() as client:
            client.send(f"{start} HTTP/1.1\r\nOrigin: {origin}\r\n{fields}\r\n\r\n".encode())
            got = client.answer()
        assert (got.status, got.get("access-control-allow-origin")) == (status, expected)


def test_cors_preflight_needs_no_token(relay):
    got = relay({"echo": {}}, **CORS).ask(
        "OPTIONS", "/v1/messages", None, ORIGIN, "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-api-key, anthropic-version", token="",
    )  # fmt: skip
    assert got.status in (200, 204) and got.get("access-control-allow-origin") in ("https://app.example", "*")
    allowed = got.get("access-control-allow-headers").lower()
    assert (
        "x-api-key" in allowed
        and "anthropic-version" in allowed
        and "POST" in got.get("access-control-allow-methods")
    )


def test_that_a_browser_calls_from_another_origin_is_told_to_no_provider(upstream, relay):
    """Anthropic refuses such requests with a 401, whatever the key."""
    provider = upstream(answer())
    fetch = ("Sec-Fetch-Site: cross-site", "sec-fetch-mode: cors", "sec-fetch-dest: empty")
    others = ("referer: https://app.example/", "sec-ch-ua-mobile: ?0", "anthropic-beta: a")
    got = relay({"anthropic": provider}, **CORS).post("/v1/messages", prompt(), ORIGIN, *fetch, *others)
    assert got.status == 200 and got.get("access-control-allow-origin")
    sent = [f"{name}: {value}".lower() for name, value in provider.requests[0].headers]
    assert not [line for line in sent if line.startswith(("origin", "sec-fetch-"))]
    assert set(others) <= set(sent), "they are about the client"


@pytest.mark.parametrize(("origins", "origin", "allowed"), [
    (["https://app.example"], ORIGIN, True), (["*"], ORIGIN, True), (["https://app.example"],
     "Origin: https://evil.example", False),
    (["https://app.example"], "Origin: https://app.example.evil.example", False), ([], ORIGIN, False),
     (["https://app.example"], "x-a: 1", False),
])  # fmt: skip
@pytest.mark.parametrize("status", [200, 400, 401])
def test_cors_is_on_every_answer_or_on_none(upstream, relay, origins, origin, allowed, status):
    provider = upstream(
        answer(status, b"{}", "request-id: req_1", "access-control-allow-origin: https://provider.example")
    )
    it = relay({"anthropic": provider}, server={"cors_origins": origins})
    got = it.post("/v1/messages", prompt(), origin, token="" if status == 401 else TOKEN)
    assert got.status == status
    if allowed:
        assert got.all("access-control-allow-origin") in ([origin[8:]], ["*"])
        exposed = got.get("access-control-expose-headers").lower()
        assert "request-id" in exposed and "retry-after" in exposed and "x-monorelay-provider" in exposed
    else:
        assert origin[8:] not in got.all("access-control-allow-origin") and "*" not in got.all(
            "access-control-allow-origin"
        )


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/v1/messages/", "/v1/messages"),
        ("/v1/%6dessages", "/v1/messages"),
        ("/v1/%6Dessage%73/", "/v1/messages"),
        ("/%76%31/messages", "/v1/messages"),
        ("/v%31/messages", "/v1/messages"),
        ("/v1/messages/?beta=true", "/v1/messages?beta=true"),
        ("/v1/messages/beta/", "/v1/messages?beta=true"),
        ("/v1/messages/count_tokens/", "/v1/messages/count_tokens"),
        ("/v1/messages/count%5ftokens", "/v1/messages/count_tokens"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1/ch%61t/completions", "/v1/chat/completions"),
        ("/v%31/chat/completions", "/v1/chat/completions"),
        ("/v1/embeddings/", "/v1/embeddings"),
        ("/v1/%72esponses", "/v1/responses"),
    ],
)
@pytest.mark.parametrize("base", ["", "/base"])
def test_every_spelling_of_a_path_takes_its_route(upstream, relay, path, target, base):
    cloud, house = upstream(answer(500)), upstream(answer())
    providers: dict[str, Any] = {}
    for name, provider in (("cloud", cloud), ("house", house)):
        for kind, version in (("anthropic", ""), ("openai", "/v1")):
            providers[f"{kind}-{name}"] = {"format": kind, "base_url": provider.url + base + version}
    routes = {"house-*": ["anthropic-house", "openai-house"], "*": ["anthropic-cloud", "openai-cloud"]}
    it = relay(providers, routes=routes, aliases={"best": "house-model"})
    for name in ("house-model", "best"):
        got = it.post(path, {"model": name})
        assert (got.status, got.get("x-monorelay-model")) == (200, "house-model"), got
        assert house.requests[-1].target == base + target and house.requests[-1].json == {
            "model": "house-model"
        }
    assert not cloud.requests
    refused(it.post(path, b"{"), 400, "invalid_request_error", openai_shape="messages" not in target)


def test_spelling_of_a_path_outside_the_known_ones_stays_below_the_base_url(upstream, relay):
    provider = upstream(answer())
    it = relay({"openai": provider, "anthropic": provider})
    for path in ("/%76%31/files/f", "/v%31/files/f", "/v1/files/f"):
        for version in ([], [ANTHROPIC_VERSION]):
            assert it.ask("GET", path, None, *version).status == 200
            assert provider.requests[-1].target == "/v1/files/f"
    for path in ("/v1/%61nthropic/models", "/v1/anthropic/models/", "/v1/anthropic/models"):
        assert it.ask("GET", path).status == 200
        assert provider.requests[-1].target == "/v1/models"


def test_an_unknown_path_goes_by_its_model_with_anthropic_version_too(upstream, relay):
    cloud, house = upstream(answer(500)), upstream(answer())
    it = relay(
        {"anthropic": cloud, "anthropic2": house}, routes={"house-*": "anthropic2", "*": "anthropic"},
        aliases={"best": "house-model"},
    )  # fmt: skip
    for name in ("house-model", "best"):
        got = it.post("/v1/new/thing", {"model": name}, ANTHROPIC_VERSION, "Content-Type: application/json")
        assert got.status == 200 and house.requests[-1].json == {"model": "house-model"}
        assert house.requests[-1].target == "/v1/new/thing"
    assert not cloud.requests


@pytest.mark.parametrize(
    "path",
    ["/v1/files/..;/messages", "/v1/files/.;/x", "/v1/files/..;a=b/messages", "/v1/files/%2e%2e;/messages",
     "/v1/files/..%3b/messages", "/v1/files/%252e.%253bx/m", "/v1/files/..;", "/..;/v1/files/f"],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_paths_that_climb_before_a_semicolon_are_404(upstream, relay, method, path):
    it, provider, token = limited(upstream, relay)
    for credential in (TOKEN, token):
        got = it.ask(method, path, b"{}" if method == "POST" else None, ANTHROPIC_VERSION, token=credential)
        assert (got.status, got.json["error"]["type"]) == (404, "not_found_error")
    assert not provider.connections


@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize("length", [257, 4_097, 100_000, 8_000_000])
def test_a_models_name_over_256_characters_is_a_bad_request(upstream, relay, length, coding):
    provider = upstream(answer())
    it = relay(both_formats(provider))
    headers = ["Content-Encoding: gzip"] if coding else []
    for path, version in (
        ("/v1/messages", []),
        ("/v1/chat/completions", []),
        ("/v1/new", [ANTHROPIC_VERSION]),
    ):
        body = json.dumps(prompt("x" * length)).encode()
        got = it.post(path, gzip.compress(body) if coding else body, *headers, *version)
        message = refused(got, 400, "invalid_request_error", openai_shape=not version and "chat" in path)
        assert len(message) < 500
    assert not provider.connections
    for name in ("x" * 256, "\U0001f600" * 256):
        assert it.post("/v1/messages", prompt(name)).status == 200


def test_a_models_name_is_counted_in_characters_and_not_in_escapes(upstream, relay):
    it = relay({"anthropic": upstream(answer())})
    for name, status in (("\\u0041" * 256, 200), ("\\u0041" * 257, 400), ("\\ud83d\\ude00" * 256, 200)):
        assert it.post("/v1/messages", b'{"model":"%s"}' % name.encode()).status == status


def many_values(count: int) -> bytes:
    """A JSON body of so many values, the outer object counted."""
    return b'{"model":"claude-test","x":[' + b",".join([b"0"] * (count - 3)) + b"]}"


@pytest.mark.timed
def test_a_body_has_a_million_values_at_most(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, aliases={"fast": "claude-test"})
    for body in (many_values(1_000_010), b'{"model":"claude-test","x":[' + b"[]," * 999_999 + b"[]]}"):
        refused(it.post("/v1/messages", body), 400, "invalid_request_error")
        refused(
            it.post("/v1/messages", gzip.compress(body), "Content-Encoding: gzip"),
            400,
            "invalid_request_error",
        )
    assert not provider.connections
    assert it.post("/v1/messages", many_values(1_000_000)).status == 200
    assert provider.requests[0].body == many_values(1_000_000)


@pytest.mark.parametrize(
    "text", ["a,b;" * 2_000_000, "[{" * 1_500_000, '\\",' * 1_200_000, "\\\\," * 1_200_000], ids=brief
)
def test_what_stands_in_a_string_is_no_value(upstream, relay, text):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, aliases={"fast": "claude-test"})
    for model in ("claude-test", "fast"):
        body = f'{{"x":"{text}","model":"{model}","y":1}}'
        assert it.post("/v1/messages", body.encode()).status == 200
        assert provider.requests[-1].body == body.replace('"fast"', '"claude-test"').encode()


# Members of an object, as JSON and not: what a body over 64 kB may hold besides its model.
ODD_VALUES = ["-0", "1.0e+2", "12345678901234567890123", "[ ]", "{\t}", '{"model":"x","model":"y"}', '"\\ud800"',
              '"\\/\\u00e9é"', "[[[[[[1]]]]]]", '"\\\\\\""', "true", '{"a":[{"model":[]}]}', "01", "1.",
              "[1,]", "tru", "NaN",
              '"\x01"', '"\\x"',
              "{'a':1}", "", '{"a" 1}', "[1 2]", "-", "1e", '"\\ud8"', "Infinity", "[}", '"a']  # fmt: skip
ODD_NAMES = ['"a"', '"model"', '"\\u006dodel"', '"Model"', '""', '"mod\\"el"', '"é\\n"', "a", '"padding"']
TURN = '{"role":"user","content":"a\\nb"}'
BLANKS = st.sampled_from(["", "", " ", "\r\n\t "])


class Members(tuple):
    """A JSON object as its pairs, which keep what is given twice."""


def one_model(body: bytes) -> str | None:
    """The model of a JSON object that has exactly one; None for every other body."""
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=Members, parse_constant=int)
    except (ValueError, RecursionError):
        return None
    found = [value for name, value in document if name == "model"] if isinstance(document, Members) else []
    return found[0] if len(found) == 1 and isinstance(found[0], str) and 0 < len(found[0]) <= 256 else None


@st.composite
def large_bodies(draw) -> tuple[bytes, bytes]:
    """A body over 64 kB with its model anywhere, often twice or not quite JSON; and the same with another model."""
    pad = draw(st.sampled_from(['"%s"' % ("x" * 70_000), '"%s"' % ('\\"é, [' * 9_000), "[%s0]" % ("0," * 35_000),
                                f"[{','.join([TURN] * 2_500)}]"]))  # fmt: skip
    fields = draw(st.lists(st.tuples(st.sampled_from(ODD_NAMES), st.sampled_from(ODD_VALUES)), max_size=2))
    fields += draw(
        st.lists(st.tuples(st.sampled_from(ODD_NAMES[4:]), JSON_VALUES.map(json.dumps)), max_size=3)
    )
    for member in (('"padding"', pad), ('"model"', "MODEL")):
        fields.insert(draw(st.integers(0, len(fields))), member)
    blank = draw(BLANKS)
    text = (
        blank
        + "{"
        + f"{blank},".join(f"{blank}{name}{blank}:{blank}{value}" for name, value in fields)
        + "}"
        + blank
    )
    models = draw(
        st.sampled_from(
            [('"fast"', '"claude-test"')] * 4 + [('"f\\u0061st"', '"claude-test"'), ("7", "7"), ('""', '""')]
        )
    )
    return tuple(text.replace("MODEL", model, 1).encode() for model in models)


def test_a_large_body_is_read_as_json_is_and_only_its_model_changes(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, aliases={"fast": "claude-test"}, routes={"claude-*": "anthropic"})

    @hypothesis.settings(max_examples=150)
    @hypothesis.given(large_bodies(), st.none() | st.tuples(st.floats(0, 1), st.binary(max_size=2)))
    def check(bodies: tuple[bytes, bytes], damage: tuple[float, bytes] | None) -> None:
        body, spliced = bodies
        at = int(damage[0] * (len(body) - 1)) if damage else 0
        # The long string without escapes has a test of its own.
        if damage and body[at : at + 1] != b"x":
            body = body[:at] + damage[1] + body[at + 1 :]
        count, expected = len(provider.requests), one_model(body)
        got = it.post("/v1/messages", body)
        if expected is None:
            refused(got, 400, "invalid_request_error")
        elif expected not in ("fast", "claude-test"):
            assert got.status == 404
        else:
            assert got.status == 200
            sent = provider.requests[-1].body
            assert one_model(sent) == "claude-test" and (damage or sent == spliced)
        assert len(provider.requests) - count == (got.status == 200)

    check()


@pytest.mark.parametrize("odd", [b"\\x", b"\\u00g0", b"\\"], ids=brief)
def test_the_escapes_of_a_string_of_100_kilobytes_are_checked_like_a_short_ones(upstream, relay, odd):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, aliases={"fast": "claude-test"})
    for model in (b"claude-test", b"fast"):
        body = b'{"model":"%s","x":"%s"}' % (model, b"x" * 50_000 + odd + b"x" * 50_000)
        refused(it.post("/v1/messages", body), 400, "invalid_request_error")
    assert not provider.connections


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files", "/api/auth/login"])
def test_trailers_over_8_kib_are_a_bad_request(upstream, relay, path):
    provider = upstream(lambda connection: (connection.read_request(), connection.send(answer())))
    it = relay({"anthropic": provider}, **GUARDED)
    body = (
        STREAMED
        if path != "/api/auth/login"
        else json.dumps({"username": "alice", "password": PASSWORD}).encode()
    )
    for size, status in ((7_000, 200), (9_000, 400)):
        trailers = b"".join(b"x-%04d: %s\r\n" % (number, b"a" * 90) for number in range(size // 100))
        data = chunk(body) + b"0\r\n" + trailers + b"\r\n"
        with it.client() as client:
            client.send(request("POST", path, data, ANTHROPIC_VERSION, "Transfer-Encoding: chunked"))
            assert client.answer().status == status


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/files", "/api/auth/login"])
def test_a_chunk_whose_size_alone_breaks_the_limit_is_refused_before_it_comes(upstream, relay, path):
    provider = upstream(lambda connection: connection.rest())
    it = relay({"anthropic": provider}, server={"max_body_mb": 1, "max_upload_mb": 1})
    for size in (b"200000\r\n", b"fffffffffffff\r\n", chunk(b"{")[:-2] + b"\r\nfffff0\r\n"):
        with it.client() as client:
            client.send(request("POST", path, size, ANTHROPIC_VERSION, "Transfer-Encoding: chunked"))
            got = client.answer()
            refused(got, 413, "request_too_large", openai_shape="type" not in got.json)


def test_bodies_held_together_beyond_their_bound_are_a_503_until_the_others_are_answered(upstream, relay):
    gate = threading.Event()
    provider = upstream(gated_stream(gate))
    it = relay({"anthropic": provider}, server={"max_held_mb": 4})
    body = json.dumps(prompt(stream=True, padding="x" * 1_500_000)).encode()
    answering = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.wait(answering)
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]))
        connection.wait(gate)
        connection.send(chunked(*ANTHROPIC_EVENTS[1:]))

    provider.script = script
    with it.client() as first, it.client() as second, it.client() as third:
        for client in (first, second):
            client.send(request("POST", "/v1/messages", body))
        eventually(lambda: len(provider.requests) == 2)
        got = it.post("/v1/messages", body)
        refused(got, 503, "api_error")
        assert got.get("x-monorelay-error") == "bodies_full" and int(got.get("retry-after")) > 0
        assert it.post("/v1/messages", prompt("nowhere@nobody") | {"model": 1}).status == 400, (
            "small ones fit"
        )
        answering.set()
        for client in (first, second):
            client.until(b"message_start")
        # Both streams still run, and hold their bodies no more.
        third.send(request("POST", "/v1/messages", body))
        third.until(b"message_start")
        gate.set()
        for client in (first, second, third):
            client.until(b"message_stop")
    assert len(provider.requests) == 3


def test_a_form_asks_for_the_last_target_that_was_tried():
    head = monorelay.parse_request_head(b"POST /v1/images/edits HTTP/1.1\r\nHost: a\r\nContent-Length: 30\r\n\r\n")
    body = monorelay.RequestBody(None, head, 1000, None)
    body.put_back(b"model=small;file=", (6, 11))
    for name, length in (("larger", 31), ("small", 30), ("s", 26)):
        body.ask_for(name)
        assert body.length == length
        assert body._ahead == f"model={name};file=".encode()


def test_no_user_takes_the_room_for_bodies_that_others_need(upstream, relay):
    gate = threading.Event()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.wait(gate)
        connection.send(answer())

    provider = upstream(script)
    users = {name: {"key": f"{name}-key-0123456789"} for name in ("ann", "bob")}
    it = relay({"anthropic": provider}, server={"max_held_mb": 5}, users=users)

    def ask(token: str, size: int) -> Connection:
        client = it.client()
        body = json.dumps(prompt(padding="x" * size)).encode()
        client.send(request("POST", "/v1/messages", body, token=token))
        return client

    with contextlib.ExitStack() as stack:
        hers = [stack.enter_context(ask("ann-key-0123456789", 1_100_000)) for _ in range(3)]
        eventually(lambda: len(provider.requests) == 3)
        with ask("ann-key-0123456789", 1_100_000) as another:
            got = another.answer()
            refused(got, 503, "api_error")
            assert got.get("x-monorelay-error") == "bodies_full" and "requests of ann" in got.json["error"]["message"]
        others = [stack.enter_context(ask(token, 600_000)) for token in ("bob-key-0123456789", TOKEN)]
        eventually(lambda: len(provider.requests) == 5)
        gate.set()
        assert [client.answer().status for client in hers + others] == [200] * 5
    with ask("ann-key-0123456789", 4_000_000) as alone:
        assert alone.answer().status == 200, "her room was given back, and a single request may take it all"


def test_an_upload_that_streams_through_is_not_held(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, server={"max_held_mb": 1})
    assert it.post("/v1/files", b"x" * 5_000_000, ANTHROPIC_VERSION).status == 200
    assert len(provider.requests[0].body) == 5_000_000


def test_an_inflated_body_counts_as_what_it_is(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider}, server={"max_held_mb": 2})
    body = gzip.compress(json.dumps(prompt(padding="x" * 5_000_000)).encode())
    got = it.post("/v1/messages", body, "Content-Encoding: gzip")
    refused(got, 503, "api_error")
    assert got.get("x-monorelay-error") == "bodies_full" and not provider.connections


def held_bytes(it: Relay) -> int:
    return it.server.service.bodies.bytes


def waits_for(gate: threading.Event, raw: bytes) -> Script:
    """A provider that takes its time."""

    def script(connection: Connection) -> None:
        while True:
            connection.read_request()
            connection.wait(gate)
            connection.send(raw)

    return script


def zipped(model: str, **fields: Any) -> tuple[bytes, bytes]:
    """A body in gzip, and as it was."""
    plain = json.dumps(prompt(model, padding="x" * 300_000, **fields)).encode()
    return gzip.compress(plain), plain


# Whom a request goes to, and with which body each time: as it came, or decompressed for this model.
@pytest.mark.parametrize(
    ("model", "sent"),
    [("claude-test", [None, None]), ("fast", ["claude-test", "claude-test"]), ("mixed", ["mixed", "claude-other"])],
)
@pytest.mark.parametrize("fails_over", [False, True])
def test_a_gzip_body_is_held_as_it_is_sent_while_a_provider_takes_its_time(upstream, relay, model, sent, fails_over):
    gate = threading.Event()
    slow = upstream(waits_for(gate, answer()))
    first, second = (upstream(answer(500)), slow) if fails_over else (slow, upstream(answer()))
    it = relay(
        {"anthropic": first, "anthropic2": second},
        aliases={"fast": ["claude-test@anthropic", "claude-test@anthropic2"],
                 "mixed": ["mixed@anthropic", "claude-other@anthropic2"]},
    )  # fmt: skip
    raw, plain = zipped(model)
    with it.client() as client:
        client.send(request("POST", "/v1/messages", raw, "Content-Encoding: gzip"))
        assert slow.called.wait(TIMEOUT_SECONDS)
        assert held_bytes(it) == len(raw) + (0 if sent[0] is None else len(plain))
        gate.set()
        assert client.answer().status == 200
        eventually(lambda: held_bytes(it) == 0)
    for provider, name in list(zip((first, second), sent))[: 1 + fails_over]:
        (got,) = provider.requests
        if name in (None, model):
            assert (got.body, got.get("content-encoding")) == (raw, "gzip")
        else:
            assert got.get("content-encoding") is None
            assert got.body == plain.replace(b'"%s"' % model.encode(), b'"%s"' % name.encode())


@pytest.mark.parametrize("model", ["claude-test", "fast"])
@pytest.mark.parametrize("resets", [False, True])
def test_a_gzip_body_is_let_go_when_its_client_leaves(upstream, relay, model, resets):
    provider = upstream(silence)
    it = relay({"anthropic": provider}, aliases={"fast": "claude-test"})
    raw, _ = zipped(model)
    with it.client() as client:
        client.send(request("POST", "/v1/messages", raw, "Content-Encoding: gzip"))
        assert provider.called.wait(TIMEOUT_SECONDS) and held_bytes(it) >= len(raw)
        if resets:
            client.reset()
    eventually(lambda: provider.left and held_bytes(it) == 0)


@pytest.mark.parametrize("model", ["claude-test", "fast"])
def test_a_gzip_body_is_let_go_when_its_stream_begins(upstream, relay, model):
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate))}, aliases={"fast": "claude-test"})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", zipped(model, stream=True)[0], "Content-Encoding: gzip"))
        client.until(b"message_start")
        assert held_bytes(it) == 0
        gate.set()
        client.until(b"message_stop")
    assert held_bytes(it) == 0


REFUSED_ZIPPED: dict[str, tuple[bytes, int]] = {
    "no route": (zipped("nowhere")[0], 404),
    "no token": (zipped("claude-test")[0], 401),
    "not hers": (zipped("gpt-5")[0], 403),
    "not hers, out of sight": (zipped("claude-test", fallbacks=["gpt-5"])[0], 403),
    "by its provider": (zipped("claude-refused")[0], 400),
    "by its provider, with another model": (zipped("refused")[0], 400),
    "by a provider that is not there": (zipped("claude-gone")[0], 502),
    "no JSON": (gzip.compress(b"{" + b" " * 300_000 + b"x"), 400),
    "no model": (gzip.compress(b'{"x":"%s"}' % (b"x" * 300_000)), 400),
    "cut off": (zipped("claude-test")[0][:-9], 400),
    "no gzip": (b"x" * 300_000, 400),
    "too large": (gzip.compress(b" " * 2_200_000), 413),
    "too much to hold": (gzip.compress(b" " * 1_800_000), 503),
}


@pytest.mark.parametrize("name", REFUSED_ZIPPED)
def test_a_gzip_body_is_let_go_when_it_is_refused(upstream, relay, name):
    body, status = REFUSED_ZIPPED[name]
    provider = upstream(answer(400))
    it = relay(
        {"anthropic": provider, "anthropic2": {"base_url": f"http://127.0.0.1:{unused_port()}"}},
        users=USERS, server={
            "jwt_secret": JWT_SECRET, "max_body_mb": 2, "max_held_mb": 1.5 if name == "too much to hold" else 16},
        routes={"claude-gone": "anthropic2", "claude-*": "anthropic", "gpt-*": "anthropic"},
        aliases={"refused": "claude-other"},
    )  # fmt: skip
    token = "" if name == "no token" else bearer() if name.startswith("not hers") else TOKEN
    got = it.post("/v1/messages", body, "Content-Encoding: gzip", token=token)
    assert got.status == status, got
    eventually(lambda: held_bytes(it) == 0)
    assert len(provider.requests) == name.startswith("by its provider")
    assert it.post("/v1/messages", prompt("claude-test")).status == 400


def test_a_user_over_the_limit_leaves_nothing_of_a_gzip_body(upstream, relay):
    it = relay({"anthropic": upstream(answer())}, server={"jwt_secret": JWT_SECRET},
               users={"alice": {"models": ["claude-*"], "requests_per_minute": 1}})  # fmt: skip
    for status in (200, 429, 429):
        got = it.post("/v1/messages", zipped("claude-test")[0], "Content-Encoding: gzip", token=bearer())
        assert got.status == status
        eventually(lambda: held_bytes(it) == 0)


# ------------------------------------------------------------------------------------------------------------
# Endpoints: what the owner, and each user, can see of what happens
# ------------------------------------------------------------------------------------------------------------

ALICE, BOB, GRAFANA = "key-of-alice-0123456789", "key-of-bob-0123456789", "key-of-grafana-0123456789"
OWNERS = {"alice": {"key": ALICE}, "bob": {"key": BOB}, "grafana": {"key": GRAFANA, "viewer": True}}
METRICS = {
    "monorelay_requests_total": ("counter", {"provider", "model", "status"}),
    "monorelay_request_duration_seconds": ("histogram", {"provider", "model"}),
    "monorelay_time_to_first_byte_seconds": ("histogram", {"provider", "model"}),
    "monorelay_tokens_total": ("counter", {"provider", "model", "kind"}),
    "monorelay_cost_usd_total": ("counter", {"provider", "model"}),
    "monorelay_untold_usage_total": ("counter", {"provider"}),
    "monorelay_user_requests_total": ("counter", {"user"}),
    "monorelay_user_tokens_total": ("counter", {"user", "kind"}),
    "monorelay_user_cost_usd_total": ("counter", {"user"}),
    "monorelay_upstream_attempts_total": ("counter", {"provider", "key", "outcome"}),
    "monorelay_key_cooling": ("gauge", {"provider", "key"}),
    "monorelay_key_remaining_ratio": ("gauge", {"provider", "key", "limit"}),
    "monorelay_requests_running": ("gauge", set()),
    "monorelay_connections_open": ("gauge", set()),
    "monorelay_refused_total": ("counter", {"code"}),
    "monorelay_log_lines_dropped_total": ("counter", set()),
    "monorelay_ledger_rows_dropped_total": ("counter", set()),
    "monorelay_ledger_rows_waiting": ("gauge", set()),
    "monorelay_build_info": ("gauge", {"version"}),
    "process_start_time_seconds": ("gauge", set()),
}


class Metrics:
    """What Prometheus' own parser reads of a text."""

    def __init__(self, text: str) -> None:
        self.families = {}
        for family in prometheus_client.parser.text_string_to_metric_families(text):
            name = family.name + ("_total" if family.type == "counter" else "")
            assert name not in self.families and family.documentation
            self.families[name] = family
        samples = [sample for family in self.families.values() for sample in family.samples]
        self.samples = {(sample.name, *sorted(sample.labels.items())): sample.value for sample in samples}
        assert len(self.samples) == len(samples), "a series is told twice"

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples that have these labels, among others."""
        return sum(
            value
            for (named, *pairs), value in self.samples.items()
            if named == name and set(labels.items()) <= set(pairs)
        )

    def labels(self, name: str, label: str) -> set[str]:
        return {dict(pairs)[label] for named, *pairs in self.samples if named == name}


def metrics(it: Any, token: str = TOKEN) -> Metrics:
    """What a relay, or a program, tells Prometheus."""
    with Client(it.url) as client:
        got = client.ask("GET", "/metrics", token=token)
    assert got.status == 200 and got.get("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    return Metrics(got.body.decode("utf-8"))


def test_metrics_have_the_names_types_and_labels_of_the_contract(upstream, relay):
    fields = (
        "anthropic-ratelimit-requests-limit: 50",
        "anthropic-ratelimit-requests-remaining: 10",
        "anthropic-ratelimit-unified-5h-utilization: 0.25",
        "anthropic-ratelimit-unified-5h-reset: 9999999999",
    )
    limited = STREAM_HEAD.replace(b"\r\n\r\n", "\r\n".join(["", *fields, "", ""]).encode())
    provider = upstream(replies(answer(429), limited + chunked(*ANTHROPIC_EVENTS), answer(404)))
    it = relay({"anthropic": two_keys(provider)}, users=OWNERS, prices={"*": {"input": 2, "output": 8}})
    assert it.post("/v1/messages", prompt(stream=True), token=ALICE).status == 200
    assert it.post("/v1/messages", prompt("nobody-has-it")).status == 404
    assert it.post("/v1/messages", prompt(), token="").status == 401
    eventually(lambda: len(it.server.service.tally.ended) == 2)
    told = metrics(it, GRAFANA)
    assert {name: family.type for name, family in told.families.items()} == {
        n: kind for n, (kind, _) in METRICS.items()
    }
    for name, family in told.families.items():
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == METRICS[name][1], name
    names = {"provider": "anthropic", "model": "claude-test"}
    assert told.value("monorelay_requests_total", **names, status="200") == 1
    assert told.value("monorelay_requests_total", provider="anthropic", model="(other)", status="404") == 1
    assert told.value("monorelay_tokens_total", **names, kind="input") == 25
    assert told.value("monorelay_tokens_total", **names, kind="output") == 12
    assert told.labels("monorelay_tokens_total", "kind") == set(monorelay.KINDS)
    assert math.isclose(told.value("monorelay_cost_usd_total", **names), (25 * 2 + 12 * 8) / 10**6)
    assert told.value("monorelay_user_tokens_total", user="alice", kind="input") == 25
    assert told.value("monorelay_user_requests_total", user="admin") == 1
    assert told.value("monorelay_upstream_attempts_total", key="label-a", outcome="429") == 1
    assert told.value("monorelay_upstream_attempts_total", key="label-b", outcome="ok") == 1
    assert told.value("monorelay_key_cooling", key="label-a") == 1 and not told.value(
        "monorelay_key_cooling", key="label-b"
    )
    assert told.value("monorelay_key_remaining_ratio", key="label-b", limit="requests") == 0.2
    assert told.value("monorelay_key_remaining_ratio", key="label-b", limit="unified_5h") == 0.75
    assert told.value("monorelay_refused_total", code="unauthenticated") == 1
    assert told.value("monorelay_build_info", version=monorelay.__version__) == 1
    assert abs(told.value("process_start_time_seconds") - time.time()) < 60
    assert told.value("monorelay_connections_open") >= 1 and told.value("monorelay_requests_running") == 0


def test_metrics_count_what_the_provider_has_seen(upstream, relay):
    provider = upstream(replies(*[answer(status) for status in (200, 500, 200, 429, 400, 200, 200)] * 4))
    it = relay({"anthropic": provider})
    got = Counter(it.post("/v1/messages", prompt()).status for _ in range(20))
    eventually(lambda: len(it.server.service.tally.ended) == 20)
    told = metrics(it)
    assert told.value("monorelay_requests_total") == sum(got.values()) == 20
    assert all(told.value("monorelay_requests_total", status=str(status)) == count for status, count in got.items())
    assert told.value("monorelay_upstream_attempts_total") == len(provider.requests)
    assert told.value("monorelay_upstream_attempts_total", outcome="5xx") == got[500]
    assert told.value("monorelay_untold_usage_total", provider="anthropic") == got[200]


HOSTILE_NAME = 'a"b\\c\nd\\n{}=,#\r\t \x7f\x85\u2028\U0001f600'


def test_metrics_hold_together_whatever_models_and_users_are_called(upstream, relay):
    it = relay({"anthropic": upstream(answer())}, server={"jwt_secret": JWT_SECRET})
    names = [HOSTILE_NAME, "\ud800", "\udfff", "\\ud800", "?", '"} 1\nmonorelay_evil 1\n#', "x" * 256, "le", "+Inf"]
    for name in names:
        token = token_of(HS256, {"sub": name, "exp": time.time() + 60})
        body = json.dumps(prompt(name)).encode()
        assert it.ask("POST", "/v1/messages", body, f"authorization: Bearer {token}", token="").status == 200
    eventually(lambda: len(it.server.service.tally.ended) == len(names))
    told = metrics(it)
    assert set(told.families) == set(METRICS)
    models, users = (
        told.labels("monorelay_requests_total", "model"),
        told.labels("monorelay_user_requests_total", "user"),
    )
    assert HOSTILE_NAME in models and HOSTILE_NAME in users and names[5] in models
    assert len(models) == len(users) == len(names) - 2 and "(other)" in models & users and "x" * 256 not in models


def test_metrics_tell_a_bounded_number_of_names_apart(upstream, relay):
    """Models that a provider has answered for, and users whom only their tokens name: a hundred of each."""
    it = relay(
        {"anthropic": upstream(answer(404)), "anthropic2": upstream(answer())},
        routes={"good-*": "anthropic2", "*": "anthropic"},
        server={"jwt_secret": JWT_SECRET},
    )
    with it.client() as client:
        for number in range(250):
            token = token_of(HS256, {"sub": f"user-{number}", "exp": time.time() + 60})
            name = f"{'good' if number % 2 else 'bad'}-{number}"
            client.send(
                request(
                    "POST",
                    "/v1/messages",
                    json.dumps(prompt(name)).encode(),
                    f"authorization: Bearer {token}",
                    token="",
                )
            )
            assert client.answer().status == (200 if number % 2 else 404)
    eventually(lambda: len(it.server.service.tally.ended) == 250)
    told = metrics(it)
    models = told.labels("monorelay_requests_total", "model")
    assert len(models) == 101 and all(name == "(other)" or name.startswith("good-") for name in models)
    assert len(told.labels("monorelay_user_requests_total", "user")) == 101
    assert told.value("monorelay_requests_total") == told.value("monorelay_user_requests_total") == 250
    assert told.value("monorelay_requests_total", provider="anthropic", status="404") == 125


def test_metrics_tell_a_bounded_number_of_statuses_apart():
    tally = monorelay.Tally(0.0)
    for status in range(100, 1000):
        tally.add(row(status=status))
    labels = {status for _, _, status in tally.statuses}
    assert {"200", "404", "429", "500", "524", "529", "2xx", "5xx"} <= labels and len(labels) < 90
    assert sum(tally.statuses.values()) == 900


def test_one_user_can_not_take_the_names_of_models_from_the_others(relay):
    it = relay({"echo": {}}, users=OWNERS, aliases={"mine": "echo-mine@echo"}, routes={"echo*": "echo"})
    with it.client() as client:
        for number in range(monorelay.TALLIED_MODELS):
            client.ask("POST", "/v1/messages", json.dumps(prompt(f"echo-{number}")).encode(), token=ALICE)
        for name in ("mine", "echo-new"):
            client.ask("POST", "/v1/messages", json.dumps(prompt(name)).encode(), token=BOB)
    eventually(lambda: len(it.server.service.tally.ended) == monorelay.TALLIED_MODELS + 2)
    models = metrics(it).labels("monorelay_requests_total", "model")
    assert len(models) == monorelay.TALLIED_MODELS_OF_ONE + 3 and {"(other)", "echo-mine", "echo-new"} <= models


def test_a_request_that_was_refused_before_it_was_sent_counts_for_the_model_that_relay_json_names():
    tally = monorelay.Tally(0.0)
    tally.models = {"smart"}
    for model in ("smart", "nonsense"):
        tally.add(row(sent="", model=model, provider="", key="", status=429))
    assert set(tally.by(1)) == {("smart",), ("(other)",)}


def test_users_of_relay_json_are_told_apart_however_many_they_are():
    tally = monorelay.Tally(0.0)
    tally.users = {f"user-{number}": None for number in range(300)}
    for number in range(300):
        tally.add(row(user=f"user-{number}"))
    assert len(tally.by(0)) == 300


def test_series_are_bounded_and_nothing_is_lost_beyond():
    tally = monorelay.Tally(0.0)
    tally.users = {f"user-{number}": None for number in range(100)}
    for number in range(5000):
        tally.add(row(user=f"user-{number % 100}", sent=f"m-{number // 100}", cost=None if number % 2 else 5))
    assert len(tally.series) <= monorelay.TALLIED_SERIES + 1 and len(tally.hours) <= monorelay.TALLIED_SERIES + 1
    assert sum(sums[0] for sums in tally.series.values()) == 5000
    assert sum(figures[0] for figures in tally.hours.values()) == 5000
    assert len("".join(monorelay.metrics_text(tally, [], {}))) < 3_000_000


def test_what_ended_workers_have_counted_stays_bounded_and_nothing_is_lost():
    both = monorelay.Tally(0.0)
    for worker in range(20):
        tally = monorelay.Tally(0.0)
        tally.users = {f"{worker}-{number}": None for number in range(200)}
        for number in range(400):
            tally.add(row(user=f"{worker}-{number // 2}", sent=f"{worker}-{number % 40}", status=200 + number % 2))
        both.include(json.loads(json.dumps(tally.shared())))
    for counted in (both.series, both.hours, both.statuses):
        assert len(counted) <= monorelay.TALLIED_SERIES + 2
    assert sum(sums[0] for sums in both.series.values()) == sum(sums[0] for sums in both.hours.values()) == 8000
    assert sum(both.statuses.values()) == sum(total for total, _ in both.seconds.values()) == 8000


@pytest.mark.parametrize(("token", "status"), [("", 401), ("wrong", 401), (ALICE, 403), (GRAFANA, 200), (TOKEN, 200)])
def test_metrics_are_for_access_keys_and_viewers(relay, token, status):
    it = relay({"echo": {}}, users=OWNERS)
    got = it.ask("GET", "/metrics", token=token)
    assert got.status == status
    if status != 200:
        refused(got, status, {401: "authentication_error", 403: "permission_error"}[status], openai_shape=True)


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5) | st.none(), st.booleans()), max_size=30)
)
def test_a_histogram_is_cumulative_and_ends_in_all(times):
    tally = monorelay.Tally(0.0)
    for duration, ttfb, stream in times:
        tally.add(row(duration=duration, ttfb=ttfb, stream=int(stream)))
    told = Metrics("".join(monorelay.metrics_text(tally, [], {})))
    for name, values in (
        ("monorelay_request_duration_seconds", [duration for duration, _, _ in times]),
        ("monorelay_time_to_first_byte_seconds", [ttfb for _, ttfb, stream in times if stream and ttfb is not None]),
    ):
        buckets = {
            float(dict(pairs)["le"]): value
            for (named, *pairs), value in told.samples.items()
            if named == f"{name}_bucket"
        }
        for limit, count in buckets.items():
            assert count == sum(value / 1000 <= limit for value in values)
        if times:
            assert math.inf in buckets and told.value(f"{name}_count") == buckets[math.inf] == len(values)
        assert math.isclose(told.value(f"{name}_sum"), sum(values) / 1000, abs_tol=1e-9)


def counted_row(number: int) -> Any:
    return row(
        request=f"req_{number}",
        user=f"u{number % 3}",
        sent=f"m{number % 2}",
        at=1_764_160_000_000 + number * 50_000,
        error=None if number % 5 else "upstream_broken",
        cost=None if number % 4 else number,
    )


@hypothesis.given(st.lists(st.integers(0, 3), max_size=60))
def test_what_several_processes_have_counted_adds_up(places):
    """Whichever of them has counted what, and through the JSON in which they tell it."""
    alone, each, together = monorelay.Tally(5.0), [monorelay.Tally(5.0 + n) for n in range(4)], monorelay.Tally(9.0)
    for number, place in enumerate(places):
        alone.add(counted_row(number))
        each[place].add(counted_row(number))
    for one in each:
        together.include(json.loads(json.dumps(one.shared())))
    for table in ("series", "hours", "statuses"):
        assert dict(getattr(together, table)) == dict(getattr(alone, table))
    assert list(together.ended) == list(alone.ended) and together.since == 5.0
    assert sum(map(sum, together.seconds.values())) >= sum(map(sum, alone.seconds.values()))


# ---- the page


def live(it: Any, *headers: str, token: str = TOKEN, version: str = "1.1", **options: int) -> Client:
    """A client that has asked for the live stream."""
    client = Client(it.url, **options)
    client.send(
        request("GET", "/api/live", None, *headers, token=token).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
    )
    return client


def live_head(client: Client) -> Message:
    """The head of a live stream, checked."""
    head = Message(client.until(b"\r\n\r\n"), b"")
    assert head.status == 200 and head.get("content-type") == "text/event-stream", head
    return head


def next_event(client: Client) -> tuple[str, int, Any]:
    """The next event of a live stream: name, id and data."""
    lines = dict(line.split(": ", 1) for line in client.chunk().decode("ascii").splitlines() if line)
    return lines["event"], int(lines["id"]), json.loads(lines["data"])


def ended_rows(client: Client, count: int) -> list[list[Any]]:
    """So many requests that a live stream tells have ended."""
    rows: list[list[Any]] = []
    while len(rows) < count:
        rows += next_event(client)[2].get("ended", [])
    return rows


def told_live(client: Client) -> tuple[str, Any, Any]:
    """The first event of a live stream."""
    live_head(client)
    return next_event(client)


def read_to_its_end(client: Client) -> None:
    """Reads a live stream until it ends in good order; EOFError when it is cut."""
    while client.chunk():
        pass


@pytest.fixture
def quick(monkeypatch):
    """A page that is told of news more often."""
    monkeypatch.setattr(monorelay, "LIVE_SECONDS", 0.05)
    monkeypatch.setattr(monorelay, "HOURS_SECONDS", 0.1)


ROW = (
    "id",
    "at",
    "user",
    "model",
    "sent",
    "provider",
    "key",
    "status",
    "ttfb",
    "seconds",
    "input",
    "cache_read",
    "output",
    "cost",
    "cache_write",
    "attempts",
    "tried",
    "error",
    "path",
    "stream",
    "complete",
    "request",
    "tier",
)
RUNNING = ("request", "user", "model", "sent", "provider", "key", "state", "seconds", "ttfb", "bytes", "attempts")


def test_a_page_is_told_the_state_and_then_what_changes(upstream, relay, quick):
    gate = threading.Event()
    provider = upstream(gated_stream(gate))
    it = relay(
        {"anthropic": provider, "echo": {}},
        users=OWNERS,
        routes={"echo": "echo", "*": "anthropic"},
        aliases={"smart": "claude-test"},
    )
    with live(it) as page:
        name, number, state = told_live(page)
        assert name == "state" and number > time.time() * 1000 * 4000
        assert set(state) == {
            "now",
            "version",
            "since",
            "admin",
            "ledger",
            "unwritten",
            "active",
            "running",
            "ended",
            "keys",
            "minute",
            "ttfb",
            "hours",
            "budgets",
        }
        assert (state["version"], state["admin"], state["ledger"]) == (monorelay.__version__, True, False)
        assert (state["active"], state["running"], state["ended"], state["hours"], state["ttfb"]) == (
            0,
            [],
            [],
            [],
            None,
        )
        assert [(key["provider"], key["state"]) for key in state["keys"]] == [("anthropic", "ok"), ("echo", "echo")]
        assert abs(state["now"] - time.time()) < 5 and state["minute"] == {"requests": 0, "errors": 0}
        with it.client() as client:
            client.send(request("POST", "/v1/messages", json.dumps(prompt("smart", stream=True)).encode(), token=ALICE))
            client.until(ANTHROPIC_EVENTS[0])
            name, _, news = next_event(page)
            while not (news.get("running") and news["running"][0][9]):
                name, _, news = next_event(page)
            running = dict(zip(RUNNING, news["running"][0]))
            assert name == "tick" and set(news) < set(state) and news["active"] == 1
            assert running == {
                **running,
                "user": "alice",
                "model": "smart",
                "sent": "claude-test",
                "provider": "anthropic",
                "state": "streaming",
                "attempts": 1,
                "bytes": len(ANTHROPIC_EVENTS[0]),
            }
            assert 0 <= running["seconds"] < 5 and running["request"].startswith("req_")
            gate.set()
            client.until(b"0\r\n\r\n")
        ended = dict(zip(ROW, ended_rows(page, 1)[0]))
        assert ended == {
            **ended,
            "user": "alice",
            "model": "smart",
            "sent": "claude-test",
            "status": 200,
            "input": 25,
            "output": 12,
            "cost": None,
            "tried": "",
            "error": "",
            "path": "/v1/messages",
            "stream": 1,
            "complete": 1,
            "request": running["request"],
            "tier": None,
            "attempts": 1,
        }
        assert 0 <= ended["ttfb"] <= ended["seconds"] < 5 and abs(ended["at"] - time.time()) < 5
    with live(it) as page:
        state = told_live(page)[2]
        assert [row[21] for row in state["ended"]] == [running["request"]] and state["hours"][0][1:4] == [1, 0, 25]
        assert state["ttfb"] == [ended["ttfb"]] * 2 and state["minute"] == {"requests": 1, "errors": 0}


def test_a_page_is_told_of_what_is_still_being_read(relay, quick):
    it = relay({"echo": {}}, users=OWNERS)
    body = json.dumps(prompt("echo")).encode()
    with live(it) as page, it.client() as client:
        told_live(page)
        client.send(request("POST", "/v1/messages", body, token=ALICE)[:-20])
        news = next_event(page)[2]
        run = dict(zip(RUNNING, news["running"][0]))
        assert run == {**run, "user": "alice", "state": "reading", "model": "", "provider": "", "attempts": 0}
        client.send(body[-20:])
        assert client.answer().status == 200
        assert ended_rows(page, 1)[0][2:4] == ["alice", "echo"]
        client.send(request("POST", "/v1/messages/count_tokens", body, token=ALICE)[:-20])
        threading.Event().wait(0.3)
        assert metrics(it).value("monorelay_requests_running") == 0
    with live(it) as page:
        assert told_live(page)[2]["running"] == []


def test_a_page_is_told_of_each_request_once_also_across_a_gap(relay, quick):
    it = relay({"echo": {}})
    told: list[str] = []
    it.post("/v1/messages", prompt("echo"))
    last = 0
    for _ in range(4):
        with live(it, *([f"last-event-id: {last}"] if last else [])) as page:
            live_head(page)
            for _ in range(8):
                for _ in range(3):
                    it.post("/v1/messages", prompt("echo"))
                _, last, news = next_event(page)
                told += [row[21] for row in news.get("ended", [])]
        for _ in range(5):
            it.post("/v1/messages", prompt("echo"))
    with live(it, f"last-event-id: {last}") as page:
        told += [row[21] for row in told_live(page)[2]["ended"]]
    rows = [row.request for row in it.server.service.tally.ended]
    assert set(rows) == set(told), "none is lost"
    seen = Counter(told)
    # Behind a gap, what has ended in the seconds before it is told again: the page knows these by their ids.
    assert max(seen.values()) <= 5
    with live(it) as page:
        once = [row[21] for row in told_live(page)[2]["ended"]]
        for _ in range(30):
            it.post("/v1/messages", prompt("echo"))
        once += [row[21] for row in ended_rows(page, 30)]
        assert min(len(rows), monorelay.FIRST_ROWS) + 30 <= len(once) == len(set(once)) <= len(rows) + 30


def test_a_page_that_was_slow_to_read_has_missed_nothing(relay, quick, monkeypatch):
    """Though more time has gone by than is looked back."""
    monkeypatch.setattr(monorelay, "LIVE_LATE_SECONDS", 0.0)
    it = relay({"echo": {}})
    page = monorelay.LivePage.__new__(monorelay.LivePage)

    class Asked:
        own_name = staticmethod(lambda: None)

    page._exchange, page._service, page._told, page._known_until = Asked, it.server.service, None, 0
    tally = it.server.service.tally
    tally.add(row(request="req_a", at=int(time.time() * 1000)))
    assert [told[21] for told in page._ended()] == ["req_a"]
    tally.add(row(request="req_b", at=int(time.time() * 1000) + 5))
    threading.Event().wait(0.1)
    tally.add(row(request="req_c", at=int(time.time() * 1000)))
    assert [told[21] for told in page._ended()] == ["req_b", "req_c"] and page._ended() == []


@pytest.mark.timed
def test_a_page_is_told_in_milliseconds_which_of_many_budgets_have_changed(relay, monkeypatch):
    users = {f"user{n}": {"key": f"a-key-of-user-{n:04}", "usd_per_day": 1, "tokens_per_day": 1} for n in range(1500)}
    it = relay({"echo": {}}, users=users, ledger={"path": "usage.db"})
    with live(it) as client:
        live_head(client)
        state = next_event(client)[2]
        assert len(state["budgets"]) == 3000
        page = next(iter(it.server.service.pages))
    told = {**state, "budgets": [{**state["budgets"][0], "used": 0.5}, *state["budgets"][1:]]}

    async def state_now() -> Any:
        return told

    monkeypatch.setattr(page, "_state", state_now)

    def news() -> Any:
        page._last = state
        try:
            page._news().send(None)
        except StopIteration as end:
            return end.value

    assert news()["budgets"] == told["budgets"][:1]
    assert seconds_each(news, 3) < 0.02


@pytest.mark.parametrize("seen", ["0", "1", "99999999999999999999", "-1", "a", "9" * 16, "1 2"])
def test_a_page_that_comes_back_with_an_odd_id_gets_the_state(relay, seen):
    it = relay({"echo": {}})
    it.post("/v1/messages", prompt("echo"))
    eventually(lambda: it.server.service.tally.ended)
    with live(it, f"last-event-id: {seen}") as page:
        assert told_live(page)[0] == "state"


def test_a_quiet_page_is_shown_that_the_connection_is_there(relay, quick, monkeypatch):
    monkeypatch.setattr(monorelay, "LIVE_QUIET_SECONDS", 0.1)
    it = relay({"echo": {}})
    with live(it, token=TOKEN) as page:
        told_live(page)
        assert page.chunk() == b": nothing new\n\n" and page.chunk().startswith(b": ")


def test_a_user_sees_only_what_is_his_own_and_no_keys(relay, quick, tmp_path):
    users = {
        **OWNERS,
        "bob": {"key": BOB, "requests_per_minute": 60},
        "alice": {"key": ALICE, "requests_per_minute": 5},
    }
    it = relay({"echo": {}}, users=users)
    for token in (ALICE, BOB, BOB, TOKEN):
        it.post("/v1/messages", prompt("echo"), token=token)
    it.post("/v1/messages", prompt("echo-error-500"), token=BOB)
    eventually(lambda: len(it.server.service.tally.ended) == 5)
    for token, own, count in ((ALICE, "alice", 1), (BOB, "bob", 3), (GRAFANA, None, 5), (TOKEN, None, 5)):
        with live(it, token=token) as page:
            state = told_live(page)[2]
        assert len(state["ended"]) == state["minute"]["requests"] == state["hours"][0][1] == count
        assert own is None or {ended[2] for ended in state["ended"]} == {own}
        assert bool(state["keys"]) == state["admin"] == (own is None)
        assert {budget["user"] for budget in state["budgets"]} == ({own} if own else {"alice", "bob"})
        rows = it.ask("GET", "/api/requests", token=token).json["rows"]
        assert len(rows) == count and (own is None or {found["user"] for found in rows} == {own})
        other = it.ask("GET", "/api/requests?user=bob", token=token).json["rows"]
        assert {found["user"] for found in other} == ({own} if own else {"bob"})
        usage = it.ask("GET", "/api/usage?by=user", token=token).json
        assert usage["total"]["requests"] == count and usage["priced"] is None
        assert own is None or [group["user"] for group in usage["rows"]] == [own]


def test_the_median_of_the_first_byte_is_that_of_answers(relay, quick):
    """What the relay or a provider refuses at once doesn't make it look fast."""
    it = relay({"echo": {}})
    for model in ("echo-error-500", "echo-error-429"):
        it.post("/v1/messages", prompt(model))
    eventually(lambda: len(it.server.service.tally.ended) == 2)
    with live(it) as page:
        state = told_live(page)[2]
    assert state["ttfb"] is None and state["minute"]["errors"] == 2
    it.post("/v1/messages", prompt("echo"))
    with live(it) as page:
        state = told_live(page)[2]
    assert state["ttfb"] == [dict(zip(ROW, state["ended"][-1]))["ttfb"]] * 2 and state["unwritten"] == 0


def test_a_page_ends_when_its_token_expires(relay, quick):
    it = relay({"echo": {}}, users=OWNERS, server={"jwt_secret": JWT_SECRET})
    token = token_of(HS256, {"sub": "alice", "exp": int(time.time()) + 2})
    with live(it, f"authorization: Bearer {token}", token="") as page:
        told_live(page)
        read_to_its_end(page)
    assert it.ask("GET", "/api/live", None, f"authorization: Bearer {token}", token="").status == 401


@pytest.mark.parametrize(
    "change",
    [
        {"users": {"bob": {"key": BOB}}},
        {"users": {**OWNERS, "alice": {"key": ALICE, "enabled": False}}},
        {"users": {**OWNERS, "alice": {"key": BOB + "-other"}}},
    ],
)
def test_a_page_ends_when_its_user_is_taken_away(relay, quick, change):
    it = relay({"echo": {}}, users=OWNERS)
    with live(it, token=ALICE) as page:
        told_live(page)
        it.server.reload(parse({"echo": {}}, **change))
        read_to_its_end(page)


def test_a_reload_is_a_new_state(relay, quick):
    it = relay({"anthropic": {"base_url": "http://127.0.0.1:9"}, "echo": {}}, users=OWNERS)
    with live(it) as page:
        assert len(told_live(page)[2]["keys"]) == 2
        it.server.reload(parse({"echo": {}}, users=OWNERS))
        name, _, state = next_event(page)
        assert name == "state" and [key["provider"] for key in state["keys"]] == ["echo"]


def test_no_more_pages_than_fifty_and_each_that_leaves_makes_room(relay, quick):
    it = relay({"echo": {}})
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(live(it)) for _ in range(monorelay.PAGES)]
        for page in pages:
            told_live(page)
        assert "close one" in refused(it.ask("GET", "/api/live"), 503, "api_error", openai_shape=True)
        pages[0].reset()
        assert eventually(lambda: len(it.server.service.pages) < monorelay.PAGES)
        with live(it) as page:
            assert told_live(page)[0] == "state"
        assert metrics(it).value("monorelay_requests_total") == metrics(it).value("monorelay_requests_running") == 0
    assert eventually(lambda: not it.server.service.pages)


def test_who_has_most_pages_makes_room_for_another_ones(relay, quick):
    it = relay({"echo": {}}, users=OWNERS)
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(live(it, token=ALICE)) for _ in range(monorelay.PAGES)]
        for page in pages:
            told_live(page)
        assert it.ask("GET", "/api/live", token=ALICE).status == 503
        owner = stack.enter_context(live(it))
        assert told_live(owner)[0] == "state"
        eventually(lambda: len(it.server.service.pages) == monorelay.PAGES)
        pages[0].until(b"0\r\n\r\n")
        for page in [stack.enter_context(live(it, token=BOB)) for _ in range(24)]:
            told_live(page)
        assert it.ask("GET", "/api/live", token=BOB).status == 503, "alice has only one page more"
        owners = Counter(page.caller.name for page in it.server.service.pages)
        assert owners["alice"] == 25 and owners["bob"] == 24 and len(owners) == 3


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.timed
def test_pages_hold_up_no_drain(relay, quick, monkeypatch, reads):
    it = relay({"echo": {}})
    with live(it, SO_RCVBUF=1 << 12) as page, it.client() as other:
        told_live(page)
        if not reads:
            monkeypatch.setattr(monorelay.LivePage, "_news", filling)
            eventually(lambda: next(iter(it.server.service.pages))._is_sending)
        begin = time.monotonic()
        it.server.stop(20.0)
        assert time.monotonic() - begin < 2
        if reads:
            read_to_its_end(page)
        assert other.ended_within(1)
    assert not it.server.service.pages


async def filling(page: Any) -> dict[str, Any]:
    """More news than a socket takes."""
    return {"now": 1.0, "filling": "x" * 8_000_000}


def test_a_page_that_reads_nothing_is_cut_and_holds_little(relay, quick, monkeypatch):
    monkeypatch.setattr(monorelay, "STALLED_CLIENT_SECONDS", 0.3)
    monkeypatch.setattr(monorelay.LivePage, "_news", filling)
    it = relay({"echo": {}})
    with live(it, SO_RCVBUF=1 << 12) as page:
        eventually(lambda: it.server.service.pages)
        tracemalloc.start()
        before, most = tracemalloc.get_traced_memory()[0], 0
        while it.server.service.pages:
            most = max(most, tracemalloc.get_traced_memory()[0])
            time.sleep(0.02)
        tracemalloc.stop()
        assert most - before < 60_000_000
        with contextlib.suppress(ConnectionError):
            assert not page.rest().endswith(b"0\r\n\r\n")


def test_a_page_of_http_1_0_is_served_until_it_closes(relay, quick):
    it = relay({"echo": {}})
    with live(it, version="1.0") as page:
        head = live_head(page)
        assert head.get("transfer-encoding") is None and head.get("connection") == "close"
        assert page.until(b"\n\n").startswith(b"event: state\nid: ")
        it.post("/v1/messages", prompt("echo"))
        page.until(b"event: tick\n")
        it.server.stop(5.0)
        page.rest()


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "OPTIONS"])
def test_the_live_stream_is_only_got(relay, method):
    it = relay({"echo": {}})
    got = it.ask(method, "/api/live")
    assert got.status == 405 and got.get("allow") == "GET" and not it.server.service.pages
    assert it.ask("GET", "/api/live", token="").status == 401


PAGES = (
    "/dashboard",
    "/metrics",
    "/api/live",
    "/api/usage",
    "/api/requests",
    "/api/requests/",
    "/api/%75sage",
    "/%6detrics",
)


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("origins", [["*"], ["https://app.example"]])
def test_no_other_origin_reads_what_the_page_shows(relay, path, origins):
    it = relay({"echo": {}}, server={"cors_origins": origins}, users=OWNERS)
    asked = ["Access-Control-Request-Method: GET", "Access-Control-Request-Headers: authorization"]
    found = []
    for token in (TOKEN, ALICE, ""):
        for method, fields in (("OPTIONS", asked), ("GET", []), ("POST", [])):
            with it.client() as client:
                client.send(request(method, path, None, "Origin: https://app.example", *fields, token=token))
                found.append(Message(client.until(b"\r\n\r\n"), b""))
    assert {200, 405} <= {got.status for got in found}
    assert not [name for got in found for name, _ in got.headers if name.startswith("access-control-")]
    assert it.ask("GET", "/health", None, "Origin: https://app.example").all("access-control-allow-origin")


def test_a_browser_is_led_to_the_page_and_others_are_answered_as_before(relay):
    it = relay({"echo": {}})
    html = "accept: text/html,application/xhtml+xml,*/*;q=0.8"
    got = it.ask("GET", "/", None, html, token="")
    assert (got.status, got.get("location")) == (303, "/dashboard")
    assert it.ask("GET", "/", token="").json["status"] == "ok"
    assert it.ask("GET", "/", None, "accept: */*", token="").json["status"] == "ok"
    assert it.ask("HEAD", "/", None, html, token="").status == 200
    page = it.ask("GET", "/dashboard", token="")
    assert page.status == 200 and page.get("content-type") == "text/html; charset=utf-8"
    assert page.get("content-security-policy") == monorelay.dashboard_policy()
    it = relay({"echo": {}}, server={"dashboard": False})
    assert (
        it.ask("GET", "/dashboard", token="").status == 404 and it.ask("GET", "/", None, html, token="").status == 200
    )
    assert it.ask("GET", "/api/usage").status == 200


ODD_QUERIES = [
    ("/api/requests?limit=0", 200), ("/api/requests?before=0", 200), ("/api/requests?limit=9999", 200),
    ("/api/requests?before=9999999999999999", 200), ("/api/requests?before=-1", 400), ("/api/requests?limit=1e3", 400),
    ("/api/requests?limit=1&limit=2", 400), ("/api/requests?errors=2", 400), ("/api/requests?x=1", 400),
    ("/api/requests?user=%ED%A0%80&model=%00&key=%22", 200),
    ("/api/requests?" + "&".join(f"a{n}=1" for n in range(40)), 400),
    ("/api/usage?from=0001-01-01&to=9999-12-31", 400), ("/api/usage?from=1000-01-01&to=2999-12-31", 200),
    ("/api/usage?from=2026-13-01", 400), ("/api/usage?from=2026-02-30", 400),
    ("/api/usage?by=user,user", 200), ("/api/usage?by=", 200), ("/api/usage?by=status", 400),
    ("/api/usage?step=hour", 400), ("/api/usage?from=%D9%A1%D9%A1%D9%A1%D9%A1-01-01", 400),
]  # fmt: skip


@pytest.mark.parametrize("ledger", [False, True])
def test_odd_queries_are_answered_or_refused(relay, tmp_path, ledger):
    it = relay({"echo": {}}, **({"ledger": {"path": str(tmp_path / "usage.db")}} if ledger else {}))
    it.post("/v1/messages", prompt("echo"))
    eventually(lambda: it.ask("GET", "/api/requests").json["rows"])
    for path, status in ODD_QUERIES:
        got = it.ask("GET", path)
        assert got.status == status, (path, got.body)
        assert status == 400 or "rows" in got.json, path
    assert "internal error" not in it.log.getvalue()


@pytest.mark.parametrize(
    ("period", "name"),
    [("step=day", "step"), ("from=2026-01-02", "from"), ("to=2026-01-02", "to"),
     ("from=2026-01-01&to=2026-01-01", "to"), ("", ""), ("from=2025-01-01", ""),
     ("from=2026-01-01&to=2999-12-31&step=", "")],
)  # fmt: skip
def test_without_a_ledger_usage_is_told_since_the_start_or_not_at_all(relay, tmp_path, period, name):
    it = relay({"echo": {}})
    it.server.service.tally.since = 1767225600.0 + 86399  # at the end of 2026-01-01
    it.post("/v1/messages", prompt("echo"))
    eventually(lambda: it.server.service.tally.ended)
    got = it.ask("GET", f"/api/usage?{period}")
    if name:
        why = f"{name}: this relay keeps no ledger (see relay.json), but the sums since its start, 2026-01-01"
        assert got.status == 400 and got.json["error"]["message"] == why
    else:
        assert got.json["from"] == (period[5:15] or "2026-01-01") and got.json["total"]["requests"] == 1
    it = relay({"echo": {}}, ledger={"path": str(tmp_path / "usage.db")})
    assert it.ask("GET", f"/api/usage?{period}").json["rows"] == []


def test_requests_are_told_in_pages_newest_first(relay):
    it = relay({"echo": {}}, users=OWNERS)
    for number in range(25):
        model = "echo-error-500" if number % 5 == 0 else "echo"
        it.post("/v1/messages", prompt(model), token=ALICE if number % 2 else BOB)
    eventually(lambda: len(it.server.service.tally.ended) == 25)
    found, before = [], ""
    while True:
        got = it.ask("GET", f"/api/requests?limit=10{before}").json
        found += got["rows"]
        if not got["next"]:
            break
        before = f"&before={got['next']}"
    rows = sorted(it.server.service.tally.ended, key=monorelay.row_number, reverse=True)
    assert [one["request"] for one in found] == [one.request for one in rows]
    assert [one.at for one in rows] == sorted((one.at for one in rows), reverse=True)
    assert set(found[0]) == {"id", *monorelay.LedgerRow._fields}
    for query, count in (
        ("errors=1", 5),
        ("user=alice", 12),
        ("model=echo", 20),
        ("key=echo/", 25),
        ("user=alice&errors=1", 2),
        ("user=", 25),
    ):
        assert len(it.ask("GET", f"/api/requests?{query}").json["rows"]) == count, query
    keyed = rows[0]._replace(provider="openai", key="team")
    named = {name: keyed.matches({"key": name}, False) for name in ("team", "openai/team", "openai", "other/team")}
    assert named == {"team": True, "openai/team": True, "openai": False, "other/team": False}


def test_a_ledger_that_can_not_be_read_is_told_and_ends_no_page(relay, quick, tmp_path):
    path = tmp_path / "usage.db"
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    it = relay({"echo": {}}, ledger={"path": str(path)})
    it.post("/v1/messages", prompt("echo"))
    for asked in ("/api/usage", "/api/requests"):
        assert "newer" in refused(it.ask("GET", asked), 503, "api_error", openai_shape=True)
    with live(it) as page:
        state = told_live(page)[2]
        assert state["hours"] == [] and len(state["ended"]) == 1
        it.post("/v1/messages", prompt("echo"))
        assert ended_rows(page, 1)
    assert "internal error" not in it.log.getvalue()


# ---- viewers and budgets


VIEWED = [
    ("GET", "/api/auth/me"),
    ("GET", "/metrics"),
    ("GET", "/api/usage"),
    ("GET", "/api/requests"),
    ("GET", "/v1/models"),
    ("GET", "/dashboard"),
]


def test_a_viewer_may_look_and_call_no_model(upstream, relay):
    anthropic, openai = upstream(answer()), upstream(answer())
    it = relay(
        {"anthropic": anthropic, "openai": openai, "echo": {}},
        users=OWNERS,
        routes={"claude-*": "anthropic", "echo": "echo", "*": "openai"},
    )
    for method, path in VIEWED:
        assert it.ask(method, path, token=GRAFANA).status == 200, path
    seen = len(anthropic.requests), len(openai.requests)
    form = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper\r\n--b--\r\n'
    kind = "content-type: multipart/form-data; boundary=b"
    calls = [
        *(
            ("POST", path, json.dumps(prompt(model)).encode(), "content-type: application/json")
            for path in (
                "/v1/messages",
                "/v1/messages/beta",
                "/v1/chat/completions",
                "/v1/completions",
                "/v1/responses",
                "/v1/embeddings",
                "/v1/audio/speech",
                "/v1/whatever/new",
                "/v1/messages/count_tokens",
            )
            for model in ("claude-x", "gpt-x", "echo")
        ),
        ("POST", "/v1/audio/transcriptions", form, kind),
        ("POST", "/v1/audio/transcriptions", b"--b--\r\n", kind),
        ("POST", "/v1/messages/batches", b'{"requests":[]}', ANTHROPIC_VERSION),
        ("POST", "/v1/batches", b"{}", "content-type: application/json"),
        ("POST", "/v1/files", b"x", ANTHROPIC_VERSION),
        ("POST", "/v1/files", form, kind),
        ("POST", "/v1/whatever", b"", "x-a: b"),
        ("GET", "/v1/files", None, ANTHROPIC_VERSION),
        ("GET", "/v1/responses/resp_1", None, "x-a: b"),
        ("DELETE", "/v1/files/f", None, "x-a: b"),
        ("PUT", "/v1/whatever", b"{}", "x-a: b"),
        ("GET", "/v1/realtime", None, "x-a: b"),
        ("PATCH", "/v1/assistants/a", b'{"model":"gpt-x"}', "content-type: application/json"),
    ]
    for method, path, body, *headers in calls:
        got = it.ask(method, path, body, *headers, token=GRAFANA)
        assert got.status == 403, (method, path, body, got)
    assert seen == (len(anthropic.requests), len(openai.requests))


SPENDERS = {"users": {"alice": {"key": ALICE, "usd_per_day": 1}, "bob": {"key": BOB, "tokens_per_day": 100},
                      "grafana": {"key": GRAFANA, "usd_per_month": 2}},
            "prices": {"priced*": {"input": 1_000, "output": 1_000}}}  # fmt: skip


def spending(tokens: int, **fields: int) -> bytes:
    """An answer that says that it has used so many tokens."""
    return answer(
        200, json.dumps({**MESSAGE, "usage": {"input_tokens": tokens, "output_tokens": 0, **fields}}).encode()
    )


def budgeted(relay: Any, provider: Any, path: Path) -> Relay:
    return relay({"anthropic": provider}, ledger={"path": str(path / "usage.db")}, **SPENDERS)


@pytest.mark.parametrize(
    ("token", "told"),
    [
        (ALICE, r"alice has spent \$1\.20 of \$1\.00 in 20\d\d-\d\d-\d\d \(UTC\)"),
        (GRAFANA, r"grafana has spent \$2\.40 of \$2\.00 in 20\d\d-\d\d \(UTC\)"),
        (BOB, r"bob has used 1200 of 100 tokens in"),
    ],
)
def test_a_spent_budget_refuses_what_would_cost_and_survives_a_restart(upstream, relay, tmp_path, token, told):
    provider = upstream(spending(1200, cache_read_input_tokens=0))
    it = budgeted(relay, provider, tmp_path)
    calls = 2 if token == GRAFANA else 1
    for number in range(calls):
        assert it.post("/v1/messages", prompt("priced"), token=token).status == 200
        eventually(lambda count=number + 1: len(it.server.service.tally.ended) == count)
    for again in range(2):
        seen = len(provider.requests)
        for path, body in (("/v1/messages", prompt("priced")), ("/v1/messages/batches", {"requests": []})):
            got = it.post(path, body, ANTHROPIC_VERSION, "content-type: application/json", token=token)
            assert re.match(told, refused(got, 429, "rate_limit_error"))
            assert got.get("x-monorelay-error") == "budget_exceeded" and got.get("x-should-retry") == "false"
            assert 0 < int(got.get("retry-after")) <= 3600
        assert len(provider.requests) == seen
        assert it.post("/v1/messages/count_tokens", prompt("priced"), token=token).status == 200
        assert it.ask("GET", "/v1/models", token=token).status == 200
        assert it.post("/v1/messages", prompt("priced"), token=TOKEN).status == 200
        budget = it.ask("GET", "/api/auth/me", token=token).json["budgets"][0]
        assert budget["used"] >= budget["of"] and budget["reset"] > time.time()
        if not again:
            it.server.stop(1.0)
            it = budgeted(relay, provider, tmp_path)


def test_no_request_is_served_before_it_is_known_what_was_spent(upstream, relay, tmp_path):
    provider = upstream(spending(1200))
    budgeted(relay, provider, tmp_path).post("/v1/messages", prompt("priced"), token=ALICE)
    path = tmp_path / "usage.db"
    eventually(lambda: path.exists() and monorelay.read_ledger(str(path), lambda connection: True))
    holder = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5)
    holder.execute("BEGIN EXCLUSIVE")
    config = parse({"anthropic": provider}, ledger={"path": str(path)}, **SPENDERS)
    again = monorelay.RelayServer(config, log=io.StringIO())
    body = json.dumps(prompt("priced")).encode()
    with concurrent.futures.ThreadPoolExecutor(1) as threads, Client(again.url) as client:
        asked = threads.submit(client.ask, "POST", "/v1/messages", body, token=ALICE)
        release = threading.Timer(0.3, holder.close)
        release.start()
        again.start()
        assert refused(asked.result(), 429, "rate_limit_error").startswith("alice has spent $1.20")
        release.join()
    again.stop(1.0)


def test_budgets_do_not_count_cache_reads_nor_what_has_no_price(upstream, relay, tmp_path):
    it = budgeted(relay, upstream(spending(9, cache_read_input_tokens=10**6)), tmp_path)
    for _ in range(11):
        assert it.post("/v1/messages", prompt("free"), token=BOB).status == 200
        assert it.post("/v1/messages", prompt("free"), token=ALICE).status == 200
    eventually(lambda: len(it.server.service.tally.ended) == 22)
    assert it.post("/v1/messages", prompt("free"), token=BOB).status == 200, "99 of 100"
    eventually(lambda: len(it.server.service.tally.ended) == 23)
    assert it.post("/v1/messages", prompt("free"), token=BOB).status == 429
    assert it.post("/v1/messages", prompt("free"), token=ALICE).status == 200


# ------------------------------------------------------------------------------------------------------------
# Handler: bodies and connections
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize("coding", ["chunked", "gzip", "gzip chunked", "deflate"])
def test_bodies_may_be_chunked_and_encoded(upstream, relay, coding, alias):
    provider = upstream(answer())
    body = ODD_BODY.replace(b"claude-test", b"fast" if alias else b"claude-test")
    raw = gzip.compress(body) if "gzip" in coding else body
    if coding == "deflate":
        raw = zlib.compress(body)
    headers = [] if coding == "chunked" else [f"Content-Encoding: {coding.split()[0]}"]
    if "chunked" in coding:
        raw, headers = chunked(raw[:9], raw[9:]), [*headers, "Transfer-Encoding: chunked"]
    got = relay({"anthropic": provider}, aliases={"fast": "claude-test"}).post("/v1/messages", raw, *headers)
    if coding == "deflate" and got.status in (400, 415):
        return  # An encoding that isn't understood may be refused, but is never passed on unread.
    (sent,) = provider.requests
    decode = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(
        sent.get("content-encoding") or "", bytes
    )
    assert (got.status, decode(sent.body)) == (200, ODD_BODY)
    assert len(sent.all("content-length")) + len(sent.all("transfer-encoding")) == 1


@pytest.mark.parametrize(
    "raw", [b"not gzip", gzip.compress(b'{"model":"a"}')[:-9], gzip.compress(b"{") + b"junk"]
)
def test_a_body_that_is_not_what_its_encoding_says_is_a_bad_request(upstream, relay, raw):
    provider = upstream(answer())
    refused(
        relay({"anthropic": provider}).post("/v1/messages", raw, "Content-Encoding: gzip"),
        400,
        "invalid_request_error",
    )
    assert not provider.connections


class PlayedZstd:
    """What compression.zstd offers of what the relay uses, in zlib's format; Pythons before 3.14 haven't the former."""

    ZstdError = ZeroDivisionError
    compress = staticmethod(zlib.compress)

    class DecompressionParameter:
        window_log_max = "the largest window"

    class ZstdDecompressor:
        def __init__(self, options: dict[Any, int]) -> None:
            assert options == {"the largest window": 23}
            self.inflater, self.held = zlib.decompressobj(), b""

        eof = property(lambda self: self.inflater.eof)
        unused_data = property(lambda self: self.inflater.unused_data)
        needs_input = property(lambda self: not self.held and not self.eof)

        def decompress(self, data: bytes, max_length: int) -> bytes:
            try:
                found = self.inflater.decompress(self.held + data, max_length)
            except zlib.error:
                raise ZeroDivisionError from None
            self.held = self.inflater.unconsumed_tail
            return found


@pytest.mark.parametrize("zstd", [PlayedZstd, *filter(None, [monorelay.zstd])])
def test_a_zstd_body_is_read_where_python_has_that(upstream, relay, monkeypatch, zstd):
    monkeypatch.setattr(monorelay, "zstd", zstd)
    provider = upstream(answer())
    it = relay({"openai": provider}, server={"max_body_mb": 1}, aliases={"short": "gpt-test"})
    body = json.dumps({"model": "gpt-test", "input": "word " * 100_000}).encode()
    squeezed, coding = zstd.compress(body), "Content-Encoding: zstd"
    assert it.post("/v1/responses", squeezed, coding).status == 200
    assert it.post("/v1/responses", zstd.compress(body.replace(b"gpt-test", b"short")), coding).status == 200
    assert [got.body for got in provider.requests] == [squeezed, body]
    for wrong in (squeezed[:-1], squeezed + b"x", b"x" + squeezed, b"", zstd.compress(body) * 2):
        refused(it.post("/v1/responses", wrong, coding), 400, "invalid_request_error", True)
    bomb = zstd.compress(b'{"model":"gpt-test","x":"' + b"0" * (64 << 20) + b'"}')
    refused(it.post("/v1/responses", bomb, coding), 413, "request_too_large", True)
    assert len(provider.requests) == 2


def test_a_zstd_body_that_cannot_be_read_names_what_to_switch_off(upstream, relay, monkeypatch):
    monkeypatch.setattr(monorelay, "zstd", None)
    got = relay({"openai": upstream(answer())}).post("/v1/responses", b"(\xb5/\xfd", "Content-Encoding: zstd")
    assert "features.enable_request_compression=false" in refused(got, 415, "invalid_request_error", True)


@pytest.mark.parametrize("kind", ["length", "chunked", "bomb", "upload", "upload chunked"])
def test_a_body_over_the_limit_is_a_413_that_a_sending_client_can_read(upstream, relay, kind):
    provider = upstream(replies_then_closes(answer()))
    it = relay({"anthropic": provider}, server={"max_body_mb": 1, "max_upload_mb": 1})
    path = "/v1/files" if "upload" in kind else "/v1/messages"
    if kind == "bomb":
        got = it.post(
            path,
            gzip.compress(b'{"model":"claude-test","x":"' + b"0" * (64 << 20) + b'"}'),
            "Content-Encoding: gzip",
        )
    else:
        framing = "Transfer-Encoding: chunked" if "chunked" in kind else f"Content-Length: {16 << 20}"
        piece = chunk(b"x" * 65536) if "chunked" in kind else b"x" * 65536
        with it.client() as client:
            client.send(request("POST", path, None, ANTHROPIC_VERSION, framing))
            for _ in range(160):
                client.send(piece)
            got = client.answer()
    refused(got, 413, "request_too_large")
    assert not provider.requests


def test_a_413_tells_the_limit_in_megabytes_and_its_setting(upstream, relay):
    it = relay({"anthropic": upstream(answer())}, server={"max_body_mb": 0.5, "max_upload_mb": 1})
    large = b'{"model":"claude-test","x":"' + b"0" * (2 << 20) + b'"}'
    for path, body, more, words in (
        ("/v1/messages", large, [], "0.5 MB (server.max_body_mb)"),
        ("/v1/messages", gzip.compress(large), ["Content-Encoding: gzip"], "0.5 MB (server.max_body_mb)"),
        ("/v1/files", large, [], "1 MB (server.max_upload_mb)"),
    ):
        with it.client() as client:
            got = client.ask("POST", path, body, ANTHROPIC_VERSION, *more)
        assert words in refused(got, 413, "request_too_large")


def test_an_upload_streams_through_while_it_is_sent(upstream, relay):
    gate, half = threading.Event(), b"x" * 100_000

    def script(connection: Connection) -> None:
        head = connection.until(b"\r\n\r\n").lower()
        received = b""
        while len(received) < len(half):
            received += connection.chunk() if b"chunked" in head else connection.take(len(half))
        gate.set()
        received += (
            b"".join(iter(connection.chunk, b"")) if b"chunked" in head else connection.take(len(half))
        )
        connection.send(answer(200, str(len(received)).encode()))

    with relay({"openai": upstream(script)}).client() as client:
        head = request(
            "POST",
            "/v1/audio/transcriptions",
            None,
            f"Content-Length: {2 * len(half)}",
            "Content-Type: multipart/form-data; boundary=b",
        )
        client.send(head, half)
        assert gate.wait(TIMEOUT_SECONDS), "the first half must reach upstream before the second is sent"
        client.send(half)
        assert client.answer().body == b"200000"


def form(*fields: tuple[str, str], boundary: str = "b0undary", file: bytes = b"RIFF", rest: bytes = b"") -> bytes:
    """A form with these fields before its file; `rest` is what follows that."""
    parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode() for name, value in fields]
    sound = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n' + file
    mark = b"\r\n--" + boundary.encode()
    return b"".join(mark + b"\r\n" + part for part in (*parts, sound))[2:] + rest + mark + b"--\r\n"


def form_field(name: str, value: str) -> bytes:
    """A field that follows the file of a form."""
    return form((name, value), file=b"").partition(b"\r\n--")[0].join([b"\r\n", b""])


FORM = "Content-Type: multipart/form-data; boundary=b0undary"
TRANSCRIPTIONS = "/v1/audio/transcriptions"


def fed(pieces: list[bytes]) -> tuple[str, tuple[int, int], bool]:
    """What a walk finds in a form."""
    walk = monorelay.FormWalk("b0undary")
    for piece in pieces:
        walk.feed(piece)
    return walk.model, walk.span, walk.is_ambiguous


@pytest.mark.parametrize("junk", [b"", b"x", b"\r\n--b0undary\r\n"])
def test_a_forms_model_is_found_however_it_arrives(junk):
    file = b"\r\n--b0undarx\r" * 9
    body = form(("language", "de"), ("model", "whisper-ü"), ("prompt", "--b0undar"), file=file) + junk
    start = body.index(b"whisper")
    expected = "whisper-ü", (start, start + len("whisper-ü".encode())), junk != b""
    assert fed([body]) == fed(bytewise(body)) == expected
    assert all(fed([body[:cut], body[cut:]]) == expected for cut in range(len(body)))


@pytest.mark.parametrize(
    "header",
    [
        'Content-Disposition: form-data; name="model"',
        'content-disposition:form-data;name="model"',
        'Content-Type: text/plain; charset=utf-8\r\nContent-Disposition: form-data; name="model"',
        'Content-Disposition: form-data; name="model"\r\nContent-Type: text/plain; charset=UTF-8\r\nContent-Length: 9',
    ],
)
def test_a_forms_model_is_found_as_clients_write_it(header):
    body = form(("model", "whisper-1")).replace(b'Content-Disposition: form-data; name="model"', header.encode(), 1)
    assert fed([body])[0::2] == ("whisper-1", False)


@pytest.mark.parametrize("filling", ["many parts", "boundaries", "almost boundaries", "a long header"])
@pytest.mark.timed
def test_no_form_takes_long(filling):
    body = {
        "many parts": form(*[("a", "")] * 5_000),
        "boundaries": form(file=b"--b0undary" * 25_000),
        "almost boundaries": form(file=b"\r\n--b0undar" * 20_000),
        "a long header": form(("a" * 250_000, "")),
    }[filling]
    pieces = [body[start : start + 64] for start in range(0, 16_000, 64)]
    assert seconds_each(lambda: fed([body]), 1) < 0.02 and seconds_each(lambda: fed(pieces), 1) < 0.02


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize(("asked", "sent"), [("whisper-1", "whisper-1"), ("ears", "gpt-4o-transcribe")])
def test_a_forms_model_decides_where_it_goes_and_its_file_streams_through(upstream, relay, asked, sent, framing):
    gate, half = threading.Event(), b"x" * 300_000
    body = form(("language", "de"), ("model", asked), file=2 * half)
    expected = body.replace(asked.encode(), sent.encode(), 1)

    def script(connection: Connection) -> None:
        head = Message(connection.until(b"\r\n\r\n"), b"")
        length = head.get("content-length")
        assert (length and int(length)) == (len(expected) if framing == "length" else None)
        received = b""
        while len(received) < len(half):
            received += connection.chunk() if framing == "chunked" else connection.take(len(half))
        gate.set()
        if framing == "chunked":
            received += b"".join(iter(connection.chunk, b""))
        else:
            received += connection.take(len(expected) - len(received))
        assert received == expected
        connection.send(answer())

    other, routed = upstream(answer()), upstream(script)
    it = relay({"openai1": other, "openai2": routed}, routes={"whisper-*": "openai2", "gpt-4o-*": "openai2"},
               aliases={"ears": "gpt-4o-transcribe"})  # fmt: skip
    frame = chunk if framing == "chunked" else bytes
    length = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {len(body)}"
    with it.client() as client:
        client.send(request("POST", TRANSCRIPTIONS, None, FORM, length), frame(body[: len(half) + 500]))
        assert gate.wait(TIMEOUT_SECONDS), "the first half must reach upstream before the second is sent"
        client.send(frame(body[len(half) + 500 :]), b"0\r\n\r\n" if framing == "chunked" else b"")
        got = client.answer()
    assert (got.status, got.get("x-monorelay-provider"), got.get("x-monorelay-model")) == (200, "openai2", sent)
    assert not other.requests


def test_a_form_without_a_model_before_its_file_goes_to_the_first_provider_as_it_is(upstream, relay):
    first, second = upstream(answer()), upstream(answer())
    it = relay({"openai1": first, "openai2": second}, routes={"whisper-1": "openai2"})
    late = form(rest=form_field("model", "whisper-1"))
    far = form(("prompt", "x" * 70_000), ("model", "whisper-1"))
    other = form(("model", "whisper-1"), boundary="c")
    bodies = [form(), late, far, b"no form", late.replace(b"name=", b"nom="), other]
    for body in bodies:
        assert it.post(TRANSCRIPTIONS, body, FORM).status == 200
    assert it.post(TRANSCRIPTIONS, form(("model", "whisper-1")), FORM.partition(";")[0]).status == 200
    assert [got.body for got in first.requests[:-1]] == bodies and not second.requests


def test_a_form_that_has_streamed_through_is_not_sent_again(upstream, relay):
    busy, spare = upstream(answer(429)), upstream(answer())
    gone = {"base_url": f"http://127.0.0.1:{unused_port()}/v1"}
    it = relay({"openai1": gone, "openai2": busy, "openai3": spare})
    body = form(("model", "whisper-1"))
    assert it.post(TRANSCRIPTIONS, body, FORM).status == 429, "nobody can send it a second time"
    assert it.post(TRANSCRIPTIONS, body, FORM).status == 200, "and the client's next try goes elsewhere"
    assert [one.requests[0].body for one in (busy, spare)] == [body, body]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (form(("model", "whisper-1"), ("model", "whisper-1")), "given more than once"),
        (form(("model", "")), "isn't empty"),
        (form(("model", "x" * 257)), "256"),
        (form(("model", "x" * 9_000)), "256"),
    ],
    ids=brief,
)
def test_a_form_without_one_clear_model_is_a_bad_request(upstream, relay, body, words):
    provider = upstream(answer())
    message = refused(relay({"openai": provider}).post(TRANSCRIPTIONS, body, FORM), 400, "invalid_request_error", True)
    assert words in message and not provider.requests


LARGE = b"x" * 400_000
DECOYS = {
    "a second model": form(("model", "small-1"), file=LARGE, rest=form_field("model", "large-1")),
    "a list of that name": form(("model", "small-1"), file=LARGE, rest=form_field("model[]", "large-1")),
    "in capitals": form(("Model", "large-1"), ("model", "small-1")),
    "behind a line that ends in LF": form(
        ("model", "small-1"), file=LARGE, rest=form_field("model", "large-1").replace(b"\r\n", b"\n")
    ),
    "without quotes": form(
        ("model", "small-1"), file=LARGE, rest=form_field("model", "large-1").replace(b'"model"', b"model")
    ),
    "behind the end": form(("model", "small-1"), file=LARGE) + form(("model", "large-1")),
    "before the beginning": b"x\r\n" + form(("model", "small-1")),
    "behind a quote that isn't one": form(("model", "small-1"), ('a\\"; name="model', "large-1")),
    "in another alphabet": form(("model", "small-1"), file=LARGE, rest=form_field("x", "y").replace(
        b'"x"', b'"x"\r\nContent-Type: text/plain; charset=utf-16')),
    "a model it may not use": form(("model", "large-1")),
    "no model": form(),
    "a model behind the file": form(rest=form_field("model", "small-1")),
}  # fmt: skip


def may_use_small(upstream: Callable[..., Upstream], relay: Callable[..., Relay]) -> tuple[Relay, Upstream, str]:
    """A relay with a user who may use small models only, its provider, and the user's token."""
    provider = upstream(answer())
    user = {"key": "key-of-alice-0123456789", "models": ["small-*"]}
    return relay({"openai": provider}, users={"alice": user}), provider, user["key"]


@pytest.mark.parametrize("name", DECOYS)
def test_a_form_that_may_name_another_model_is_refused_to_whom_models_are_set(upstream, relay, name):
    it, provider, token = may_use_small(upstream, relay)
    with it.client() as client:
        got = client.ask("POST", TRANSCRIPTIONS, DECOYS[name], FORM, token=token)
    refused(got, 403, "permission_error", True)
    eventually(lambda: all(one.sock.fileno() < 0 for one in provider.connections))
    assert not provider.requests, "no provider has the whole of it"
    assert it.post(TRANSCRIPTIONS, form(("model", "small-1"), file=LARGE), FORM, token=token).status == 200


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (TRANSCRIPTIONS, [FORM + "; boundary=other"]),
        (TRANSCRIPTIONS, [FORM, "Content-Type: application/json"]),
        (TRANSCRIPTIONS + "?model=large-1", [FORM]),
        ("/v1/anything", [FORM]),
        ("/v1/chat/completions", [FORM]),
    ],
)
def test_a_form_that_may_be_read_otherwise_is_refused_to_whom_models_are_set(upstream, relay, path, fields):
    it, provider, token = may_use_small(upstream, relay)
    assert it.post(path, form(("model", "small-1")), *fields, token=token).status in (400, 403)
    assert not provider.requests


def test_expect_100_continue_comes_after_authentication(upstream, relay):
    it = relay({"anthropic": upstream(answer())})
    with it.client() as client:
        client.send(
            request("POST", "/v1/messages", None, "Expect: 100-continue", f"Content-Length: {len(STREAMED)}")
        )
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
        client.send(STREAMED)
        assert client.answer().status == 200
    with it.client() as client:
        client.send(
            request("POST", "/v1/messages", None, "Expect: 100-continue", "Content-Length: 9", token="wrong")
        )
        assert client.answer().status == 401


def test_requests_may_be_pipelined(upstream, relay):
    provider = upstream(
        lambda connection: [connection.send(answer(200, connection.read_request().body)) for _ in range(9)]
    )
    bodies = [json.dumps(prompt(n=n)).encode() for n in range(3)]
    with relay({"anthropic": provider}).client() as client:
        requests = [request("POST", "/v1/messages", body) for body in bodies]
        client.send(
            request("GET", "/health"),
            *requests,
            request("POST", "/v1/messages", chunked(b"{}"), "Transfer-Encoding: chunked"),
        )
        assert [client.answer().status for _ in range(1)] == [200]
        assert [client.answer().body for _ in bodies] == bodies
        assert client.answer().status == 400


@pytest.mark.parametrize("keep", [False, True])
def test_http_1_0_clients_are_served(upstream, relay, keep):
    provider = upstream(replies(answer(200, b'{"a":1}'), ANTHROPIC_STREAM))
    it = relay({"anthropic": provider})
    with it.client() as client:
        head = request("POST", "/v1/messages", STREAMED, *(["Connection: keep-alive"] if keep else []))
        client.send(head.replace(b"HTTP/1.1\r\nHost: relay", b"HTTP/1.0"))
        got = client.answer()
        assert (got.status, got.body, got.get("transfer-encoding")) == (200, b'{"a":1}', None)
        assert keep or client.ended_within(1)
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED).replace(b"HTTP/1.1", b"HTTP/1.0"))
        got = client.answer()
        assert (got.body, got.get("transfer-encoding")) == (b"".join(ANTHROPIC_EVENTS), None)


def test_head_answers_have_no_body(upstream, relay):
    provider = upstream(
        lambda connection: [
            connection.send(answer().replace(b"{}", b"{}" * (connection.read_request().method != "HEAD")))
            for _ in range(2)
        ]
    )
    with relay({"anthropic": provider}).client() as client:
        for path in ("/v1/files/f", "/nowhere", "/health", "/v1/models"):
            assert client.ask("HEAD", path, None, ANTHROPIC_VERSION).status == (
                404 if path == "/nowhere" else 200
            )
        assert client.ask("GET", "/health").json["status"] == "ok", "the connection is in step"


def test_what_is_held_of_pipelined_requests_is_bounded(relay):
    it, count = relay({"echo": {}}, server={"log": "off"}), 15_000
    with it.client() as client:
        sender = threading.Thread(target=client.send, args=[request("GET", "/health", token="") * count])
        sender.start()
        most = 0
        for _ in range(count):
            assert client.answer().status == 200
            most = max([most, *(len(handler.channel.received) for handler in list(it.server.handlers))])
        sender.join()
    assert most <= monorelay.HELD_BYTES + monorelay.RECEIVE_BYTES


INVENTED = {
    "paths": lambda n: (f"/v1/files/{n}-" + "x" * 15_000, None, []),
    "escaped paths": lambda n: (f"/v1/files/{n}-" + "%41" * 500 + "x" * 13_500, None, []),
    "unknown paths": lambda n: (f"/{n}-" + "x" * 15_000, None, []),
    "queries": lambda n: (f"/v1/models?limit={n}&after_id=" + "x" * 15_000, None, []),
    "models": lambda n: ("/v1/messages", {"model": f"claude-{n}-".ljust(256, "\u20ac")}, []),
    "long models": lambda n: ("/v1/messages", {"model": f"claude-{n}-".ljust(15_000, "x")}, []),
    "sessions": lambda n: ("/v1/messages", prompt(), [f"x-claude-code-session-id: {n}-" + "x" * 15_000]),
    "tokens": lambda n: ("/v1/messages", prompt(), [f"authorization: Bearer {n}-" + "x" * 15_000]),
    "names of users": lambda n: ("/api/auth/refresh", {"refresh_token": f"{n}".ljust(15_000, "x")}, []),
}


@pytest.mark.parametrize("name", INVENTED)
def test_what_clients_invent_is_not_kept(upstream, relay, name):
    keys = {"keys": ["sk-a", "sk-b"], "key_strategy": "sticky"}
    provider = upstream(replies(answer(529)))
    it = relay(
        {"anthropic": {"upstream": provider, **keys}}, server={"log": "text", "jwt_secret": JWT_SECRET}
    )
    numbers = itertools.count()

    def ask() -> None:
        path, body, headers = INVENTED[name](next(numbers))
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        client.ask(method, path, data, ANTHROPIC_VERSION, *headers)
        # What the log and the provider of this test keep is theirs.
        provider.requests.clear()
        it.log.truncate(0)
        it.log.seek(0)

    with it.client() as client:
        for _ in range(20):
            ask()
        assert bytes_grown(ask, 600) < 6 << 20, "most of these are 15 kB long"


def test_no_cache_is_without_bound():
    caches = [value for value in vars(monorelay).values() if hasattr(value, "cache_parameters")]
    assert caches and all(cache.cache_parameters()["maxsize"] is not None for cache in caches)


@pytest.mark.timed
def test_lines_that_wait_for_a_log_that_takes_nothing_are_bounded_in_number_and_bytes():
    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            gate.wait(4 * TIMEOUT_SECONDS)
            return len(text)

    gate = threading.Event()
    writer = monorelay.LogWriter(Stuck())
    writer.start()
    try:
        assert bytes_grown(lambda: writer.write("x" * 10_000), 6_000) < 20 << 20
        assert bytes_grown(lambda: writer.write("x"), 50_000) < 5 << 20
        assert seconds_each(lambda: writer.write("x")) < 50e-6
    finally:
        gate.set()
        writer.finish()


# ------------------------------------------------------------------------------------------------------------
# Handler: requests that attack
# ------------------------------------------------------------------------------------------------------------

SMUGGLED = request("POST", "/v1/messages", json.dumps(prompt("smuggled")).encode())


def assert_turned_away(client: Client, status: int = 400) -> None:
    """One refusal, then the end of the connection."""
    got = client.answer()
    assert (got.status, bool(got.get("x-monorelay-error")), got.get("connection")) == (
        status,
        True,
        "close",
    ), got
    assert got.json["error"]["type"] == "invalid_request_error"
    assert client.rest() == b""


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_malformed_head_gets_400_and_the_connection_is_closed(upstream, relay, name):
    provider = upstream(answer())
    with relay({"anthropic": provider}).client() as client:
        head, end, rest = BAD_HEADS[name].partition(b"Host: a\r\n")
        client.send(
            head + end + (b"x-api-key: %s\r\n" % TOKEN.encode() if end else b"") + rest, b"abc", SMUGGLED
        )
        assert_turned_away(client)
    assert not provider.connections


@pytest.mark.parametrize("name", LONG_HEADS)
def test_a_head_over_the_limits_is_refused(upstream, relay, name):
    data, status = LONG_HEADS[name]
    provider = upstream(answer())
    with relay({"anthropic": provider}).client() as client:
        client.send(data, SMUGGLED)
        assert_turned_away(client, status)
    assert not provider.connections


@pytest.mark.parametrize(
    "body",
    [b"+3\r\nabc\r\n0\r\n\r\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"0_3\r\nabc\r\n0\r\n\r\n", b"-1\r\n\r\n",
     b"3\r\nabcd\r\n0\r\n\r\n", b"3\nabc\r\n0\r\n\r\n",
     b"\r\n0\r\n\r\n", b"f" * 40 + b"\r\n", b"3\r\nabc\n0\r\n\r\n", b"3 \r\nabc\r\n0\r\n\r\n",
     b"0\r\nContent-Length : 5\r\n\r\n"],
)  # fmt: skip
def test_a_malformed_chunk_gets_400_and_the_connection_is_closed(upstream, relay, body):
    provider = upstream(answer())
    with relay({"anthropic": provider}).client() as client:
        client.send(request("POST", "/v1/messages", None, "Transfer-Encoding: chunked"), body, SMUGGLED)
        assert_turned_away(client)
    assert not provider.requests


def test_a_head_or_body_that_ends_early_is_no_request(upstream, relay):
    provider = upstream(answer())
    it = relay({"anthropic": provider})
    for data in (request("POST", "/v1/messages", STREAMED)[:40], request("POST", "/v1/messages",
    STREAMED)[:-3],
                 request("POST", "/v1/messages", chunked(STREAMED),
                 "Transfer-Encoding: chunked")[:-7]):  # fmt: skip
        with it.client() as client:
            client.send(data)
            client.sock.shutdown(socket.SHUT_WR)
            assert client.rest()[:12] in (b"", b"HTTP/1.1 400")
    assert not provider.requests


@pytest.mark.parametrize("line", [b"CONNECT elsewhere.example:443", b"TRACE /v1/messages"])
def test_a_method_behind_which_no_request_may_come_is_a_405_and_the_end(upstream, relay, line):
    provider = upstream(answer())
    with relay({"anthropic": provider}).client() as client:
        client.send(line, b" HTTP/1.1\r\nHost: a\r\nx-api-key: %s\r\n\r\n" % TOKEN.encode(), SMUGGLED)
        assert_turned_away(client, 405)
    assert not provider.connections


FUZZ_PIECES = [*HEAD_PIECES, GOOD_HEADS["least"], GOOD_HEADS["chunked"], SMUGGLED, b"0\r\n\r\n"]


def test_no_bytes_bring_the_server_down_or_out_of_step(relay):
    it = relay({"echo": {}})

    @hypothesis.given(st.lists(st.sampled_from(FUZZ_PIECES), max_size=9))
    def check(pieces: list[bytes]) -> None:
        with it.client() as client:
            with contextlib.suppress(OSError):
                client.send(*pieces)
                client.sock.shutdown(socket.SHUT_WR)
            answers = Replay(client.rest()).messages(is_answer=True, may_be_cut=True)
        sent = b"".join(pieces)
        assert all(got.status in (200, 400, 401, 404, 405, 414, 431) for got in answers)
        assert sum(got.status == 200 for got in answers) <= sent.count(SMUGGLED) + sent.count(b"GET")

    check()


# ------------------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------------------


def test_each_request_is_one_line_that_tells_what_happened(upstream, relay):
    it = relay({"anthropic": two_keys(upstream(replies(ANTHROPIC_STREAM, message_answer(HI,
    usage={"input_tokens": 31, "output_tokens": 7}))))},
               aliases={"fast": "claude-test"})  # fmt: skip
    got = it.post("/v1/messages?secret=query", prompt("fast", stream=True))
    line = it.logged("/v1/messages")
    for part in (
        "POST",
        "fast",
        "claude-test",
        "anthropic",
        "label-a",
        "200",
        str(len(got.body)),
        "25",
        "12",
    ):
        assert re.search(rf"\b{re.escape(part)}\b", line), (part, line)
    assert all(hidden not in line for hidden in ("secret=query", TOKEN, "sk-a", "Hello"))
    it.post("/v1/messages", prompt())
    assert it.logged("=31", "=7")


def test_who_speaks_tls_to_the_port_is_a_warning_now_and_then(relay):
    it = relay({"echo": {}})
    for _ in range(3):
        with it.client() as client, pytest.raises(ssl.SSLError):
            ssl.create_default_context().wrap_socket(client.sock, server_hostname="localhost")
    it.logged("127.0.0.1 speaks TLS to this port", "http://")
    assert it.log.getvalue().count("speaks TLS") == 1


def test_the_log_can_be_json_or_off(relay):
    it = relay({"echo": {}}, server={"log": "json"})
    it.post("/v1/messages", prompt("echo"))
    record = json.loads(it.logged("/v1/messages"))
    assert record["status"] == 200 and record["method"] == "POST" and record["path"] == "/v1/messages"
    quiet = relay({"echo": {}}, server={"log": "off"})
    quiet.post("/v1/messages", prompt("echo"))
    quiet.server.stop()
    assert "/v1/messages" not in quiet.log.getvalue()


@pytest.mark.parametrize("style", ["text", "json"])
def test_how_many_lines_were_dropped_is_told_as_anything_else_is(style):
    stream = io.StringIO()
    writer = monorelay.LogWriter(stream)
    writer.style = style
    for number in range(monorelay.LOG_BACKLOG_LINES + 7):
        writer.say(str(number))
    writer.start()
    writer.finish()
    last = stream.getvalue().splitlines()[-1]
    told = json.loads(last) if style == "json" else dict(part.split("=") for part in shlex.split(last))
    message = "7 lines of the log were dropped: it was not taken fast enough"
    assert (told["level"], told["message"]) == ("warning", message)


@pytest.mark.parametrize("log", ["text", "json"])
def test_the_log_is_one_line_whatever_a_client_sends(relay, log):
    it = relay({"echo": {}}, server={"log": log})
    it.post("/v1/messages", {"model": "evil\n\x1b[31mforged status=200\u2028\x9b \u202e\ud800"})
    it.ask("GET", "/nowhere%0a%1b[31m", None, "User-Agent: \xff\x9b")
    it.post("/v1/messages", {"model": "x" * 100_000})
    it.ask("GET", "/last")
    it.logged("/last")
    lines = [line for line in it.log.getvalue().split("\n") if "/v1/messages" in line or "nowhere" in line]
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def test_a_log_that_cannot_be_written_never_stops_the_serving(upstream):
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("disk full")

    server = monorelay.RelayServer(parse({"echo": {}}), log=Broken())
    server.start()
    try:
        with Client(server.url) as client:
            assert [
                client.ask("POST", "/v1/messages", json.dumps(prompt("echo")).encode()).status
                for _ in range(3)
            ] == [200] * 3
    finally:
        server.stop()


def test_no_key_and_no_token_leaks_anywhere(upstream, relay):
    secret = "sk-very-secret"
    faults = [
        answer(401, b'{"error":"bad key sk-very-secret"}'),
        answer(429),
        answer(500),
        b"garbage\r\n\r\n",
        ANTHROPIC_STREAM,
    ]
    provider = upstream(replies(*faults))
    it = relay(
        {
            "anthropic": {"upstream": provider, "keys": [secret]},
            "openai": {"base_url": "http://127.0.0.1:9", "keys": [secret]},
        },
        **GUARDED,
    )
    token = jwt.encode(claims(sub="bob"), JWT_SECRET, "HS256")
    seen = b""
    for path in ("/v1/messages", "/v1/chat/completions", "/v1/models", "/nowhere") * 3:
        got = it.post(path, prompt(), token=token)
        seen += got.head + got.body
    it.post("/api/auth/login", {"username": "bob", "password": PASSWORD}, token="")
    it.post("/v1/messages", prompt(), token="almost-" + TOKEN)
    it.server.stop()
    for hidden in (secret, JWT_SECRET, PASSWORD, TOKEN, token, PASSWORD_HASH):
        assert hidden.encode() not in seen and hidden not in it.log.getvalue()


def test_the_log_names_what_broke_an_answer_without_length(upstream, relay):
    it = relay({"anthropic": upstream(replies_then_closes(CLOSE_DELIMITED["json"], b'{"whole":1}'))})
    assert it.post("/v1/messages", prompt()).body == b'{"whole":1}'
    assert "upstream_broken" not in it.logged("/v1/messages")


# ------------------------------------------------------------------------------------------------------------
# The ledger
# ------------------------------------------------------------------------------------------------------------


def usage_rows(path: str, since: int, until: int, by: Any = (), step_day: bool = False, user: Any = None) -> Any:
    """The sums of a ledger as people get them."""
    return [monorelay.usage_row(*group) for group in monorelay.summed_usage(path, since, until, by, step_day, user)]


def row(**columns: Any) -> Any:
    """A row of the ledger: a stream that went well, but for these columns."""
    usual = {
        "at": int(time.time() * 1000), "request": "req_1", "user": "alice", "model": "smart", "sent": "claude-x",
        "provider": "anthropic", "key": "team", "path": "/v1/messages", "status": 200, "stream": 1, "attempts": 1,
        "ttfb": 500, "duration": 2000, "input": 10, "cache_read": 1000, "cache_write": 5, "cache_write_long": 2,
        "output": 7, "tier": None, "cost": 1000, "complete": 1, "error": None,
    }  # fmt: skip
    return monorelay.LedgerRow(**{**usual, **columns})


class Ledger(monorelay.LedgerWriter):
    """A writer with its file, and what it has warned of."""

    def __init__(self, path: Path, keep_days: int = 90, users: dict[str, Any] | None = None) -> None:
        self.path, self.keep_days, self.users = path, keep_days, users or {}
        self.warnings: list[str] = []
        super().__init__(self.warnings.append)
        self.use(parse({"echo": {}}, users=self.users, ledger={"path": str(path), "keep_days": keep_days}))
        self.start()

    def write(self, *rows: Any) -> list[str]:
        """Writes all that waits, and ends; what was warned of."""
        for one in rows:
            self.put(one)
        self.finish()
        return self.warnings


def selected(path: Path, query: str) -> list[Any]:
    """What the query finds in the file, each row a tuple, or a value where that is all."""
    connection = sqlite3.connect(path)
    try:
        return [found[0] if len(found) == 1 else found for found in connection.execute(query).fetchall()]
    finally:
        connection.close()


def assert_sums_are_exact(path: Path) -> None:
    """The tables of sums say what the rows say."""
    assert selected(path, "PRAGMA integrity_check") == ["ok"]
    by_hour = selected(
        path,
        """SELECT at / 3600000, user, iif(status / 100 = 2, sent, '(other)'), coalesce(provider, ''), coalesce(key, ''),
        count(*), sum(status >= 400 OR coalesce(error, 'client_gone') <> 'client_gone'),
        sum(status / 100 = 2 AND (input IS NULL OR output IS NULL)),
        total(input), total(cache_read), total(cache_write), total(cache_write_long), total(output), sum(cost),
        total(iif(stream, ttfb, 0)), sum(stream AND ttfb IS NOT NULL), total(duration)
        FROM request GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5""",
    )
    assert selected(path, "SELECT * FROM hour ORDER BY 1, 2, 3, 4, 5") == by_hour
    for day, length in (("%Y-%m-%d", 10), ("%Y-%m", 7)):
        by_window = selected(
            path,
            f"""SELECT user, strftime('{day}', at / 1000, 'unixepoch'), total(cost), sum(
            ifnull(input, 0) + ifnull(cache_write, 0) + ifnull(cache_write_long, 0) + ifnull(output, 0)) AS tokens
            FROM request GROUP BY 1, 2 HAVING tokens OR total(cost) ORDER BY 1, 2""",
        )
        assert selected(path, f"SELECT * FROM spent WHERE length(window) = {length} ORDER BY 1, 2") == by_window


def test_a_row_has_the_columns_of_the_table(tmp_path):
    assert Ledger(tmp_path / "usage.db").write(row()) == []
    columns = selected(tmp_path / "usage.db", "SELECT name FROM pragma_table_info('request')")
    assert columns == ["id", *monorelay.LedgerRow._fields]
    assert selected(tmp_path / "usage.db", "PRAGMA user_version") == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["usage.db", "usage.db-journal"]


NOW = time.time()
UNKNOWN_OR = st.none() | st.integers(0, 10**6)
ROWS = st.builds(
    row, at=st.integers(0, 400_000_000).map(lambda ms: int(NOW * 1000) - ms),
    user=st.sampled_from(["alice", "bob", ""]),
    sent=st.sampled_from(["claude-x", "gpt-5"]), provider=st.sampled_from(["anthropic", ""]),
    key=st.sampled_from(["team", ""]), status=st.sampled_from([200, 201, 400, 429, 502]), stream=st.integers(0, 1),
    ttfb=UNKNOWN_OR, input=UNKNOWN_OR, cache_read=UNKNOWN_OR, cache_write=UNKNOWN_OR, cache_write_long=UNKNOWN_OR,
    output=UNKNOWN_OR, cost=st.none() | st.integers(0, 10**15), error=st.sampled_from([None, "client_gone", "cut"]),
)  # fmt: skip


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(st.lists(ROWS, max_size=12), min_size=1, max_size=4))
def test_the_sums_of_a_ledger_are_those_of_its_rows(batches):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "usage.db"
        for batch in batches:
            assert Ledger(path).write(*batch) == []
        if any(batches):
            assert selected(path, "SELECT count(*) FROM request") == [sum(map(len, batches))]
            assert_sums_are_exact(path)


def test_names_that_nobody_answered_to_are_one_model_in_the_sums(tmp_path):
    Ledger(tmp_path / "usage.db").write(*(row(sent=f"invented-{n}", status=404) for n in range(50)), row())
    assert selected(tmp_path / "usage.db", "SELECT model, requests, errors FROM hour ORDER BY 1") == [
        ("(other)", 50, 50), ("claude-x", 1, 0),
    ]  # fmt: skip


@pytest.mark.timed
def test_a_file_that_another_process_has_locked_gets_its_rows_when_it_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(monorelay, "LEDGER_LOCK_SECONDS", 0.2)
    it = Ledger(tmp_path / "usage.db")
    it.put(row())
    eventually(lambda: not it.waiting)
    for begin in ("BEGIN EXCLUSIVE", "BEGIN; SELECT * FROM request"):
        holder = sqlite3.connect(it.path, isolation_level=None, check_same_thread=False)
        for statement in begin.split(";"):
            holder.execute(statement).fetchone()
        for number in range(1500):
            begun = time.monotonic()
            it.put(row(request=f"req_{number}"))
            assert time.monotonic() - begun < 0.05, "nobody waits for the file"
        eventually(lambda: "database is locked" in "".join(it.warnings), 8)
        assert it.waiting == 1500
        holder.close()
        eventually(lambda: not it.waiting, 8)
    it.finish()
    assert len(it.warnings) == 1 and "usage.db can't be written: database is locked; 1500 rows wait" in it.warnings[0]
    assert selected(it.path, "SELECT count(*), count(DISTINCT request) FROM request") == [(3001, 1500)]
    assert_sums_are_exact(it.path)


@pytest.mark.timed
def test_the_end_waits_for_a_locked_file_but_not_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(monorelay, "LEDGER_LAST_SECONDS", 1.0)
    it = Ledger(tmp_path / "usage.db")
    it.put(row())
    eventually(lambda: not it.waiting)
    holder = sqlite3.connect(it.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    it.put(row())
    begun = time.monotonic()
    it.finish()
    assert 1 <= time.monotonic() - begun < 2
    assert it.warnings[-1] == "1 rows of the ledger are lost: it could not be written"
    holder.close()


def test_what_waits_for_a_ledger_is_bounded_and_what_is_dropped_is_counted(tmp_path):
    it = Ledger(tmp_path / "no such folder" / "usage.db")
    for _ in range(10_007):
        it.put(row())
    assert (it.waiting, it.dropped) == (10_000, 7)
    eventually(lambda: "unable to open database file; " in "".join(it.warnings))
    it.path.parent.mkdir()
    eventually(lambda: not it.waiting)
    it.finish()
    assert it.warnings[1:] == ["7 rows of the ledger were dropped: too many waited for it"]
    assert selected(it.path, "SELECT sum(requests) FROM hour") == [10_000]


@pytest.mark.timed
def test_a_row_costs_the_event_loop_next_to_nothing(tmp_path):
    it = monorelay.LedgerWriter(lambda message: None)
    it.use(parse({"echo": {}}, ledger={"path": str(tmp_path / "usage.db")}))
    one = row()
    assert seconds_each(lambda: it.put(one)) < 50e-6
    assert not list(tmp_path.iterdir())


WRITING = """
import sys, time, monorelay
config = monorelay.parse_config('{"ledger": {"path": "usage.db"}, "providers": {"echo": {"format": "echo"}}}', {})
writer = monorelay.LedgerWriter(lambda message: print(message, flush=True))
writer.use(config)
writer.start()
values = dict.fromkeys(monorelay.LedgerRow._fields)
for number in range(int(sys.argv[1])):
    values.update(at=int(time.time() * 1000), request=f"req_{number}", user="alice", sent="claude-x", status=200,
                  input=number, output=1, cost=number % 97, complete=1, stream=0)
    writer.put(monorelay.LedgerRow(**values))
    if number % 300 == 0:
        time.sleep(0.1)
exec(sys.argv[2])
writer.finish()
"""


def writing(folder: Path, rows: int, last: str = "") -> subprocess.Popen[str]:
    """A process that writes so many rows to usage.db in the folder, and then does `last`."""
    return subprocess.Popen(
        [sys.executable, "-c", WRITING, str(rows), last], cwd=folder, text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


def test_two_processes_write_the_same_ledger_and_the_sums_are_exact(tmp_path):
    processes = [writing(tmp_path, 4000), writing(tmp_path, 3000)]
    told = [process.communicate(timeout=60)[0] for process in processes]
    assert not any("lost" in text or "dropped" in text for text in told), told
    assert selected(tmp_path / "usage.db", "SELECT count(*) FROM request") == [7000]
    assert selected(tmp_path / "usage.db", "SELECT sum(requests) FROM hour") == [7000]
    assert_sums_are_exact(tmp_path / "usage.db")


def test_a_process_that_is_killed_leaves_a_ledger_that_holds_together(tmp_path):
    process = writing(tmp_path, 100_000)
    eventually(lambda: (tmp_path / "usage.db-journal").stat().st_size, 30)  # it is in the midst of a transaction
    process.kill()
    process.communicate(timeout=TIMEOUT_SECONDS)
    assert Ledger(tmp_path / "usage.db").write(row()) == []
    assert selected(tmp_path / "usage.db", "SELECT sum(requests) FROM hour")[0] >= 1
    assert_sums_are_exact(tmp_path / "usage.db")


DYING = """
import monorelay, os, signal, sqlite3
connection = sqlite3.connect("usage.db", isolation_level=None)
connection.execute("PRAGMA journal_mode = TRUNCATE")
connection.execute("PRAGMA cache_size = 5")
connection.execute("BEGIN IMMEDIATE")
connection.executemany("INSERT INTO spent VALUES (?, '2026-11', 1, 1)", [(f"user{n}",) for n in range(9000)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_process_has_begun_that_dies_is_undone_by_whoever_reads_first(tmp_path):
    path = tmp_path / "usage.db"
    Ledger(path).write(row(cost=70))
    before = path.stat().st_size
    for reads in (
        lambda: run("usage", "usage.db", "--by", "user", "--csv", cwd=tmp_path).stdout.count("alice"),
        lambda: len(usage_rows(str(path), 0, 10**6, ["user"])),
        lambda: int(Ledger(path, users=LIMITED).spent("alice", monorelay.windows(time.time())[0]) == (70, 24)),
    ):
        subprocess.run([sys.executable, "-c", DYING], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(HERE)})
        assert path.stat().st_size > 2 * before, "half of it is in the file"
        assert reads() == 1 and path.stat().st_size == before
        assert_sums_are_exact(path)


def test_rows_wait_for_a_disk_that_is_full(tmp_path):
    full = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))\n"
        "writer.finish = lambda: None\n"
        "[writer.put(monorelay.LedgerRow(**values)) for number in range(2000)]\n"
        "time.sleep(2.5)\n"
        "print(writer.waiting, flush=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "monorelay.LedgerWriter.finish(writer)\n"
    )
    process = writing(tmp_path, 1, f"import resource\n{full}")
    told = process.communicate(timeout=30)[0].splitlines()
    assert len(told) == 2 and re.match(r"the ledger usage\.db can't be written: d.*(I/O|disk is full)", told[0])
    assert 0 < int(told[1]) <= 2001
    assert selected(tmp_path / "usage.db", "SELECT count(*) FROM request") == [2001]
    assert_sums_are_exact(tmp_path / "usage.db")


def test_a_ledger_of_a_newer_version_is_left_as_it_is(tmp_path):
    path = tmp_path / "usage.db"
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.execute("CREATE TABLE future (x)")
    connection.close()
    before = path.read_bytes()
    it = Ledger(path)
    it.put(row())
    eventually(lambda: it.warnings)
    assert "a newer MonoRelay has made it (version 2, this one knows 1); 1 rows wait" in it.warnings[0]
    assert path.read_bytes() == before and it.waiting == 1
    path.unlink()
    eventually(lambda: not it.waiting)
    it.finish()
    assert selected(path, "SELECT count(*) FROM request") == [1] and len(it.warnings) == 1


def made_by_another_program(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (x)")
    connection.close()


@pytest.mark.parametrize("users", [{}, {"alice": {"usd_per_day": 1}}])
def test_a_database_of_another_program_is_left_as_it_is(tmp_path, users):
    path = tmp_path / "notes"
    made_by_another_program(path)
    before = path.read_bytes()
    it = Ledger(path, users=users)
    it.put(row(cost=3))
    eventually(lambda: it.failing and it.warnings)
    time.sleep(1.2)  # until it has tried again
    assert len(it.warnings) == 1 and "can't be written: another program has made it;" in it.warnings[0]
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path] and it.waiting == 1
    path.unlink()
    eventually(lambda: not it.waiting)
    it.finish()
    assert selected(path, "SELECT count(*) FROM request") == [1]


@pytest.mark.parametrize("how", ["no database", "malformed"])
def test_a_broken_ledger_is_kept_under_another_name_and_a_new_one_begun(tmp_path, how):
    path = tmp_path / "usage.db"
    if how == "malformed":
        Ledger(path).write(*(row(request=f"req_{n}") for n in range(500)))
        whole = path.read_bytes()
        path.write_bytes(whole[:100] + b"\x07" * (len(whole) - 100))
    else:
        path.write_bytes(b"no database at all" * 100)
    broken = path.read_bytes()
    it = Ledger(path, users={"alice": {"usd_per_day": 1}})
    it.put(row())
    eventually(lambda: not it.waiting)
    it.finish()
    (kept,) = (file for file in tmp_path.iterdir() if re.fullmatch(r"usage\.db\.broken-\d{8}T\d{6}Z", file.name))
    assert kept.read_bytes() == broken
    assert len(it.warnings) == 1 and "is broken (" in it.warnings[0] and kept.name in it.warnings[0]
    assert selected(path, "SELECT count(*) FROM request") == [1]


def test_a_ledger_that_is_moved_away_is_begun_anew(tmp_path):
    it = Ledger(tmp_path / "usage.db")
    for _ in range(2):
        it.put(row())
        eventually(lambda: not it.waiting)
        it.path.rename(tmp_path / f"{time.time_ns()}.db")
    assert it.write(row()) == []
    assert [selected(path, "SELECT sum(requests) FROM hour") for path in tmp_path.glob("*.db")] == [[1]] * 3


def test_what_is_too_old_is_dropped_step_by_step_and_the_sums_are_kept_for_longer(tmp_path):
    path, day, now = tmp_path / "usage.db", 86_400_000, int(time.time() * 1000)
    old = [row(at=now - 500 * day), *(row(at=now - 3 * day) for _ in range(8000)), row(at=now - 1 * day)]
    assert Ledger(path, keep_days=4000).write(*old) == []
    assert selected(path, "SELECT count(*) FROM request") == [8002]
    left = []
    for _ in range(3):
        Ledger(path, keep_days=2).write(row())
        left += selected(path, "SELECT count(*) FROM request")
    assert left == [3003, 3, 4]
    assert selected(path, "SELECT sum(requests) FROM hour") == [8001 + 3], "all but the oldest hour"
    assert min(selected(path, "SELECT window FROM spent")) > monorelay.windows(time.time() - 400 * 86400)[1]


def test_text_and_numbers_that_sqlite_does_not_take_stop_no_row(tmp_path):
    odd = row(model="half \ud800", user="b\x00b", cost=10**30, path="x" * 9999, provider="ü", sent=b"bytes", ttfb=1.5)
    assert Ledger(tmp_path / "usage.db").write(odd, row()) == []
    (found, _) = selected(tmp_path / "usage.db", "SELECT model, user, cost, length(path), provider, sent FROM request")
    assert found == ("half ?", "b\x00b", None, 256, "ü", None)


LIMITED = {"alice": {"usd_per_day": 1}, "bob": {"tokens_per_day": 1}, "free": {}}


def test_what_was_spent_is_known_at_once_and_survives_a_restart(tmp_path):
    day, month = monorelay.windows(time.time())
    it = Ledger(tmp_path / "usage.db", users=LIMITED)
    assert it.spent("alice", day) == (0, 0)
    it.put(row(cost=70))
    assert it.spent("alice", day) == it.spent("alice", month) == (70, 24), "reads of the cache don't count"
    it.put(row(cost=None, input=None, output=None, cache_write=None, cache_write_long=None))
    eventually(lambda: not it.waiting)
    it.put(row(cost=5, user="bob"))
    assert (it.spent("alice", day), it.spent("bob", day), it.spent("bob", month)) == ((70, 24), (5, 24), (5, 24))
    it.finish()
    it = Ledger(tmp_path / "usage.db", users=LIMITED)
    assert (it.spent("alice", day), it.spent("bob", month), it.spent("free", day)) == ((70, 24), (5, 24), (0, 0))
    it.put(row(cost=1))
    assert it.spent("alice", day) == (71, 48)
    assert it.write() == []


def test_what_other_workers_have_spent_is_known_soon(tmp_path):
    day, _ = monorelay.windows(time.time())
    idle, busy = Ledger(tmp_path / "usage.db", users=LIMITED), Ledger(tmp_path / "usage.db", users=LIMITED)
    busy.put(row(cost=70))
    eventually(lambda: idle.spent("alice", day) == (70, 24))
    idle.put(row(cost=1))
    assert idle.spent("alice", day) == (71, 48)
    eventually(lambda: busy.spent("alice", day) == (71, 48))
    assert idle.write() == busy.write() == []


def test_rows_for_which_there_is_no_room_count_for_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(monorelay, "LEDGER_BACKLOG_ROWS", 3)
    day, _ = monorelay.windows(time.time())
    it = Ledger(tmp_path / "no such folder" / "usage.db", users=LIMITED)
    for _ in range(5):
        it.put(row(cost=70))
    assert (it.spent("alice", day), it.waiting, it.dropped) == ((350, 120), 3, 2)
    it.use(parse({"echo": {}}, users=LIMITED, ledger={"path": str(it.path)}))
    assert it.spent("alice", day) == (350, 120), "a reload forgets nothing"
    it.path.parent.mkdir()
    eventually(lambda: not it.waiting)
    assert it.spent("alice", day) == (350, 120)
    assert dict(it.shared())["alice", day] == (140, 48), "which other workers read nowhere"
    it.write()


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(ROWS, max_size=30), st.integers(0, 30))
def test_what_was_spent_is_the_sum_of_what_is_written_and_what_waits(rows, written):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setattr(monorelay.time, "time", lambda: NOW)
        it = monorelay.LedgerWriter(lambda message: None)
        it.use(parse({"echo": {}}, users=LIMITED, ledger={"path": str(Path(folder) / "usage.db")}))
        for one in rows[:written]:
            it.put(one)
        assert it._flush()
        for one in rows[written:]:
            it.put(one)
        sums = monorelay.spent_sums(rows)
        for user, window in itertools.product(("alice", "bob"), monorelay.windows(NOW)):
            assert it.spent(user, window) == sums.get((user, window), (0, 0))


def test_a_reload_changes_the_file_and_the_users_with_budgets(tmp_path):
    it = Ledger(tmp_path / "usage.db")
    it.put(row())
    eventually(lambda: not it.waiting)
    it.use(parse({"echo": {}}, users=LIMITED, ledger={"path": str(tmp_path / "other.db")}))
    it.put(row(cost=3))
    eventually(lambda: not it.waiting)
    it.use(parse({"echo": {}}))
    it.put(row())
    assert it.waiting == 0, "there is no ledger any more"
    it.use(parse({"echo": {}}, users=LIMITED, ledger={"path": str(tmp_path / "usage.db")}))
    day, _ = monorelay.windows(time.time())
    eventually(lambda: it.spent("alice", day) == (1000, 24))
    assert it.write() == []
    assert [selected(tmp_path / name, "SELECT cost FROM request") for name in ("usage.db", "other.db")] == [[1000], [3]]


def test_a_ledger_that_a_reload_begins_is_written(tmp_path):
    it = monorelay.LedgerWriter(lambda message: None)
    it.use(parse({"echo": {}}))
    it.start()
    it.put(row())
    it.use(parse({"echo": {}}, ledger={"path": str(tmp_path / "usage.db")}))
    it.put(row())
    it.finish()
    assert selected(tmp_path / "usage.db", "SELECT count(*) FROM request") == [1]


def test_who_is_limited_changes_together_with_what_is_known_of_them(tmp_path):
    """Else a row could be written of which a budget knows nothing yet."""
    it = monorelay.LedgerWriter(lambda message: None)
    limited, lock = [], it._lock

    class Lock:
        def __enter__(self) -> None:
            limited.append(it._limited)
            lock.acquire()

        def __exit__(self, *error: object) -> None:
            lock.release()

    it._lock = Lock()
    it.use(parse({"echo": {}}, ledger={"path": str(tmp_path / "usage.db")}, users={"alice": {"usd_per_day": 1}}))
    assert (limited, it._limited) == ([()], ("alice",))


HOUR = 3_600_000
MIDNIGHT = (int(NOW // 86400) - 3) * 24  # the hour in which three days ago begins
DAYS = [monorelay.windows(NOW + number * 86400)[0] for number in (-3, -2, -1)]


@pytest.fixture
def some_days(tmp_path) -> str:
    """A ledger of some days."""
    path, at = tmp_path / "usage.db", MIDNIGHT * HOUR
    rows = [
        row(at=at, cost=3_000_000_000),
        row(at=at + 23 * HOUR, user="bob", sent="gpt-5", key="spare", cost=None, output=None, stream=0),
        row(at=at + 24 * HOUR, ttfb=700, duration=1000, cost=1),
        row(at=at + 48 * HOUR, user="bob", status=429, sent="x", cost=None, error="upstream:rate_limit_error"),
        row(at=at + 48 * HOUR, user="bob", sent="gpt-5", status=200, error="client_gone", complete=0, cost=None),
    ]
    assert Ledger(path).write(*rows) == []
    return str(path)


def test_usage_is_summed_by_what_is_asked_for(some_days):
    alice = {
        "user": "alice", "model": "claude-x", "requests": 2, "errors": 0, "untold": 0, "input": 20, "cache_read": 2000,
        "cache_write": 10, "cache_write_long": 4, "output": 14, "usd": 3.000000001, "ttfb": 0.6, "seconds": 1.5,
    }  # fmt: skip
    rows = usage_rows(some_days, MIDNIGHT, MIDNIGHT + 49, ["user", "model"])
    assert rows[0] == alice and [(it["user"], it["model"], it["requests"]) for it in rows[1:]] == [
        ("bob", "gpt-5", 2), ("bob", "(other)", 1),
    ]  # fmt: skip
    assert (rows[1]["usd"], rows[1]["untold"], rows[1]["errors"]) == (None, 1, 0)
    assert usage_rows(some_days, MIDNIGHT, MIDNIGHT + 49, ["user", "model"], user="alice") == [alice]
    assert usage_rows(some_days, MIDNIGHT, MIDNIGHT + 48, user="bob")[0]["ttfb"] is None
    (total,) = usage_rows(some_days, MIDNIGHT, MIDNIGHT + 49)
    assert (total["requests"], total["errors"], total["usd"], total["output"]) == (5, 1, 3.000000001, 28)
    days = usage_rows(some_days, MIDNIGHT, MIDNIGHT + 49, ["key"], step_day=True)
    assert [(it["day"], it["key"], it["requests"]) for it in days] == [
        (DAYS[0], "team", 1), (DAYS[0], "spare", 1), (DAYS[1], "team", 1), (DAYS[2], "team", 2),
    ]  # fmt: skip
    assert usage_rows(some_days, MIDNIGHT + 1, MIDNIGHT + 23) == []
    assert usage_rows(some_days, MIDNIGHT + 1, MIDNIGHT + 23, ["provider"], True, "nobody") == []


def test_the_total_has_what_groups_beyond_the_most_leave_out(relay, some_days, monkeypatch, capsys):
    monkeypatch.setattr(monorelay, "LEDGER_GROUPS", 1)
    it = relay({"echo": {}}, ledger={"path": some_days}, users={"alice": {"key": ALICE}})
    for token, requests in ((TOKEN, 5), (ALICE, 2)):
        told = it.ask("GET", f"/api/usage?from={DAYS[0]}&by=user,model&step=day", token=token).json
        assert len(told["rows"]) == 1 and told["total"]["requests"] == requests
    assert monorelay.run_usage({"json": True, "by": ("user", "model"), "days": 9}, some_days, some_days) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["rows"]) == 1 and told["total"]["requests"] == 10


@pytest.mark.parametrize("by", [["day"], ["hour"], ["user", "1; DROP TABLE hour"], ["request"]])
def test_usage_is_grouped_by_known_columns_only(some_days, by):
    with pytest.raises(ValueError, match="it can be grouped by user, model, provider, key"):
        usage_rows(some_days, 0, 10**6, by)


def test_requests_are_listed_newest_first_page_by_page(some_days):
    def ids(**wanted: Any) -> list[int]:
        return [it["id"] for it in monorelay.request_page(some_days, **wanted)[0]]

    (newest,) = monorelay.request_page(some_days, limit=1)[0]
    assert tuple(newest) == ("id", *monorelay.LedgerRow._fields)
    assert (newest["id"], newest["user"], newest["complete"], newest["cost"]) == (5, "bob", 0, None)
    assert ids() == [5, 4, 3, 2, 1]
    assert (ids(limit=2), ids(limit=2, before=4), ids(before=1)) == ([5, 4], [3, 2], [])
    assert ids(before=10**6) == ids(before=10**18) == [5, 4, 3, 2, 1]
    assert (ids(user="alice"), ids(model="gpt-5"), ids(model="smart", user="bob")) == ([3, 1], [5, 2], [5, 4, 2])
    assert (ids(key="anthropic/spare"), ids(key="spare"), ids(key="openai/spare"), ids(key="anthropic")) == (
        [2], [2], [], []
    )  # fmt: skip
    assert (ids(errors=True), ids(user="")) == ([4], [])
    assert ids(limit=0) == [5] and ids(user="half \ud800") == []


def test_a_rare_request_is_found_however_many_there_are_before_it(relay, tmp_path, monkeypatch):
    path = tmp_path / "usage.db"
    rows = [row(request=f"req_{n}", user="bob" if n in (3, 57) else "alice") for n in range(100)]
    assert Ledger(path).write(*rows) == []
    monkeypatch.setattr(monorelay, "LEDGER_SEARCHED_ROWS", 10)
    it = relay({"echo": {}}, ledger={"path": str(path)})
    found, before, count = [], "", 0
    while before is not None:
        page = it.ask("GET", f"/api/requests?user=bob&limit=2&before={before}").json
        found, before, count = found + [one["request"] for one in page["rows"]], page["next"], count + 1
    assert (found, count) == (["req_57", "req_3"], 10)
    for limit, following in ((10, [91, 81]), (0, [100, 99]), (1, [100, 99])):
        first = it.ask("GET", f"/api/requests?limit={limit}").json["next"]
        assert [first, it.ask("GET", f"/api/requests?limit={limit}&before={first}").json["next"]] == following
    assert it.ask("GET", "/api/requests?limit=5&before=6").json["next"] is None, "there is none before the first"


def test_a_ledger_that_is_not_there_yet_is_empty_and_stays_so(tmp_path):
    path = tmp_path / "usage.db"
    assert usage_rows(str(path), 0, 10**6) == monorelay.request_page(str(path))[0] == []
    assert not path.exists()
    path.touch()
    assert usage_rows(str(path), 0, 10**6) == monorelay.request_page(str(path))[0] == []


def test_a_ledgers_queries_only_read(some_days):
    connection = monorelay.open_ledger(some_days)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM hour")
    connection.close()


@pytest.mark.timed
def test_a_large_ledger_is_read_at_once(tmp_path):
    # The last hour is a whole one: in the first seconds of another, not every user has been there.
    path, now = str(tmp_path / "odd %3F#? name.db"), time.time() // 3600 * 3600 - 1
    users, models = [f"user{n}" for n in range(10)], ["claude-a", "claude-b", "gpt-5"]
    rows = [
        row(at=int(now * 1000) - n * 15_000, user=users[n % 10], sent=models[n % 3], status=500 if n % 4 == 0 else 200)
        for n in range(172_000)
    ]
    monorelay.write_ledger(monorelay.LedgerSettings(path, 4000), rows, (), now)
    until = int(now // 3600) + 1

    def seconds(read: Callable[[], Any], count: int) -> float:
        begun = time.process_time()
        assert len(read()) == count
        return time.process_time() - begun

    def by_user() -> Any:
        return usage_rows(path, until - 31 * 24, until, ["user", "model"])

    def listed(before: int = 2**62, limit: int = 200, **wanted: Any) -> Callable[[], Any]:
        return lambda: monorelay.request_page(path, before, limit, **wanted)[0]

    def printed() -> Any:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert monorelay.run_usage({"days": 31}, path) == 0
        return text.getvalue().splitlines()

    for read, count in (
        (by_user, 35),
        (lambda: usage_rows(path, until - 31 * 24, until, monorelay.GROUPS), 35),
        (lambda: usage_rows(path, until - 31 * 24, until, ["model"], user="user3"), 3),
        (lambda: monorelay.hour_rows(path, until - 48, None), 48),
        (lambda: monorelay.hour_rows(path, until - 48, "user3"), 48),
        (printed, 40), (listed(), 200), (listed(before=100_000), 200), (listed(limit=1000), 1000),
        (listed(errors=True), 200), (listed(user="user4", errors=True, before=5000), 200),
        # All of it has to be looked through.
        (listed(user="nobody", errors=True), 0), (listed(model="none"), 0), (listed(key="anthropic/none"), 0),
    ):  # fmt: skip
        assert min(seconds(read, count) for _ in range(5)) < 0.05
    connection = monorelay.open_ledger(path)
    plan = connection.execute("EXPLAIN QUERY PLAN " + monorelay.SWEEP_REQUESTS, (0,)).fetchall()
    connection.close()
    assert any("request_at" in step[-1] for step in plan) and not any(step[-1] == "SCAN request" for step in plan)


def test_a_relay_begins_its_ledger_with_its_start_and_ends_it_with_its_end(relay, tmp_path):
    it = relay({"echo": {}}, ledger={"path": str(tmp_path / "usage.db")}).server
    it.service.ledger.put(row())
    it.reload(parse({"echo": {}}, ledger={"path": str(tmp_path / "other.db")}))
    it.service.ledger.put(row())
    it.stop()
    found = [selected(path, "SELECT count(*) FROM request")[0] for path in tmp_path.glob("*.db")]
    assert sum(found) == 2


@pytest.mark.parametrize("sections", [{}, {"ledger": {"path": "usage.db"}}], ids=["without", "with"])
def test_a_relay_has_a_thread_for_its_ledger_only_if_there_is_one(relay, tmp_path, monkeypatch, sections):
    monkeypatch.chdir(tmp_path)
    it = relay({"echo": {}}, **sections)
    assert (it.server.service.ledger._thread is not None) == bool(sections)
    assert it.post("/v1/messages", prompt()).status == 200 and (sections or not list(tmp_path.iterdir()))


def test_a_ledger_that_can_not_be_written_is_warned_of_once_a_minute(tmp_path):
    clock = Clock()
    (tmp_path / "file").touch()
    warnings: list[str] = []
    it = monorelay.LedgerWriter(warnings.append, clock)
    it.use(parse({"echo": {}}, ledger={"path": str(tmp_path / "file" / "usage.db")}))
    it.put(row())
    told = []
    for seconds in (0, 1, 58, 2, 59, 2):
        clock.now += seconds
        assert not it._flush()
        told.append(len(warnings))
    assert told == [1, 1, 1, 2, 2, 3]


def first_state(it: Any) -> Any:
    """What the page is told at first."""
    with Client(it.url) as client:
        client.send(request("GET", "/api/live"))
        return json.loads(client.until(b"\n\n").rpartition(b"data: ")[2])


@pytest.mark.parametrize(("recent", "told"), [(0, 50), (20, 50), (60, 60)])
def test_a_page_is_told_at_first_of_all_that_the_ledger_may_not_have_yet(relay, recent, told):
    it, now = relay({"echo": {}}), int(time.time() * 1000)
    times = [now - 3_600_000] * 60 + [now] * recent
    it.server.service.tally.ended.extend(row(at=at, request=f"req_{number}") for number, at in enumerate(times))
    ended = first_state(it)["ended"]
    assert len(ended) == told and ended[-1][21] == f"req_{len(times) - 1}"


@pytest.mark.parametrize("how", ["locked", "of a newer version", "no database"])
@pytest.mark.timed
def test_a_ledger_that_can_not_be_read_is_said_to_be_and_holds_up_nothing_else(relay, tmp_path, monkeypatch, how):
    monkeypatch.setattr(monorelay, "LEDGER_LOCK_SECONDS", 0.2)
    path = tmp_path / "usage.db"
    it = relay({"echo": {}}, ledger={"path": str(path)})
    holder = sqlite3.connect(path, isolation_level=None)
    if how == "no database":
        path.write_bytes(b"no database at all" * 100)
    else:
        holder.execute("PRAGMA user_version = 2" if how == "of a newer version" else "BEGIN EXCLUSIVE")
    for query in ("/api/usage", "/api/requests"):
        got = it.ask("GET", query)
        assert (got.status, got.get("x-monorelay-error")) == (503, "ledger_unreadable")
        assert got.json["error"]["message"].startswith("the ledger can't be read: ")
    state = first_state(it)
    assert state["ledger"] and state["hours"] == [] and state["active"] == 0
    begun = time.monotonic()
    assert it.post("/v1/messages", prompt()).status == it.ask("GET", "/metrics").status == 200
    assert time.monotonic() - begun < 0.5
    holder.close()
    assert "internal error" not in it.log.getvalue()


def without_sqlite(folder: Path) -> dict[str, Any]:
    """The environment of a Python that has no sqlite3."""
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['sqlite3'] = sys.modules['_sqlite3'] = None\n")
    return {"env": {**os.environ, "PYTHONPATH": str(folder)}}


NOTING_IMPORTS = """
import os, sys
imports = os.open("imports.txt", os.O_WRONLY | os.O_CREAT)
sys.addaudithook(lambda event, values: event == "import" and os.write(imports, f"{values[0]}\\n".encode()))
"""


@pytest.mark.parametrize("has_sqlite", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_ledger_that_comes_with_a_reload_imports_nothing(program, tmp_path, workers, has_sqlite):
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}} if has_sqlite else without_sqlite(tmp_path)
    with open(tmp_path / "sitecustomize.py", "a") as file:
        file.write(NOTING_IMPORTS)
    config = settings({"echo": {}}, server={"workers": workers})
    it = program(config, **options)
    with Client(it.url) as client:
        assert client.ask("POST", "/v1/messages", json.dumps(prompt()).encode()).status == 200
    # This is the last that each of them imports when it starts.
    eventually(lambda: (tmp_path / "imports.txt").read_text().split().count("ctypes._endian") == workers)
    imported = (tmp_path / "imports.txt").read_text()
    assert "sqlite3" in imported.split() and not (tmp_path / "usage.db").exists()
    it.write({**config, "ledger": {"path": "usage.db"}})
    eventually(lambda: "was reloaded" in it.text())
    eventually(lambda: first_state(it)["ledger"] == has_sqlite)

    def is_kept() -> bool:  # the other worker may take up the edit a little later, and what it serves before isn't
        with Client(it.url) as client:
            assert client.ask("POST", "/v1/messages", json.dumps(prompt()).encode()).status == 200
            assert client.ask("GET", "/api/usage").json["rows"] or has_sqlite
        return (tmp_path / "usage.db").exists()

    eventually(lambda: is_kept() == has_sqlite)
    assert (tmp_path / "imports.txt").read_text() == imported
    assert it.text().count("ledger: this Python has no sqlite3; nothing is kept") == (not has_sqlite)


@pytest.mark.parametrize("how", ["no sqlite3", "below a file", "disk full"])
@pytest.mark.timed
def test_a_relay_without_a_place_for_its_ledger_serves_all_the_same(program, tmp_path, how):
    path = tmp_path / ("relay.json/usage.db" if how == "below a file" else "usage.db")
    options: dict[str, Any] = {}
    if how == "no sqlite3":
        options = without_sqlite(tmp_path)
    if how == "disk full":
        options["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    config = settings({"echo": {}}, ledger={"path": str(path)}, users={"alice": {"key": "key-of-alice-0123"}})
    it = program(config, **options)
    eventually(lambda: "stop it" in it.text())
    slowest, body = 0.0, json.dumps(prompt(stream=True)).encode()
    with Client(it.url) as client:
        for number in range(40):
            begun = time.monotonic()
            got = client.ask("POST", "/v1/messages", body, token="key-of-alice-0123")
            slowest = max(slowest, time.monotonic() - begun)
            assert (got.status, events_of(got.body)[-1][0]) == (200, "message_stop")
            # In between, several attempts are made to write.
            threading.Event().wait(0.0 if how == "no sqlite3" else 0.055)
            assert number or client.ask("GET", "/health").status == 200
        usage, listed = client.ask("GET", "/api/usage"), client.ask("GET", "/api/requests")
        counters = client.ask("GET", "/metrics").body.decode()
    assert slowest < 0.5 and 'monorelay_user_requests_total{user="alice"} 40\n' in counters
    told = it.text()
    assert "internal error" not in told and first_state(it)["ledger"] == (how != "no sqlite3")
    if how == "no sqlite3":
        assert "ledger: this Python has no sqlite3; nothing is kept" in " ".join(told.split())
        assert usage.json["total"]["requests"] == len(listed.json["rows"]) == 40, "what is in memory is told"
        assert "\nmonorelay_ledger_rows_waiting 0\n" in counters and "can't be written" not in told
        done = run("usage", cwd=tmp_path, **options)
        assert (done.returncode, done.stderr) == (1, "monorelay: ledger: this Python has no sqlite3\n")
    else:
        assert usage.json["rows"] == listed.json["rows"] == []
        assert told.count("can't be written") == 1 and "\nmonorelay_ledger_rows_waiting 40\n" in counters
        assert first_state(it)["unwritten"] == 40


# -- a week of traffic: every account agrees with what the providers told


KIND_NAMES = ("input", "cache_read", "cache_write", "cache_write_long", "output")
FIGURES = ("requests", "errors", "untold", *KIND_NAMES, "cost")
ODD_RATES = {  # USD a token: what most requests cost is no whole number of 10^-9 USD
    "claude-a": ("3.00000013e-06", "3.1e-07", "3.7500001e-06", "6.0000007e-06", "1.50000003e-05"),
    "claude-b": ("5e-06", "5.000009e-07", "6.25e-06", "1e-05", "2.5e-05"),
    "gpt-a": ("1.2500000007e-06", "1.25e-07", "1.5e-06", "2.5e-06", "1.00001e-05"),
}
RATE_NAMES = ("input_cost_per_token", "cache_read_input_token_cost", "cache_creation_input_token_cost",
              "cache_creation_input_token_cost_above_1hr", "output_cost_per_token")  # fmt: skip


class Bill(NamedTuple):
    """What a provider has told of one attempt; `kinds` is None where it told no tokens."""

    plan: dict[str, Any]
    model: str
    provider: str
    key: str
    status: int
    stream: bool
    kinds: tuple[int | None, ...] | None
    complete: bool
    path: str

    @property
    def cost(self) -> int | None:
        """In 10^-9 USD, half a unit rounded up."""
        if self.kinds is None or self.model not in ODD_RATES:
            return None
        rates = map(fractions.Fraction, ODD_RATES[self.model])
        usd = sum(rate * (count or 0) for rate, count in zip(rates, self.kinds))
        return math.floor(usd * 10**9 + fractions.Fraction(1, 2))

    @property
    def answered(self) -> bool:
        return self.status == 200

    @property
    def failed(self) -> bool:
        return self.status >= 400 or self.plan["fate"] == "cut"

    @property
    def figures(self) -> tuple[int | None, ...]:
        """What it adds to FIGURES."""
        untold = self.answered and (self.kinds is None or self.kinds[-1] is None)
        return 1, int(self.failed), int(untold), *(count or 0 for count in self.kinds or (0,) * 5), self.cost


def usage_in(path: str, kinds: tuple[int, ...]) -> dict[str, Any]:
    """The usage object of these tokens in the format of the path."""
    plain, read, write, long, output = kinds
    if path.endswith("/messages"):
        split = {"ephemeral_5m_input_tokens": write, "ephemeral_1h_input_tokens": long}
        return {"input_tokens": plain, "cache_read_input_tokens": read, "cache_creation_input_tokens": write + long,
                "cache_creation": split, "output_tokens": output, "service_tier": "standard"}  # fmt: skip
    details = {"cached_tokens": read, "cache_write_tokens": write + long,
               "cache_write_tokens_details": {"ttl_12h_tokens": long}}  # fmt: skip
    total = plain + read + write + long
    if path.endswith("/responses"):
        return {"input_tokens": total, "input_tokens_details": details, "output_tokens": output}
    return {"prompt_tokens": total, "prompt_tokens_details": details, "completion_tokens": output}


def plan_in(asked: Any) -> dict[str, Any]:
    """What the text of a request tells its provider to do."""
    text = asked["input"] if "input" in asked else asked["messages"][0]["content"]
    return json.loads(text if isinstance(text, str) else text[0]["text"])


class Billing:
    """Providers that do what each request's text says, and write down what they told."""

    def __init__(self) -> None:
        self.bills: list[Bill] = []
        self.attempts: Counter[tuple[str, str, str]] = Counter()  # provider, key, status

    def of(self, plan: dict[str, Any]) -> list[Bill]:
        return [bill for bill in self.bills if bill.plan["number"] == plan["number"]]

    def script(self, provider: str) -> Script:
        def script(connection: Connection) -> None:
            while True:
                asked = connection.read_request()
                if not self.answer(provider, connection, asked.target, asked):
                    return

        return script

    def answer(self, provider: str, connection: Connection, path: str, asked: Message) -> bool:
        """Answers one request; whether the connection can be used for another."""
        body, plan = asked.json, plan_in(asked.json)
        key = (asked.get("x-api-key") or asked.get("authorization").removeprefix("Bearer ")).removeprefix("sk-")
        fate, before, stream = plan["fate"], len(self.of(plan)), body.get("stream", False)
        kinds = tuple(plan["kinds"])

        def bill(status: int, stream: bool, told: tuple[int | None, ...] | None, complete: bool = True) -> str:
            self.bills.append(Bill(plan, body["model"], provider, key, status, stream, told, complete, path))
            self.attempts[(provider, key, str(status))] += 1
            return f"x-bill: {len(self.bills) - 1}"

        refusals = {"failover": 429 if before < 1 else 0, "elsewhere": 529 if provider == "anthropic" else 0,
                    "fails": 500, "refused": 400}  # fmt: skip
        status = refusals.get(fate, 0)
        if status:
            connection.send(answer(status, b'{"error":{"type":"x","message":"no"}}', bill(status, False, None)))
        elif stream:
            return self.stream(connection, path, body, fate, kinds, bill)
        elif fate == "left":
            bill(0, False, None, complete=False)
            return not connection.ended_within(TIMEOUT_SECONDS)
        else:
            whole = json.dumps({**self.document(path, body["model"]), "usage": usage_in(path, kinds)}).encode()
            # Half of an answer can't be translated: its client gets a whole error.
            half = (502, True) if plan["path"] != path else (200, False)
            number = bill(half[0], False, None, half[1]) if fate == "cut" else bill(200, False, kinds)
            sent = answer(200, whole, number)
            connection.send(sent[: len(sent) - len(whole) // 2] if fate == "cut" else sent)
        return fate != "cut"

    @staticmethod
    def document(path: str, model: str) -> dict[str, Any]:
        """A whole answer but for its usage."""
        if path.endswith("/messages"):
            return {**MESSAGE, "model": model, "content": [{"type": "text", "text": "Hi"}], "stop_reason": "end_turn"}
        if path.endswith("/responses"):
            return {"id": "resp_1", "object": "response", "status": "completed", "model": model, "output": [],
                    "service_tier": "default"}  # fmt: skip
        choice = {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}
        return {"id": "c1", "object": "chat.completion", "created": 1, "model": model, "choices": [choice]}

    def stream(self, connection: Connection, path: str, body: Any, fate: str, kinds: Any, bill: Any) -> bool:
        """Sends the stream, or its first event, and writes down what that told."""
        usage, told = usage_in(path, kinds), kinds
        if path.endswith("/messages"):
            events = list(ANTHROPIC_EVENTS)
            events[0] = sse("message_start", message={**MESSAGE, "usage": {**usage, "output_tokens": 2}})
            events[-2] = sse("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": kinds[-1]})
            if fate in ("cut", "left"):
                told = (*kinds[:-1], None)  # its output is only a placeholder
        elif path.endswith("/responses"):
            document = self.document(path, body["model"])
            events = [sse("response.created", response={**document, "status": "in_progress", "usage": None}),
                      sse("response.completed", response={**document, "usage": usage})]  # fmt: skip
            told = None if fate in ("cut", "left") else kinds
        else:
            tells = body.get("stream_options", {}).get("include_usage")
            last = json.dumps({"object": "chat.completion.chunk", "choices": [], "usage": usage})
            ending = [f"data: {last}\n\n".encode()] if tells else []
            events = [*OPENAI_EVENTS[:-1], *ending, OPENAI_EVENTS[-1]]
            told = kinds if tells and fate not in ("cut", "left") else None
        number = bill(200, True, told, fate not in ("cut", "left"))
        connection.send(STREAM_HEAD.replace(b"\r\n\r\n", f"\r\n{number}\r\n\r\n".encode()), chunk(events[0]))
        if fate == "cut":
            return False
        if fate == "left":
            return not connection.ended_within(TIMEOUT_SECONDS)
        connection.send(chunked(*events[1:]))
        return True


STYLES = {  # path, streamed, model as it is asked for
    "message": ("/v1/messages", False, "claude-a"), "message stream": ("/v1/messages", True, "smart"),
    "chat": ("/v1/chat/completions", False, "gpt-a"), "chat stream": ("/v1/chat/completions", True, "gpt-a"),
    "chat without a price": ("/v1/chat/completions", False, "gpt-unpriced"),
    "response": ("/v1/responses", False, "gpt-a"), "response stream": ("/v1/responses", True, "gpt-a"),
    "message to chat": ("/v1/messages", False, "gpt-a"), "message to chat stream": ("/v1/messages", True, "gpt-a"),
    "chat to message": ("/v1/chat/completions", False, "claude-a"),
    "chat to message stream": ("/v1/chat/completions", True, "smart"),
}  # fmt: skip
FATES = ("whole", "failover", "elsewhere", "fails", "refused", "cut", "left", "untold")
WEEK_USERS = {"alice": {"key": "key-of-alice-0123", "usd_per_month": 10**6}, "bob": {"usd_per_day": 10**6}}
ALIASES = {"smart": "claude-b"}


class Week:
    """A relay whose clock is moved through the seven days up to now while three users call it."""

    def __init__(self, upstream: Any, relay: Any, folder: Path, patched: pytest.MonkeyPatch) -> None:
        self.now = self.end = time.time()
        patched.setattr(time, "time", lambda: self.now)
        self.path = folder / "usage.db"
        self.billing = Billing()
        self.delivered: list[tuple[int, str, str, Bill]] = []  # day, user, model as asked for
        self.translated: list[tuple[Bill, bytes]] = []  # what was answered in another format than the provider's
        prices = {
            model: {"litellm_provider": "any", **dict(zip(RATE_NAMES, map(float, rates)))}
            for model, rates in ODD_RATES.items()
        }
        keys = [{"key": f"sk-{label}", "label": label} for label in ("team", "spare")]
        scripted = {name: upstream(self.billing.script(name)) for name in ("anthropic", "anthropic2", "openai")}
        self.relay = relay(
            {name: {"upstream": it, "keys": keys, "key_strategy": "round-robin"} for name, it in scripted.items()},
            ledger={"path": str(self.path)}, prices=prices, users=WEEK_USERS, aliases=ALIASES,
            server={"jwt_secret": JWT_SECRET}, routes={"claude-*": ["anthropic", "anthropic2"], "gpt-*": "openai"},
        )  # fmt: skip
        expires = self.end + 30 * 86400
        self.tokens = {"admin": TOKEN, "alice": WEEK_USERS["alice"]["key"],
                       "bob": jwt.encode({"sub": "bob", "exp": expires}, JWT_SECRET, "HS256")}  # fmt: skip

    def live(self) -> None:
        """Each user sends a request of each style to each fate, the first of them whole."""
        chance, tally = random.Random(7), self.relay.server.service.tally
        wanted = list(itertools.product(self.tokens, STYLES, FATES))
        chance.shuffle(wanted)
        wanted = [*itertools.product(self.tokens, STYLES, FATES[:1]), *wanted]
        for number, (user, style, fate) in enumerate(wanted):
            self.now = self.end - 6 * 86400 * (1 - number / len(wanted))
            kinds = [chance.randrange(10 ** chance.randrange(1, 6)) for _ in KIND_NAMES]
            path, stream, model = STYLES[style]
            self.call({"number": number, "fate": fate, "kinds": kinds, "path": path}, user, path, stream, model)
            eventually(lambda count=number + 1: sum(tally.statuses.values()) == count)
        self.now = self.end
        eventually(lambda: not self.relay.server.service.ledger.waiting)

    def call(self, plan: dict[str, Any], user: str, path: str, stream: bool, model: str) -> None:
        """Sends a request and finds the bill of the attempt whose answer came."""
        text, got = json.dumps(plan), b""
        body = {"model": model, "stream": stream, "max_tokens": 9}
        if path.endswith("/responses"):
            body["input"] = text
        else:
            body["messages"] = [{"role": "user", "content": text}]
        if path.endswith("/completions") and plan["fate"] != "untold":
            body["stream_options"] = {"include_usage": True}
        with self.relay.client() as client:
            client.send(request("POST", path, json.dumps(body).encode(), token=self.tokens[user]))
            if plan["fate"] == "left":
                if stream:
                    client.until(b"\n\n")
                else:
                    eventually(lambda: self.billing.of(plan))
                told = None
            else:
                head = Message(client.until(b"\r\n\r\n"), b"")
                got = client.rest() if plan["fate"] == "cut" and head.status == 200 else read_body(client, head)
                told = head.get("x-bill")
        bill = self.billing.bills[int(told)] if told else self.billing.of(plan)[-1]
        self.delivered.append((int(self.now // 86400), user, model, bill))
        self.translated += [(bill, got)] if bill.path != path else []

    def sums(self, *by: str, first: int = 0, last: int = 10**6, user: str = "") -> dict[tuple[Any, ...], list[Any]]:
        """FIGURES by some of day, user, model, provider and key, as the providers told them."""
        found: dict[tuple[Any, ...], list[Any]] = {}
        for day, owner, _, bill in self.delivered:
            if first <= day <= last and user in ("", owner):
                names = {"day": monorelay.windows_of_day(day)[0], "user": owner, "provider": bill.provider,
                         "model": bill.model if bill.answered else "(other)", "key": bill.key}  # fmt: skip
                sums = found.setdefault(tuple(names[name] for name in by), [None] * len(FIGURES))
                sums[:] = [monorelay.plus(one, other) for one, other in zip(sums, bill.figures)]
        return found


    def total(self, **chosen: Any) -> list[Any]:
        return self.sums(**chosen).get((), [0] * len(FIGURES))


def read_body(client: Client, head: Message) -> bytes:
    """Reads the rest of an answer."""
    if head.get("transfer-encoding"):
        return b"".join(iter(client.chunk, b""))
    return client.take(int(head.get("content-length")))


def figures_of(row: dict[str, Any]) -> list[Any]:
    """The FIGURES of a row of `usage` or /api/usage, whose numbers may be text."""
    counts = [int(row[name]) for name in FIGURES[:-1]]
    return [*counts, None if row["usd"] in (None, "") else nano(row["usd"])]


def nano(usd: Any) -> int:
    """10^-9 USD as a whole number, which it must be."""
    exact = fractions.Fraction(str(usd)) * 10**9
    assert exact.denominator == 1, usd
    return int(exact)


def grouped(rows: list[dict[str, Any]], *by: str) -> dict[tuple[Any, ...], list[Any]]:
    found = {tuple(row[name] for name in by): figures_of(row) for row in rows}
    assert len(found) == len(rows)
    return found


def samples(it: Relay | Program) -> dict[tuple[str, ...], float]:
    """The metrics by name and values of their labels."""
    with Client(it.url) as client:
        text = client.ask("GET", "/metrics").body.decode()
    return {
        (name, *(value for _, value in re.findall(r'(\w+)="([^"]*)"', labels))): value
        for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.M)
    }


@pytest.fixture
def week(upstream, relay, tmp_path, monkeypatch) -> Week:
    it = Week(upstream, relay, tmp_path, monkeypatch)
    it.live()
    return it


GROUPINGS = [("user",), ("model",), ("provider",), ("key",), ("user", "model"), ("model", "provider", "key", "user")]


def test_all_accounts_of_a_week_agree_with_what_the_providers_told(week, tmp_path):
    days = sorted({day for day, *_ in week.delivered})
    assert len(days) == 7 and {bill.status for *_, bill in week.delivered} == {0, 200, 400, 500, 502}
    check_translated(week)
    check_rows(week)
    check_queries(week, days)
    check_command_line(week, tmp_path)
    check_metrics(week)
    check_memory(week)
    check_budgets(week)
    check_log(week)
    assert_sums_are_exact(week.path)


def check_translated(week: Week) -> None:
    """Clients of the other format are told the same tokens, those that were written to a cache in one."""
    seen: Counter[tuple[str, bool]] = Counter()
    for bill, got in week.translated:
        if not (bill.answered and bill.complete):
            continue
        plain, read, write, long, output = bill.plan["kinds"]
        expected, path = usage_in(bill.plan["path"], (plain, read, write + long, 0, output)), bill.plan["path"]
        documents = [json.loads(line) for line in re.findall(rb"(?m)^(?:data: )?(\{.*\})$", got)]
        told: dict[str, Any] = {}
        for document in documents:
            told.update(document.get("message", document).get("usage") or {})
        if path.endswith("completions"):
            asked_for_it = bill.plan["fate"] != "untold" or not bill.stream
            expected["prompt_tokens_details"].pop("cache_write_tokens_details")
            more = {"total_tokens": sum(bill.plan["kinds"]), "completion_tokens_details": {"reasoning_tokens": 0}}
            expected = {**expected, **more} if asked_for_it else {}
        else:
            del expected["cache_creation"], expected["service_tier"]
            # Claude Code takes 0 for not told.
            expected["input_tokens"] = plain or int(read + write + long > 0)
        assert told == expected, (bill, got)
        seen[path, bill.stream] += 1
    assert len(seen) == 4 and min(seen.values()) > 10, seen


def check_rows(week: Week) -> None:
    """The rows in the file are those of the providers, one by one; /api/requests tells all of them, page by page."""
    told = Counter(
        (day, user, asked, bill.model, bill.provider, bill.key, bill.status, bill.stream, bill.cost, bill.complete,
         bill.failed, len(week.billing.of(bill.plan)), *(bill.kinds or (None,) * 5))
        for day, user, asked, bill in week.delivered
    )  # fmt: skip
    columns = ("user", "model", "sent", "provider", "key", "status", "stream", "cost", "complete")
    rows, before, pages = [], "", 0
    while before is not None:
        page = week.relay.ask("GET", f"/api/requests?limit=50&before={before}").json
        rows, before, pages = rows + page["rows"], page["next"], pages + 1
    assert pages > 3 and [row["id"] for row in rows] == list(range(len(week.delivered), 0, -1))
    assert told == Counter(
        (row["at"] // 86_400_000, *(row[name] for name in columns),
         row["status"] >= 400 or row["error"] not in (None, "client_gone"), row["attempts"],
         *(row[name] for name in KIND_NAMES))
        for row in rows
    )  # fmt: skip
    names = ("id", *monorelay.LedgerRow._fields)
    assert selected(week.path, f"SELECT {', '.join(names)} FROM request ORDER BY id DESC") == [
        tuple(row[name] for name in names) for row in rows
    ]
    for query, chosen in {
        "user=alice": lambda user, asked, bill: user == "alice",
        "model=smart": lambda user, asked, bill: asked == "smart",
        "model=claude-b&key=anthropic2/team": lambda user, asked, bill: (
            bill.model == "claude-b" and (bill.provider, bill.key) == ("anthropic2", "team")
        ),
        "key=team": lambda user, asked, bill: bill.key == "team",
        "errors=1": lambda user, asked, bill: bill.failed,
    }.items():
        found = week.relay.ask("GET", f"/api/requests?limit=1000&{query}").json["rows"]
        assert len(found) == sum(chosen(*one) for _, *one in week.delivered) > 0, query
    for user in ("alice", "bob"):
        own = week.relay.ask("GET", "/api/requests?limit=1000&user=admin", token=week.tokens[user]).json["rows"]
        assert {row["user"] for row in own} == {user} and len(own) == len(week.delivered) // 3


def check_queries(week: Week, days: list[int]) -> None:
    """/api/usage, for the whole week and for a part of it, by everything and day by day."""
    for first, last in ((days[0], days[-1]), (days[2], days[4]), (days[-1], days[-1])):
        period = "from={}&to={}".format(*(monorelay.windows_of_day(day)[0] for day in (first, last)))
        for by, user, step in itertools.product(GROUPINGS, week.tokens, ("", "day")):
            query = f"/api/usage?{period}&by={','.join(by)}&step={step}"
            got = week.relay.ask("GET", query, token=week.tokens[user]).json
            chosen = {"first": first, "last": last, "user": "" if user == "admin" else user}
            names = (*(["day"] if step else []), *by)
            assert grouped(got["rows"], *names) == week.sums(*names, **chosen), query
            assert figures_of(got["total"]) == week.total(**chosen)


def check_command_line(week: Week, folder: Path) -> None:
    """`usage` as JSON, as CSV and as a table."""
    for by in (("user", "model"), ("day", "provider", "key")):
        command = ["usage", "usage.db", "--days", "9", "--by", ",".join(by)]
        told = json.loads(run(*command, "--json", cwd=folder).stdout)
        assert grouped(told["rows"], *by) == week.sums(*by) and figures_of(told["total"]) == week.total()
        lines = list(csv.DictReader(io.StringIO(run(*command, "--csv", cwd=folder).stdout)))
        assert grouped(lines, *by) == week.sums(*by)
    lines = run("usage", "usage.db", "--days", "9", "--by", "user", cwd=folder).stdout.splitlines()
    found = {words[0]: words[1:] for words in (line.split() for line in lines)}
    for name, (requests, errors, _, plain, read, write, long, output, cost) in (
        *((user, sums) for (user,), sums in week.sums("user").items()), ("total", week.total()),
    ):  # fmt: skip
        counts = [f"{count:,}" for count in (requests, errors, plain, read, write + long, output)]
        assert found[name] == [*counts, monorelay.usd_text(cost)]


def check_metrics(week: Week) -> None:
    """The counters since the start, by model, user, status and attempt."""
    found = samples(week.relay)
    by_status = Counter((bill.provider, bill.model, str(bill.status)) for *_, bill in week.delivered)
    assert by_status == {key[1:]: int(value) for key, value in found.items() if key[0] == "monorelay_requests_total"}
    for prefix, by in (("monorelay", ("provider", "model")), ("monorelay_user", ("user",))):
        for names, sums in week.sums(*by).items():
            if "(other)" in names:
                continue  # what failed has no tokens, and the counters know its model
            told = dict(zip(FIGURES, sums))
            assert [int(found[(f"{prefix}_tokens_total", *names, kind)]) for kind in KIND_NAMES] == sums[3:8]
            assert nano(found[(f"{prefix}_cost_usd_total", *names)]) == (told["cost"] or 0)
            if by == ("user",):
                assert int(found[("monorelay_user_requests_total", *names)]) == told["requests"]
    for (provider,), sums in week.sums("provider").items():
        assert int(found[("monorelay_untold_usage_total", provider)]) == sums[FIGURES.index("untold")]
    tried = Counter[tuple[str, str]]()
    for (name, *labels), value in found.items():
        if name == "monorelay_upstream_attempts_total":
            tried[tuple(labels[:2])] += int(value)
    counted = Counter[tuple[str, str]]()
    for (provider, key, status), count in week.billing.attempts.items():
        counted[(provider, key)] += count if status != "0" else 0
    assert tried == counted


def check_memory(week: Week) -> None:
    """What is in memory since the start, for whoever has no ledger, is what the ledger has."""
    history, hour = week.relay.server.service.history, int(week.now // 3600)
    for by in [by for by in GROUPINGS if "model" not in by]:  # that of what failed is known here
        in_memory = {tuple(group.values()): sums for group, sums in history._usage_in_memory(None, by)}
        in_file = monorelay.summed_usage(str(week.path), 0, hour + 1, by, False, None)
        assert in_memory == {tuple(group.values()): sums for group, sums in in_file}
    for user in (None, *week.tokens):
        sums: dict[int, list[int]] = {}
        for (at, owner), figures in week.relay.server.service.tally.hours.items():
            if at > hour - monorelay.TALLIED_HOURS and user in (None, owner):
                sums[at] = [one + other for one, other in zip(sums.get(at, [0] * len(figures)), figures)]
        found = monorelay.hour_rows(str(week.path), hour - monorelay.TALLIED_HOURS + 1, user)
        assert {at: [figure or 0 for figure in figures] for at, *figures in found} == sums


def check_budgets(week: Week) -> None:
    """What a user has spent of its budget, in the window that it has."""
    (today, month) = monorelay.windows(week.now)
    for user, window, length in (("alice", month, 7), ("bob", today, 10)):
        (budget,) = week.relay.ask("GET", "/api/auth/me", token=week.tokens[user]).json["budgets"]
        spent = [sums[-1] or 0 for (day,), sums in week.sums("day", user=user).items() if day[:length] == window]
        assert nano(budget["used"]) == sum(spent)


def check_log(week: Week) -> None:
    """The lines of the log, summed up."""
    text = week.relay.log.getvalue()
    sums = dict(zip(FIGURES, week.total()))
    assert sum(map(nano, re.findall(r" cost=(\S+)", text))) == sums["cost"]
    for kind in KIND_NAMES:
        assert sum(map(int, re.findall(rf" {kind}=(\d+)", text))) == sums[kind]


def test_what_a_bill_of_anthropics_was_is_told_everywhere(upstream, program, tmp_path):
    """A bill of 4.614 cents for the writes and 0.825 for the output, which leaves out 3 tokens of input."""
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 12304, "cache_read_input_tokens": 0, "output_tokens": 1}
    events = list(ANTHROPIC_EVENTS)
    events[0] = sse("message_start", message={**MESSAGE, "usage": usage})
    events[-2] = sse("message_delta", delta={"stop_reason": "end_turn"}, usage={**usage, "output_tokens": 550})
    (tmp_path / "prices.json").write_text(json.dumps({"claude-3-7-sonnet-20250219": LITELLM_PRICES["claude-sonnet"]}))
    config = settings({"anthropic": upstream(STREAM_HEAD + chunked(*events))}, ledger={"path": "usage.db"})
    it = program({**config, "prices": "prices.json"})
    with Client(it.url) as client:
        got = client.ask("POST", "/v1/messages", json.dumps(prompt("claude-3-7-sonnet-20250219", stream=True)).encode())
        assert got.body == b"".join(events)
        eventually(lambda: monorelay.request_page(str(tmp_path / "usage.db"))[0])
        today = monorelay.windows(time.time())[0]
        by_api = client.ask("GET", f"/api/usage?from={DAYS[-1]}&to={today}").json
        counters = client.ask("GET", "/metrics").body.decode()
    bill = 54_399_000
    for table in ("request", "hour"):
        assert selected(tmp_path / "usage.db", f"SELECT cost FROM {table}") == [bill]
    assert selected(tmp_path / "usage.db", "SELECT cost, tokens FROM spent") == [(bill, 12_857)] * 2
    told = json.loads(run("usage", "--json", cwd=tmp_path).stdout)
    for usage in (by_api, told):
        assert [row["usd"] for row in (*usage["rows"], usage["total"])] == [0.054399] * 2
    for labels in ('cost_usd_total{provider="anthropic",model="claude-3-7-sonnet-20250219"}',
                   'user_cost_usd_total{user="admin"}'):  # fmt: skip
        assert f"\nmonorelay_{labels} 0.054399\n" in counters
    assert eventually(lambda: re.search(r" cost=(\S+)", it.text()))[1] == "0.054399000"
    assert run("usage", cwd=tmp_path).stdout.count(" $0.0544") == 2


# ------------------------------------------------------------------------------------------------------------
# Server: admission, deadlines, reload, drain
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/chat/completions"])
def test_over_max_connections_is_an_answer_and_never_a_hang(upstream, relay, path):
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate)), "echo": {}}, server={"max_connections": 2})
    with it.client() as first, it.client() as second:
        for client in (first, second):
            client.send(request("POST", "/v1/messages", STREAMED))
            client.until(b"message_start")
        with it.client() as third:
            with contextlib.suppress(ConnectionError):
                third.send(request("POST", path, json.dumps(prompt("echo")).encode()))
            got = third.answer()
            refused(got, 503, "api_error", openai_shape="chat" in path)
            assert got.get("retry-after") and third.rest() == b""
        gate.set()
        first.until(b"message_stop")
    assert eventually(lambda: it.ask("GET", "/health").status == 200)


def test_making_room_loses_no_answer(relay):
    it = relay({"echo": {}}, server={"max_connections": 8})
    answered = [0] * 12

    def ask_again_and_again(number: int) -> None:
        for _ in range(40):
            with contextlib.suppress(ConnectionError, EOFError), it.client() as client:
                for _ in range(5):
                    answered[number] += client.ask("GET", "/health").status == 200

    in_threads(ask_again_and_again, len(answered))
    it.ask("GET", "/health")
    eventually(lambda: it.log.getvalue().count("path=/health status=200") <= sum(answered) + 1)


@pytest.mark.timed
def test_a_burst_of_300_connections_is_served_within_two_seconds(relay):
    it = relay({"echo": {}})
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(it.client()) for _ in range(300)]
        for client in clients:
            client.send(request("POST", "/v1/messages", json.dumps(prompt("echo")).encode()))
        assert [client.answer().status for client in clients] == [200] * 300
    assert time.monotonic() - begin < 2


def test_long_heads_of_those_who_have_shown_no_token_wait_for_the_others(relay):
    it, gate = relay({"echo": {}}, clock=Clock()), threading.Event()  # by which no turn is ever late
    with contextlib.ExitStack() as stack:
        known, *clients, last = (stack.enter_context(it.client()) for _ in range(12))
        assert known.ask("GET", "/api/auth/me").status == 200
        assert {client.ask("GET", "/health").status for client in (*clients, last)} == {200}
        held = threading.Event()
        it.server.service.loop.post(lambda: (held.set(), gate.wait()))
        assert held.wait(TIMEOUT_SECONDS)
        for client in clients:
            client.send(request("GET", "/api/auth/me", None, f"x-long: {'x' * 5000}"))
        last.send(request("GET", "/health"))
        known.send(request("GET", "/health", None, f"x-long: {'x' * 5000}"))
        time.sleep(0.1)  # until all of it has come
        gate.set()
        assert {client.answer().status for client in (known, last, *clients)} == {200}
    eventually(lambda: it.log.getvalue().count("path=") == 24)
    ended = re.findall(r"path=(\S+)", it.log.getvalue())[12:]
    assert ended == ["/health"] * 2 + ["/api/auth/me"] * 10


def threads_and_descriptors() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/dev/fd"))


def test_load_leaves_no_thread_and_no_descriptor_behind(upstream, relay):
    provider = upstream(
        lambda connection: [
            connection.read_request() and connection.send(ANTHROPIC_STREAM) for _ in range(1000)
        ]
    )
    it = relay({"anthropic": provider})
    with it.client() as client:
        client.ask("POST", "/v1/messages", STREAMED)
    before = eventually(threads_and_descriptors)

    def visit(number: int) -> None:
        with it.client() as client:
            client.send(request("POST", "/v1/messages", STREAMED))
            if number % 3:
                client.answer()

    in_threads(visit, 60)
    for connection in provider.connections:
        connection.close()
    it.post("/v1/messages", prompt())
    eventually(lambda: all(now <= then + 2 for now, then in zip(threads_and_descriptors(), before)))


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Does the work once per number, all at the same time; raises what any of them raised."""
    faults: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_answers_are_never_mixed_up(upstream, relay):
    provider = upstream(
        lambda connection: [connection.send(answer(200, connection.read_request().body)) for _ in range(1000)]
    )
    it = relay({"anthropic": provider})

    def visit(number: int) -> None:
        with it.client() as client:
            for turn in range(5):
                body = json.dumps(prompt(metadata={"user_id": f"{number}-{turn}"})).encode()
                assert client.ask("POST", "/v1/messages", body).body == body

    in_threads(visit, 32)


def test_reloading_under_load_fails_not_one_request(upstream, relay):
    provider, other = upstream(answer()), upstream(answer())
    it = relay({"anthropic": provider})
    done = threading.Event()

    def visit(number: int) -> None:
        with it.client() as client:
            while not done.is_set():
                assert client.ask("POST", "/v1/messages", STREAMED).status == 200

    def reload(number: int) -> None:
        for target in [other, provider] * 10:
            seen = len(target.requests)
            it.server.reload(parse({"anthropic": target}))
            eventually(lambda target=target, seen=seen: len(target.requests) > seen)
        done.set()

    in_threads(lambda number: visit(number) if number else reload(number), 9)
    assert provider.requests and other.requests


def test_a_running_request_finishes_on_the_config_it_began_with(upstream, relay):
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"message_start")
        it.server.reload(parse({"echo": {}}, server={"access_key": "another-access-key"}))
        assert it.ask("GET", "/api/auth/me").status == 401
        assert it.post("/v1/messages", prompt("echo"), token="another-access-key").status == 200
        gate.set()
        client.until(b"message_stop")


COMING = {
    "JSON": ("/v1/chat/completions", json.dumps(prompt("m")).encode(), "Content-Type: application/json"),
    "a form": ("/v1/audio/transcriptions", form(("model", "m")), FORM),
    "a form's file": ("/v1/audio/transcriptions", form(("model", "m"), file=b"x" * 9000), FORM),
    "a file": ("/v1/files", b"x" * 9000, "Content-Type: application/octet-stream"),
}


@pytest.mark.parametrize("kind", COMING)
@pytest.mark.parametrize(
    ("users", "status"),
    [({}, 401), ({"alice": {"key": ALICE, "models": []}}, 403), ({"alice": {"key": ALICE, "viewer": True}}, 403),
     ({"bob": {"key": ALICE}}, 403), ({"alice": {"key": ALICE, "requests_per_minute": 9}}, 200)],
    ids=brief,
)  # fmt: skip
def test_a_body_that_is_still_coming_is_not_taken_from_one_who_may_not_send_it_any_more(
    upstream, relay, kind, users, status
):
    provider = upstream(answer())
    it = relay({"openai": provider}, users={"alice": {"key": ALICE}})
    path, body, content_type = COMING[kind]
    begun = len(body) - 500 if "file" in kind else 20
    with it.client() as client:
        client.send(request("POST", path, None, content_type, f"Content-Length: {len(body)}", token=ALICE))
        client.send(body[:begun])
        eventually(lambda: it.server.service.running)
        time.sleep(0.05)
        config, other = it.server.service.config, parse({"echo": {}}, users=users)
        it.server.reload(config._replace(users=other.users, user_keys=other.user_keys))
        client.send(body[begun:])
        assert client.answer().status == status
    assert len(provider.requests) == (status == 200)


def test_stopping_lets_a_running_stream_finish(upstream, relay):
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate))})
    with it.client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"message_start")
        stopping = threading.Thread(target=it.server.stop, args=(TIMEOUT_SECONDS,))
        stopping.start()
        eventually(lambda: not accepts(it.url))
        gate.set()
        client.until(b"message_stop")
        stopping.join(TIMEOUT_SECONDS)
        assert not stopping.is_alive()


def accepts(url: str) -> bool:
    """Whether a connection is taken and a request on it answered with anything but 503."""
    try:
        with Client(url) as client:
            return client.ask("GET", "/health").status != 503
    except (OSError, EOFError):
        return False


def tenths_waited_for(client: Client, clock: Clock, seconds: float, trickled: bytes) -> int:
    """How many tenths of the time the relay waits for one that sends a byte in each before it hangs up."""
    for number in range(12):
        with contextlib.suppress(OSError):
            client.send(trickled[number : number + 1])
        clock.move(0.0)  # there it waits for more
        if client.ended_within(0.01):
            return number
        clock.move(seconds / 10)
    raise AssertionError("it waits for more than its time")


@pytest.mark.parametrize(
    ("deadline", "sent", "trickled"),
    [
        ("HEAD_SECONDS", b"", SMUGGLED[:60]),
        ("HEAD_SECONDS", b"GET /health HTTP/1.1\r\n", b"x-a: " + b"a" * 60),
        ("BODY_PAUSE_SECONDS", request("POST", "/v1/messages", b"{", "Content-Length: 99"), b""),
        (
            "BODY_PAUSE_SECONDS",
            request("POST", "/v1/files", b"{", "Content-Length: 99", ANTHROPIC_VERSION),
            b"",
        ),
        ("BODY_PAUSE_SECONDS", request("POST", "/v1/messages", b"5", "Transfer-Encoding: chunked"), b""),
        ("IDLE_SECONDS", request("GET", "/health"), b""),
    ],
    ids=brief,
)
def test_slow_clients_are_cut_when_their_time_is_over(upstream, relay, deadline, sent, trickled):
    provider, clock = upstream(lambda connection: connection.rest()), Clock()
    it = relay({"anthropic": provider}, clock)
    with it.client() as client:
        client.send(sent)
        eventually(lambda: it.server.served)
        assert tenths_waited_for(client, clock, getattr(monorelay, deadline), trickled) == 10
    assert not provider.requests


def test_a_client_that_takes_nothing_for_its_time_is_cut(upstream, relay):
    cut, clock = threading.Event(), Clock()

    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]))
        try:
            while True:
                connection.send(chunk(b"data: " + b"x" * 60_000 + b"\n\n"))
        except ConnectionError:
            cut.set()

    it = relay({"anthropic": upstream(script)}, clock)
    with it.client(SO_RCVBUF=1 << 16) as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        # Once it is full, it isn't read from any more.
        eventually(lambda: any(handler.channel._blocked for handler in list(it.server.served)))
        clock.move(monorelay.STALLED_CLIENT_SECONDS - 1.0)
        assert not cut.is_set()
        clock.move(1.0)
        assert cut.wait(2 * TIMEOUT_SECONDS)


def test_what_has_come_before_a_stop_is_answered(relay):
    it = relay({"echo": {}})
    with it.client() as kept, it.client() as late:
        assert kept.ask("GET", "/health").status == 200
        held = threading.Event()
        it.server.service.loop.post(lambda: held.wait(TIMEOUT_SECONDS))
        for client in (kept, late):
            client.send(request("GET", "/health"))
        threading.Thread(target=it.server.stop, args=(TIMEOUT_SECONDS,)).start()
        held.set()
        assert [client.answer().status in (200, 503) for client in (kept, late)] == [True, True]


@pytest.mark.parametrize("kind", ["answered", "silent"])
@pytest.mark.timed
def test_at_max_connections_the_longest_idle_one_makes_room(relay, kind):
    it = relay({"echo": {}}, server={"max_connections": 20})
    with contextlib.ExitStack() as stack:
        idle = []
        for _ in range(20):
            idle.append(stack.enter_context(it.client("127.0.0.9")))
            if kind == "answered":
                assert idle[-1].ask("GET", "/health").status == 200
        if kind == "answered":
            assert idle[0].ask("GET", "/health").status == 200, "the second is now the longest idle one"
        for _ in range(5):
            assert (
                stack.enter_context(it.client())
                .ask("POST", "/v1/messages", STREAMED.replace(b"claude-test", b"echo"))
                .status
                == 200
            )
        if kind == "answered":
            assert [client.ended_within(0.05) for client in (*idle[1:6], idle[0], *idle[-3:])] == [
                True
            ] * 5 + [False] * 4


def test_connections_at_work_make_no_room(upstream, relay):
    gate = threading.Event()
    it = relay({"anthropic": upstream(gated_stream(gate)), "echo": {}}, server={"max_connections": 3})
    with it.client() as stream, it.client() as head, it.client() as body:
        stream.send(request("POST", "/v1/messages", STREAMED))
        stream.until(b"message_start")
        head.send(b"GET /health HTTP/1.1\r\n")
        body.send(request("POST", "/v1/messages", b"{", "Content-Length: 9"))
        eventually(lambda: len(it.server.handlers) == 3)
        threading.Event().wait(0.1)
        with it.client() as late:
            late.send(request("GET", "/health"))
            refused(late.answer(), 503, "api_error", openai_shape=True)
        gate.set()
        stream.until(b"message_stop")
        head.send(b"Host: a\r\n\r\n")
        assert head.answer().status == 200


def floods(client: Client, asked: bytes) -> None:
    """Sends as much as the relay takes, and reads nothing."""
    client.sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        for start in range(0, len(asked), 1 << 14):
            client.sock.sendall(asked[start : start + (1 << 14)])
    client.sock.settimeout(TIMEOUT_SECONDS)


@pytest.fixture
def small_buffers(monkeypatch) -> None:
    """Few bytes are on their way to a client that doesn't read."""
    tune = monorelay.tune

    def tune_small(sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
        tune(sock)

    monkeypatch.setattr(monorelay, "tune", tune_small)


UNPROVEN = {
    "pipelines and reads nothing": request("GET", "/health", token="") * 4_000,
    "pipelines what is refused": request("POST", "/v1/messages", STREAMED, token="") * 2_000,
    "pipelines with a wrong token": request("GET", "/api/auth/me", token="wrong") * 4_000,
    "a head that doesn't end": b"GET /health HTTP/1.1\r\nx: ",
    "a login that doesn't end": request("POST", "/api/auth/login", b"{", "Content-Length: 99", token=""),
    "telemetry that doesn't end": request("POST", "/api/event_logging/batch", b"{", "Content-Length: 99", token=""),
    "a body that nobody wants": request("POST", "/v1/messages", b"{" * 9_000, "Content-Length: 999999", token=""),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_who_is_busy_for_long_without_a_token_makes_room_the_longest_one_first(upstream, relay, small_buffers, name):
    gate, clock = threading.Event(), Clock()
    it = relay({"anthropic": upstream(gated_stream(gate)), "echo": {}}, clock, server={"max_connections": 5})
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(it.client()) for _ in range(2)]
        for stream in streams:
            stream.send(request("POST", "/v1/messages", STREAMED))
            stream.until(b"message_start")
        greedy = []
        for number in range(3):
            greedy.append(stack.enter_context(it.client(SO_RCVBUF=1 << 12)))
            floods(greedy[-1], UNPROVEN[name])
            eventually(lambda number=number: len(it.server.served) == 3 + number)
            clock.move(0.0)  # there it has seen what this one is about
            clock.move(0.125)
        for _ in range(8):  # so that one deadline after the other is seen
            clock.move(monorelay.UNPROVEN_SECONDS / 8)
        ports = [client.sock.getsockname()[1] for client in greedy]
        for number in range(3):
            streams.append(stack.enter_context(it.client()))
            streams[-1].send(request("POST", "/v1/messages", STREAMED))
            streams[-1].until(b"message_start")
            served = {handler.client_address[1] for handler in list(it.server.served)}
            assert [port in served for port in ports] == [False] * (number + 1) + [True] * (2 - number)
        with it.client() as late:
            late.send(request("GET", "/health"))
            refused(late.answer(), 503, "api_error", openai_shape=True)
        assert all(client.ended_within(TIMEOUT_SECONDS) for client in greedy)
        gate.set()
        for stream in streams:
            stream.until(b"message_stop")


def test_who_has_shown_a_token_is_not_closed_while_busy(upstream, relay, small_buffers):
    gate, clock = threading.Event(), Clock()
    it = relay({"anthropic": upstream(gated_stream(gate)), "echo": {}}, clock, server={"max_connections": 4})
    with it.client() as stream, it.client() as head, it.client() as body, it.client(SO_RCVBUF=1 << 12) as greedy:
        stream.send(request("POST", "/v1/messages", STREAMED))
        stream.until(b"message_start")
        assert head.ask("GET", "/api/auth/me").status == 200
        head.send(b"GET /health HTTP/1.1\r\n")
        body.send(request("POST", "/v1/messages", b"{", "Content-Length: 9"))
        floods(greedy, request("GET", "/api/auth/me") + request("GET", "/health", token="") * 4_000)
        eventually(lambda: len(it.server.served) == 4 and not it.server.unproven and not it.server.idle)
        clock.move(4 * monorelay.UNPROVEN_SECONDS)
        for _ in range(3):
            with it.client() as late:
                late.send(request("GET", "/health"))
                refused(late.answer(), 503, "api_error", openai_shape=True)
        gate.set()
        stream.until(b"message_stop")
        head.send(b"Host: a\r\n\r\n")
        assert head.answer().status == 200 and greedy.answer().status == 200


def test_an_idle_connection_goes_before_one_that_is_busy_without_a_token(relay):
    clock = Clock()
    it = relay({"echo": {}}, clock, server={"max_connections": 3})
    with it.client() as head, it.client() as known, it.client() as silent:
        head.send(b"GET /health HTTP/1.1\r\n")
        eventually(lambda: len(it.server.unproven) == 1 and len(it.server.served) == 3)
        assert known.ask("GET", "/api/auth/me").status == 200
        clock.move(3 * monorelay.UNPROVEN_SECONDS)
        # The longest idle one goes first, whoever it is.
        with it.client() as new, it.client() as newer:
            for client, idle in ((new, silent), (newer, known)):
                assert client.ask("GET", "/health", token="").status == 200 and idle.ended_within(TIMEOUT_SECONDS)
            head.send(b"Host: a\r\n\r\n")
            assert head.answer().status == 200


def get_stuck(it: Relay, clients: list[Client], helper: Client) -> None:
    """Has each of them ask for more than fits into the sockets' buffers on the way; the helper, who has shown a token,
    is busy afterwards."""
    handlers = {handler.client_address[1]: handler for handler in list(it.server.served)}

    def flowing() -> list[Client]:
        return [one for one in clients if not handlers[one.sock.getsockname()[1]].channel.is_sending]

    def all_stuck() -> bool:
        # All of them are served in one turn of the loop, whose responses go out at its end.
        held = threading.Event()
        it.server.service.loop.post(lambda: held.wait(TIMEOUT_SECONDS))
        for client in flowing():
            client.send(request("GET", "/", token=""))
        helper.send(request("GET", "/health", token=""))
        held.set()
        assert helper.answer().status == 200
        return not flowing() and not threading.Event().wait(0.3) and not flowing()

    assert helper.ask("GET", "/api/auth/me").status == 200
    eventually(all_stuck, seconds=4 * TIMEOUT_SECONDS)
    helper.send(b"GET")


def test_connections_whose_last_response_is_stuck_make_room(relay, small_buffers):
    clock = Clock()
    it = relay({"echo": {}}, clock, server={"max_connections": 5})
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(it.client(SO_RCVBUF=1 << 11)) for _ in range(4)]
        helper = stack.enter_context(it.client())
        eventually(lambda: len(it.server.served) == 5)
        get_stuck(it, stuck, helper)
        clock.move(0.0)
        assert it.ask("GET", "/api/auth/me").status == 503
        clock.move(2 * monorelay.UNPROVEN_SECONDS)
        assert it.ask("GET", "/api/auth/me").status == 200


@pytest.mark.timed
def test_idle_connections_make_room_behind_any_number_of_stuck_ones(relay, small_buffers):
    count = 16
    it = relay({"echo": {}}, server={"max_connections": count + 4})
    with contextlib.ExitStack() as stack:
        stuck = [stack.enter_context(it.client(SO_RCVBUF=1 << 11)) for _ in range(count)]
        helper = stack.enter_context(it.client())
        eventually(lambda: len(it.server.served) == count + 1)
        get_stuck(it, stuck, helper)
        idle = [stack.enter_context(it.client()) for _ in range(3)]
        assert [client.ask("GET", "/health").status for client in idle] == [200] * 3
        assert it.ask("GET", "/api/auth/me").status == 200 and idle[0].ended_within(TIMEOUT_SECONDS)


class Stub:
    """A connection as make_room() sees it, that counts how often it is looked at."""

    looks = 0

    def __init__(self, server: monorelay.RelayServer) -> None:
        self.closes, self.closed, self.task, self.server = False, False, self, server

    def may_be_closed(self) -> bool:
        Stub.looks += 1
        return self.closes

    def be_busy(self) -> None:
        self.server.idle.pop(self)

    def cancel(self) -> None:
        self.closed = True


@pytest.mark.parametrize("count", [20, 200, 4_096])
def test_making_room_looks_at_each_stuck_connection_once(relay, count):
    server = relay({"echo": {}}).server
    now = server.service.loop.now
    kinds = {name: [Stub(server) for _ in range(count)] for name in ("idle", "unproven")}
    try:
        server.idle.update(dict.fromkeys(kinds["idle"]))
        server.unproven.update({stub: now for stub in kinds["unproven"]})
        Stub.looks = 0
        assert [server.make_room() for _ in range(10)] == [False] * 10
        assert Stub.looks == count and not server.idle
        for stub in kinds["unproven"]:
            server.unproven[stub] = now - monorelay.UNPROVEN_SECONDS - 1
        assert server.make_room()
        assert [stub.closed for stub in kinds["unproven"]] == [True] + [False] * (count - 1)
        kinds["idle"][3].closes = True
        server.idle.update(dict.fromkeys(kinds["idle"]))
        assert server.make_room() and kinds["idle"][3].closed and not kinds["unproven"][1].closed
    finally:
        server.idle.clear()
        server.unproven.clear()


# ------------------------------------------------------------------------------------------------------------
# Page: the document, and what a browser makes of it
# ------------------------------------------------------------------------------------------------------------


def test_the_policy_names_the_documents_only_script_and_style():
    policy = dict(part.split(" ", 1) for part in monorelay.dashboard_policy().split("; "))
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}\\b[^>]*>(.*?)</{tag}>", monorelay.PAGE, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert policy["require-trusted-types-for"] == "'script'" and policy["frame-ancestors"] == "'none'"


def test_the_document_makes_no_markup_and_fetches_nothing_from_elsewhere():
    """No sink of HTML or code, no attribute that the policy forbids, no address but that of SVG's namespace."""
    sinks = r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|Function\(|srcdoc|\.href\b|\.src\b"
    assert not re.search(sinks, monorelay.PAGE)
    assert not re.search(r"""\s(?:style|on\w+)=["']""", monorelay.PAGE)
    assert set(re.findall(r"\bhttps?://[^'\" ]+", monorelay.PAGE)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"localStorage|document\.cookie|EventSource", monorelay.PAGE)


class Browser:
    """A headless Chromium with a profile of its own. The page's own names are at hand in its scripts."""

    def __init__(self, folder: Path) -> None:
        from selenium import webdriver

        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        assert chromium and driver, "to test the page, install a browser: apt-get install chromium chromium-driver"
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for argument in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", f"user-data-dir={folder}",
        ):  # fmt: skip
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.driver.set_script_timeout(4 * TIMEOUT_SECONDS)

    def run(self, script: str, *values: Any) -> Any:
        """What the JavaScript expression is; the values are its `arguments`."""
        return self.driver.execute_script(f"return {script}", *values)

    def until(self, script: str, *values: Any) -> Any:
        """The same, once it is true."""
        return eventually(lambda: self.run(script, *values), 2 * TIMEOUT_SECONDS)

    def texts(self, selector: str) -> list[str]:
        """The texts of all elements that match, white space at their ends dropped."""
        return self.run("[...document.querySelectorAll(arguments[0])].map((one) => one.textContent.trim())", selector)

    def rows(self, table: str) -> list[list[str]]:
        """The cells of a table's rows."""
        return self.run("[...$(arguments[0]).rows].map((row) => [...row.cells].map((cell) => cell.textContent))", table)

    def settle(self) -> None:
        """Waits until what is known is drawn."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def press(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def size(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def prefer(self, **features: str) -> None:
        """What a person has set in the system, such as prefers_color_scheme."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def open(self, relay: Relay, query: str = "") -> None:
        self.driver.get(f"{relay.url}/dashboard{query}")
        self.until("$('signin').open")

    def sign_in(self, key: str = "", username: str = "", password: str = "") -> None:
        """Fills in the form, and sends it by the Enter key."""
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        for name, value in {"username": username, "password": password, "key": key}.items():
            field = self.driver.find_element(By.CSS_SELECTOR, f"#signin [name={name}]")
            field.clear()
            field.send_keys(value)
        field.send_keys(Keys.ENTER)

    def show(self, relay: Relay, key: str = TOKEN, query: str = "") -> None:
        """Opens the page, signs in with a key, and waits for what is live."""
        self.open(relay, query)
        self.sign_in(key)
        self.until("$('link').dataset.tone === 'good'")

    def complaints(self) -> list[str]:
        """What stood on the console, but for the responses of 401 that the page asks a person about."""
        return [entry["message"] for entry in self.driver.get_log("browser") if "status of 401" not in entry["message"]]


@pytest.fixture
def browser(tmp_path) -> Iterator[Browser]:
    """A browser in which the page breaks no policy and raises no error."""
    it = Browser(tmp_path / "profile")
    try:
        it.size(1440, 1200)
        yield it
        assert it.complaints() == []
    finally:
        it.driver.quit()


@pytest.mark.browser
def test_the_page_shows_a_request_as_it_runs_and_when_it_has_ended(upstream, relay, browser):
    gate = threading.Event()
    provider = {"upstream": upstream(gated_stream(gate)), "keys": [{"key": "sk-secret", "label": "team"}]}
    it = relay({"anthropic": provider}, aliases={"smart": "claude-test@anthropic"})
    browser.show(it)
    assert browser.texts("#tiles dd")[:2] == ["0", "nothing"] and browser.rows("running") == []
    assert browser.texts("#filters option") == ["all users", "all models", "all keys", "anthropic/team"]
    with it.client() as client:
        client.send(request("POST", "/v1/messages", json.dumps(prompt("smart", stream=True)).encode()))
        browser.until("$('running').rows.length === 1 && $('running').textContent.includes('streaming')")
        (row,) = browser.rows("running")
        assert row[:4] == ["admin", "▸ streaming", "smart → claude-test", "anthropic / team"]
        assert re.fullmatch(r"\d+\.\d s|\d+ m?s", row[4]) and row[5].endswith("s")
        assert re.fullmatch(r"[\d.]+ [KM]?B", row[6])
        assert browser.run("$('rows').rows.length") == 0 and browser.texts("#tiles dd")[0] == "1"
        gate.set()
        client.answer()
    browser.until("$('running').rows.length === 0 && $('rows').rows.length === 1")
    (row,) = browser.rows("rows")
    assert row[1:6] == ["✓ 200", "admin", "smart → claude-test", "anthropic / team", "1"]
    assert "sk-secret" not in browser.run("document.documentElement.outerHTML")
    assert row[8].isdecimal() and row[11] == "no price" and row[6] and row[7]


@pytest.mark.browser
def test_failed_requests_can_be_found_with_their_attempts(upstream, relay, browser):
    first, second = upstream(replies(answer(529))), upstream(replies(answer(200), answer(529)))
    it = relay({"anthropic": first, "anthropic2": second})
    for status in (200, 529):
        assert it.post("/v1/messages", prompt()).status == status
    browser.show(it)
    browser.until("$('rows').rows.length === 2")
    (told,) = browser.texts("#failure")
    browser.press("#filters [name=errors]")
    browser.until("$('rows').rows.length === 1 && location.search === '?errors=1'")
    assert browser.rows("rows")[0][1].startswith("✕ 529")
    browser.press("#rows button")
    attempts = browser.texts("#attempts li")
    reason = ", then ".join(attempts) + "; the client got 529"
    assert "✕ 529" in told and told.endswith(reason) and browser.rows("rows")[0][4] == reason
    assert sorted(attempt.split(" / ")[0] for attempt in attempts) == ["anthropic", "anthropic2"]
    assert all(attempt.endswith(": 529 overloaded") for attempt in attempts)
    assert browser.rows("rows")[0][5:] == [""] * 7, "nothing came of it that could be counted"
    browser.press("#detail button")
    browser.driver.back()
    browser.until("$('rows').rows.length === 2 && location.search === '' && !$('filters').elements.errors.checked")
    browser.driver.forward()
    browser.until("$('rows').rows.length === 1 && $('filters').elements.errors.checked")
    browser.driver.refresh()  # the tab is still signed in
    browser.until("$('rows').rows.length === 1 && $('link').dataset.tone === 'good'")


@pytest.mark.browser
def test_the_page_says_in_a_sentence_whether_all_is_well(upstream, relay, browser, tmp_path, monkeypatch):
    provider = upstream(replies(answer(503), answer(200)))
    it = relay({"anthropic": provider}, ledger={"path": str(tmp_path / "usage.db")})
    browser.show(it)
    browser.until("$('status').textContent === '● All well: 1 key ok, no request failed in the last ten minutes'")
    assert it.post("/v1/messages", prompt()).status == 503

    def until_said(words: str) -> None:
        """Two changes to the sentence may be needed, ten seconds apart."""
        eventually(lambda: browser.run("$('status').textContent.includes(arguments[0])", words), 6 * TIMEOUT_SECONDS)

    until_said("▲ 2 problems: a request failed at ")
    # Once it isn't avoided any more, it still has failed when it was last tried.
    state = "$('keys').rows[0].cells[1].textContent"
    browser.until(f"{state}.startsWith('▲ ')")
    assert re.fullmatch(r"▲ last attempt failed at \d\d:\d\d \(5xx error\)", browser.run(state))
    assert browser.run("$('keys').rows[0].dataset.tone") == "warn"
    assert it.post("/v1/messages", prompt()).status == 200
    browser.until(f"{state} === '● ok'")
    until_said("▲ 1 problem: a request failed at ")

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(monorelay, "write_ledger", fail)
    it.post("/v1/messages", prompt("none"))
    until_said("the ledger can't be written, 1 request ")


@pytest.mark.browser
def test_users_are_told_what_they_have_spent_and_why_they_are_refused(relay, browser, tmp_path):
    users = {"alice": {"key": "key-of-alice-0123456789", "tokens_per_day": 2, "requests_per_minute": 30}}
    it = relay({"echo": {}}, users=users, ledger={"path": str(tmp_path / "usage.db")})
    token = users["alice"]["key"]
    assert [it.post("/v1/messages", prompt("echo"), token=token).status for _ in range(2)] == [200, 429]
    eventually(lambda: not it.server.service.ledger.waiting)
    browser.show(it, token)
    browser.until("$('rows').rows.length === 2 && $('users').rows.length")
    status = browser.until("$('status').textContent.includes('tokens today') && $('status').textContent")
    spent = r"you have spent (\d+) of 2 tokens today, and can go on at \d\d:\d\d"
    assert re.fullmatch(rf"▲ 2 problems: a request failed at \d\d:\d\d; {spent}", status)
    refused = browser.rows("rows")[0]
    assert refused[1] == "✕ 429" and refused[4:] == ["the relay answered 429 budget exceeded", *[""] * 7]
    budgets = browser.texts("#users .gauge")
    assert re.fullmatch(r"✕ \d+ of 2 tokens today", budgets[0]) and budgets[1] == "1 of 30 requests a minute"
    assert browser.run("document.querySelector('#users rect').getAttribute('width')") == "100%"


@pytest.mark.browser
def test_requests_of_several_days_and_models_without_a_price_are_told_apart(relay, browser, tmp_path):
    settings, now = monorelay.LedgerSettings(str(tmp_path / "usage.db"), 90), time.time()
    rows = [
        row(at=int((now - ago * 3600) * 1000), request=f"req_{number}", user="alice", sent=sent, cost=cost)
        for number, (ago, sent, cost) in enumerate([(60, "claude-x", 10**9), (0, "claude-x", 10**9), (0, "new", None)])
    ]  # fmt: skip
    monorelay.write_ledger(settings, rows, (), now)
    it = relay({"echo": {}}, ledger={"path": settings.path}, prices={"claude-x": {"input": 1, "output": 1}})
    browser.show(it, query="?days=7")
    browser.until("$('rows').rows.length === 3 && $('models').rows.length === 2")
    assert [cells[-2] for cells in browser.rows("users")] == ["at least $2.00"]
    assert [cells[-1] for cells in browser.rows("models")] == ["$2.00", "no price"]
    assert browser.texts("#tiles > :last-child dd") == ["at least $2.00", "alice at least $2.00 · no price for new"]
    assert browser.run("[...$('rows').rows].map((row) => row.classList.contains('day'))") == [False, False, True]
    assert re.fullmatch(r"\d\d? [A-Z][a-z]{2}, \d\d:\d\d", browser.rows("rows")[2][0])


@pytest.mark.browser
@pytest.mark.parametrize("query", ["", "?days=7"])
def test_without_a_ledger_the_page_shows_the_sums_since_a_start_some_days_ago(relay, browser, query):
    it = relay({"echo": {}})
    it.server.service.tally.since -= 3 * 86400
    assert it.post("/v1/messages", prompt()).status == 200
    browser.show(it, query=query)
    browser.until("$('users').rows.length && $('models').rows.length")
    assert [cells[0] for cells in browser.rows("models")] == ["claude-test"]


@pytest.mark.browser
def test_rows_are_shown_whole_and_the_rest_when_asked_for(upstream, relay, browser):
    gate = threading.Event()
    it = relay({"anthropic": {"upstream": upstream(gated_stream(gate)), "keys": ["sk-1", "sk-2", "sk-3"]}})
    browser.show(it)
    with contextlib.ExitStack() as stack:
        for _ in range(12):
            client = stack.enter_context(it.client())
            client.send(request("POST", "/v1/messages", json.dumps(prompt("claude-a", stream=True)).encode()))
        browser.until("view.running.length === 12 && $('running').rows.length === 8")
        more = "section:has(#running) > button"
        assert browser.texts(more) == ["▾ 4 more"]
        browser.press(more)
        browser.until("$('running').rows.length === 12")
        scrolls = "[...document.querySelectorAll('main *')].filter((one) => getComputedStyle(one).overflowY === 'auto')"
        assert browser.run(f"{scrolls}.map((one) => one.id)") == ["box"]
        assert browser.run("$('keys').rows.length") == 3
        browser.size(360, 780)
        browser.until("$('keys').rows.length === 0")
        assert browser.texts("section:has(#keys) > button") == ["▾ 3 keys ok"]
        assert browser.run(f"{scrolls}.length") == 0
        one_line = "[...$('running').rows].every((row) => row.getBoundingClientRect().height < 40)"
        assert browser.run(one_line)
        gate.set()


HOSTILE = "<img src=x onerror=hacked=1>"


@pytest.mark.browser
def test_names_that_strangers_chose_are_shown_as_text(relay, browser):
    aliases = {HOSTILE: "echo", f"{HOSTILE}!": "echo-error-500"}
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, aliases=aliases)
    user = "</script><script>hacked=1</script>\u202e&amp;"
    claims = {"sub": user, "type": "access", "exp": int(time.time()) + 600}
    token = jwt.encode(claims, JWT_SECRET, "HS256")
    assert it.post("/v1/messages", prompt(HOSTILE), token=token).status == 200
    assert it.post("/v1/messages", prompt(f"{HOSTILE}!"), token=token).status == 500
    browser.show(it)
    browser.until("$('rows').rows.length === 2 && $('users').rows.length && $('models').rows.length")
    assert {row[2] for row in browser.rows("rows")} == {user}
    assert all(row[3].startswith(HOSTILE) for row in browser.rows("rows"))
    assert user in [row[0] for row in browser.rows("users")]
    browser.press("#users button")
    browser.until("new URLSearchParams(location.search).get('user') === arguments[0]", user)
    browser.until("$('filters').elements.user.value === arguments[0] && $('rows').rows.length === 2", user)
    browser.press("#rows button")
    assert browser.run("$('facts').textContent").count(user) == 1
    assert browser.run("document.querySelectorAll('main img, dialog img, main script, main a, dialog a').length") == 0
    assert browser.run("window.hacked") is None


@pytest.mark.browser
def test_a_user_sees_only_their_own(relay, browser):
    users = {name: {"key": f"key-of-{name}-0123456789"} for name in ("alice", "bob")}
    it = relay({"echo": {}}, users=users)
    for name, user in users.items():
        assert it.post("/v1/messages", prompt(f"echo-{name}"), token=user["key"]).status == 200
    browser.show(it, users["alice"]["key"])
    browser.until("$('rows').rows.length && $('users').rows.length")
    assert browser.texts("#me") == ["alice"]
    assert [row[3] for row in browser.rows("rows")] == ["echo-alice"]
    assert [row[0] for row in browser.rows("users")] == ["alice"] and browser.rows("keys") == []
    assert "bob" not in browser.run("document.documentElement.outerHTML")
    shown = browser.run("[$('keys'), $('advice'), $('filters').elements.user].map((one) => one.checkVisibility())")
    assert shown == [False, False, False]


@pytest.mark.browser
def test_signing_in_by_password_and_by_key(relay, browser):
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users={"alice": {"password": PASSWORD_HASH}})
    browser.open(it)
    browser.sign_in("no-key-of-this-relay")
    browser.until("$('problem').textContent.startsWith('✕ ')")
    browser.sign_in("a key\u00e9")
    browser.until("$('problem').textContent.includes('no key')")
    browser.sign_in(username="alice", password="wrong")
    browser.until("$('problem').textContent.startsWith('✕ ') && !$('problem').textContent.includes('no key')")
    browser.sign_in(username="alice", password=PASSWORD)
    browser.until("$('link').dataset.tone === 'good' && !$('signin').open")
    assert browser.texts("#me") == ["alice"] and browser.run("location.href") == f"{it.url}/dashboard"
    assert browser.run("document.cookie") == "" and browser.run("localStorage.length") == 0
    assert browser.run("Object.keys(sessionStorage)") == ["monorelay"]
    browser.press("#leave")
    browser.until("$('signin').open && sessionStorage.length === 0")


@pytest.mark.browser
def test_an_expired_token_is_asked_for_again_over_what_was_seen(relay, browser, monkeypatch):
    it = relay({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users={"alice": {"password": PASSWORD_HASH}})
    clock = time.time
    claims = {"sub": "alice", "type": "access", "exp": int(clock()) + 600}
    token = jwt.encode(claims, JWT_SECRET, "HS256")
    assert it.post("/v1/messages", prompt("echo"), token=token).status == 200
    browser.show(it, token, "?model=echo")
    browser.until("$('rows').rows.length === 1")
    monkeypatch.setattr(time, "time", lambda: clock() + 601)
    browser.until("$('signin').open")
    assert "expired" in browser.texts("#problem")[0]
    assert browser.run("$('rows').rows.length") == 1 and browser.run("location.search") == "?model=echo"
    browser.sign_in(username="alice", password=PASSWORD)
    browser.until("$('link').dataset.tone === 'good' && !$('signin').open")
    assert browser.run("$('rows').rows.length") == 1 and browser.run("location.search") == "?model=echo"


@pytest.mark.browser
def test_a_hidden_tab_asks_for_nothing_and_catches_up_when_it_is_seen(relay, browser):
    it = relay({"echo": {}})
    browser.show(it)
    browser.driver.execute_script(
        """window.asked = []; const honest = fetch;
        window.fetch = (path, options) => { asked.push([path, options.headers]); return honest(path, options); };
        Object.defineProperty(document, "hidden", { configurable: true, get: () => true });
        document.dispatchEvent(new Event("visibilitychange"));"""
    )
    assert it.post("/v1/messages", prompt("echo-unseen")).status == 200
    browser.until("connection.signal.aborted")
    time.sleep(1.5)  # in which two ticks would have come
    assert browser.run("asked") == [] and browser.rows("rows") == []
    browser.driver.execute_script("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
    browser.until("$('rows').rows.length === 1 && $('link').dataset.tone === 'good'")
    path, headers = browser.run("asked[0]")
    assert path == "api/live" and headers["last-event-id"].isdecimal() and TOKEN not in path
    # What is told again behind a gap is the same request.
    browser.driver.execute_script("connection.abort()")
    assert it.post("/v1/messages", prompt("echo-error-500")).status == 500
    browser.until("rows.length === 2 && $('status').textContent.includes(': a request failed at ')")
    assert browser.run("recent.length") == 2


@pytest.mark.browser
def test_the_page_comes_back_after_the_relay_was_away(program, browser):
    """It tries again, and asks nobody: the key is still the right one."""
    port = unused_port()
    first = program(settings({"echo": {}}), "--port", str(port))
    browser.show(first)
    first.signal(signal.SIGTERM)
    assert first.ended() == 0
    browser.until("$('link').dataset.tone === 'bad' && $('words').textContent.includes('again in')")
    assert re.fullmatch(r"▲ No connection: what is shown is of \d\d:\d\d:\d\d", browser.texts("#status")[0])
    program(settings({"echo": {}}), "--port", str(port))
    browser.until("$('link').dataset.tone === 'good'")
    assert not browser.run("$('signin').open")
    assert all(" net::ERR_" in entry for entry in browser.complaints())  # refused, reset, broken off


@pytest.mark.browser
def test_a_page_too_many_says_so_and_comes_when_there_is_room(relay, browser):
    it = relay({"echo": {}})
    with contextlib.ExitStack() as others:
        for _ in range(monorelay.PAGES):
            client = others.enter_context(it.client())
            client.send(request("GET", "/api/live"))
            client.until(b"\n\n")
        browser.open(it)
        browser.sign_in(TOKEN)
        browser.until("$('words').textContent.includes(arguments[0])", f"{monorelay.PAGES} pages")
    browser.until("$('link').dataset.tone === 'good'")
    assert all("status of 503" in entry for entry in browser.complaints())


@pytest.mark.browser
def test_a_key_that_is_refused_is_told_from_one_that_cools(upstream, relay, browser):
    it = relay({"anthropic": upstream(replies(answer(401))), "anthropic2": upstream(replies(answer(429)))})
    assert it.post("/v1/messages", prompt()).status == 429
    browser.show(it)
    browser.until("$('keys').rows.length === 2")
    assert re.fullmatch(r"attempts since \d\d:\d\d", browser.texts("#counted")[0])
    states = [cells[1] for cells in browser.rows("keys")]
    assert re.fullmatch(r"✕ 401 key refused, avoided until \d\d:\d\d", states[0])
    assert re.fullmatch(r"◐ 429 rate limit, avoided for \d+ s \(claude-\S+\)", states[1])
    browser.press("#tiles button")  # the number of failed requests leads to them
    browser.until("location.search === '?errors=1' && $('rows').rows.length === 1")


@pytest.mark.browser
def test_with_echo_alone_the_page_says_what_to_set_next(relay, browser):
    it = relay({"anthropic": {"base_url": "http://127.0.0.1:9", "keys": []}, "echo": {}})
    browser.show(it)
    browser.until("$('advice').checkVisibility() && $('advice').querySelectorAll('li').length === 3")
    assert "echo" in browser.texts("#advice li")[0]
    assert [re.findall("prices|ledger", text)[-1] for text in browser.texts("#advice li")[1:]] == ["prices", "ledger"]
    (command,) = browser.texts("#none code")
    command = command.replace("YOUR KEY", TOKEN)
    done = subprocess.run(["bash", "-c", f"{command} -s"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert json.loads(done.stdout)["content"] == [{"type": "text", "text": "Hello"}]
    browser.until("$('rows').rows.length === 1")
    assert browser.texts("#none") == [""]


# The texts whose contrast with what is behind them is below 4.5 : 1.
FAINT_TEXTS = """
const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const light = (color) => {
  const [red, green, blue] = color.match(/[\\d.]+/g).map((part) => linear(part / 255));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const ground = (one) => {
  const color = getComputedStyle(one).backgroundColor;
  return color.startsWith("rgb(") ? light(color) : ground(one.parentElement);
};
const isText = (one) => [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
return [...document.querySelectorAll("main *, header *")].filter((one) => {
  if (one.namespaceURI.endsWith("svg") || !one.checkVisibility() || !isText(one)) return false;
  const [dim, bright] = [light(getComputedStyle(one).color), ground(one)].sort((one, other) => one - other);
  return (bright + 0.05) / (dim + 0.05) < 4.5;
}).map((one) => one.textContent);
"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1440])
def test_the_page_can_be_read_on_small_and_large_screens_by_day_and_by_night(relay, browser, width, scheme):
    it = relay({"anthropic": {"base_url": "http://127.0.0.1:9"}, "echo": {}}, routes={"echo*": "echo"})
    for model in ("echo", "echo-error-529", "echo-of-a-model-with-a-name-that-goes-on-and-on-and-on"):
        it.post("/v1/messages", prompt(model))
    browser.size(width, 900)
    browser.prefer(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    browser.show(it)
    browser.until("$('rows').rows.length === 3 && $('models').rows.length > 0")
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.getAnimations().length") == 0
    assert browser.driver.execute_script(FAINT_TEXTS) == []  # WCAG 2.2, 1.4.3
    is_dark = browser.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 60)")
    assert is_dark == (scheme == "dark")


@pytest.mark.browser
def test_every_control_has_a_name_and_every_table_its_headings(relay, browser):
    """As a screen reader is told: by Chromium's accessibility tree."""
    it = relay({"echo": {}})
    it.post("/v1/messages", prompt("echo"))
    browser.show(it)
    browser.until("$('rows').rows.length === 1 && $('models').rows.length === 1")
    nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    controls = ("button", "checkbox", "combobox", "textbox", "region", "table", "image", "dialog")
    assert [role for role, name in told if role in controls and not name] == []
    assert {"Keys", "Running", "Users", "Models", "Requests"} <= {name for role, name in told if role == "table"}
    headings = {name for role, name in told if role == "columnheader"}
    assert {"Status", "Model", "First byte", "Used of its limits"} <= headings
    assert [role for role, _ in told].count("status") == 1


# How many milliseconds the page takes to draw its rows and have them laid out: the least of 100 places, for frames, and
# means, tell as much of the machine as of the page.
DRAWING_MILLISECONDS = """
const took = Array.from({ length: 100 }, (_, step) => {
  $("box").scrollTop = (step + 1) * 2000;
  const begun = performance.now();
  drawRows();
  $("box").getBoundingClientRect();
  return performance.now() - begun;
});
return Math.min(...took);
"""


@pytest.mark.browser
def test_ten_thousand_requests_scroll_and_stay_where_they_are(relay, browser, tmp_path):
    settings, now = monorelay.LedgerSettings(str(tmp_path / "usage.db"), 90), time.time()
    rows = [row(at=int(now * 1000) - 60_000 + number, request=f"req_{number}") for number in range(10_000)]
    monorelay.write_ledger(settings, rows, (), now)
    it = relay({"echo": {}}, ledger={"path": settings.path})
    browser.show(it)
    browser.until("$('rows').rows.length > 20")
    while (count := browser.run("rows.length")) < 10_000:
        browser.driver.execute_script("$('box').scrollTop = $('box').scrollHeight")
        browser.until("rows.length > arguments[0]", count)
        browser.settle()
    assert browser.run("$('rows').rows.length") < 100
    assert browser.driver.execute_script(DRAWING_MILLISECONDS) < 16
    # Where somebody reads, nothing moves when requests end; and what has the focus keeps it.
    browser.driver.execute_script("$('box').scrollTop = 5000")
    browser.settle()
    top = "document.activeElement.getBoundingClientRect().top - $('box').getBoundingClientRect().top"
    where = f"[document.activeElement.dataset.request, {top}]"
    browser.driver.execute_script("$('rows').querySelectorAll('button')[15].focus({ preventScroll: true })")
    before, count = browser.run(where), browser.run("rows.length")
    assert it.post("/v1/messages", prompt("echo")).status == 200
    browser.until("rows.length > arguments[0]", count)
    browser.settle()
    after = browser.run(where)
    assert after[0] == before[0] and abs(after[1] - before[1]) < 2
    # On a narrow screen it is the page that scrolls.
    browser.size(360, 780)
    last = "$('rows').lastChild.querySelector('button').dataset.request"
    browser.until(f"(document.documentElement.scrollTop = 1e9, {last} === 'req_0')")
    bottom = browser.run("$('rows').lastChild.getBoundingClientRect().bottom")
    assert 600 < bottom <= 780 and browser.run("$('rows').rows.length") < 100


# ------------------------------------------------------------------------------------------------------------
# Command line: the program as people run it
# ------------------------------------------------------------------------------------------------------------

def compiled(name: str) -> str:
    """The program compiled, beside what stands beside it: to compile it is half of the time of a start, and the tests
    start it some hundred times."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    shutil.copy(HERE / "relay.json", folder)
    return py_compile.compile(str(HERE / name), os.path.join(folder, f"{name}c"), doraise=True)


PROGRAM = [sys.executable, compiled("monorelay.py")]


def run(*arguments: str, cwd: Path, text: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments], input=text, cwd=cwd, capture_output=True, text=True, timeout=20, **options
    )


class Program:
    """A relay in a process of its own, its stderr collected; `url` is what its banner says."""

    def __init__(self, folder: Path, config: dict[str, Any], *arguments: str, **options: Any) -> None:
        self.file = folder / "relay.json"
        self.write(config)
        self.lines: list[str] = []
        self.process = subprocess.Popen([*PROGRAM, *arguments], cwd=folder, stdin=subprocess.DEVNULL,
        text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True, **options)  # fmt: skip
        threading.Thread(target=self.collect, daemon=True).start()
        self.url = eventually(
            lambda: (
                re.search(r"http://127\.0\.0\.1:[1-9]\d*", self.text())[0] if "curl" in self.text() else None
            )
        )

    def write(self, config: dict[str, Any] | str) -> None:
        self.file.write_text(config if isinstance(config, str) else json.dumps(config))
        self.file.chmod(0o600)

    def collect(self) -> None:
        for line in self.process.stderr:
            self.lines.append(line)

    def text(self) -> str:
        return "".join(self.lines)

    def resident_bytes(self) -> int:
        found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())
        return int(found[1]) << 10

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self) -> int:
        return self.process.wait(TIMEOUT_SECONDS)


@pytest.fixture
def program(tmp_path) -> Iterator[Callable[..., Program]]:
    made: list[Program] = []

    def make(config: dict[str, Any], *arguments: str, **options: Any) -> Program:
        made.append(Program(tmp_path, config, *arguments, **options))
        return made[-1]

    yield make
    for one in made:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()
        one.process.stdout.close()
        assert "Traceback" not in one.text(), one.text()


@pytest.mark.parametrize("arguments", [["token", "--help"], ["help", "token"]])
def test_a_command_has_a_help_of_its_own(tmp_path, arguments):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("usage: monorelay.py token USER [--config FILE] [--expires")
    assert "a JWT" in done.stdout and "--port" not in done.stdout


def test_an_older_python_is_told_so_in_the_first_line_that_it_can_not_read():
    lines = (HERE / "monorelay.py").read_text("utf-8").splitlines()
    assert re.match(r"#.*?coding[:=] *utf-8\b", lines[1]), "Python 2 reads no other file"
    first = next(number for number, line in enumerate(lines) if re.search(r"\bf[\"']", line))
    assert "needs Python 3.9 or later" in lines[first]
    made = [line for line in lines[:first] if re.match(r"\w+ *(:.*)?=|class |def |@", line)]
    assert not made, "nothing is made before"


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8"])
def test_an_older_python_prints_what_is_needed(version, tmp_path):
    elsewhere = next(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), None)
    python = elsewhere or shutil.which(f"python{version}")
    if not python:
        pytest.skip(f"there is no Python {version} here")
    program = [python, str(HERE / "monorelay.py")]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and "MonoRelay needs Python 3.9 or later, this is " in done.stderr
    assert version == "2.7" or done.stderr.count("\n") == 1


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_version_and_help(tmp_path, option):
    done = run(option, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert monorelay.__version__ in done.stdout if option == "--version" else "hash-password" in done.stdout


def curl_command(it: Program) -> str:
    """What the banner says to try."""
    eventually(lambda: "stop it" in it.text())
    return re.search(r"^  try it +(curl .*\n(?: {15}.*\n)*)", it.text(), re.M)[1]


def test_the_banner_tells_what_is_missing_and_fits_a_terminal(program):
    config = settings({"anthropic": {"base_url": "https://a.example", "keys": ["${SOME_KEY:-}"]},
                       "openai": {"base_url": "https://o.example/v1", "keys": []}, "echo": {}},
                      routes={"claude-*": ["anthropic", "echo"], "gpt-*": "openai"},
                      server={"access_key": "${OWNER_KEY}"}, aliases={f"alias-{n}": "claude-x" for n in range(9)},
                      users={f"user-{n}": {} for n in range(20)})  # fmt: skip
    it = program(config, env={**os.environ, "OWNER_KEY": TOKEN})
    curl_command(it)
    lines = it.text().splitlines()
    assert max(map(len, lines[1:])) <= 80, lines
    told = " ".join(it.text().split())
    assert "missing anthropic has no key: set SOME_KEY; until then echo answers for claude-*" in told
    assert "missing openai has no key: put one into providers.openai.keys" in told and "gpt-* clients" not in told
    assert "(in a shell where OWNER_KEY is set as here)" in told and "Ctrl-C" in told
    assert f"ANTHROPIC_BASE_URL={it.url} \\ ANTHROPIC_AUTH_TOKEN=$OWNER_KEY claude" in told and TOKEN not in told


def test_claude_codes_line_of_the_banner_can_be_pasted(program):
    config = settings({"echo": {}})
    del config["server"]["access_key"]
    it = program(config, env={name: value for name, value in os.environ.items() if name != "MONORELAY_ACCESS_KEY"})
    curl_command(it)
    line = re.search(r"ANTHROPIC_BASE_URL=.*? claude$", it.text(), re.M | re.S)[0]
    done = subprocess.run(["bash", "-c", line.removesuffix("claude") + "env"], capture_output=True, text=True)
    given = dict(entry.split("=", 1) for entry in done.stdout.splitlines() if entry.startswith("ANTHROPIC_"))
    with Client(given["ANTHROPIC_BASE_URL"]) as client:
        assert client.ask("GET", "/api/auth/me", token=given["ANTHROPIC_AUTH_TOKEN"]).status == 200


@pytest.mark.parametrize("kept_in", ["env_file", "file"])
def test_the_banners_curl_line_finds_a_key_that_is_kept_in_a_file(program, tmp_path, kept_in):
    (tmp_path / "keys.env").write_text("OWNER='key-in-a-file-0123456789'\n")
    (tmp_path / "key").write_text("key-in-a-file-0123456789\n")
    key = "${OWNER}" if kept_in == "env_file" else "${file:key}"
    it = program({**settings({"echo": {}}, server={"access_key": key}), "env_file": "keys.env"})
    done = subprocess.run(["bash", "-c", curl_command(it)], cwd="/", capture_output=True, text=True, timeout=10)
    assert json.loads(done.stdout)["type"] == "message" and "key-in-a-file" not in it.text()


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1080", "http://127.0.0.1:1080"])
def test_a_proxy_that_is_not_http_is_told_at_the_start(tmp_path, proxy):
    (tmp_path / "relay.json").write_text(json.dumps(settings({"anthropic": {"base_url": "https://a.example"}})))
    done = run("check", cwd=tmp_path, env={**os.environ, "HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": ""})
    assert done.returncode == 0
    told = "warning: providers.anthropic: the proxy to it can't be used: a proxy by socks5"
    assert (told in done.stdout) == proxy.startswith("socks")


def test_the_banner_never_shows_a_key_of_the_owner(program):
    key = "mr-chosen-by-the-owner"
    it = program(settings({"echo": {}}, server={"access_key": key}))
    done = subprocess.run(
        ["bash", "-c", curl_command(it)], cwd="/", capture_output=True, text=True, timeout=TIMEOUT_SECONDS
    )
    assert json.loads(done.stdout)["type"] == "message" and key not in it.text()


def test_every_line_of_a_json_log_is_json(program):
    it = program(settings({"echo": {}}, server={"log": "json"}))
    lines = [json.loads(line) for line in it.text().splitlines()]
    assert {line["level"] for line in lines} == {"info"} and any("curl" in line["message"] for line in lines)


@pytest.mark.parametrize("gone", [True, False])
@pytest.mark.timed
def test_a_relay_ends_with_its_terminal(tmp_path, gone):
    """At a SIGHUP; one whose terminal is still there takes it for a reload."""
    (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}})))
    near, far = os.openpty()
    process = subprocess.Popen([*PROGRAM], cwd=tmp_path, stdin=far, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)  # fmt: skip
    try:
        os.close(far)
        lines = iter(process.stderr.readline, "")
        assert any("clients" in line for line in lines)
        if gone:
            os.close(near)
        process.send_signal(signal.SIGHUP)
        if gone:
            assert process.wait(TIMEOUT_SECONDS) == 0
        else:
            assert any("was reloaded" in line for line in lines)
    finally:
        process.kill()
        process.communicate()
        if not gone:
            os.close(near)


def test_an_edit_of_the_env_file_is_taken_up(program, tmp_path):
    (tmp_path / "keys.env").write_text("OWNER=first-key-0123456789\n")
    it = program({**settings({"echo": {}}, server={"access_key": "${OWNER}"}), "env_file": "keys.env"})

    def status(token: str) -> int:
        with Client(it.url) as client:
            return client.ask("GET", "/api/auth/me", None, token=token).status

    assert status("first-key-0123456789") == 200
    (tmp_path / "keys.env").write_text("OWNER=second-key-0123456789\n")
    eventually(lambda: "was reloaded" in it.text())
    assert [status(f"{which}-key-0123456789") for which in ("first", "second")] == [401, 200]


@pytest.mark.parametrize("edited", ["keys.env", "prices.json"])
@pytest.mark.parametrize("when", ["at the start", "in a reload"])
def test_an_edit_of_a_file_beside_while_it_is_read_is_taken_up(relay, tmp_path, monkeypatch, edited, when):
    texts = {"keys.env": "OWNER={}-key-0123456789\n", "prices.json": '{{"{}-*": {{"input": 1, "output": 2}}}}'}
    for name, text in texts.items():
        (tmp_path / name).write_text(text.format("first"))
    path, it, edits = tmp_path / "relay.json", relay({"echo": {}}).server, [texts[edited].format("second")]
    beside = {"env_file": "keys.env", "prices": "prices.json"}
    path.write_text(json.dumps({**settings({"echo": {}}, server={"access_key": "${OWNER}"}), **beside}))
    parse_prices = monorelay.parse_prices

    def edit_and_parse(document: Any) -> Any:
        if edits:
            (tmp_path / edited).write_text(edits.pop())
        return parse_prices(document)

    monkeypatch.setattr(monorelay, "parse_prices", edit_and_parse)
    if when == "at the start":
        it.reload(monorelay.load_prices(monorelay.load_config(str(path), {}), str(path)))
    file = monorelay.ConfigFile(it.service.config, str(path), {}, monorelay.file_state(str(path)))
    signals = iter(["SIGHUP", ""] if when == "in a reload" else ["", ""])
    with pytest.raises(StopIteration):
        monorelay.Operator(it, file).run(types.SimpleNamespace(next=lambda seconds: next(signals)))
    config = it.service.config
    found = [config.server.access_keys[0].reveal(), config.prices.by_pattern[0][0]]
    assert found[edited == "prices.json"].startswith("second-") and found[edited == "keys.env"].startswith("first-")


@pytest.mark.parametrize(("again", "status"), [(b"horse\n", 0), (b"house\n", 1)])
def test_hash_password_asks_twice_at_a_terminal(tmp_path, again, status):
    near, far = os.openpty()
    process = subprocess.Popen([*PROGRAM, "hash-password"], cwd=tmp_path, stdin=far, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)  # fmt: skip
    try:
        seen = b""
        for prompt_text, typed in ((b"Password: ", b"horse\n"), (b"Again: ", again)):
            while not seen.endswith(prompt_text):
                seen += process.stderr.read(1)
            os.write(near, typed)
        printed, rest = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
        os.close(near)
        os.close(far)
    assert process.returncode == status
    assert monorelay.check_password("horse", printed.decode().strip()) == (status == 0)
    assert (b"two passwords" in rest) == (status == 1)


def test_an_edit_of_the_price_file_is_taken_up_and_a_broken_one_keeps_the_old_prices(relay, tmp_path):
    it = relay({"openai": {"base_url": "http://127.0.0.1:9"}}).server
    path, prices = tmp_path / "relay.json", tmp_path / "prices.json"
    path.write_text(json.dumps({**settings({"echo": {}}), "prices": prices.name}))
    prices.write_text(json.dumps(LITELLM_PRICES))
    operator = monorelay.Operator(it, monorelay.ConfigFile(it.service.config, str(path), {}, ()))

    def price() -> Any:
        config = it.service.config
        provider = config.providers["echo"]
        return monorelay.cost_of(config.prices, provider, "gpt-5", used(0, output=1)), config.prices.as_of

    today = monorelay.windows(time.time())[0]
    operator.reload()
    assert price() == (10_000, today)
    prices.write_text("<html>")
    path.write_text(json.dumps({**settings({"echo": {}}), "prices": prices.name, "aliases": {"new": "echo"}}))
    operator.reload()
    assert price() == (10_000, today) and it.service.config.aliases == {"new": ("echo",)}, "the rest is taken up"
    prices.unlink()
    operator.reload()
    path.write_text(json.dumps({**settings({"echo": {}}), "prices": {"gpt-*": {"input": 1, "output": 2}}}))
    operator.reload()
    assert price() == (2000, "")


def test_a_running_relay_sees_an_edit_of_its_price_file(program, tmp_path):
    (tmp_path / "prices.json").write_text(json.dumps(LITELLM_PRICES))
    it = program({**settings({"echo": {}}), "prices": "prices.json"})
    assert re.search(r"prices     7 entries of 20\d\d-\d\d-\d\d\n", it.text())
    (tmp_path / "prices.json").write_text('{"gpt-*": {"inptu": 1}}')
    eventually(lambda: "prices: prices.json: gpt-*.inptu: unknown key, did you mean input?" in it.text())
    eventually(lambda: "the prices of before stay in force" in it.text())
    (tmp_path / "prices.json").write_text('{"gpt-*": {"input": 1, "output": 2}}')
    eventually(lambda: it.text().count("was reloaded") == 2)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (None, "given: "),
        ({"env_file": "given"}, "relay.json: env_file: given can't be read: "),
        ({"prices": "given"}, "relay.json: prices: given: can't be read: "),
        ({"server": {"access_key": "${file:given}"}}, "access_key: the file given can't be read as a regular file"),
    ],
    ids=brief,
)
@pytest.mark.parametrize("kind", ["pipe", "device", "large"])
def test_only_regular_files_of_some_size_are_read(tmp_path, config, told, kind):
    """A pipe or a device would keep a relay waiting, which could not be stopped then."""
    given = tmp_path / "given"
    if kind == "pipe":
        os.mkfifo(given)
    elif kind == "device":
        given.symlink_to("/dev/zero")
    else:
        given.touch()
        os.truncate(given, (64 << 20) + 1)
    (tmp_path / "relay.json").write_text(json.dumps({**settings({"echo": {}}), **(config or {})}))
    done = run("check", *([] if config else ["--config", "given"]), cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert told in done.stderr and "a regular file" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "relay.json: prices: prices.json: can't be read: No such file or directory"),
        ("<html>", "relay.json: prices: prices.json: line 1 column 1: Expecting value"),
        (b"\xff{}", "relay.json: prices: prices.json: "),
        ('{"gpt-5": {"input_cost_per_token": "1"}}', "prices: prices.json: gpt-5.input_cost_per_token: must be a num"),
    ],
    ids=brief,
)
def test_a_price_file_that_is_broken_at_the_start_is_an_error(tmp_path, text, told):
    (tmp_path / "relay.json").write_text(json.dumps({**settings({"echo": {}}), "prices": "prices.json"}))
    if text is not None:
        (tmp_path / "prices.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in (["check"], []):
        done = run(*command, cwd=tmp_path)
        assert done.returncode == 1 and told in done.stderr and done.stderr.count("\n") == 1, done


def test_usage_is_a_table_of_the_ledger_that_relay_json_names(tmp_path):
    (tmp_path / "relay.json").write_text(json.dumps({**settings({"echo": {}}), "ledger": {"path": "usage.db"}}))
    done = run("usage", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert f"monorelay: {tmp_path}/usage.db: there is no ledger yet" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["relay.json"], "none is made"
    at = int(time.time() * 1000)
    rows = [
        *(row(cost=21_100_000_000, input=1_000_000) for _ in range(2)), row(at=at - 500 * 24 * HOUR),
        row(user="b\x1b[1m", sent="gpt-5", cost=None, output=None), row(status=500, cost=None, input=None),
    ]  # fmt: skip
    Ledger(tmp_path / "usage.db").write(*rows)
    done = run("usage", cwd=tmp_path)
    today = monorelay.windows(time.time())[0]
    assert (done.returncode, done.stderr) == (0, "")
    assert [" ".join(line.split()) for line in done.stdout.splitlines() if line[0] not in "-f"] == [
        "user model requests errors input cache read cache write output cost",
        "alice claude-x 2 0 2,000,000 2,000 14 14 $42.20",
        '"b\\u001b[1m" gpt-5 1 0 10 1,000 7 0 ?',
        "alice (other) 1 1 0 1,000 7 7 ?",
        "total 4 1 2,000,010 4,000 28 21 $42.20",
        "1 answers told nothing of their tokens, or not all of it",
    ]
    assert f" to {today} (UTC); costs are estimates" in done.stdout
    assert len({len(line) for line in done.stdout.splitlines()[:7]}) == 1, "the columns are aligned"


def test_usage_as_csv_and_json_and_of_several_files(some_days, tmp_path):
    other = tmp_path / "other.db"
    shutil.copy(some_days, other)
    for files, times in ([some_days], 1), ([some_days, str(other)], 2):
        done = run("usage", *files, "--days", "9", "--by", "user, day", "--csv", cwd=tmp_path)
        lines = list(csv.DictReader(io.StringIO(done.stdout)))
        assert [(it["day"], it["user"], int(it["requests"])) for it in lines] == [
            (DAYS[0], "alice", times), (DAYS[0], "bob", times), (DAYS[1], "alice", times), (DAYS[2], "bob", 2 * times),
        ]  # fmt: skip
        assert [it["usd"] for it in lines] == [str(3.0 * times), "", str(times * 1e-9), ""]
        done = run("usage", "--days", "9", "--by=provider", "--json", *files, cwd=tmp_path)
        told = json.loads(done.stdout)
        assert (told["by"], told["to"]) == (["provider"], monorelay.windows(time.time())[0])
        assert [(it["provider"], it["requests"]) for it in told["rows"]] == [("anthropic", 5 * times)]
        assert told["total"]["usd"] == 3.000000001 * times and told["total"]["ttfb"] == 0.55


def test_usage_of_an_idle_week_is_nothing(tmp_path):
    Ledger(tmp_path / "usage.db", keep_days=4000).write(row(at=int(time.time() * 1000) - 20 * 24 * HOUR))
    assert run("usage", "usage.db", cwd=tmp_path).stdout.startswith("nothing was used from ")
    assert json.loads(run("usage", "usage.db", "--json", cwd=tmp_path).stdout)["rows"] == []
    assert "total" in run("usage", "usage.db", "--days", "22", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["usage"], 'relay.json: there is no ledger; add "ledger": {"path": "usage.db"}, or name a file'),
        (["usage", "none.db"], "monorelay: none.db: there is no ledger yet"),
        (["usage", "relay.json"], "monorelay: relay.json: file is not a database"),
        (["usage", "--by", "usr"], "must be some of user, model, provider, key, day, did you mean user?"),
        (["usage", "--days", "0"], "--days must be a whole number from 1 to 400"),
        (["usage", "--csv", "--json"], "usage prints --csv or --json"),
        (["check", "--csv"], "check takes no --csv"),
        (["usage", "--jsno"], "did you mean --json?"),
    ],
)
def test_usage_that_can_not_be_told_gets_one_line_that_says_why(tmp_path, arguments, told):
    (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}})))
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode in (1, 2) and done.stdout == "" and done.stderr.count("\n") == 1
    assert told in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["relay.json"]


def test_hash_password_reads_stdin(tmp_path):
    done = run("hash-password", cwd=tmp_path, text="pässword\n")
    assert done.returncode == 0 and monorelay.check_password("pässword", done.stdout.strip())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["chek"], "there is no command chek, did you mean check?"),
        (["--prot", "80"], "option --prot not recognized, did you mean --port?"),
        (["--port"], "option --port requires argument"),
        (["--port", "high"], "--port must be a number, not a string: 'high'"),
        (["start"], "there is no command start, did you mean serve?"),
        (["users"], "there is no command users, did you mean usage?; see"),
        (["--config", ""], "--config must not be empty"),
        (["check", "--expires", "3d"], "check takes no --expires"),
        (["check", "this"], "check takes nothing but options"),
        (["token"], "token takes one USER"),
        (["token", "alice", "--expires", "soon"], "--expires must be a time such as 30d"),
    ],
)
def test_a_command_line_that_is_wrong_gets_one_line_that_says_so(tmp_path, arguments, told):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and told in done.stderr and "--help" in done.stderr


def test_token_makes_a_jwt_for_a_user(tmp_path):
    config = settings({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=USERS)
    (tmp_path / "relay.json").write_text(json.dumps(config))
    done = run("token", "alice", "--expires", "30d", cwd=tmp_path)
    claimed = jwt.decode(done.stdout.strip(), JWT_SECRET, ["HS256"])
    assert (
        done.returncode == 0
        and claimed["sub"] == "alice"
        and abs(claimed["exp"] - time.time() - 30 * 86400) < 60
    )
    assert done.stderr == f"valid for alice until {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(claimed['exp']))}\n"
    (tmp_path / "relay.json").rename(tmp_path / "team.json")
    assert run("token", "alcie", "--config", "team.json", cwd=tmp_path).stderr == (
        "team.json: users: there is no alcie, did you mean alice?\n"
    )
    (tmp_path / "team.json").rename(tmp_path / "relay.json")
    for arguments in (["nobody"], ["alice", "--expires", "soon"], ["alice", "--expires", "-1d"]):
        done = run("token", *arguments, cwd=tmp_path)
        assert done.returncode and done.stdout == "" and "Traceback" not in done.stderr, arguments


def test_check_tells_what_would_be_served_and_hides_secrets(tmp_path):
    config = settings({"anthropic": {"base_url": "https://a.example", "keys": ["sk-very-secret"]},
    "echo": {}},
                      server={"jwt_secret": JWT_SECRET}, users=USERS,
                      aliases={"fast": "claude-x"})  # fmt: skip
    (tmp_path / "relay.json").write_text(json.dumps(config))
    done = run("check", cwd=tmp_path)
    assert done.returncode == 0 and all(word in done.stdout for word in ("anthropic", "echo", "fast"))
    for hidden in ("sk-very-secret", JWT_SECRET, TOKEN, PASSWORD_HASH):
        assert hidden not in done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [["check"], []])
def test_a_broken_config_is_reported_in_full_with_exit_1(tmp_path, arguments):
    config = settings(
        {"anthropic": {"base_ulr": "https://a.example", "keys": ["sk-very-secret"], "timeout": -1}}
    )
    (tmp_path / "relay.json").write_text(json.dumps(config))
    done = run(*arguments, cwd=tmp_path)
    assert (
        done.returncode == 1
        and "providers.anthropic.base_ulr: unknown key, did you mean base_url?" in done.stderr + done.stdout
    )
    assert "providers.anthropic.timeout" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and "sk-very-secret" not in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        (["--config", "missing.json"], None, "missing.json"),
        (["--port", "70000"], {}, "port"),
        (["--prot"], {}, "--prot"),
        (["frobnicate"], {}, "frobnicate"),
        (["--host", "0.0.0.0"], {"access_key": ""}, "access_key"),
        (["--host", "0.0.0.0"], {"access_key": "fifteen letters"}, "16"),
        (["--host", "::"], {"access_key": ""}, "access_key"),
        (["--host", "no.such.host.invalid"], {}, "no.such.host.invalid"),
    ],
)
def test_what_cannot_be_started_says_why_in_a_line(tmp_path, arguments, config, words):
    if config is not None:
        (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}}, server=config)))
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode and words in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert len(done.stderr.splitlines()) <= 6


def test_a_port_in_use_says_so(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}})))
        done = run("--port", port, cwd=tmp_path)
    assert (
        done.returncode == 1
        and port in done.stderr
        and "in use" in done.stderr
        and f"try --port {int(port) % 65535 + 1}" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_the_banners_curl_line_works_as_pasted(program, tmp_path):
    config = settings({"echo": {}, "openai": {"base_url": "https://a.example", "keys": []}})
    del config["server"]["access_key"]
    it = program(config)
    command, text = curl_command(it), it.text()
    assert "echo" in text and "openai" in text and f"{it.url}/v1" in text and "ANTHROPIC_BASE_URL" in text
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and json.loads(done.stdout)["type"] == "message", (command, done)
    it.signal(signal.SIGTERM)
    assert it.ended() == 0 and it.process.stdout.read() == "", "stdout is quiet"


def has_ipv6() -> bool:
    """Whether this machine has the address ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
@pytest.mark.parametrize("workers", [1, 2])
def test_localhost_is_both_loopback_addresses(program, workers):
    it = program(settings({"echo": {}}, server={"host": "localhost", "workers": workers}))
    other = it.url.replace("127.0.0.1", "[::1]")
    for url in [it.url, other] * 5:
        with Client(url) as client:
            assert client.ask("GET", "/api/auth/me").status == 200
    with Client(other) as client:
        client.send(request("GET", "/health"))
        it.signal(signal.SIGTERM)
        assert client.answer().status in (200, 503), "who was connected before the end is answered"
    assert it.ended() == 0 and not accepts(other)


def test_localhost_is_one_address_where_there_is_no_ipv6(monkeypatch):
    made = socket.socket

    def without_ipv6(family: int = socket.AF_INET, *more: Any, **options: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(monorelay.errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return made(family, *more, **options)

    monkeypatch.setattr(socket, "socket", without_ipv6)
    (only,) = monorelay.listen(parse(server={"host": "localhost"}).server)
    with only:
        assert only.getsockname()[0] == "127.0.0.1"


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_localhost_is_in_use_when_one_of_its_addresses_is():
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=r"::1.*another relay may be running"):
            monorelay.listen(parse(server={"host": "localhost", "port": port}).server)
        with socket.create_server(("127.0.0.1", port)):
            pass  # nothing is left of the attempt


def test_a_readable_file_with_secrets_earns_a_warning(program):
    config = settings({"anthropic": {"base_url": "https://a.example", "keys": ["sk-very-secret"]}})
    quiet = program(config)
    assert "chmod" not in quiet.text()
    quiet.signal(signal.SIGTERM)
    quiet.ended()
    quiet.file.chmod(0o644)
    done = run("check", cwd=quiet.file.parent)
    assert "relay.json" in done.stderr + done.stdout and "chmod 600" in done.stderr + done.stdout


@pytest.mark.parametrize("how", ["SIGHUP", "edit"])
def test_relay_json_is_reloaded_and_a_broken_one_keeps_the_old(program, how):
    config = settings({"echo": {}}, routes={"echo": "echo"})
    it = program(config)

    def status(model: str) -> int:
        with Client(it.url) as client:
            return client.ask("POST", "/v1/messages", json.dumps(prompt(model)).encode()).status

    def rewrite(wanted: dict[str, Any] | str) -> None:
        it.write(wanted)
        if how == "SIGHUP":
            it.signal(signal.SIGHUP)

    assert status("new") == 404
    rewrite({**config, "aliases": {"new": "echo"}})
    assert eventually(lambda: status("new") == 200)
    rewrite('{"server": ')
    assert eventually(lambda: "relay.json" in it.text().split("new")[-1]) and status("new") == 200
    rewrite({**config, "server": {**config["server"], "workers": 2}, "aliases": {"newer": "echo"}})
    assert eventually(lambda: status("newer") == 200) and status("new") == 404
    assert eventually(lambda: "workers" in it.text() and "restart" in it.text())


TOO_DEEP = {
    "brackets": '{"server":{"cors_origins":%s}}' % ("[" * 1000 + "]" * 1000),
    "brackets that can be read": '{"server":{"cors_origins":%s}}' % ("[" * 800 + "]" * 800),
    "aliases": json.dumps({"aliases": {f"a{number}": f"a{number + 1}" for number in range(1200)}}),
}


@pytest.mark.parametrize("name", TOO_DEEP)
def test_a_config_that_is_too_deep_is_reported_in_a_line_with_exit_1(tmp_path, name):
    (tmp_path / "relay.json").write_text(TOO_DEEP[name])
    done = run("check", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    # Some Pythons go deeper than others, and find what else is wrong with it.
    told = "deep" in done.stderr or (name == "brackets that can be read" and "server.cors_origins" in done.stderr)
    assert done.stderr.startswith("relay.json: ") and told and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", TOO_DEEP)
def test_a_config_that_is_too_deep_keeps_the_old(program, name):
    it = program(settings({"echo": {}}))
    it.write(TOO_DEEP[name])
    it.signal(signal.SIGHUP)
    assert eventually(lambda: "not reloaded" in it.text()) and "deep" in it.text()
    with Client(it.url) as client:
        assert client.ask("POST", "/v1/messages", json.dumps(prompt("echo")).encode()).status == 200


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_a_second_one_ends_at_once(upstream, program, number, workers):
    gate = threading.Event()
    config = settings({"anthropic": upstream(gated_stream(gate))}, server={"workers": workers})
    for signals in (1, 2):
        it = program(config)
        with Client(it.url) as client:
            client.send(request("POST", "/v1/messages", STREAMED))
            client.until(b"message_start")
            # As Ctrl-C does, the signal reaches parent and children.
            os.killpg(it.process.pid, number)
            eventually(lambda it=it: "stopping" in it.text() and not accepts(it.url))
            assert it.process.poll() is None, "a running stream is waited for"
            if signals == 1:
                gate.set()
                client.until(b"message_stop")
            else:
                os.killpg(it.process.pid, number)
            code = it.ended()
        assert code == 0 or signals == 2
        gate.clear()
    gate.set()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_second_signal_cuts_is_logged(upstream, program, workers):
    """The signals reach the whole group: workers have them from there and from their supervisor."""
    gate = threading.Event()
    it = program(settings({"anthropic": upstream(gated_stream(gate))}, server={"workers": workers}))
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(it.url)) for _ in range(3)]
        for client in clients:
            client.send(request("POST", "/v1/messages", STREAMED))
            client.until(b"message_start")
        os.killpg(it.process.pid, signal.SIGTERM)
        eventually(lambda: "stopping" in it.text())
        with pytest.raises(OSError):  # no request of ours is to be counted
            while True:
                Client(it.url).close()
        assert it.text().count("stopping") == 1 and "a second signal ends" in it.text()
        assert workers == 2 or "stopping: 3 requests are running" in it.text()
        assert it.process.poll() is None and "running request" not in it.text(), "one signal doesn't count as two"
        os.killpg(it.process.pid, signal.SIGTERM)
        assert it.ended() != 0
    eventually(lambda: sum(map(int, re.findall(r"cut (\d) running request", it.text()))) == 3)
    named = set(re.findall(r"req_\w+", "".join(line for line in it.lines if "cut " in line)))
    cut = {re.search(r" id=(\w+)", line)[1] for line in it.lines if re.search("messages.*shutting_down", line)}
    assert len(named) == 3 and named == cut
    gate.set()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_relay_at_rest_stops_without_many_words(program, workers):
    it = program(settings({"echo": {}}, server={"workers": workers}))
    it.signal(signal.SIGTERM)
    assert it.ended() == 0
    eventually(lambda: it.text().count("stopping") == 1)
    assert workers == 2 or "running" not in it.text()


@pytest.mark.parametrize("to", ["supervisor", "group"])
def test_workers_tell_of_a_reload_once(program, to):
    config = settings({"echo": {}}, server={"workers": 3})
    it = program(config)
    eventually(lambda: len(children(it)) == 3)
    eventually(lambda: all(accepts(it.url) for _ in range(20)))
    (os.killpg if to == "group" else os.kill)(it.process.pid, signal.SIGHUP)
    eventually(lambda: "was reloaded" in it.text())
    it.write({**config, "server": {**config["server"], "workers": 2}})
    eventually(lambda: it.text().count("was reloaded") == 2)
    it.signal(signal.SIGTERM)
    assert it.ended() == 0
    assert it.text().count("was reloaded") == 2 and it.text().count("server.workers has changed") == 1


def test_a_relay_json_that_comes_later_is_taken_up_and_one_that_goes_keeps_the_old(tmp_path):
    shutil.copy(HERE / "monorelay.py", tmp_path)
    port = unused_port()
    process = subprocess.Popen(
        [sys.executable, "monorelay.py", "--port", str(port)], cwd=tmp_path, stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "MONORELAY_ACCESS_KEY": TOKEN},
    )  # fmt: skip

    def status(model: str) -> int:
        with Client(f"http://127.0.0.1:{port}") as client:
            return client.ask("POST", "/v1/messages", json.dumps(prompt(model)).encode()).status

    try:
        assert eventually(lambda: status("echo") == 200) and status("mine") == 404
        (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}}, routes={"mine": "echo"})))
        assert eventually(lambda: status("mine") == 200)
        (tmp_path / "relay.json").unlink()
        lines = iter(process.stderr.readline, "")
        gone = next(line for line in lines if "No such file" in line)
        assert "relay.json: No such file" in gone and "Errno" not in gone and "not reloaded" in next(lines)
        assert status("mine") == 200
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.timed
def test_draining_ends_after_drain_seconds(upstream, program):
    gate = threading.Event()
    it = program(settings({"anthropic": upstream(gated_stream(gate))}, server={"drain_seconds": 0.3}))
    with Client(it.url) as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        client.until(b"message_start")
        begin = time.monotonic()
        it.signal(signal.SIGTERM)
        assert it.ended() == 0 and 0.25 < time.monotonic() - begin < 3
    gate.set()


def children(it: Program) -> set[int]:
    """The processes that a relay has started."""
    return set(map(int, Path(f"/proc/{it.process.pid}/task/{it.process.pid}/children").read_text().split()))


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("end", ["whole", "stopped", "killed"])
def test_an_http_1_0_client_sees_the_end_of_a_stream_only_when_it_is_whole(upstream, program, end, framing):
    gate = threading.Event()
    first, rest = ANTHROPIC_EVENTS[0], b"".join(ANTHROPIC_EVENTS[1:])
    head, frame, last = FRAMINGS[framing]
    provider = upstream(gated_pieces([first, rest], [gate, gate], head, frame, last))
    it = program(settings({"anthropic": provider}, server={"workers": 2, "drain_seconds": 0.1}))
    with Client(it.url) as client:
        client.send(request("POST", "/v1/messages", STREAMED).replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.until(first)
        if end == "whole":
            gate.set()
            while client.fill():
                pass
            assert bytes(client.buffer) == rest
            return
        if end == "stopped":
            it.signal(signal.SIGTERM)
        else:
            for worker in children(it):
                os.kill(worker, signal.SIGKILL)
        with pytest.raises(ConnectionResetError):
            while client.fill():
                pass
    gate.set()


def test_an_http_1_0_client_that_takes_nothing_while_the_relay_stops_sees_no_end(upstream, program):
    def script(connection: Connection) -> None:
        connection.read_request()
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]), chunk(b": more\n" * 100_000) * 40)

    it = program(settings({"anthropic": upstream(script)}, server={"drain_seconds": 0.2}))
    with Client(it.url, SO_RCVBUF=1 << 12) as client:
        client.send(request("POST", "/v1/messages", STREAMED).replace(b"HTTP/1.1", b"HTTP/1.0"))
        client.until(ANTHROPIC_EVENTS[0])
        it.signal(signal.SIGTERM)
        assert it.ended() == 0
        with pytest.raises(ConnectionResetError):
            while client.fill():
                pass


def test_workers_share_the_port_and_a_dead_one_is_replaced(program):
    it = program(settings({"echo": {}}, server={"workers": 2}))
    before = eventually(lambda: len(children(it)) == 2 and children(it))
    os.kill(min(before), signal.SIGKILL)
    after = eventually(lambda: len(children(it)) == 2 and min(before) not in children(it) and children(it))
    assert after != before
    assert eventually(lambda: all(accepts(it.url) for _ in range(20)))
    it.signal(signal.SIGTERM)
    assert it.ended() == 0


@pytest.mark.parametrize("broken", ["relay.json", "prices.json"])
def test_who_was_taken_away_does_not_come_back_with_a_new_worker(program, tmp_path, broken):
    (tmp_path / "prices.json").write_text("{}")
    config = {**workers_of(settings({"echo": {}}), 2), "prices": "prices.json"}
    it = program({**config, "users": {"alice": {"key": ALICE}, "bob": {"key": BOB}}})

    def admits(token: str) -> set[int]:
        return {got.status for got in asked_of_workers(it, 20, "GET", "/api/auth/me", token=token)}

    eventually(lambda: admits(ALICE) == admits(BOB) == {200})
    it.write({**config, "users": {"bob": {"key": BOB}}})
    eventually(lambda: admits(ALICE) == {401})
    time.sleep(1.1)  # each process looks once a second
    (tmp_path / broken).write_text('{"half": ')
    eventually(lambda: "stays in force" in it.text() or "stay in force" in it.text())
    for worker in (killed := children(it)):
        os.kill(worker, signal.SIGKILL)
    eventually(lambda: len(children(it) - killed) == 2)
    eventually(lambda: admits(BOB) == {200})
    assert admits(ALICE) == {401}
    told = rf"the new worker (\d+) serves by the last configuration .*{broken}: "
    eventually(lambda: set(map(int, re.findall(told, it.text()))) == children(it))
    (tmp_path / "prices.json").write_text("{}")
    it.write({**config, "users": {"alice": {"key": ALICE}}})
    eventually(lambda: admits(ALICE) == {200}), "new workers see the next edit"


def test_a_worker_that_can_not_act_is_killed_some_time_after_its_last_request_was_due(monkeypatch):
    config = parse({"echo": {}}, server={"drain_seconds": 30})
    supervisor = monorelay.Supervisor(monorelay.ConfigFile(config, "", {}, ()), [])
    pid, now = os.fork(), [0.0]
    if not pid:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.waitpid(pid, os.WUNTRACED)
    supervisor._workers[pid], supervisor._log = (0.0, 0), types.SimpleNamespace(say=print, finish=list)
    monkeypatch.setattr(monorelay, "time", types.SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]}))

    def pass_time(seconds: float) -> str:
        assert now[0] < 1000
        now[0] += 1
        time.sleep(0.01)
        return ""

    assert supervisor._stop(types.SimpleNamespace(next=pass_time, close=lambda: None)) == 1
    assert 5 < now[0] - 30 < 20


# ---- what workers know together


def asked_of_workers(
    it: Program, count: int, method: str, path: str, body: Any = None, token: str = TOKEN
) -> list[Message]:
    """What so many requests get, each on a connection of its own and all at once, so that every worker has some."""

    def ask(_: int) -> Message:
        with Client(it.url) as client:
            return client.ask(method, path, None if body is None else json.dumps(body).encode(), token=token)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(pool.map(ask, range(count)))


def workers_of(config: dict[str, Any], count: int, **server: Any) -> dict[str, Any]:
    return {**config, "server": {**config["server"], "workers": count, "drain_seconds": 1, **server}}


@pytest.mark.parametrize("workers", [2, 4])
def test_requests_a_minute_hold_for_all_workers_together(program, workers):
    config = settings({"echo": {}}, users={"alice": {"key": ALICE, "requests_per_minute": 20}})
    it = program(workers_of(config, workers))
    eventually(lambda: len(children(it)) == workers)
    got: Counter[int] = Counter()
    for _ in range(60):
        got.update(answer.status for answer in asked_of_workers(it, 1, "POST", "/v1/messages", prompt("echo"), ALICE))
        time.sleep(0.03)
    assert got == {200: 20, 429: 40}
    for answer in asked_of_workers(it, 20, "GET", "/api/auth/me", token=ALICE):
        assert answer.json["requests_left"] == 0
        assert answer.json["budgets"] == [
            {"user": "alice", "limit": "requests_per_minute", "used": 20, "of": 20, "reset": None}
        ]


def test_a_burst_over_all_workers_passes_no_more_than_it_may(program):
    config = settings({"echo": {}}, users={"alice": {"key": ALICE, "requests_per_minute": 30}})
    it = program(workers_of(config, 4))
    eventually(lambda: len(children(it)) == 4)
    got = Counter(got.status for got in asked_of_workers(it, 400, "POST", "/v1/messages", prompt("echo"), ALICE))
    assert got == {200: 30, 429: 370}
    for pid in children(it):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(children(it)) == 4)
    found = asked_of_workers(it, 50, "POST", "/v1/messages", prompt("echo"), ALICE)
    assert {got.status for got in found} == {429}, "who takes the place of a dead worker goes on with its count"


@pytest.mark.parametrize("status", [429, 401])
def test_a_key_that_cools_in_one_worker_cools_in_the_others(upstream, program, status):
    def script(connection: Connection) -> None:
        while True:
            asked = connection.read_request()
            connection.send(answer(status) if asked.get("x-api-key") == "sk-a" else answer())

    provider = upstream(script)
    it = program(workers_of(settings({"anthropic": two_keys(provider)}), 4))
    eventually(lambda: len(children(it)) == 4)
    assert asked_of_workers(it, 1, "POST", "/v1/messages", prompt())[0].get("x-monorelay-attempts") == "2"
    time.sleep(0.1)
    for got in asked_of_workers(it, 60, "POST", "/v1/messages", prompt()):
        assert (got.status, got.get("x-monorelay-attempts")) == (200, "1")
    used = Counter(asked.get("x-api-key") for asked in provider.requests)
    assert used["sk-a"] == 1 and it.text().count("comes last") == 1

    def all_agree() -> bool:
        texts = [Metrics(got.body.decode()) for got in asked_of_workers(it, 12, "GET", "/metrics")]
        return all(told.value("monorelay_key_cooling", key="label-a") == 1 for told in texts)

    assert eventually(all_agree)


def test_every_worker_tells_the_figures_of_all_and_keeps_those_of_one_that_was_killed(upstream, program):
    provider = upstream(spending(7))
    config = settings({"anthropic": provider}, users=OWNERS, prices={"*": {"input": 1, "output": 1}})
    it = program(workers_of(config, 3))
    eventually(lambda: len(children(it)) == 3)
    for token in (ALICE, BOB):
        assert {got.status for got in asked_of_workers(it, 30, "POST", "/v1/messages", prompt(), token)} == {200}

    def told_by_all() -> bool:
        for got in asked_of_workers(it, 9, "GET", "/metrics"):
            told = Metrics(got.body.decode())
            assert told.value("monorelay_requests_total", status="200") == 60 == len(provider.requests)
            assert told.value("monorelay_tokens_total", kind="input") == 420
            assert told.value("monorelay_upstream_attempts_total", outcome="ok") == 60
            assert told.value("monorelay_user_requests_total", user="alice") == 30
            assert told.value("monorelay_request_duration_seconds_count") == 60
            assert told.value("monorelay_requests_running") == 0
        for got in asked_of_workers(it, 9, "GET", "/api/usage?by=user", token=ALICE):
            assert (got.json["total"]["requests"], got.json["total"]["input"]) == (30, 210)
        for got in asked_of_workers(it, 9, "GET", "/api/requests?limit=1000"):
            assert len({found["request"] for found in got.json["rows"]}) == 60
        for _ in range(6):
            with live(it) as page:
                state = told_live(page)[2]
            assert sum(hour[1] for hour in state["hours"]) == state["minute"]["requests"] == 60
            assert sum(key["requests"] for key in state["keys"]) == 60
        return True

    assert eventually(told_by_all)
    for worker in list(children(it))[:2]:
        os.kill(worker, signal.SIGKILL)
        eventually(lambda dead=worker: dead not in children(it) and len(children(it)) == 3)
    assert eventually(told_by_all)


def test_running_requests_of_all_workers_are_shown_with_their_age(upstream, program):
    """Also when several pages look at the same moment."""
    gate = threading.Event()
    it = program(workers_of(settings({"anthropic": upstream(gated_stream(gate))}), 2))
    eventually(lambda: len(children(it)) == 2)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            client = stack.enter_context(Client(it.url))
            client.send(request("POST", "/v1/messages", STREAMED))
            client.until(ANTHROPIC_EVENTS[0])
        pages = [stack.enter_context(live(it)) for _ in range(6)]
        for page in pages:
            live_head(page)
        seen: list[list[Any]] = [[] for _ in pages]

        def looked() -> bool:
            for number, page in enumerate(pages):
                seen[number] = next_event(page)[2].get("running", seen[number])
                assert all(0 <= run[7] < 60 for run in seen[number]), seen[number]
            return all(len(runs) == 8 for runs in seen)

        eventually(looked)
        assert looked() and looked()
        gate.set()
    assert eventually(lambda: metrics(it).value("monorelay_requests_running") == 0)


def test_budgets_hold_for_all_workers(upstream, program):
    """What one has spent, the others know in two seconds."""
    config = settings({"anthropic": upstream(spending(1200))}, ledger={"path": "usage.db"}, **SPENDERS)
    it = program(workers_of(config, 3))
    eventually(lambda: len(children(it)) == 3)
    assert asked_of_workers(it, 1, "POST", "/v1/messages", prompt("priced"), ALICE)[0].status == 200
    time.sleep(2.5)
    found = asked_of_workers(it, 40, "POST", "/v1/messages", prompt("free"), ALICE)
    assert {(got.status, got.get("x-monorelay-error")) for got in found} == {(429, "budget_exceeded")}


def test_budgets_hold_for_all_workers_while_the_ledger_can_not_be_written(upstream, program, tmp_path):
    provider = upstream(spending(30))
    it = program(workers_of(settings({"anthropic": provider}, ledger={"path": "later/usage.db"}, **SPENDERS), 3))

    def all_have_rows_that_wait() -> bool:
        asked_of_workers(it, 12, "POST", "/v1/messages", prompt("free"))
        return it.text().count("can't be written") == 3

    eventually(all_have_rows_that_wait)

    def asked() -> Counter[int]:
        got: Counter[int] = Counter()
        for _ in range(20):
            got.update(found.status for found in asked_of_workers(it, 1, "POST", "/v1/messages", prompt("free"), BOB))
            time.sleep(0.1)
        return got

    assert asked() == {200: 4, 429: 16}
    (tmp_path / "later").mkdir()
    eventually(lambda: all(metrics(it).value("monorelay_ledger_rows_waiting") == 0 for _ in range(10)))
    assert asked() == {429: 20}
    found = asked_of_workers(it, 20, "GET", "/api/auth/me", token=BOB)
    assert {got.json["budgets"][0]["used"] for got in found} == {120}, "nothing counts twice"


def test_a_board_is_read_whole_though_several_write_without_pause():
    board, writers, stop = monorelay.Board(5), 3, time.monotonic() + 1.5
    pids = []
    for worker in range(writers):
        if not (pid := os.fork()):
            number = 0
            while time.monotonic() < stop:
                number += 1
                board.write(worker, {"worker": worker, "number": number, "filling": [number] * (number * 37 % 5000)})
            os._exit(0)
        pids.append(pid)
    reads, gave_up, last = 0, 0, [0] * writers
    while time.monotonic() < stop:
        for worker in range(writers):
            document = board.read(worker)
            if document is None:
                gave_up += 1
                continue
            reads += 1
            number = document["number"]
            assert document == {"worker": worker, "number": number, "filling": [number] * (number * 37 % 5000)}
            assert number >= last[worker]
            last[worker] = number
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * writers
    assert reads > 100 and min(last) > 10 and board.read(3) is None
    assert [board.read(worker)["number"] for worker in range(writers)] >= last


@hypothesis.settings(max_examples=20)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.dictionaries(st.text(max_size=5), st.text(max_size=9)))))
def test_a_board_shows_what_was_written_last(writes):
    board, last = monorelay.Board(3), {}
    for place, document in writes:
        assert board.write(place, document)
        last[place] = document
    assert [board.read(place) for place in range(3)] == [last.get(place) for place in range(3)]


def test_what_there_is_no_room_for_leaves_what_was_there():
    board = monorelay.Board(3)
    assert board.write(1, {"a": 1})
    assert not board.write(1, {"a": "x" * monorelay.BOARD_PLACE_BYTES})
    assert board.read(0) is board.read(2) is None and board.read(1) == {"a": 1}
    assert (
        board.write(1, {"a": "x" * (monorelay.BOARD_PLACE_BYTES // 2 - 100)}) and board.read(0) is board.read(2) is None
    )
    board.write(1, {})
    assert not board.read(1)


def test_figures_are_shown_with_fewer_rows_where_there_is_no_room_for_all():
    place = monorelay.PlaceOnBoard(monorelay.Board(5), 0)
    tally = monorelay.Tally(0.0)
    for number in range(monorelay.ENDED_ROWS):
        odd = "\U0001f600" * 256
        tally.add(row(request=f"req_{number}", model=odd, sent=odd, path=odd[:200], user=odd[:200]))
    running = [["req", "u" * 200, "\U0001f600" * 256, "\U0001f600" * 256, "p", "k", "waiting", 1.0, None, 0, 1]] * 200
    figures = {"tally": tally.shared(), "running": running, "keys": [], "gauges": {"x_total": 3}}
    place.show_figures(figures)
    found = monorelay.PlaceOnBoard(place.board, 1).other_figures()[0]
    assert found["tally"]["series"] == json.loads(json.dumps(figures["tally"]["series"]))
    assert found["tally"]["ended"][-1][1] == "req_499" and 10 <= len(found["tally"]["ended"]) < 500
    place.keep_figures()
    kept = monorelay.PlaceOnBoard(place.board, 1).other_figures()
    assert (
        len(kept) == 1
        and kept[0]["gauges"] == {"x_total": 3}
        and kept[0]["tally"]["series"] == found["tally"]["series"]
    )


def test_nothing_cools_in_other_workers_where_there_is_no_room_to_show_it():
    place = monorelay.PlaceOnBoard(monorelay.Board(5), 0)
    place.show({"cooling": [[["p", "k", "x" * 2000]] * 2000], "spent": [1]})
    assert monorelay.PlaceOnBoard(place.board, 1).news({})[0] == {"cooling": [], "spent": [1]}


def test_a_relay_without_room_on_its_board_serves_on(upstream, program, monkeypatch, tmp_path):
    """Whatever models a client invents: 256 characters, of which each is twelve bytes on the board."""
    it = program(
        workers_of(
            settings(
                {"anthropic": upstream(answer(429)), "echo": {}},
                routes={"echo": "echo", "*": "anthropic"},
                users={"alice": {"key": ALICE, "requests_per_minute": 1200}},
            ),
            2,
        )
    )
    eventually(lambda: len(children(it)) == 2)
    with Client(it.url) as client:
        for number in range(1000):
            name = f"{number:05}" + "\U0001f600" * 251
            assert client.ask("POST", "/v1/messages", json.dumps(prompt(name)).encode(), token=ALICE).status == 429
    for got in asked_of_workers(it, 12, "POST", "/v1/messages", prompt("echo"), ALICE):
        assert got.status == 200

    def agreed() -> bool:
        found = {got.json["requests_left"] for got in asked_of_workers(it, 8, "GET", "/api/auth/me", token=ALICE)}
        totals = {
            Metrics(got.body.decode()).value("monorelay_requests_total")
            for got in asked_of_workers(it, 8, "GET", "/metrics")
        }
        return found == {1200 - 1012} and totals == {1012}

    assert eventually(agreed)
    assert "internal error" not in it.text()


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_closed_or_full_stderr_stops_nothing(tmp_path, redirect):
    port = unused_port()
    (tmp_path / "relay.json").write_text(json.dumps(settings({"echo": {}}, server={"port": port})))
    process = subprocess.Popen(["bash", "-c", f'exec "$@" {redirect}', "bash", *PROGRAM], cwd=tmp_path)
    try:
        assert eventually(lambda: accepts(f"http://127.0.0.1:{port}"))
        assert process.poll() is None
    finally:
        process.terminate()
        assert process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor time is read from /proc")
@pytest.mark.timed
def test_out_of_descriptors_is_survived_without_spinning_or_flooding(program):
    limit = 64
    it = program(
        settings({"echo": {}}), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    )

    def processor_seconds() -> float:
        fields = Path(f"/proc/{it.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with contextlib.ExitStack() as stack:
        for _ in range(2 * limit):
            stack.enter_context(Client(it.url))
        before, lines, gate = processor_seconds(), len(it.lines), threading.Event()
        gate.wait(0.5)
        assert processor_seconds() - before < 0.25 and len(it.lines) - lines < 20
    assert eventually(lambda: accepts(it.url))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_idle_connections_cost_little(program):
    it = program(settings({"echo": {}}))
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Client(it.url))
        assert first.ask("GET", "/health").status == 200
        before = it.resident_bytes()
        clients = [stack.enter_context(Client(it.url)) for _ in range(1000)]
        for client in clients:
            client.send(request("GET", "/health"))
        assert {client.answer().status for client in clients} == {200}
        assert it.resident_bytes() - before < 20 << 20


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_logins_at_the_same_time_take_the_memory_of_one(program):
    it = program(settings({"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=USERS))
    before = it.resident_bytes()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(it.url)) for _ in range(24)]
        for number, client in enumerate(clients):
            tried = {"username": f"user{number}", "password": "wrong"}
            client.send(request("POST", "/api/auth/login", json.dumps(tried).encode()))
        statuses = {client.answer().status for client in clients}
    assert 401 in statuses <= {401, 429}
    assert it.resident_bytes() - before < 40 << 20


class Silenced:
    """A relay in a process group of its own, whose stderr is a pipe that is full before it starts and stays so."""

    def __init__(self, folder: Path, **server: Any) -> None:
        self.port = unused_port()
        self.url = f"http://127.0.0.1:{self.port}"
        (folder / "relay.json").write_text(
            json.dumps(settings({"echo": {}}, server={"port": self.port, **server}))
        )
        self.pipe, end = os.pipe()
        os.set_blocking(end, False)
        with contextlib.suppress(BlockingIOError):
            while os.write(end, b"x" * 4096):
                pass
        with contextlib.suppress(BlockingIOError):
            while os.write(end, b"x"):
                pass
        os.set_blocking(end, True)
        self.process = subprocess.Popen(
            PROGRAM, cwd=folder, stdin=subprocess.DEVNULL, stderr=end, start_new_session=True
        )
        os.close(end)

    def __enter__(self) -> Silenced:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in self.children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        self.process.wait()
        os.close(self.pipe)

    def children(self) -> set[str]:
        file = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return set(file.read_text().split()) if file.exists() else set()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("number", "log"), [(signal.SIGTERM, "text"), (signal.SIGTERM, "off"), (signal.SIGINT, "json")]
)
def test_a_stderr_that_takes_nothing_holds_up_neither_start_nor_end(tmp_path, workers, log, number):
    with Silenced(tmp_path, workers=workers, log=log, drain_seconds=1) as it:
        eventually(lambda: accepts(it.url))
        with Client(it.url) as client:
            for _ in range(20):
                assert client.ask("GET", "/nowhere").status == 404
        it.process.send_signal(number)
        assert it.process.wait(TIMEOUT_SECONDS) == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are read from /proc")
def test_workers_are_replaced_though_stderr_takes_nothing(tmp_path):
    with Silenced(tmp_path, workers=2, drain_seconds=1) as it:
        before = eventually(lambda: len(it.children()) == 2 and it.children())
        eventually(lambda: accepts(it.url))
        for number, child in enumerate(sorted(before)):
            os.kill(int(child), signal.SIGKILL)
            eventually(
                lambda number=number: len(it.children()) == 2 and len(it.children() - before) == number + 1,
                seconds=10,
            )
        eventually(lambda: all(accepts(it.url) for _ in range(10)))
        it.process.send_signal(signal.SIGTERM)
        assert it.process.wait(TIMEOUT_SECONDS) == 0


def lower_descriptor_limit(limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crowd_in_the_first_moment_under_a_low_limit_ends_nothing(tmp_path, workers):
    port = unused_port()
    (tmp_path / "relay.json").write_text(
        json.dumps(settings({"echo": {}}, server={"port": port, "workers": workers, "drain_seconds": 1}))
    )
    process = subprocess.Popen(
        PROGRAM, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lower_descriptor_limit(256),
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        with contextlib.ExitStack() as stack:
            eventually(lambda: stack.enter_context(Client(url)))
            for _ in range(400):
                with contextlib.suppress(OSError):
                    stack.enter_context(Client(url))
            # Longer than the relay takes to settle and to write its banner.
            threading.Event().wait(0.5)
            assert process.poll() is None
        eventually(lambda: accepts(url))
        process.terminate()
        told = process.communicate(timeout=TIMEOUT_SECONDS)[1]
        assert process.returncode == 0 and "Traceback" not in told and "internal error" not in told
        assert "try it" in told
    finally:
        process.kill()
        process.wait()


def test_without_a_descriptor_left_answers_are_what_they_are(program):
    config = settings(
        {"echo": {}}, server={"jwt_secret": JWT_SECRET}, users=USERS, routes={"echo": "echo", "claude-x": "echo"}
    )

    def login(password: str) -> bytes:
        body = json.dumps({"username": "alice", "password": password}).encode()
        return request("POST", "/api/auth/login", body, token="")

    asked = {
        "unknown model": (request("POST", "/v1/messages", json.dumps(prompt("claude-y")).encode()), 404),
        "wrong token": (request("POST", "/v1/messages", STREAMED, token="wrong"), 401),
        "wrong password": (login("wrong"), 401),
        "right password": (login(PASSWORD), 200),
        "unknown path": (request("GET", "/nowhere"), 404),
        "wrong method": (request("GET", "/v1/messages"), 405),
        "catalogue": (request("GET", "/v1/models"), 200),
        "no JSON": (request("POST", "/v1/messages", b"{"), 400),
    }
    it = program(config, preexec_fn=lower_descriptor_limit(64))
    with contextlib.ExitStack() as stack:
        # Requests that have begun, of clients that have shown a token: such connections make no room, however long it
        # takes.
        clients = {name: stack.enter_context(Client(it.url)) for name in asked}
        for name, client in clients.items():
            assert client.ask("GET", "/api/auth/me").status == 200
            client.send(asked[name][0][:12])

        def is_refused() -> bool:
            """Whether one more connection, which stays if it may, is turned away."""
            more = stack.enter_context(Client(it.url))
            with contextlib.suppress(ConnectionError):
                more.send(b"GET /health HTTP/1.1\r\n")
            return more.ended_within(0.02)

        assert any(is_refused() for _ in range(80)), "no descriptor is left"
        for name, client in clients.items():
            client.send(asked[name][0][12:])
            got = client.answer()
            assert got.status == asked[name][1], (name, got)
            assert name != "unknown model" or "claude-x" in got.json["error"]["message"]
    eventually(lambda: accepts(it.url))
    assert "internal error" not in it.text()


def test_an_edit_right_after_the_start_is_taken_up(tmp_path):
    for turn in range(3):
        port = unused_port()
        config = settings({"echo": {}}, server={"port": port}, routes={"echo": "echo"})
        file = tmp_path / "relay.json"
        file.write_text(json.dumps(config))
        process = subprocess.Popen(PROGRAM, cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            eventually(lambda port=port: Client(f"http://127.0.0.1:{port}").close() is None)
            file.write_text(json.dumps({**config, "aliases": {f"new{turn}": "echo"}}))

            def is_known(turn: int = turn, port: int = port) -> bool:
                with Client(f"http://127.0.0.1:{port}") as client:
                    return (
                        client.ask("POST", "/v1/messages", json.dumps(prompt(f"new{turn}")).encode()).status
                        == 200
                    )

            eventually(is_known)
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("log", ["text", "json"])
@pytest.mark.parametrize("workers", [1, 2])
def test_the_banner_comes_before_anything_else(tmp_path, workers, log):
    port = unused_port()
    config = settings({"echo": {}}, server={"port": port, "workers": workers, "log": log, "drain_seconds": 1})
    (tmp_path / "relay.json").write_text(json.dumps(config))
    process = subprocess.Popen(
        PROGRAM,
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        client = eventually(lambda: Client(url))
        with client:
            for _ in range(30):
                assert client.ask("GET", "/nowhere").status == 404
            # Also what a reload and the end of a worker tell comes behind.
            process.send_signal(signal.SIGHUP)
            threading.Event().wait(0.3)
        process.terminate()
        lines = process.communicate(timeout=2 * TIMEOUT_SECONDS)[1].splitlines()
    finally:
        process.kill()
        process.wait()
    clients = next(number for number, line in enumerate(lines) if "OpenAI SDKs" in line)
    assert "MonoRelay" in lines[0] and not any("/nowhere" in line for line in lines[: clients + 1])
    assert sum("/nowhere" in line for line in lines) == 30


# ------------------------------------------------------------------------------------------------------------
# Soak: a minute of 200 streams at a time, a tenth of them abandoned
# ------------------------------------------------------------------------------------------------------------


SOAK_SECONDS = 40
LEDGER_SOAK_SECONDS = 25
LOCKED_SOAK_SECONDS = 45  # ten before the file is locked, ten without it, and fifteen until another worker is killed


def soak_script(connection: Connection) -> None:
    """A stream whose events carry the user_id of the request, over and over."""
    while True:
        mark = connection.read_request().json["metadata"]["user_id"]
        middle = [
            sse("content_block_delta", index=0, delta={"type": "text_delta", "text": f"{mark} {n}"})
            for n in range(40)
        ]
        connection.send(STREAM_HEAD)
        for event in (ANTHROPIC_EVENTS[0], *middle, ANTHROPIC_EVENTS[-1]):
            connection.send(chunk(event))
        connection.send(b"0\r\n\r\n")


def soak_stream(it: Relay, mark: str, abort: bool) -> None:
    with it.client() as client:
        body = json.dumps(prompt(stream=True, metadata={"user_id": mark})).encode()
        client.send(request("POST", "/v1/messages", body))
        if abort:
            client.until(b"message_start")
            return client.reset()
        events = events_of(client.answer().body)
        texts = [data["delta"]["text"] for name, data in events if name == "content_block_delta"]
        assert texts == [f"{mark} {n}" for n in range(40)] and events[-1][0] == "message_stop"


@pytest.mark.slow
def test_soak(upstream, relay, monkeypatch):
    # Kept connections go soon, so that the count at the end need not wait for them.
    monkeypatch.setattr(monorelay, "UPSTREAM_IDLE_SECONDS", 1)
    provider = upstream(soak_script)
    it = relay({"anthropic": provider}, server={"log": "off"})
    soak_stream(it, "first", abort=False)
    before, finished = threads_and_descriptors(), Counter[str]()
    deadline = time.monotonic() + SOAK_SECONDS

    def visit(number: int) -> None:
        chance = random.Random(number)
        for turn in itertools.count():
            if time.monotonic() > deadline:
                return
            abort = chance.random() < 0.1
            soak_stream(it, f"{number}-{turn}", abort)
            finished["aborted" if abort else "whole"] += 1

    in_threads(visit, 200)
    assert finished["whole"] > 1000 and finished["aborted"] > 50, finished
    for connection in provider.connections:
        connection.close()
    soak_stream(it, "last", abort=False)
    eventually(
        lambda: all(now <= then + 2 for now, then in zip(threads_and_descriptors(), before)), seconds=30
    )
    print(f"soak: {dict(finished)}")


class Billed:
    """A relay of two workers and 200 clients, who all the time have a stream each; what the provider told of each
    stream, and what the clients have got."""

    def __init__(self, upstream: Any, program: Any, folder: Path) -> None:
        self.told: dict[str, tuple[int, ...]] = {}  # the kinds of tokens by mark
        self.provider = upstream(self.script)
        self.it = program(settings({"anthropic": self.provider}, ledger={"path": "usage.db"}, server={"workers": 2}))
        self.path = folder / "usage.db"
        self.got: list[tuple[str, str, float, float]] = []  # id, mark, when it began, seconds to the first byte
        self.ended: dict[str, float] = {}  # by id
        self.broken: list[str] = []  # ids, as far as they were told

    def workers(self) -> list[int]:
        pid = self.it.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def script(self, connection: Connection) -> None:
        while True:
            mark = connection.read_request().json["metadata"]["user_id"]
            chance = random.Random(mark)
            kinds = tuple(chance.randrange(10 ** chance.randrange(1, 7)) for _ in KIND_NAMES)
            usage = usage_in("/v1/messages", kinds)
            self.told[mark] = kinds
            connection.send(
                STREAM_HEAD, chunk(sse("message_start", message={**MESSAGE, "usage": {**usage, "output_tokens": 1}}))
            )
            for event in marked_stream(mark)[1:]:
                threading.Event().wait(0.25)
                connection.send(chunk(event))
            connection.send(chunk(sse("message_delta", delta={}, usage={"output_tokens": kinds[-1]})))
            connection.send(chunked(ANTHROPIC_EVENTS[-1]))

    def visit(self, mark: str) -> None:
        request_id = ""
        try:
            with patient(self.it) as client:
                begun = time.monotonic()
                client.send(request("POST", "/v1/messages", marked_prompt(mark, stream=True)))
                head = Message(client.until(b"\r\n\r\n"), b"")
                request_id = head.get("x-monorelay-request-id")
                first_byte = time.monotonic() - begun
                assert head.status == 200 and mark.encode() in b"".join(iter(client.chunk, b""))
                self.ended[request_id] = time.monotonic()
                self.got.append((request_id, mark, begun, first_byte))
        except (ConnectionError, EOFError):
            self.broken.append(request_id)

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds

        def visit(number: int) -> None:
            for turn in itertools.count():
                if time.monotonic() > deadline:
                    return
                self.visit(f"{number}-{turn}")

        in_threads(visit, 200)

    def missing(self) -> set[str]:
        """The ids of those that a client has got whole and the ledger doesn't have; all others are right in it."""
        names = ("request", "complete", *KIND_NAMES)
        rows = selected(self.path, f"SELECT {', '.join(names)} FROM request")
        found = {request_id: (bool(complete), *kinds) for request_id, complete, *kinds in rows}
        assert len(found) == len(rows), "none is in it twice"
        marks = {request_id: mark for request_id, mark, _, _ in self.got}
        assert found.keys() <= marks.keys() | set(self.broken)
        for request_id in found.keys() & marks.keys():
            assert found[request_id] == (True, *self.told[marks[request_id]])
        assert_sums_are_exact(self.path)
        return marks.keys() - found.keys()

    def waits(self, since: float = 0, until: float = math.inf) -> list[float]:
        """How long the requests that began in this time waited for their first byte, the shortest first."""
        return sorted(wait for _, _, begun, wait in self.got if since <= begun < until)


@pytest.fixture
def billed(descriptors, upstream, program, tmp_path) -> Billed:
    return Billed(upstream, program, tmp_path)


@pytest.mark.slow
def test_soak_of_the_ledger(billed):
    billed.run(LEDGER_SOAK_SECONDS)
    assert len(billed.got) > 1000 and not billed.broken
    sums = [sum(column) for column in zip(*(billed.told[mark] for _, mark, _, _ in billed.got))]
    eventually(lambda: selected(billed.path, "SELECT sum(requests) FROM hour") == [len(billed.got)])
    assert billed.missing() == set()
    names = ", ".join(f"sum({kind})" for kind in KIND_NAMES)
    for table in ("request", "hour"):
        assert selected(billed.path, f"SELECT {names} FROM {table}") == [tuple(sums)]
    time.sleep(2 * monorelay.SHARED_SECONDS)  # what the workers show each other
    found = samples(billed.it)
    labels = ("anthropic", "claude-test")
    assert [int(found[("monorelay_tokens_total", *labels, kind)]) for kind in KIND_NAMES] == sums
    assert int(found[("monorelay_requests_total", *labels, "200")]) == len(billed.got)
    assert "can't be written" not in billed.it.text()
    waits = billed.waits()
    print(f"soak of the ledger: {len(waits)} streams, first byte {waits[len(waits) // 2]:.3f} s, "
          f"{waits[len(waits) * 99 // 100]:.3f} s of 99 %")  # fmt: skip


HOLDING = """
import sqlite3, time
connection = sqlite3.connect("usage.db", isolation_level=None, timeout=20)
connection.execute("BEGIN EXCLUSIVE")
print(flush=True)
time.sleep(10)
"""


@pytest.mark.slow
def test_soak_of_a_ledger_that_is_locked_for_ten_seconds_while_workers_are_killed(billed, tmp_path):
    times: dict[str, float] = {}
    killed: list[float] = []

    def kill() -> None:
        os.kill(billed.workers()[0], signal.SIGKILL)
        killed.append(time.monotonic())

    def disturb() -> None:
        threading.Event().wait(10)
        holder = subprocess.Popen([sys.executable, "-c", HOLDING], cwd=tmp_path, stdout=subprocess.PIPE)
        holder.stdout.readline()
        times["locked"] = time.monotonic()
        threading.Event().wait(5)
        kill()
        holder.communicate(timeout=20)
        times["free"] = time.monotonic()
        threading.Event().wait(15)
        kill()

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    billed.run(LOCKED_SOAK_SECONDS)
    disturbing.join()
    assert len(killed) == 2 and len(billed.got) > 1000
    time.sleep(3.0)  # three pauses of their ledgers
    # What is lost is what a worker had not written when it was killed: what ended in its last second, or since the
    # file was locked.
    spans = [(times["locked"] - 1.5, killed[0]), (killed[1] - 1.5, killed[1])]
    unwritten = billed.missing()
    missing, lost = [billed.ended[request_id] for request_id in unwritten], []
    for since, until in spans:
        ended = sum(since < at < until + 0.5 for at in billed.ended.values())
        lost.append(sum(since < at < until + 0.5 for at in missing))
        assert lost[-1] < 0.8 * ended, "the other worker has lost nothing"
    assert sum(lost) == len(missing)
    assert len(billed.broken) <= 2 * 200, "those that ran in the workers that were killed"
    # All tell the same of what is left, which is what the provider has told of it.
    columns = ("requests", *KIND_NAMES)
    (written,) = selected(billed.path, f"SELECT {', '.join(f'sum({name})' for name in columns)} FROM hour")
    left = [mark for request_id, mark, _, _ in billed.got if request_id not in unwritten]
    assert list(written[1:]) == [sum(column) for column in zip(*(billed.told[mark] for mark in left))]
    printed = json.loads(run("usage", "usage.db", "--json", cwd=tmp_path).stdout)["total"]
    with patient(billed.it) as client:
        asked = client.ask("GET", f"/api/usage?from={monorelay.windows(time.time() - 86400)[0]}").json["total"]
    assert [printed[name] for name in columns] == [asked[name] for name in columns] == list(written)
    assert written[0] == len(left)
    # The metrics know all but what ended in a killed worker's last second: it showed what it had counted before.
    counted = int(samples(billed.it)[("monorelay_requests_total", "anthropic", "claude-test", "200")])
    unshown = sum(any(at - 1.5 < ended < at + 0.5 for at in killed) for ended in billed.ended.values())
    assert len(billed.got) - unshown <= counted <= len(billed.got) + len(billed.broken)
    assert counted > len(left), "also what was lost while the file was locked"
    # Nobody waits for the file.
    locked, usual = billed.waits(times["locked"], times["free"]), billed.waits(until=times["locked"])
    assert len(locked) > 500 and locked[len(locked) * 99 // 100] < max(0.3, 3 * usual[len(usual) * 99 // 100])
    warnings = billed.it.text().count("can't be written: database is locked")
    assert 1 <= warnings <= 3, "one of each process, the killed one's successor too"
    print(f"soak of a locked ledger: {len(billed.got)} streams, lost {lost}, broken {len(billed.broken)}; 99 % "
          f"of first bytes in {usual[len(usual) * 99 // 100]:.3f} s, {locked[len(locked) * 99 // 100]:.3f} s locked; "
          f"{warnings} warnings")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# A crowd: thousands that are only there
# ------------------------------------------------------------------------------------------------------------

CROWD = 5000
OPENING = STREAM_HEAD + chunk(ANTHROPIC_EVENTS[0])


def quiet_streams(listener: socket.socket) -> None:
    """A provider for any number of streams in one thread: each gets its first event, and no more."""
    held = []
    with selectors.DefaultSelector() as selector, contextlib.suppress(OSError):
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    held.append(listener.accept()[0])
                    selector.register(held[-1], selectors.EVENT_READ)
                elif key.fileobj.recv(1 << 16):
                    key.fileobj.sendall(OPENING)
                else:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """As many as this crowd needs at our side; the relay raises its own limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 3 * CROWD + 500
    assert hard == resource.RLIM_INFINITY or hard >= needed, f"this needs `ulimit -Hn` of {needed}, not {hard}"
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_thousands_of_idle_clients_and_quiet_streams_at_a_time(many_descriptors, program):
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        threading.Thread(target=quiet_streams, args=(listener,), daemon=True).start()
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        low = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        it = program(
            settings({"anthropic": {"base_url": base_url}}, server={"max_connections": 4 * CROWD, "log": "off"}),
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, low)),
        )
        idle = [Client(it.url) for _ in range(CROWD)]
        for client in idle:
            client.send(request("GET", "/health"))
        assert all(client.answer().status == 200 for client in idle)
        streams = []
        for _ in range(CROWD):
            streams.append(Client(it.url))
            streams[-1].send(request("POST", "/v1/messages", STREAMED))
            streams[-1].until(ANTHROPIC_EVENTS[0])
        # All of them are still there, and nobody waits for the others.
        started = time.monotonic()
        assert all(client.ask("GET", "/health").status == 200 for client in idle[::100])
        assert time.monotonic() - started < 1
        print(f"{CROWD} idle clients and {CROWD} quiet streams: {it.resident_bytes() >> 20} MB")
        for client in idle + streams:
            client.close()
        eventually(lambda: len(os.listdir(f"/proc/{it.process.pid}/fd")) < 100)


# ------------------------------------------------------------------------------------------------------------
# At full size: nobody is held up, nothing is kept
# ------------------------------------------------------------------------------------------------------------

STALL_SECONDS = 0.1  # how long anybody may wait for GET /health, whatever others do
PEAK_FACTOR = 3  # how often what was sent may be held at a time
PEAK_BYTES = 12 << 20  # and what anything may take besides
KEPT_BYTES = 20 << 20  # what may be left of it
REST_SECONDS = 60.0
TRIES = 3
LARGEST = 31 << 20  # just below the 32 MB that are let in

# Asks for /health on fresh connections until its stdin ends; then it tells how long the slowest took. It is a process
# of its own, which no work of the tests holds up.
PROBE = """
import select, socket, sys, time
port, slowest, is_last = int(sys.argv[1]), 0.0, False
while True:
    begin = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 100) as sock:
        sock.settimeout(100)
        sock.sendall(b"GET /health HTTP/1.1\\r\\nHost: relay\\r\\nConnection: close\\r\\n\\r\\n")
        got = b""
        while data := sock.recv(65536):
            got += data
        assert b" 200 " in got[:20], got
    slowest = max(slowest, time.monotonic() - begin)
    if is_last:
        break
    print("asked", flush=True)
    is_last = bool(select.select([sys.stdin], [], [], 0.01)[0])
print(slowest)
"""


class Meter:
    """What a relay does to others while a block runs: the longest GET /health in seconds, its memory in bytes.

    One answer is awaited before the block begins, and one asked for after it has ended."""

    def __init__(self, it: Program) -> None:
        self.it = it
        self.before = it.resident_bytes()
        self.slowest = 0.0
        self.peak = 0

    def __enter__(self) -> Meter:
        # 5 sets the peak back to what is resident now (proc(5)).
        Path(f"/proc/{self.it.process.pid}/clear_refs").write_text("5")
        port = str(urllib.parse.urlsplit(self.it.url).port)
        self.probe = subprocess.Popen(
            [sys.executable, "-c", PROBE, port], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.probe.stdout.readline() == "asked\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.slowest = float(self.probe.communicate(timeout=200)[0].splitlines()[-1])
        status = Path(f"/proc/{self.it.process.pid}/status").read_text()
        self.peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10


def assert_bearable(
    it: Program, attack: Callable[[], object], sent_bytes: int, kept_bytes: int = KEPT_BYTES
) -> None:
    """Whatever the attack sends (so many bytes, inflated ones counted), others don't notice, and it leaves nothing.

    The best of a few tries counts: a stall that the relay makes comes each time, what else a small machine does
    doesn't. One of a second is no noise."""
    before, seen = it.resident_bytes(), []
    while len(seen) < TRIES:
        with Meter(it) as meter:
            attack()
        seen.append(meter.slowest)
        assert meter.peak - before < PEAK_FACTOR * sent_bytes + PEAK_BYTES, (
            f"{(meter.peak - before) >> 20} MB at a time"
        )
        assert meter.slowest < 1, f"GET /health took {meter.slowest:.2f} s"
        if meter.slowest < STALL_SECONDS:
            break
    assert min(seen) < STALL_SECONDS, f"GET /health took {seen} s"

    def is_back() -> bool:
        kept = it.resident_bytes() - before
        assert kept < kept_bytes, f"{kept >> 20} MB are kept"
        return True

    eventually(is_back, seconds=REST_SECONDS)


def patient(it: Program, source: str = "") -> Client:
    """A client that waits until even a slow answer is there."""
    client = Client(it.url, source)
    client.sock.settimeout(100)
    return client


def sends(it: Program, *asked: bytes, statuses: tuple[int, ...]) -> Callable[[], None]:
    """One client's request, its answer read and dropped; its status must be one of these."""

    def attack() -> None:
        with patient(it) as client:
            with contextlib.suppress(ConnectionError):
                for part in asked:
                    client.send(part)
            head = client.until(b"\r\n\r\n")
            assert Message(head, b"").status in statuses, head
            client.sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while client.sock.recv(1 << 20):
                    pass

    return attack


def squeezed(opening: bytes, filling: bytes, end: bytes, size: int = LARGEST) -> tuple[bytes, int]:
    """A JSON body of a size in gzip, and that size."""
    body = opening + filling * ((size - len(opening) - len(end)) // len(filling)) + end
    return gzip.compress(body, 1), len(body)


def as_json(path: str, document: Any) -> tuple[str, bytes, int]:
    body = json.dumps(document).encode()
    return path, body, len(body)


def in_gzip(*pieces: bytes, path: str = "/v1/messages", **options: int) -> tuple[str, bytes, int]:
    return (path, *squeezed(*pieces, **options))


CALLING = (
    b'{"model":"gpt-x","max_tokens":1,"messages":[{"role":"user","content":"x"},'
    b'{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"n","input":{"a":'
)
CALLED = b'}}]},{"role":"user","content":[{"type":"tool_result","tool_use_id":"t","content":"y"}]}]}'
SHOWING = (
    b'{"model":"gpt-x","max_tokens":1,"messages":[{"role":"user","content":"x"}],'
    b'"tools":[{"name":"n","input_schema":{"enum":['
)
SHOWN = b'""]}}]}'

# Path, body, and how large the body is when it is inflated; and the statuses that an answer may have.
LARGE_REQUESTS: dict[str, tuple[Callable[[], tuple[str, bytes, int]], tuple[int, ...]]] = {
    "echo-tool 7 deep": (lambda: as_json("/v1/messages", prompt("echo-tool", tools=[nested_tool(7)])), (200, 400)),
    "echo-tool 10 deep": (lambda: as_json("/v1/messages", prompt("echo-tool", tools=[nested_tool(10)])), (200, 400)),
    "echo embeds 1000": (
        lambda: as_json("/v1/embeddings", {"model": "echo", "input": ["a"] * 1000, "dimensions": 4096}), (200, 400)),
    "echo embeds 4000": (
        lambda: as_json("/v1/embeddings", {"model": "echo", "input": ["a"] * 4000, "dimensions": 4096}), (200, 400)),
    "echo streams a megabyte": (
        lambda: as_json("/v1/messages", prompt("echo", stream=True, max_tokens=1 << 20,
                                               messages=[{"role": "user", "content": "a " * 500_000}])), (200,)),
    "echo answers with a megabyte": (
        lambda: as_json("/v1/chat/completions", chat("echo", max_tokens=1 << 20,
                                                     messages=[{"role": "user", "content": "a " * 500_000}])), (200,)),
    "echo and 6 MB": (
        lambda: as_json("/v1/messages", prompt("echo", messages=[{"role": "user", "content": "a " * 3_000_000}])),
        (413,)),
    "echo stops at 400 kB": (
        lambda: as_json("/v1/messages", prompt("echo", stop_sequences=["a" * 200_000 + "b"],
                                               messages=[{"role": "user", "content": "a" * 400_000}])), (200, 400)),
    "arrays in arrays": (lambda: in_gzip(b'{"model":"claude-a","x":' + b"[" * (LARGEST // 2 - 20), b"]", b"}"), (400,)),
    "arrays unclosed": (lambda: in_gzip(b'{"model":"claude-a","x":', b"[", b""), (400,)),
    "empty arrays": (lambda: in_gzip(b'{"model":"claude-a","x":[', b"[],", b"[]]}"), (400,)),
    "empty objects": (lambda: in_gzip(b'{"model":"claude-a","x":[', b"{},", b"{}]}"), (400,)),
    "members": (lambda: in_gzip(b'{"model":"claude-a"', b',"":0', b"}"), (400,)),
    "members and an alias": (lambda: in_gzip(b"{", b'"":0,', b'"model":"fast"}'), (400,)),
    "numbers": (lambda: in_gzip(b'{"model":"claude-a","x":[', b"1,", b"1]}"), (400,)),
    "one number": (lambda: in_gzip(b'{"model":"claude-a","x":', b"9", b"}"), (200, 400)),
    "blanks": (lambda: in_gzip(b'{"model":"claude-a"', b" ", b"}"), (200, 400)),
    "quotes": (lambda: in_gzip(b'{"model":"claude-a","x":"', b'\\"', b'"}'), (200,)),
    "short strings": (lambda: in_gzip(b'{"model":"fast","x":[', b'"' + b"x" * 50 + b'",', b'""]}'), (200,)),
    "escapes": (lambda: in_gzip(b'{"model":"fast","x":"', b"\\u00e9", b'"}'), (200,)),
    "a model of 24 MB": (lambda: in_gzip(b'{"model":"claude-\\u0041', b"x", b'"}', size=24 << 20), (400,)),
    "an unknown model of 31 MB": (lambda: in_gzip(b'{"model":"', b"x", b'"}', path="/v1/chat/completions"), (400,)),
    # These are translated, and what this provider answers to all can't be.
    "a call with a string of 16 MB": (
        lambda: in_gzip(CALLING + b'"', b"x", b'"' + CALLED, size=16 << 20), (502,)),
    "a call with 16,000 strings": (
        lambda: in_gzip(CALLING + b"[", b'"' + b"x" * 1000 + b'",', b'""]' + CALLED, size=16 << 20), (502,)),
    "a schema of 50,000 strings": (
        lambda: in_gzip(SHOWING, b'"' + b"x" * 300 + b'",', SHOWN, size=16 << 20), (502,)),
    "one image of 31 MB": (lambda: in_gzip(b'{"x":"', b"iVBORw0KGgo", b'","model":"fast"}'), (200,)),
}  # fmt: skip


@pytest.fixture
def besieged(upstream, program) -> Callable[..., Program]:
    """A relay with echo, a provider with two keys that takes whatever comes, an alias, and users."""

    def swallows(connection: Connection) -> None:
        while True:
            head = connection.until(b"\r\n\r\n")
            left = int(Message(head, b"").get("content-length") or 0)
            left -= len(connection.take(min(left, len(connection.buffer))))
            while left:
                left -= len(connection.sock.recv(min(left, 1 << 20)))
            connection.send(answer())

    def make(script: Script = swallows, **server: Any) -> Program:
        keys = {"keys": ["sk-a", "sk-b"], "timeout": 100}
        provider = upstream(script)
        routes = {"echo*": "echo", "claude-*": "anthropic", "gpt-*": "openai"}
        return program(
            settings(
                {"anthropic": {"upstream": provider, **keys}, "openai": {"upstream": provider, **keys}, "echo": {}},
                server={"jwt_secret": JWT_SECRET, "log": "off", **server}, users=USERS, routes=routes,
                aliases={"fast": "claude-a"},
            )
        )  # fmt: skip

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE_REQUESTS)
def test_nobody_waits_for_a_large_request(besieged, name):
    make, statuses = LARGE_REQUESTS[name]
    path, body, size = make()
    headers = ["Content-Encoding: gzip"] if body.startswith(b"\x1f\x8b") else []
    it = besieged()
    assert_bearable(it, sends(it, request("POST", path, body, *headers), statuses=statuses), size)


CONVERSATION = ["Grüße, \"Welt\"\n\tfor (x of y) { z[1] = '\\\\'; }\u2028 " * 8, "plain words, and more of them. " * 40,
                "データ" * 100, json.dumps({"path": "a/b.py", "text": 'print("hello")\n' * 20})]  # fmt: skip


def conversation(model: str, size: int = 30 << 20, ascii_only: bool = True) -> bytes:
    """What a client really sends: many turns with text, code and tool results of some kilobytes each."""
    texts = itertools.cycle(CONVERSATION)
    turns: list[dict[str, Any]] = []
    average = sum(len(json.dumps(text, ensure_ascii=ascii_only).encode()) for text in CONVERSATION) / len(
        CONVERSATION
    )
    while len(turns) * (average + 80) < size:
        role = ("user", "assistant")[len(turns) % 2]
        turns.append({"role": role, "content": [{"type": "text", "text": next(texts)}]})
    body = prompt(model, messages=turns, metadata={"user_id": "session"}, stream=False)
    return json.dumps(body, ensure_ascii=ascii_only).encode()


@pytest.mark.slow
@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("coding", ["", "gzip"])
@pytest.mark.parametrize("model", ["claude-a", "fast"])
def test_nobody_waits_for_a_conversation_of_30_megabytes(besieged, model, coding, ascii_only):
    body = conversation(model, ascii_only=ascii_only)
    assert 25 << 20 < len(body) < 32_000_000
    raw, headers = (gzip.compress(body, 1), ["Content-Encoding: gzip"]) if coding else (body, [])
    it = besieged()
    assert_bearable(it, sends(it, request("POST", "/v1/messages", raw, *headers), statuses=(200,)), len(body))


@pytest.mark.slow
@pytest.mark.parametrize("filling", [b" ", b"\t", b"x: y\r\n", b"a:\r\n"], ids=brief)
@pytest.mark.parametrize("part", ["head", "trailer", "trailer of a login"])
def test_nobody_waits_for_a_head_or_trailer_that_is_almost_right(besieged, part, filling):
    it = besieged()
    odd = b"x:" * (filling in b" \t") + filling * (65_300 // len(filling)) + b"\x01\r\n\r\n"
    if part == "head":
        asked = b"GET / HTTP/1.1\r\nHost: a\r\n" + odd
    else:
        path = "/api/auth/login" if "login" in part else "/v1/messages"
        asked = request("POST", path, chunk(STREAMED) + b"0\r\n" + odd, "Transfer-Encoding: chunked")
    assert_bearable(it, sends(it, asked, statuses=(400, 431)), len(asked))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2_000, 16_000])
def test_nobody_waits_for_trailers_that_dribble_on_30_connections(besieged, count):
    it = besieged()
    opening = request(
        "POST", "/api/auth/login", b"0\r\n" + b"a:\r\n" * count, "Transfer-Encoding: chunked", token=""
    )

    def processor_seconds() -> float:
        fields = Path(f"/proc/{it.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(patient(it)) for _ in range(30)]
            for client in clients:
                client.send(opening)
            spent = processor_seconds()
            for _ in range(40):
                for client in clients:
                    with contextlib.suppress(ConnectionError):
                        client.send(b"a")
                threading.Event().wait(0.05)
            assert processor_seconds() - spent < 0.8, "1,200 bytes in 2 seconds, and what the meter asks for"

    assert_bearable(it, attack, 30 * len(opening))


@pytest.fixture
def descriptors() -> Iterator[None]:
    """Enough for both ends of some thousand connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if 0 < hard < 20_000 else 20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
def test_1200_connections_that_pipeline_and_read_nothing_cost_little(descriptors, besieged):
    it, asked = besieged(), request("GET", "/health", token="") * 2_000

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(1_200):
                client = stack.enter_context(Client(it.url, SO_RCVBUF=1 << 12))
                client.sock.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    for start in range(0, len(asked), 1 << 16):
                        client.sock.sendall(asked[start : start + (1 << 16)])
            threading.Event().wait(1)
            assert it.resident_bytes() < 100 << 20

    assert_bearable(it, attack, 16 << 20)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["answered", "silent"])
def test_all_connections_idle_at_one_address_shut_nobody_out(descriptors, besieged, kind):
    it = besieged(max_connections=4096)
    with contextlib.ExitStack() as stack:
        for _ in range(4096):
            client = stack.enter_context(Client(it.url, "127.0.0.7"))
            if kind == "answered":
                assert client.ask("GET", "/health").status == 200

        def attack() -> None:
            for _ in range(100):
                with Client(it.url) as other:
                    assert other.ask("GET", "/api/auth/me").status == 200

        assert_bearable(it, attack, 0)


@pytest.mark.slow
def test_4096_connections_that_pipeline_without_a_token_and_read_nothing_shut_nobody_out(descriptors, besieged):
    gate = threading.Event()
    it, count = besieged(gated_stream(gate), max_connections=4096), 4076
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(patient(it)) for _ in range(20)]
        for stream in streams:
            stream.send(request("POST", "/v1/messages", json.dumps(prompt("claude-a", stream=True)).encode()))
            stream.until(b"message_start")
        greedy = []
        for _ in range(count):
            greedy.append(stack.enter_context(Client(it.url, SO_RCVBUF=1 << 11)))
            floods(greedy[-1], request("GET", "/health", token="") * 1_000)
        threading.Event().wait(2)
        for _ in range(200):
            owner = stack.enter_context(Client(it.url))
            assert owner.ask("GET", "/api/auth/me").status == 200
        gate.set()
        for stream in streams:
            stream.until(b"message_stop")


@pytest.mark.slow
@pytest.mark.parametrize(
    "opening", [b"G", request("POST", "/api/auth/login", b"{", "Content-Length: 9", token="")], ids=brief
)
def test_1000_new_connections_beside_2000_that_are_held_hold_nobody_up(descriptors, besieged, opening):
    it = besieged(max_connections=2_010)

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(2_000):
                stack.enter_context(Client(it.url)).send(opening)
            threading.Event().wait(1.5)
            for number in range(1_000):
                stack.enter_context(Client(it.url)).send(opening)
                if number % 100 == 99:  # no more than may wait to be told that there is no room
                    threading.Event().wait(0.1)

    assert_bearable(it, attack, 8 << 20)


def heavy_head(escapes: int) -> bytes:
    """A head of 64 kB that is costly to read: many escapes in its path, many options of its connection."""
    opening = f"POST /v1/{'%41' * escapes} HTTP/1.1\r\nHost: a\r\nConnection: ".encode()
    options = ",".join(map("".join, itertools.product(string.ascii_lowercase + string.digits, repeat=2))) + ","
    return opening + (options * 20).encode()[: 64_000 - len(opening)] + b"\r\n\r\n"


@pytest.mark.slow
@pytest.mark.parametrize("escapes", [0, 512, 5_000])
def test_nobody_waits_for_60_heads_that_are_costly_to_read(besieged, escapes):
    it, asked = besieged(), heavy_head(escapes)

    def attack() -> None:
        for _ in range(5):
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(patient(it)) for _ in range(60)]
                for client in clients:
                    client.send(asked)
                for client in clients:
                    status = Message(client.until(b"\r\n\r\n"), b"").status
                    assert status == 431

    assert_bearable(it, attack, 60 * len(asked))


@pytest.mark.slow
def test_nobody_waits_while_names_that_are_permutations_are_compared(besieged):
    chance, letters = random.Random(5), list("ab" * 32)
    names = []
    for _ in range(1_000):
        chance.shuffle(letters)
        names.append("".join(letters))
    wanted = "".join(sorted(letters, key=lambda _: chance.random()))
    it = besieged(replies(catalogue_answer(*names)))
    assert_bearable(it, sends(it, request("GET", "/v1/models"), statuses=(200,)), 1 << 20)
    assert_bearable(it, sends(it, request("GET", f"/v1/models/{wanted}"), statuses=(404,)), 1 << 20)


@pytest.mark.slow
def test_250_guesses_at_once_do_not_hold_up_the_owners_login(besieged):
    it = besieged()

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            for number in range(250):
                client = stack.enter_context(patient(it, f"127.0.1.{number + 1}"))
                body = json.dumps({"username": f"user{number % 50}", "password": "wrong"}).encode()
                client.send(request("POST", "/api/auth/login", body, token=""))
            begin = time.monotonic()
            with patient(it, "127.0.5.1") as owner:
                body = json.dumps({"username": "bob", "password": PASSWORD}).encode()
                assert owner.ask("POST", "/api/auth/login", body, token="").status in (200, 429)
            assert time.monotonic() - begin < 1.5

    # A password takes 16 MB while it is hashed (RFC 7914 §2).
    assert_bearable(it, attack, 8 << 20)


def filled(opening: bytes, filling: bytes, end: bytes, size: int) -> bytes:
    """A JSON body of not quite this size."""
    return opening + filling * ((size - len(opening) - len(end)) // len(filling)) + end


def costly_tokens() -> list[str]:
    """Two header lines with tokens as long as may be, whose claims would take long to read."""
    payload = filled(b'{"a":[', b"{},", b"{}]}", 5_850).decode()
    token = token_of(HS256, payload, "another secret of 32 bytes or more")
    assert 7_800 < len(token) < 8_000
    return [f"Authorization: Bearer {token}", f"x-api-key: {token}"]


ECHOED = b'{"model":"echo","max_tokens":523800,"messages":[{"role":"user","content":"'
# How many of which request come at once, the status of their answers, and the bytes of one: of its body when it is
# inflated, or of its answer.
BURSTS: dict[str, tuple[int, Callable[[], bytes], int, int]] = {
    "logins with many values": (
        300, lambda: request("POST", "/api/auth/login", filled(b'{"a":[', b"{},", b"{}]}", 16_000), token=""), 400,
        16_000),
    "tokens with many values": (
        200, lambda: request("GET", "/v1/models", None, *costly_tokens(), token=""), 401, 16_000),
    "echo embeds": (
        300, lambda: request("POST", "/v1/embeddings", b'{"model":"echo","input":["a"],"dimensions":4096}'), 200,
        92_000),
    "an alias behind many names": (
        150, lambda: request("POST", "/v1/messages", filled(b"{", b'"":0,', b'"model":"fast"}', 16_000)), 200, 16_000),
    "echo counts half a million words": (
        40, lambda: request("POST", "/v1/messages", gzip.compress(ECHOED + b"a " * 523_850 + b'"}]}', 1),
                            "Content-Encoding: gzip"), 200, 1 << 20),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", BURSTS)
def test_nobody_waits_for_many_requests_that_are_completed_at_once(besieged, name):
    count, make, status, size = BURSTS[name]
    it, asked = besieged(), make()

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(patient(it)) for _ in range(count)]
            for client in clients:
                client.send(asked[:-1])
            threading.Event().wait(0.5)
            for client in clients:
                client.send(asked[-1:])
            assert {client.answer().status for client in clients} == {status}

    assert_bearable(it, attack, count * size, kept_bytes=2 * KEPT_BYTES)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
def test_nobody_waits_for_100_responses_in_chunks_of_a_byte_that_come_at_once(besieged, kind):
    count = 100
    all_asked = threading.Barrier(count)
    head = STREAM_HEAD.replace(b"text/event-stream", kind.encode())
    body = b"1\r\na\r\n" * 10_000 + b"0\r\n\r\n"

    def script(connection: Connection) -> None:
        while True:
            connection.read_request()
            all_asked.wait(100)
            connection.send(head, body)

    it = besieged(script)

    def attack() -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(patient(it)) for _ in range(count)]
            for client in clients:
                client.send(request("POST", "/v1/messages", json.dumps(prompt("claude-a", stream=True)).encode()))
            for client in clients:
                assert client.answer().body == b"a" * 10_000

    assert_bearable(it, attack, count * len(body))


@pytest.mark.slow
def test_names_of_60_models_of_31_megabytes_are_not_kept(besieged):
    it = besieged()
    bodies = [squeezed(b'{"model":"claude-%d' % number, b"x", b'"}')[0] for number in range(60)]

    def attack() -> None:
        for body in bodies:
            sends(it, request("POST", "/v1/messages", body, "Content-Encoding: gzip"), statuses=(400,))()

    assert_bearable(it, attack, LARGEST)


@pytest.mark.slow
def test_bodies_go_when_their_responses_have_begun_and_their_memory_goes_back(besieged):
    gate = threading.Event()

    def streams(connection: Connection) -> None:
        head = connection.until(b"\r\n\r\n")
        left = int(Message(head, b"").get("content-length")) - len(connection.buffer)
        while left:
            left -= len(connection.sock.recv(min(left, 1 << 20)))
        connection.send(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]))
        gate.wait(200)
        connection.send(chunked(*ANTHROPIC_EVENTS[1:]))

    it = besieged(streams)
    asked = request(
        "POST", "/v1/messages", json.dumps(prompt("claude-a", stream=True, x="x" * (30 << 20))).encode()
    )
    before = it.resident_bytes()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(patient(it)) for _ in range(30)]
        with Meter(it) as meter:
            for client in clients:
                client.send(asked)
                client.until(b"message_start")
        assert meter.peak - before < PEAK_FACTOR * len(asked) + PEAK_BYTES
        eventually(lambda: it.resident_bytes() - before < KEPT_BYTES, seconds=10)
        gate.set()
        for client in clients:
            client.until(b"message_stop")


@pytest.mark.slow
def test_bodies_that_wait_together_stay_below_their_bound(besieged):
    gate = threading.Event()

    def waits(connection: Connection) -> None:
        connection.until(b"\r\n\r\n")
        while not gate.is_set():
            connection.sock.settimeout(0.2)
            with contextlib.suppress(socket.timeout):
                if not connection.sock.recv(1 << 20):
                    return
        connection.send(answer())

    it = besieged(waits, max_held_mb=200)
    body, size = squeezed(b'{"model":"fast","x":"', b"x", b'"}')
    asked = request("POST", "/v1/messages", body, "Content-Encoding: gzip")

    def attack() -> None:
        gate.clear()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(patient(it)) for _ in range(40)]
            for client in clients:
                client.send(asked)
            statuses = Counter()
            for client in clients:
                client.sock.settimeout(1 if not statuses[0] else 0.05)
                try:
                    statuses[client.answer().status] += 1
                except socket.timeout:
                    statuses[0] += 1
            # Those that wait hold what they inflate to, the others are told to come again.
            assert set(statuses) <= {0, 503} and statuses[0] * size < 300 << 20, statuses
            gate.set()

    assert_bearable(it, attack, 200 << 20)


def dribbles(*pieces: bytes) -> Script:
    """Sends each byte of the pieces on its own."""

    def script(connection: Connection) -> None:
        connection.read_request()
        for piece in pieces:
            for start in range(len(piece)):
                connection.send(piece[start : start + 1])
        connection.send(b"\r\n\r\n")

    return script


ODD_PROVIDERS: dict[str, tuple[Script, tuple[int, ...]]] = {
    "a head of blanks": (replies_then_closes(b"HTTP/1.1 200 OK\r\nx:" + b" " * 250_000 + b"\x01\r\n\r\n"), (502,)),
    "a head of tabs": (replies_then_closes(b"HTTP/1.1 200 OK\r\nx:" + b"\t " * 125_000 + b"\x01\r\n\r\n"), (502,)),
    "a reason of blanks": (replies_then_closes(b"HTTP/1.1 200" + b" " * 250_000 + b"\x01\r\n\r\n"), (502,)),
    "a head of fields": (replies_then_closes(b"HTTP/1.1 200 OK\r\n" + b"a:\r\n" * 62_000 + b"\x01\r\n\r\n"), (502,)),
    "a trailer of blanks": (
        replies_then_closes(STREAM_HEAD, chunk(ANTHROPIC_EVENTS[0]), b"0\r\nx:" + b" " * 250_000 + b"\x01\r\n\r\n"),
        (200, 502)),
    "a trailer in bytes": (dribbles(STREAM_HEAD + chunk(ANTHROPIC_EVENTS[0]) + b"0\r\n", b"a:\r\n" * 16_000), (200,)),
    "a head in bytes": (dribbles(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n" * 10_000, b"content-length: 4"), (200, 502)),
    "a line in bytes": (dribbles(FRAMINGS["close-delimited"][0], b"data: " + b"x" * 64_000), (200,)),
    "chunks of a byte": (
        replies_then_closes(STREAM_HEAD, b"1\r\nx\r\n" * 400_000, b"0\r\n\r\n"), (200,)),
    "lines of nothing": (replies_then_closes(STREAM_HEAD, chunk(b"\n" * (1 << 20)) * 8, b"0\r\n\r\n"), (200,)),
    "carriage returns": (replies_then_closes(STREAM_HEAD, chunk(b"\r" * (1 << 20)) * 8, b"0\r\n\r\n"), (200,)),
    "an interim answer of fields": (
        replies_then_closes(b"HTTP/1.1 103 Early\r\n" + b"a: b\r\n" * 10_000 + b"\r\n", answer()), (200, 502)),
    "an error in arrays": (
        replies_then_closes(answer(400, b'{"error":' + b"[" * 4_000_000)), (400,)),
    "results_url almost": (
        replies_then_closes(answer(200, b'"results_url"' + b" " * 250_000 + b'"results_url" : "http' * 50_000)),
        (200,)),
    "usage almost": (replies_then_closes(answer(200, b'"input_tokens" : ' * 250_000)), (200,)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD_PROVIDERS)
def test_nobody_waits_for_what_a_provider_sends(besieged, name):
    script, statuses = ODD_PROVIDERS[name]
    it = besieged(script)
    if name == "results_url almost":
        asked = request("GET", "/v1/messages/batches/b", None, ANTHROPIC_VERSION)
    else:
        asked = request("POST", "/v1/messages", json.dumps(prompt("claude-a", stream=True)).encode())
    assert_bearable(it, sends(it, asked, statuses=statuses), 4 << 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "listed",
    [b'{"data":[' + b"[]," * 1_300_000 + b"[]]}", b'{"data":' + b"[" * 4_000_000,
     b'{"data":[' + b'{"id":"a"},' * 360_000 + b"{}]}", b'{"data":[{"id":"' + b"x" * 4_000_000 + b'"}]}',
     b'{"data":[%s]}' % b",".join(b'{"id":"m-%04d","x":%s}' % (n, b'{"":' * 330 + b"{}" + b"}" * 330)
                                  for n in range(298)),
     b'{"data":[%s]}' % b",".join(b'{"id":"m-%04d","x":"%s"}' % (n, "\U0001f600".encode() + b"y" * 1_980)
                                  for n in range(1_000)),
     b'{"data":[{"id":"m","x":[%s]}]}' % b",".join([b"1.2345678901234567e-300"] * 99_000)],
    ids=brief,
)  # fmt: skip
def test_nobody_waits_for_a_catalogue(besieged, listed):
    it = besieged(replies(answer(200, listed)))
    assert_bearable(it, sends(it, request("GET", "/v1/models"), statuses=(200,)), len(listed) * 2)


# ------------------------------------------------------------------------------------------------------------
# The README: every block of it is run
# ------------------------------------------------------------------------------------------------------------

SHIPPED = ["monorelay.py", "relay.json", "README.md", "LICENSE", "test_monorelay.py"]


class Block(NamedTuple):
    """A fenced block of the README."""

    language: str
    text: str
    line: int


def readme_blocks() -> list[Block]:
    source = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
    return [
        Block(match[1], match[2], source[: match.start()].count("\n") + 1)
        for match in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```$", source, re.M | re.S)
    ]


def readme_block(language: str, part: str = "") -> str:
    """The text of the README's only block in this language, or the only one with this part."""
    (block,) = (block for block in readme_blocks() if block.language == language and part in block.text)
    return block.text


def readme_config(part: str) -> Any:
    """The README's only JSON block with this part."""
    return json.loads(readme_block("json", part))


def test_readme_is_there_and_has_blocks_of_each_kind():
    assert {"sh", "json", "python", "text"} <= {block.language for block in readme_blocks()}


def environ_of(text: str) -> dict[str, str]:
    """A value for every ${NAME} in the text."""
    return {name: f"a-value-for-{name}-of-32-bytes-or-more" for name in re.findall(r"\$\{(\w+)", text)}


@pytest.mark.parametrize(
    "block", [it for it in readme_blocks() if it.language == "json"], ids=lambda it: f"line {it.line}"
)
def test_readme_json_is_a_config(block):
    monorelay.parse_config(block.text, environ_of(block.text))


def test_shipped_relay_json_runs_as_it_is(program):
    it = program(json.loads((HERE / "relay.json").read_text(encoding="utf-8")), "--port", "0")
    assert accepts(it.url)


# Blocks that aren't run, by a part of their text, and why.
README_NOT_RUN = {
    ".ci/bench": "it takes minutes; .ci/run runs a short form of it",
    "curl -O https://": "it is of this network only that a test may be sure",
}
# What stands in for programs that not every machine has, or that would change it.
SUDO = """#!/bin/sh
case $1 in
useradd | systemctl) exit 0 ;;
-u) shift 2 ;;
esac
exec "$@"
"""
UV = """#!/bin/sh
test "$1" = run && shift && exec python3 "$@"
"""
DOCKER = """#!/usr/bin/env python3
import os, sys

assert sys.argv[1:3] == ["run", "--rm"], sys.argv
words, environ, mounts = sys.argv[3:], {"PATH": os.environ["PATH"]}, []
while words[0].startswith("-"):
    option, value = words.pop(0), words.pop(0)
    if option == "-e":
        name, given, there = value.partition("=")
        environ[name] = there if given else os.environ[name]
    elif option == "-v":
        mounts.append(value.split(":"))
    else:
        assert option in ("-p", "--stop-timeout"), option
image, *command = words
assert image.startswith("python:"), image
for here, there, *_ in mounts:
    here = here if "/" in here else os.path.abspath("volume of " + here)
    os.makedirs(here, exist_ok=True)
    command = [word.replace(there + "/", here + "/") for word in command]
    environ = {name: here if value == there else value for name, value in environ.items()}
os.execvpe(command[0], command, environ)
"""
# kubectl itself is asked for what it would create.
KUBECTL = f"""#!/bin/sh
exec {shutil.which("kubectl") or "true"} "$@" --dry-run=client
"""
STAND_INS = {"sudo": SUDO, "uv": UV, "docker": DOCKER, "kubectl": KUBECTL}
SERVES = re.compile(r"((\w+=\S+ )*(python3|uv run) monorelay\.py|docker run .*)", re.S)


# What was used, as the README shows it: user, model as sent (none if no model answered), provider, how often, and the
# tokens of each request by monorelay.KINDS.
USED_IN_THE_README = [
    ("alice", "claude-opus-4-5", "anthropic", 412, (90, 61_000, 2_300, 0, 640)),
    ("alice", "claude-haiku-4-5", "anthropic", 655, (310, 9_000, 0, 0, 85)),
    ("bob", "gpt-5", "openai", 96, (2_400, 11_000, 0, 0, 900)),
    ("bob", "llama3.3:70b", "local", 19, (800, 0, 0, 0, 300)),
    ("bob", "llama3.3:70b", "local", 12, ()),
    ("bob", "", "openai", 3, ()),
]


def invented_ledger(path: Path, days: int, used: list[Any]) -> None:
    """Writes a ledger in which these requests are spread over so many days, at the prices that the README gives."""
    prices = monorelay.parse_prices(readme_config('"prices"')["prices"])
    formats = {"anthropic": "anthropic", "openai": "openai", "local": "openai"}
    described = {name: {"format": it, "base_url": "http://127.0.0.1:9/v1"} for name, it in formats.items()}
    providers = parse(described).providers
    now = time.time()
    for user, sent, provider, count, tokens in used:
        kinds = dict(zip(monorelay.KINDS, tokens or [None] * 5))
        cost = monorelay.cost_of(prices, providers[provider], sent, monorelay.Used(**kinds))
        usual = {"user": user, "model": sent or "gpt-nine", "sent": sent, "provider": provider, "key": "team"}
        rows = [
            row(at=int((now - days * 86400 * n / count) * 1000), request=f"req_{n}", cost=cost, **usual, **kinds,
                status=200 if sent else 404, error=None if sent else "upstream:invalid_request_error")
            for n in range(count)
        ]  # fmt: skip
        monorelay.write_ledger(monorelay.LedgerSettings(str(path), 90), rows, (), now)


class ReadmeShell:
    """Runs the README's blocks in a folder of their own, each in a shell, as somebody does who reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = str(unused_port())
        self.serving = contextlib.ExitStack()
        self.paths = {place: f"{folder}{place}" for place in ("/opt/monorelay", "/etc/monorelay", "/etc/systemd")}
        programs = folder / "bin"
        programs.mkdir()
        for name, text in STAND_INS.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        Path(self.paths["/etc/systemd"], "system").mkdir(parents=True)
        for name in SHIPPED:
            shutil.copy(HERE / name, folder)
        shipped = (HERE / "relay.json").read_text()
        nowhere = f"http://127.0.0.1:{unused_port()}/"  # no provider is to be called
        (folder / "relay.json").write_text(shipped.replace("https://", nowhere).replace("8787", self.port))
        (folder / "keys.env").write_text("ANTHROPIC_API_KEY=sk-of-nobody\n")
        (folder / "monorelay@.service").write_text(readme_block("ini"))
        self.used_relay = folder / "used"  # a folder with a ledger that is as the README has it
        self.used_relay.mkdir()
        for name in ("monorelay.py", "relay.json"):
            shutil.copy(folder / name, self.used_relay)
        invented_ledger(self.used_relay / "usage.db", 5, USED_IN_THE_README)
        environ = {name: value for name, value in os.environ.items() if not name.endswith("_KEY")}
        searched = [str(programs), str(Path(sys.executable).parent), environ["PATH"]]
        self.environ = {
            **environ,
            "PATH": os.pathsep.join(searched),
            "ANTHROPIC_API_KEY": "",
            "MONORELAY_ACCESS_KEY": "an-access-key-of-the-readme",
        }

    def run(self, block: Block) -> str:
        """What the block prints; one that serves runs in the background, in the place of the one before."""
        text = block.text.strip().replace("-g monorelay", "").replace("8787", self.port)
        for path, ours in self.paths.items():
            text = text.replace(path, ours)
        shell = [sys.executable] if block.language == "python" else ["bash", "-euo", "pipefail"]
        command = [*shell, "-c", text]
        folder = self.used_relay if "monorelay.py usage" in text else self.folder
        options: Any = {"cwd": folder, "env": self.environ, "stdin": subprocess.DEVNULL}
        if SERVES.fullmatch(text[text.startswith("export") and text.index("\n") + 1 :]):
            self.serve(command, options)
            return ""
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, **options)
        assert done.returncode == 0, f"README.md line {block.line}: {done.stderr}"
        return done.stdout

    def serve(self, command: list[str], options: dict[str, Any]) -> None:
        self.serving.close()
        with open(self.folder / "log.txt", "a") as log:
            process = subprocess.Popen(command, stderr=log, start_new_session=True, **options)
        self.serving.callback(process.wait, TIMEOUT_SECONDS)
        self.serving.callback(os.killpg, process.pid, signal.SIGTERM)
        eventually(lambda: accepts(f"http://127.0.0.1:{self.port}"))
        assert process.poll() is None


@pytest.fixture
def shell(tmp_path) -> Iterator[ReadmeShell]:
    folder = tmp_path / "readme"
    folder.mkdir()
    shell = ReadmeShell(folder)
    with shell.serving:
        yield shell


def test_readme_commands_run_in_the_readmes_order_and_print_what_it_says(shell, program):
    alice = {"key": "the-key-of-alice-0123", "models": ["claude-*", "echo"]}
    it = program(settings({"echo": {}}, server={"log": "json"}, users={"alice": alice}))
    with Client(it.url) as client:
        assert client.ask("POST", "/v1/messages", b'{"model": "gpt-5"}', token=alice["key"]).status == 403
    eventually(lambda: "gpt-5" in it.text())
    (shell.folder / "log.json").write_text(it.text())
    blocks = readme_blocks()
    skipped = {part for part in README_NOT_RUN for block in blocks if part in block.text}
    assert skipped == set(README_NOT_RUN), "the README no longer has these blocks"
    for block, following in zip(blocks, [*blocks[1:], None]):
        if block.language in ("sh", "python") and not any(part in block.text for part in README_NOT_RUN):
            if block.text.startswith("jq ") and not shutil.which("jq") and os.environ.get("CI") != "true":
                continue
            printed = shell.run(block)
            if following and following.language == "text":
                assert masked(printed) == masked(following.text), f"README.md line {following.line}"


def masked(text: str) -> str:
    """The text without what differs from run to run."""
    return re.sub(r"msg_\w+|20\d\d-[\d-]+(T[\d:.]+Z)?", "", text).strip()


def readme_tables() -> dict[str, dict[str, str]]:
    """The README's tables, by what heads their first column; of each row the second cell by the first."""
    tables: dict[str, dict[str, str]] = {}
    for table in re.findall(r"(?:^\|.*\n)+", (HERE / "README.md").read_text(encoding="utf-8"), re.M):
        (head, *_), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
        tables[head] = {row[0]: row[1] for row in rows}
    return tables


@pytest.mark.parametrize(
    ("section", "table"),
    [
        ("server", monorelay.SERVER_SETTINGS),
        ("users.NAME", monorelay.USER_SETTINGS),
        ("ledger", monorelay.LEDGER_SETTINGS),
        ("providers.NAME", monorelay.PROVIDER_SETTINGS),
        ("providers.NAME.translate", {**monorelay.TRANSLATION_SETTINGS, "extra": (None, None)}),
        ("top level", dict.fromkeys(monorelay.TOP_LEVEL, (None, None))),
    ],
)
def test_the_readme_has_every_setting_with_its_default(section, table):
    told = readme_tables()[section if " " in section else f"`{section}`"]
    assert sorted(told) == sorted(f"`{name}`" for name in table)
    for name, (_, default) in table.items():
        cell = told[f"`{name}`"]
        if default or default is False:
            assert json.loads(cell.strip("`")) == default, name
        else:  # nothing, which the README says in words
            assert cell and "`" not in cell, name


def test_the_readme_has_every_field_of_the_log():
    record = monorelay.AccessRecord(UNIX_TIME, 0.0)
    for name in record.__slots__:
        if getattr(record, name) == "":
            setattr(record, name, "x")
    record.first_byte, record.attempts = 1.0, 2
    record.used, record.cost = monorelay.Used(1, 2, 3, 4, 5), 6
    told = [name for cell in readme_tables()["field"] for name in re.findall(r"`(\w+)`", cell)]
    assert sorted([*told, "level"]) == sorted(json.loads(record.line(2.0, "json")))


def test_the_readme_says_what_somebody_is_told_whose_budget_is_spent():
    block = readme_block("json", '"usd_per_day"')
    config = monorelay.parse_config(block, environ_of(block))
    at = datetime.datetime(2026, 11, 26, 12, tzinfo=datetime.timezone.utc).timestamp()
    told = monorelay.spent_over(config.users["alice"], lambda window: (20_130_000_000, 0), at).message
    assert f"`{told}`" in " ".join((HERE / "README.md").read_text(encoding="utf-8").split())


def test_the_readmes_alias_fails_over_across_formats(upstream, relay):
    given = readme_config('"claude-or-gpt"')
    native, other = upstream(json_reply({}, 529)), upstream(json_reply(CHAT_HI))
    for name, provider in (("anthropic", native), ("openai", other)):
        told = {"upstream": provider, **given["providers"][name], "base_url": provider.url + "/v1", "keys": ["sk-x"]}
        given["providers"][name] = told
    it = relay(given["providers"], aliases=given["aliases"], routes=given["routes"])
    got = it.post("/v1/messages", claude_code(model="claude-or-gpt", stream=False))
    assert got.json["content"] == [said("Hi")] and got.get("x-monorelay-translated") == "anthropic>openai"
    assert native.requests[0].json["model"] == "claude-opus-4-5"
    assert (other.requests[0].json["model"], other.requests[0].json["reasoning_effort"]) == ("gpt-5", "high")


def test_the_readmes_settings_of_translation_are_valid():
    told = [json.loads(cell.strip("`")) for cell in readme_tables()["provider"].values() if cell.startswith("`")]
    assert len(told) == 4
    for settings in told:
        parse({"a": {"format": "openai", "base_url": "http://127.0.0.1:9/v1", "translate": settings}})


@pytest.mark.parametrize("client", ["Anthropic SDKs", "OpenAI SDKs"])
def test_the_readmes_settings_for_the_sdks_work(relay, monkeypatch, client):
    it = relay({"echo": {}})
    given = dict(re.findall(r"([A-Z_]+)=([^ `]+)", readme_tables()["client"][client]))
    assert len(given) == 2
    for name, value in given.items():
        monkeypatch.setenv(name, TOKEN if value == "K" else re.sub("^R", it.url, value))
    asked: Any = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    if client == "OpenAI SDKs":
        assert openai.OpenAI().chat.completions.create(**asked).choices[0].message.content == "Hello"
    else:
        assert anthropic.Anthropic().messages.create(max_tokens=9, **asked).content[0].text == "Hello"


def test_the_readmes_pictures_are_there_and_small():
    paths = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (HERE / "README.md").read_text(encoding="utf-8"))
    assert paths and all(0 < (HERE / path).stat().st_size < 200_000 for path in paths)


def metrics_of_the_readme() -> dict[str, set[str]]:
    """The labels of each metric in the README's table."""
    rows = readme_tables()["metric"].items()
    return {name: set(re.findall(r"\w+", labels)) for names, labels in rows for name in re.findall(r"\w+", names)}


def names_of_metrics(text: str) -> dict[str, set[str]]:
    """The metrics in the text of a scrape, and the labels that each has somewhere."""
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+?)(?:_bucket|_sum|_count)?(?:\{(.*)\})? \S+$", text, re.M):
        found.setdefault(name, set()).update(set(re.findall(r"(\w+)=", labels)) - {"le"})
    return found


def test_the_readmes_viewer_scrapes_the_metrics_that_the_readme_names(upstream, relay):
    limits = ("anthropic-ratelimit-requests-limit: 50", "anthropic-ratelimit-requests-remaining: 49")
    (given,) = re.findall(r'`"users": (\{ "prometheus".*\})`', (HERE / "README.md").read_text(encoding="utf-8"))
    users = json.loads(given.replace("${PROMETHEUS_KEY}", "a-key-of-16-characters"))
    told = answer(200, b'{"usage": {"input_tokens": 5, "output_tokens": 7}}', *limits)
    it = relay({"anthropic": upstream(told)}, users=users)
    assert it.post("/v1/messages", prompt()).status == 200
    assert it.post("/v1/messages", prompt("none@nowhere"), token="").status == 401
    (job,) = yaml.safe_load(readme_block("yaml", "scrape_configs"))["scrape_configs"]
    assert set(job) == {"job_name", "authorization", "static_configs"}  # the rest is as usual: http, /metrics, Bearer
    assert job["authorization"]["credentials_file"] and job["static_configs"][0]["targets"] == ["127.0.0.1:8787"]
    assert it.post("/v1/messages", prompt(), token=users["prometheus"]["key"]).status == 403
    got = it.ask("GET", "/metrics", token=users["prometheus"]["key"])
    assert got.status == 200
    families = set(re.findall(r"^# TYPE (\w+)", got.body.decode(), re.M))
    found = names_of_metrics(got.body.decode())
    assert set(found) == families
    assert metrics_of_the_readme() == found


def test_the_readmes_queries_ask_for_metrics_and_labels_that_there_are():
    queries = re.sub("\n +", " ", re.sub("^#.*\n", "", readme_block("promql"), flags=re.M)).splitlines()
    told = metrics_of_the_readme()
    assert len(queries) == 5
    for query in queries:
        asked = re.findall(r"(monorelay_\w+?)(?:_bucket)?\b(?:\{(\w+))?", query)
        labels = {label for name, _ in asked for label in told[name]} | {"le"}
        wanted = {label for _, label in asked if label}
        for by in re.findall(r"by \(([^)]*)\)", query):
            wanted |= set(by.split(", "))
        assert asked and wanted <= labels, query


def test_the_readmes_contents_are_its_sections():
    """In their order; GitHub makes an anchor of a heading's letters, digits and hyphens."""
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", readme, re.M)
    anchors = [re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles]
    contents = readme[: readme.index("\n## ")]
    assert re.findall(r"\[([^\]]+)\]\(#([^)]+)\)", contents) == list(zip(titles, anchors))


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark runs on Linux")
def test_the_readme_shows_rows_that_the_benchmark_prints():
    readme, bench = (HERE / "README.md").read_text(encoding="utf-8"), runpy.run_path(str(HERE / ".ci" / "bench"))
    printed = [f"{case.name}: {figure.name}" for case in bench["CASES"] for figure in case.figures]
    (shown,) = bench["README_FIGURES"].findall(readme)
    assert bench["README_ROWS"] and set(bench["README_ROWS"]) <= set(printed)
    part = bench["readme_part"](shown.splitlines()).splitlines()
    assert set(part) <= set(shown.splitlines())
    assert [line.count(row) for row, line in zip(bench["README_ROWS"], part[4:])] == [1] * len(bench["README_ROWS"])


# ------------------------------------------------------------------------------------------------------------
# Growing past one machine: the README's nginx configuration, systemd unit and manifest do what it says
# ------------------------------------------------------------------------------------------------------------

NGINX = shutil.which("nginx", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
needs_nginx = pytest.mark.skipif(
    not NGINX and os.environ.get("CI") != "true", reason="there is no nginx here; in CI it has to be"
)

# What Debian's nginx.conf has around the files in conf.d, with everything in a folder of the test's own.
NGINX_CONF = """
daemon off;
user root;  # heeded when root starts it, ignored otherwise
worker_processes 1;
pid nginx.pid;
error_log error.log info;
events { worker_connections 768; }
http {
    access_log access.log;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    include monorelay.conf;
}
"""


HAPROXY = shutil.which("haproxy", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))
needs_haproxy = pytest.mark.skipif(
    not HAPROXY and os.environ.get("CI") != "true", reason="there is no HAProxy here; in CI it has to be"
)
each_balancer = pytest.mark.parametrize(
    "balancer", [pytest.param("nginx", marks=needs_nginx), pytest.param("haproxy", marks=needs_haproxy)]
)


def replaced(text: str, replacements: dict[str, str]) -> str:
    """The text with each of these replaced; all must be in it."""
    for old, new in replacements.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


class Fleet:
    """Two relays, a process each, behind nginx or HAProxy as the README configures it."""

    def __init__(self, balancer: str, start: Callable[[int], Program], folder: Path, authority: trustme.CA) -> None:
        program = {"nginx": NGINX, "haproxy": HAPROXY}[balancer]
        assert program, f"{balancer} is not installed"
        self.start = start
        self.relays = {port: start(port) for port in (unused_port(), unused_port())}
        self.port = unused_port()
        self.context = ssl.create_default_context()
        authority.configure_trust(self.context)
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_and_cert_chain_pem.write_to_path(folder / "relay.pem")
        (folder / "nginx.conf").write_text(NGINX_CONF)
        first, second = self.relays
        relays = {"127.0.0.1:8787": f"127.0.0.1:{first}", "127.0.0.1:8788": f"127.0.0.1:{second}"}
        if balancer == "nginx":
            own = {
                "listen 443": f"listen 127.0.0.1:{self.port}",
                "/etc/nginx/relay.crt": f"{folder}/relay.pem",
                "/etc/nginx/relay.key": f"{folder}/relay.pem",
            }
            command = [program, "-p", str(folder), "-c", "nginx.conf", "-e", "error.log"]
        else:
            own = {"bind :443": f"bind 127.0.0.1:{self.port}", "/etc/haproxy/relay.pem": f"{folder}/relay.pem"}
            command = [program, "-f", str(folder / "monorelay.conf")]
        (folder / "monorelay.conf").write_text(replaced(readme_block(balancer), {**relays, **own}))
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
        eventually(lambda: self.client().close() is None)

    def client(self) -> Client:
        client = Client(f"http://127.0.0.1:{self.port}")
        client.sock = self.context.wrap_socket(client.sock, server_hostname="127.0.0.1")
        return client

    def served(self, request_id: str) -> int:
        """The port of the relay that has served the request."""
        return eventually(lambda: next(port for port, relay in self.relays.items() if request_id in relay.text()))

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(TIMEOUT_SECONDS) in (0, -signal.SIGTERM)  # HAProxy ends by the signal


CALLERS = [f"access-key-of-caller-{number}" for number in range(24)]


@pytest.fixture
def fleet(program, tmp_path, authority) -> Iterator[Callable[[str, Upstream], Fleet]]:
    made: list[Fleet] = []

    def make(balancer: str, provider: Upstream) -> Fleet:
        config = settings({"anthropic": provider}, server={"access_key": [TOKEN, *CALLERS]})
        made.append(Fleet(balancer, lambda port: program(config, "--port", str(port)), tmp_path, authority))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def marked_prompt(mark: str, **fields: Any) -> bytes:
    return json.dumps(prompt(metadata={"user_id": mark}, **fields)).encode()


def marked_stream(mark: str) -> list[bytes]:
    """The events of a stream that has the mark in its middle."""
    delta = sse("content_block_delta", index=0, delta={"type": "text_delta", "text": mark})
    return [*ANTHROPIC_EVENTS[:2], delta, *ANTHROPIC_EVENTS[5:]]


class MarkingProvider:
    """A script whose answers carry the request's mark; those to marks that begin with "held" wait for the gate,
    streams among them after their first event."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.held = threading.Semaphore(0)  # one more for each request that waits

    def __call__(self, connection: Connection) -> None:
        while True:
            asked = connection.read_request().json
            mark = asked["metadata"]["user_id"]
            first, *others = marked_stream(mark)
            if asked.get("stream"):
                connection.send(STREAM_HEAD, chunk(first))
            if mark.startswith("held"):
                self.held.release()
                connection.wait(self.gate)
            connection.send(chunked(*others) if asked.get("stream") else answer(200, json.dumps(mark).encode()))


def ask_marked(client: Client, mark: str, stream: bool, caller: str) -> None:
    """Asks, and sees to it that a whole answer with the mark comes."""
    got = client.ask("POST", "/v1/messages", marked_prompt(mark, stream=stream), token=caller)
    assert got.status == 200, got
    assert got.body == b"".join(marked_stream(mark)) if stream else got.json == mark


@each_balancer
def test_each_caller_is_sent_to_one_relay_in_whichever_header_the_key_is(upstream, fleet, balancer):
    it, served = fleet(balancer, upstream(replies(*[answer(200)] * 99))), Counter[int]()
    for caller in CALLERS:
        with it.client() as client:
            ports = set()
            for header in (f"x-api-key: {caller}", f"authorization: Bearer {caller}"):
                got = client.ask("POST", "/v1/messages", marked_prompt("any"), header, token="")
                assert got.status == 200
                ports.add(it.served(got.get("x-monorelay-request-id")))
            assert len(ports) == 1
            served.update(ports)
    assert len(served) == 2


@each_balancer
def test_a_stream_comes_through_a_balancer_event_by_event(upstream, fleet, balancer):
    gates = [threading.Event() for _ in ANTHROPIC_EVENTS]
    with fleet(balancer, upstream(gated_pieces(ANTHROPIC_EVENTS, gates))).client() as client:
        client.send(request("POST", "/v1/messages", STREAMED))
        assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        for event, gate in zip(ANTHROPIC_EVENTS, gates):
            client.until(event.splitlines()[1])
            gate.set()
        client.until(b"\r\n0\r\n\r\n")


@each_balancer
def test_an_upload_goes_through_a_balancer_as_it_comes(upstream, fleet, balancer):
    parts = [bytes([number]) * 50_000 for number in range(4)]
    arrived = [threading.Event() for _ in parts]

    def script(connection: Connection) -> None:
        connection.until(b"\r\n\r\n")
        for part, gate in zip(parts, arrived):
            assert connection.take(len(part)) == part
            gate.set()
        connection.send(answer(200))

    with fleet(balancer, upstream(script)).client() as client:
        length = f"content-length: {sum(map(len, parts))}"
        client.send(request("POST", "/v1/files", None, ANTHROPIC_VERSION, length))
        for part, gate in zip(parts, arrived):
            client.send(part)
            assert gate.wait(TIMEOUT_SECONDS)
        assert client.answer().status == 200


@each_balancer
def test_restarting_one_relay_after_the_other_behind_a_balancer_loses_no_request(upstream, fleet, balancer):
    provider = MarkingProvider()
    it = fleet(balancer, upstream(provider))
    finished, over = Counter[int](), threading.Event()

    def visit(number: int) -> None:
        while not over.is_set():
            with it.client() as client:
                for turn in range(100):
                    ask_marked(client, f"{number}-{turn}", stream=turn % 2 == 1, caller=CALLERS[number])
                    finished[number] += 1

    def hold(number: int) -> None:
        with it.client() as client:
            ask_marked(client, f"held-{number}", stream=number % 2 == 1, caller=CALLERS[number])

    def wait_for_more(count: int) -> None:
        wanted = sum(finished.values()) + count
        eventually(lambda: sum(finished.values()) >= wanted)

    def restart(port: int) -> None:
        """Stops the relay on this port while it serves, and starts another one there when it has ended."""
        provider.gate.clear()
        held = [pool.submit(hold, number) for number in range(16)]
        assert all(provider.held.acquire(timeout=TIMEOUT_SECONDS) for _ in held)
        old = it.relays[port]
        old.signal(signal.SIGTERM)
        eventually(lambda: "stopping" in old.text())
        wait_for_more(50)
        assert old.process.poll() is None, "it should wait for what is held"
        provider.gate.set()
        for one in held:
            one.result(TIMEOUT_SECONDS)
        assert old.ended() == 0
        wait_for_more(50)
        it.relays[port] = it.start(port)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        visitors = [pool.submit(visit, number) for number in range(8)]
        try:
            for port in list(it.relays):
                restart(port)
        finally:
            over.set()
            provider.gate.set()
        for visitor in visitors:
            visitor.result()


@pytest.fixture
def unit(tmp_path) -> dict[str, dict[str, str]]:
    """The sections of the README's systemd unit, for a relay on an unused port, with paths that this machine has."""
    text = replaced(
        readme_block("ini"),
        {
            "/usr/bin/python3 /opt/monorelay/": f"{sys.executable} {HERE}/",
            "/etc/monorelay/": f"{tmp_path}/",
            "/usr/bin/curl": str(shutil.which("curl")),
            "/bin/kill": str(shutil.which("kill")),
        },
    )
    (tmp_path / "monorelay@.service").write_text(text)
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.optionxform = str
    parser.read_string(text.replace("%i", str(unused_port())))
    return {name: dict(parser[name]) for name in parser.sections()}


def test_the_systemd_unit_is_valid(unit, tmp_path):
    assert set(unit) == {"Unit", "Service", "Install"}
    drain_seconds = parse({"echo": {}}).server.drain_seconds
    assert float(unit["Service"]["TimeoutStopSec"]) > drain_seconds
    if shutil.which("systemd-analyze"):
        command = ["systemd-analyze", "verify", str(tmp_path / "monorelay@.service")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        assert done.returncode == 0 and "monorelay" not in done.stderr, done.stderr


def test_the_systemd_units_commands_start_reload_and_stop_a_relay(unit, tmp_path):
    service = unit["Service"]
    shutil.copy(HERE / "relay.json", tmp_path)
    port = service["ExecStartPost"].rpartition(":")[2].split("/")[0]
    assert service["ProtectSystem"] == "strict" and port in service["StateDirectory"]  # else relays share a ledger
    state = tmp_path / "var" / "lib" / service["StateDirectory"]
    state.mkdir(parents=True)  # as systemd does, which makes it the only place that can be written, and tells of it
    environ = {**os.environ, "STATE_DIRECTORY": str(state), "MONORELAY_ACCESS_KEY": TOKEN}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            shlex.split(service["ExecStart"]), cwd="/", stderr=log, start_new_session=True, env=environ
        )
    try:
        subprocess.run(shlex.split(service["ExecStartPost"]), check=True, timeout=2 * TIMEOUT_SECONDS)
        with Client(f"http://127.0.0.1:{port}") as client:
            assert client.ask("POST", "/v1/messages", json.dumps(prompt("echo")).encode()).status == 200
        reload = service["ExecReload"].replace("$MAINPID", str(process.pid))
        subprocess.run(shlex.split(reload), check=True, timeout=TIMEOUT_SECONDS)
        eventually(lambda: "reloaded" in (tmp_path / "log").read_text())
        process.send_signal(getattr(signal, service["KillSignal"]))
        assert process.wait(TIMEOUT_SECONDS) == 0
        assert selected(state / "usage.db", "SELECT model FROM request") == ["echo"]
        assert not list(tmp_path.glob("usage.db*"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def manifest() -> dict[str, Any]:
    """The README's Kubernetes objects by their kind."""
    return {it["kind"]: it for it in yaml.safe_load_all(readme_block("yaml", "Deployment"))}


def test_the_manifest_fits_together(manifest, relay):
    deployment, service = manifest["Deployment"]["spec"], manifest["Service"]["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"] == labels == service["selector"]
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    ((name, port),) = ((it["name"], it["containerPort"]) for it in container["ports"])
    assert container["args"][container["args"].index("--port") + 1] == str(port)
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_seconds = parse({"echo": {}}).server.drain_seconds
    assert pod["terminationGracePeriodSeconds"] > pause + drain_seconds
    mounts, volumes = ({it["name"]: it for it in listed} for listed in (container["volumeMounts"], pod["volumes"]))
    assert mounts.keys() == volumes.keys() == {"relay", "state"}
    assert mounts["relay"]["readOnly"] and volumes["relay"]["configMap"]
    assert pod["securityContext"]["fsGroup"] == container["securityContext"]["runAsUser"]
    # The ledger of the relay.json that lies here is on the volume that can be written, and that alone can be.
    assert container["securityContext"]["readOnlyRootFilesystem"] and "emptyDir" in volumes["state"]
    environ = {it["name"]: it["value"] for it in container["env"]}
    config = monorelay.parse_config((HERE / "relay.json").read_text(encoding="utf-8"), environ)
    assert str(Path(config.ledger.path).parent) == mounts["state"]["mountPath"] and "readOnly" not in mounts["state"]
    it = relay({"echo": {}})
    for probe in (container["readinessProbe"], container["livenessProbe"]):
        assert probe["httpGet"]["port"] == name == service["ports"][0]["targetPort"]
        assert it.ask("GET", probe["httpGet"]["path"], token="").status == 200


@pytest.mark.parametrize("access_key, status", [("sixteen-characters", 0), ("short", 1), ("", 1)])
def test_the_manifests_command_is_accepted_with_a_long_access_key(manifest, tmp_path, access_key, status):
    (container,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    python, *command = [*container["command"], *container["args"], "check"]
    folder = container["volumeMounts"][0]["mountPath"]
    command = [part.replace(f"{folder}/", f"{HERE}/") for part in command]
    environ = {**os.environ, "MONORELAY_JWT_SECRET": "", "MONORELAY_ACCESS_KEY": access_key}
    environ |= {it["name"]: str(tmp_path) for it in container["env"]}
    done = subprocess.run(
        [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=2 * TIMEOUT_SECONDS
    )
    assert python == "python" and done.returncode == status, done.stderr
    assert status or (f"{tmp_path}/usage.db" in done.stdout and "ledger.path" not in done.stdout)
