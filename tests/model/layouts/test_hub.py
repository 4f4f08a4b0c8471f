"""Hub ids, with a hub on this machine: the real client downloads folders of the real layout from a local server."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from huggingface_hub import constants

from vlm_tune.config.parse import load_config
from vlm_tune.errors import ConfigError
from vlm_tune.model.build import build_model
from vlm_tune.model.encoder import build_encoder

REVISION = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serve folders as models of a hub, and keep the names of the files that were asked for."""

    def __init__(self, models: dict[str, Path]):
        super().__init__(("127.0.0.1", 0), Answers)
        self.models = models
        self.asked: list[str] = []


class Answers(BaseHTTPRequestHandler):
    """The three questions that a download asks: what the model holds, what a file is, and the file."""

    def do_GET(self):
        self.answer(with_content=True)

    def do_HEAD(self):
        self.answer(with_content=False)

    def answer(self, with_content):
        path = self.path.partition("?")[0]
        name = next((name for name in self.server.models if f"/{name}/" in path + "/"), None)
        if name is None:
            return self.say(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_content)
        folder = self.server.models[name]
        if path.startswith("/api/"):
            files = [{"type": "file", "path": each.name, **facts(each)} for each in sorted(folder.iterdir())]
            model = {"id": name, "sha": REVISION, "siblings": [{"rfilename": each["path"]} for each in files]}
            return self.say(200, json.dumps(files if "/tree/" in path else model).encode(), {}, with_content)
        file = folder / path.rpartition("/")[2]
        content = file.read_bytes()
        if with_content:
            self.server.asked.append(f"{name}/{file.name}")
        etag = {"ETag": f'"{facts(file)["oid"]}"', "X-Repo-Commit": REVISION}
        return self.say(200, content, etag, with_content)

    def say(self, code, content, headers, with_content):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_content:
            self.wfile.write(content)

    def log_message(self, *arguments):
        """Say nothing."""


def facts(file):
    return {"size": file.stat().st_size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()}


@pytest.fixture
def hub(toys, tmp_path, monkeypatch):
    server = Hub({"toys/vision": toys.vision, "toys/llm": toys.llm})
    Thread(target=server.serve_forever, daemon=True).start()
    # the variables of the same names are read when the client is imported
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(toys):
    return load_config(toys.arguments("model.vision.path=toys/vision", "model.llm.path=toys/llm"))


def weights(hub):
    return [name for name in hub.asked if name.endswith(".safetensors")]


def test_counting_rows_needs_no_weights(hub, config):
    encoder, tokenizer = build_encoder(config)
    assert encoder.settings.tokens_per_tile == 4
    assert len(tokenizer) > 2500
    assert {"toys/vision/config.json", "toys/llm/tokenizer.json"} <= set(hub.asked)
    assert not weights(hub)


def test_a_model_is_downloaded_once_and_equals_the_folders(toys, hub, config):
    ours = build_model(config).vlm.llm.state_dict()
    theirs = build_model(load_config(toys.arguments())).vlm.llm.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    asked = list(hub.asked)
    assert len(weights(hub)) == 2
    build_model(config)
    assert hub.asked == asked


def test_small_files_in_the_cache_are_no_model(hub, config, monkeypatch):
    build_encoder(config)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    build_encoder(config)  # they are enough for this
    with pytest.raises(ConfigError, match=r"the hub cannot be reached and the model is not in the local cache"):
        build_model(config)


def test_a_name_that_the_hub_does_not_know_is_said(hub, config):
    config.model.llm.path = "toys/lmm"
    with pytest.raises(ConfigError, match=r"model.llm.path=toys/lmm: .* no such model on the hub"):
        build_model(config)
