"""A small server of OpenAI's chat completions within the process of a test: real HTTP, scripted answers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]


def said(text: str | None) -> Reply:
    """A good answer."""
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}, {}


def failed(status: int, message: str = "no", **headers: str) -> Reply:
    """A refusal."""
    return status, {"error": {"message": message}}, {name.replace("_", "-"): value for name, value in headers.items()}


class ChatServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        bodies: What was asked, in order of arrival.
        headers: The headers of each request.
        most_at_once: The largest number of requests that were under way together.
    """

    daemon_threads = True

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.lock = reply, threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.under_way = self.most_at_once = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `bodies` has it all."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append({**body, "path": self.path})
            self.server.headers.append(dict(self.headers))
            self.server.under_way += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.under_way)
        status, content, headers = self.server.reply(body, number)
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        with self.server.lock:
            self.server.under_way -= 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def chat_server(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[ChatServer]:
    """A server for the time of a test.

    Args:
        reply: Given the request and its number from 0: status, content (JSON or bytes) and headers.
    """
    server = ChatServer(reply)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
