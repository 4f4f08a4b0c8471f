"""Debian's Chromium without a window, driven by its own protocol over two pipes: no package is needed."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

FOUND = shutil.which("chromium") or shutil.which("google-chrome")
WAIT = 60.0  # seconds for something to become true on a page, on a busy machine too
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),  # a camera that shows a test picture
)


class Chromium:
    """One page of a browser of its own, with an empty profile."""

    def __enter__(self) -> Self:
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        read, theirs_out = os.pipe()
        theirs_in, write = os.pipe()
        command = [str(FOUND), *FLAGS, f"--user-data-dir={self.profile.name}", "about:blank"]
        joined = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the protocol is spoken on these two
        self.process = subprocess.Popen(
            ["bash", "-c", joined, "bash", *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.read, self.write = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self.number, self.rest, self.session = 0, b"", ""
        self.errors: list[str] = []  # what pages complained of
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self.process.pid, 9)
        self.process.wait()
        self.read.close()
        with contextlib.suppress(BrokenPipeError):
            self.write.close()
        self.profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            answer = self.next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def next(self) -> dict[str, Any]:
        """Read one message; complaints of a page are kept."""
        while b"\0" not in self.rest:
            more = os.read(self.read.fileno(), 1 << 20)
            assert more, "the browser has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(message)
        if found.get("method") == "Runtime.exceptionThrown":
            self.errors.append(found["params"]["exceptionDetails"]["exception"].get("description", "an exception"))
        if found.get("method") == "Log.entryAdded" and found["params"]["entry"]["level"] == "error":
            self.errors.append(found["params"]["entry"]["text"])
        return found

    def open(self, address: str) -> None:
        """Go to an address."""
        self.ask("Page.navigate", url=address)

    def see(self, expression: str) -> Any:
        """Evaluate a script on the page."""
        result = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """Evaluate a script until it gives something true, and return that."""
        end = time.monotonic() + WAIT
        while time.monotonic() < end:
            if found := self.see(f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"):
                return found
            time.sleep(0.1)
        raise AssertionError(f"never true: {expression}. The page says: {self.see('document.body.innerText')[:600]}")

    def photograph(self, path: Path, width: int, is_dark: bool = False) -> None:
        """Write a picture of the whole page at a width."""
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.ask("Emulation.setDeviceMetricsOverride", **shape)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.see("new Promise((done) => setTimeout(done, 500))")
        picture = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(picture))
