"""A page in headless Chromium, driven through a pipe, and a folder served to it. Standard library only."""

from __future__ import annotations

import base64
import functools
import http.server
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript",
                      ".wasm": "application/wasm"}

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a folder, on this machine only, for the length of the block."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Page:
    """One tab: `evaluate` JavaScript, wait, look."""

    def __init__(self, profile: Path, width: int, height: int, phone: bool = False):
        found = next(filter(None, map(shutil.which, NAMES)), None)
        assert found, f"Chromium is missing: apt-get install chromium (looked for {', '.join(NAMES)})"
        ours, theirs = os.pipe(), os.pipe()                 # commands, answers
        self.commands, self.answers = os.fdopen(ours[1], "wb", 0), os.fdopen(theirs[0], "rb")
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "about:blank"]
        redirected = f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}'
        self.process = subprocess.Popen(["bash", "-c", redirected, found, *flags],
                                        pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL)
        os.close(ours[0]), os.close(theirs[1])
        self.numbers, self.session = itertools.count(1), None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=phone,
                  deviceScaleFactor=2 if phone else 1)

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command and its answer; events between are passed over."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = json.loads(b"".join(iter(functools.partial(self.answers.read, 1), b"\0")))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, address: str) -> None:
        """Goes there."""
        self.send("Page.navigate", url=address)

    def evaluate(self, code: str) -> Any:
        """The value of an expression."""
        return self.send("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def wait(self, code: str, seconds: float = 120) -> Any:
        """The first true value of an expression; an error that says what the page says otherwise."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.evaluate(code):
                return value
            time.sleep(0.1)
        raise TimeoutError(f"{code}: not within {seconds} s; {self.evaluate('document.body.innerText')!r}")

    def screenshot(self, path: Path) -> None:
        """A PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self.send("Browser.close")
        self.process.wait(20)
