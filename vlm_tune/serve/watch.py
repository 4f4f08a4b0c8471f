"""Serve a live page of runs to this machine's browser: their curves and sample answers, read from their folders.

A fixed list of addresses answers, and only for the runs that are shown. A page of another site cannot read them: the
browser would have to name this machine in the Host header.
"""

import json
import re
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from rich.console import Console

from vlm_tune.config.schema import ImageConfig
from vlm_tune.errors import ConfigError
from vlm_tune.model.checkpoint import CONFIG
from vlm_tune.pages.page import FOLDER, jpeg, render
from vlm_tune.pages.recorded import LOOK, changes, describe, differing, newest_runs
from vlm_tune.pages.report_html import QUALITY, small_picture

HOSTS = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d+)?")  # any port: another machine may forward one to here
QUIET = 300.0  # seconds without a step, after which a run is not said to be running


def watch(runs: list[Path], folder: Path, port: int, console: Console) -> None:
    """Serve the page until Ctrl-C; without `runs`, of the newest in a folder, also of those that start later."""
    with make_server(runs, folder, port) as server:
        port = server.server_address[1]
        watched = ", ".join(run.name for run in runs) or f"the newest runs of {folder}"
        console.print(f"watching {watched}: http://127.0.0.1:{port}", soft_wrap=True)
        forward = f"ssh -N -L {port}:127.0.0.1:{port} THIS_MACHINE"
        console.print(f"from another machine: {forward}. Ctrl-C ends the page alone: runs go on", soft_wrap=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def make_server(runs: list[Path], folder: Path, port: int) -> ThreadingHTTPServer:
    """Open the port on this machine alone; raise ConfigError where it is taken."""
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"{', '.join(map(str, runs))}: two runs of one name. Name each run once")
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Page)
    except OSError as error:
        raise ConfigError(f"port={port}: {error.strerror}. Give another one, or port=0 for any that is free") from error
    server.shown = Shown(runs, folder)  # type: ignore[attr-defined]
    return server


class Shown:
    """The runs of a page, each read again when one of its files has changed."""

    def __init__(self, runs: list[Path], folder: Path) -> None:
        self.given = runs
        self.folder = folder
        self.read: dict[str, tuple[str, dict[str, Any]]] = {}  # by name: version and description

    def runs(self) -> dict[str, Path]:
        """Return the run folders by name."""
        return {run.name: run for run in self.given or newest_runs(self.folder)[::-1] if (run / CONFIG).exists()}

    def describe(self, run: Path) -> tuple[str, dict[str, Any]]:
        """Return a run's version and description."""
        version = "-".join(map(str, changes(run)))
        if self.read.get(run.name, ("",))[0] != version:
            self.read[run.name] = version, describe(run)
        return self.read[run.name]

    def news(self, known: dict[str, str]) -> dict[str, Any]:
        """Describe all runs; of one whose version the page knows already, only the state."""
        described = {name: self.describe(run) for name, run in self.runs().items()}
        keys = differing([run for _, run in described.values()])
        return {"runs": [self.one(name, known.get(name, ""), keys) for name in described]}

    def one(self, name: str, known: str, keys: list[str]) -> dict[str, Any]:
        """Describe one run for the page."""
        version, found = self.read[name]
        age = time.time() - max(changes(self.runs()[name])[:2]) / 1e9
        state = "finished" if found["is_finished"] else "running" if age < QUIET else "quiet"
        now = {"name": name, "version": version, "state": state, "age": age}
        if known == version:
            return now
        kept = {key: value for key, value in found.items() if key not in ("settings", "answers")}
        answers = [{**answer, "picture": bool(answer["picture"])} for answer in found["answers"]]
        differs = {key: found["settings"].get(key) for key in keys}
        return {**kept, **now, "answers": answers, "differs": differs}

    def picture(self, name: str, number: str) -> bytes | None:
        """Return the picture of a sample answer, small, by the run's name and the answer's number."""
        run = self.runs().get(name)
        if run is None or not number.isdecimal():
            return None
        _, found = self.describe(run)
        paths = [answer["picture"] for answer in found["answers"]][int(number) :]
        look = {key.removeprefix(LOOK): value for key, value in found["settings"].items() if key.startswith(LOOK)}
        image = small_picture(paths[0], ImageConfig(**look)) if paths and paths[0] else None
        return jpeg(image, QUALITY) if image else None


class Page(BaseHTTPRequestHandler):
    """Answer the page's own requests."""

    def do_GET(self) -> None:
        """Answer one of the addresses that exist."""
        if not HOSTS.fullmatch(self.headers.get("Host") or ""):
            self.reply(421, "text/plain", b"this page answers to 127.0.0.1 and localhost")
            return
        shown: Shown = self.server.shown  # type: ignore[attr-defined]
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.split("/")[1:]]
        match parts:
            case [""]:
                self.reply(200, "text/html", render("watch.html", heading="Runs", data=None, script_hash="").encode())
            case ["watch.js"]:
                self.reply(200, "text/javascript", (FOLDER / "watch.js").read_bytes())
            case ["data.json"]:
                news = shown.news(dict(parse_qsl(address.query)))
                self.reply(200, "application/json", json.dumps(news).encode())
            case ["picture", name, number] if (picture := shown.picture(name, number)) is not None:
                self.reply(200, "image/jpeg", picture)
            case ["favicon.ico"]:  # which browsers ask for by themselves
                self.reply(204, "image/x-icon", b"")
            case _:
                self.reply(404, "text/plain", b"no such address")

    def reply(self, code: int, kind: str, content: bytes) -> None:
        """Send one answer."""
        self.send_response(code)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        headers |= {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: Any) -> None:
        """Say nothing of each request."""
