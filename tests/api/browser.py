"""Headless Chromium, spoken to over its own pipe: a page, what a person does on it, and what is seen."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = 60.0
SETTLED = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"


class Page:
    """One tab."""

    def __init__(self, write: int, read: int) -> None:
        self._write = os.fdopen(write, "wb", buffering=0)
        self._read = os.fdopen(read, "rb", buffering=0)
        self._answers: Queue[dict[str, Any]] = Queue()
        self._number = 0
        self._session: str | None = None
        self.said: list[str] = []  # errors and warnings of the console
        self._listener = threading.Thread(target=self._listen, daemon=True, name="browser")
        self._listener.start()
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def _listen(self) -> None:
        waiting = b""
        with contextlib.suppress(OSError, ValueError):
            while part := self._read.read(2**16):
                *whole, waiting = (waiting + part).split(b"\0")
                for one in whole:
                    self._take(json.loads(one))

    def _take(self, found: dict[str, Any]) -> None:
        if "id" in found:
            self._answers.put(found)
        elif found["method"] == "Log.entryAdded":
            self.said.append(found["params"]["entry"]["text"])
        elif found["method"] == "Runtime.exceptionThrown":
            self.said.append(json.dumps(found["params"]["exceptionDetails"])[:500])
        elif found["method"] == "Page.javascriptDialogOpening":
            threading.Thread(
                target=self._send, args=("Page.handleJavaScriptDialog", {"accept": True})
            ).start()

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        return self._number

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = self._send(method, params)
        while True:
            try:
                found = self._answers.get(timeout=SECONDS)
            except Empty:
                raise AssertionError(f"{method} was not answered; the console: {self.said}") from None
            if found["id"] == number:
                assert "error" not in found, found
                result: dict[str, Any] = found["result"]
                return result

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        """Of the window; and what colours its user likes."""
        self._ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Go there."""
        self._ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression, or of the promise that it is."""
        found = self._ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        script = f"""new Promise((done, failed) => {{
            const until = Date.now() + {SECONDS * 1000};
            const look = () => {{
                if ({condition}) done(true);
                else if (Date.now() > until) failed(new Error('never true'));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        assert self.run(script), f"{condition}; the console: {self.said}"

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self._ask("Input.insertText", text=text)

    def press(self, key: str) -> None:
        """A key."""
        code = {"Enter": 13, "Escape": 27, "Tab": 9, " ": 32}[key]
        about = {"key": key, "windowsVirtualKeyCode": code, "code": key}
        text = {"Enter": "\r", " ": " "}.get(key)
        self._ask("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self._ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, path: Path) -> None:
        """What is seen, as a PNG."""
        self.run(SETTLED)
        path.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        with contextlib.suppress(AssertionError, OSError):
            self._ask("Browser.close")
        self._write.close()
        self._listener.join(10)
        self._read.close()


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A tab of a browser that is gone after the block."""
    assert CHROMIUM is not None
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    command = (
        f"exec {CHROMIUM} --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
        f"--user-data-dir={folder} --remote-debugging-pipe 3<&{theirs_read} 4>&{theirs_write}"
    )
    process = subprocess.Popen(
        ["bash", "-c", command],
        pass_fds=(theirs_read, theirs_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs_read)
    os.close(theirs_write)
    page = Page(ours_write, ours_read)
    try:
        yield page
    finally:
        page.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
