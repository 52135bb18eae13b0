"""Pictures from anywhere are the same picture; what is none, too large, too slow or not there is told apart."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cloc_mllm.errors import ClocError
from cloc_mllm.inference.images import read_image, with_pictures
from tests.builders import noise_image

PICTURE = noise_image(40, 30, seed=3)


def encoded(picture: Image.Image = PICTURE) -> bytes:
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """A server that is well-behaved, slow, endless or lost, as its path says."""

    stopped = threading.Event()

    def do_GET(self) -> None:
        if self.path == "/moved.png":
            self.send_response(302)
            self.send_header("Location", "/scene.png")
            self.end_headers()
            return
        if self.path == "/silent.png":
            self.stopped.wait(10)
            return
        self.send_response(404 if self.path == "/gone.png" else 200)
        self.end_headers()
        try:
            if self.path == "/scene.png":
                self.wfile.write(encoded())
            elif self.path == "/page.html":
                self.wfile.write(b"<html>")
            while self.path in ("/drip.png", "/endless.png") and not self.stopped.is_set():
                self.wfile.write(b"0" * (1 if self.path == "/drip.png" else 100_000))
                time.sleep(0.05 if self.path == "/drip.png" else 0)
        except OSError:
            self.close_connection = True  # the client has had enough

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    Handler.stopped.set()
    http.shutdown()
    http.server_close()
    thread.join()


def test_every_source_is_the_same_picture(server: str, tmp_path: Path) -> None:
    path = tmp_path / "scene.png"
    PICTURE.save(path)
    sources: list[Any] = [path, str(path), PICTURE, np.asarray(PICTURE), encoded(), path.as_uri()]
    for source in [*sources, f"{server}/scene.png", f"{server}/moved.png"]:
        assert np.array_equal(np.asarray(read_image(source)), np.asarray(PICTURE)), source


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("gone.png", r"the server answers 404 Not Found\. Check the address"),
        ("silent.png", r"no answer within 0.5 s"),
        ("drip.png", r"no answer within 0.5 s"),
        ("endless.png", r"the file is larger than 1 MiB"),
        ("page.html", r"the image is not a picture that Pillow can read"),
    ],
)
def test_what_a_server_may_do_is_named(server: str, page: str, problem: str) -> None:
    start = time.monotonic()
    with pytest.raises(ClocError, match=problem) as caught:
        read_image(f"{server}/{page}", timeout=0.5, max_mib=1)
    assert caught.value.file == f"{server}/{page}"
    assert time.monotonic() - start < 5


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    for source, problem in (
        (tmp_path / "absent.png", "absent.png' does not exist"),
        (tmp_path / "text.png", "text.png' is not a picture"),
        (b"no picture", "the image is not a picture"),
        (np.zeros((2, 3, 4, 5), dtype=np.uint8), "is not a picture|cannot be read"),
        ((tmp_path / "absent.png").as_uri(), "cannot be read"),
        ("nothing://at.all/x.png", "cannot be opened: Protocol not known"),
        ("http://127.0.0.1:9/x.png", "cannot be read: .*refused"),
        ("http://", "cannot be read"),
        (17, "a int is not a picture"),
    ):
        with pytest.raises(ClocError, match=problem):
            read_image(source)  # type: ignore[arg-type]


def test_urls_in_a_conversation_are_fetched_and_nothing_else_is_touched(server: str) -> None:
    url = f"{server}/scene.png"
    plain: list[Any] = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": url}]},
    ]
    assert with_pictures(plain) == plain
    asked = [
        *plain,
        {"role": "user", "content": [{"type": "image", "image": url}, {"type": "image", "image": "a.png"}]},
    ]
    items = with_pictures(asked)[2]["content"]
    assert np.array_equal(np.asarray(items[0]["image"]), np.asarray(PICTURE))
    assert items[1] == {"type": "image", "image": "a.png"}
    assert asked[2]["content"][0]["image"] == url
