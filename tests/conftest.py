"""What all tests share: toy files, a private cache, no network, two threads, and the command line as a function."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from toys import Toys

ROOT = Path(__file__).parents[1]
PARENTS_PROCESSES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

os.environ |= {
    "OMP_NUM_THREADS": "2",  # before torch is imported anywhere: results must not depend on the machine's cores
    "GOMP_SPINCOUNT": "10000",  # threads that spin for long make tiny models ten times slower on a busy machine
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1,localhost",  # servers of tests are on this machine
}


class Finished(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _network_blocked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines, so that no test passes only where there is a network."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {address}: tests run without a network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _short_packs_are_spared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the layers of short packs keep what those of a long one would, in tests of the model."""
    if request.path.is_relative_to(ROOT / "tests" / "model"):
        monkeypatch.setattr("vlm_tune.model.kernels.kept.FEW", 0)


@pytest.fixture(autouse=True)
def _same_scheduling() -> Iterator[None]:
    """Fail a test that leaves this process real-time: it and all that it forks would starve the tests beside it."""
    policy = getattr(os, "sched_getscheduler", lambda process: None)  # macOS has none
    before = policy(0)
    yield
    assert policy(0) == before, f"scheduling policy {before} became {policy(0)}"


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's cache out of the tests, and the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLM_TUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> "Toys":
    """Hold the toy model and data; read only."""
    from toys import build_toys

    return build_toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture
def run_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """Give a function that runs `python -m vlm_tune ARGUMENTS` in this process."""

    def run(*arguments: str) -> Finished:
        from vlm_tune.cli import main

        capsys.readouterr()
        code = main(list(arguments))
        return Finished(code, *capsys.readouterr())

    return run


@pytest.fixture
def start_cli() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Give a function that starts `python -m vlm_tune ARGUMENTS` as a process of its own, in a group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        inherited = {name: value for name, value in os.environ.items() if name not in PARENTS_PROCESSES}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "vlm_tune", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=inherited | environment, start_new_session=True, **pipes)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.communicate()


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Name a model of which only the small files are there: what reads data needs no more."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text('{"patch_size": 14}')
    shutil.copytree(Path(__file__).parent / "golden" / "tokenizer", folder / "llm")
    (folder / "llm" / "config.json").write_text('{"model_type": "llama"}')
    paths = [f"model.{part}.path={folder / part}" for part in ("vision", "llm")]
    return ["model=tiny", *paths, "data.workers=0"]
