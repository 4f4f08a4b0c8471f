"""Processes that torchrun or SLURM started are one run: in one folder, on one machine or on two."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import time

import pytest
from compare import assert_same, state_of
from conftest import PARENTS_PROCESSES, ROOT
from processes import PATIENCE, fork_cli, free_port, keep_figure

from vlm_tune.model.checkpoint import find_runs
from vlm_tune.training.callbacks import ranks
from vlm_tune.training.callbacks.metrics import read_metrics
from vlm_tune.training.module import VlmModule

STEPS = 3
ALL = (
    "stage=finetune",
    "stage.init_from=none",
    f"stage.max_steps={STEPS}",
    "stage.evaluate=false",
    "trainer.accelerator=cpu",
    "trainer.num_chats=0",
)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "one", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
SLURM = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train"}
SLURM |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0", "SLURM_NNODES": "1"}
LAUNCHERS = {
    "torchrun": lambda rank: TORCHRUN | {"RANK": rank, "LOCAL_RANK": rank},
    "SLURM": lambda rank: SLURM | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_processes_that_were_started_from_outside_share_one_folder(toys, tmp_path, launcher):
    runs, meeting = tmp_path / "runs", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    arguments = toys.arguments(*ALL, "trainer.devices=2", runs=runs)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    ranks = [fork_cli(arguments, logs[rank], **meeting, **LAUNCHERS[launcher](str(rank))) for rank in range(2)]
    for rank in ranks:
        rank.join(PATIENCE)
    said = "\n".join(log.read_text(encoding="utf-8") for log in logs)
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    (run,) = find_runs(runs)
    assert sorted(path.name for path in runs.iterdir()) == sorted([run.name, "latest"])
    assert read_metrics(run / "metrics.csv")[-1]["step"] == STEPS


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_another_number_of_processes_than_devices_is_an_error(toys, tmp_path, run_cli, monkeypatch, launcher):
    for name, value in LAUNCHERS[launcher]("0").items():
        monkeypatch.setenv(name, value)
    done = run_cli(*toys.arguments(*ALL, "trainer.devices=3", "trainer.global_batch=3", runs=tmp_path))
    assert done.code == 2
    assert "trainer.devices*trainer.nodes=3, but 2 processes were started (torchrun --nnodes" in done.err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def machines():
    """Give two network namespaces that see each other as two machines would: their names and addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and the command ip")
    names, addresses = [f"vlm_tune_{os.getpid()}_{end}" for end in "ab"], ("10.77.0.1", "10.77.0.2")
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        subprocess.run(
            ["ip", "link", "add", "va", "netns", names[0], "type", "veth", "peer", "vb", "netns", names[1]], check=True
        )
        for name, link, address in zip(names, ("va", "vb"), addresses, strict=True):
            within = ["ip", "-n", name]
            subprocess.run([*within, "addr", "add", f"{address}/24", "dev", link], check=True)
            subprocess.run([*within, "link", "set", link, "up"], check=True)
            subprocess.run([*within, "link", "set", "lo", "up"], check=True)
        yield list(zip(names, ("va", "vb"), strict=True)), addresses[0]
    except subprocess.CalledProcessError as refused:
        pytest.skip(f"network namespaces cannot be made here: {refused}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def set_link(machine, state):
    """Plug a machine's cable in, or out."""
    subprocess.run(["ip", "-n", machine[0], "link", "set", machine[1], state], check=True)


@contextlib.contextmanager
def inside(name):
    """Let the processes that are forked here be on a machine."""
    library = ctypes.CDLL(None)
    with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{name}") as theirs:
        assert library.setns(theirs.fileno(), 0) == 0
        try:
            yield
        finally:
            assert library.setns(ours.fileno(), 0) == 0


def test_a_machine_that_is_cut_off_ends_both_and_both_go_on(toys, tmp_path, machines, monkeypatch):
    namespaces, address = machines
    more = ("trainer.devices=1", "trainer.nodes=2", "trainer.save_every=2", "data.val=none", "strategy=ddp")
    given = [*(each for each in ALL if "max_steps" not in each), "stage.max_steps=5"]
    for name, seconds in {"SILENCE": 5.0, "MANNERS": 1.0, "BEAT": 0.2}.items():
        monkeypatch.setattr(ranks, name, seconds)

    def train(name, *resume):
        arguments = toys.arguments(*given, *more, *resume, runs=tmp_path / name)
        meeting = {"MASTER_ADDR": address, "MASTER_PORT": "29500"} | TORCHRUN | {"LOCAL_WORLD_SIZE": "1"}
        logs, processes = [tmp_path / f"{rank}.log" for rank in range(2)], []
        for rank, (name, link) in enumerate(namespaces):
            own = {"RANK": str(rank), "GROUP_RANK": str(rank), "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": link}
            with inside(name):
                processes.append(fork_cli(arguments, logs[rank], **meeting | own))
        for process in processes:
            process.join(60)
            process.kill()
        return [process.exitcode for process in processes], [log.read_text(encoding="utf-8") for log in logs]

    begin = VlmModule.training_step

    def cut(self, batch, batch_idx):
        if self.global_step == 3 and self.global_rank == 1:
            set_link(namespaces[1], "down")
        return begin(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(VlmModule, "training_step", cut)
        codes, said = train("cut")
    assert codes == [2, 2], said
    assert "TrainingError: rank 1 has given no sign of life for" in said[0].splitlines()[-1]
    assert "TrainingError: rank 0, or torchrun on its machine, cannot be reached any more" in said[1].splitlines()[-1]
    assert all("3 steps were done" in each and "Traceback" not in each for each in said)
    set_link(namespaces[1], "up")
    codes, said = train("cut", "resume=last")
    assert codes == [0, 0], said
    codes, said = train("straight")
    assert codes == [0, 0], said
    (ours,), (theirs,) = find_runs(tmp_path / "cut"), find_runs(tmp_path / "straight")
    assert_same(state_of(ours, 5), state_of(theirs, 5))


# ------------------------------------------------------------------------------------------------- make test-strategies


def torchrun(*options):
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "vlm_tune"]


def environment(**more):
    inherited = {name: value for name, value in os.environ.items() if name not in PARENTS_PROCESSES}
    return inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


@pytest.mark.strategies
def test_torchrun_starts_two_processes(toys, tmp_path):
    command = torchrun("--nproc-per-node", "2", "--master-port", free_port())
    command += toys.arguments(*ALL, "trainer.devices=2", "strategy=fsdp", runs=tmp_path)
    subprocess.run(command, env=environment(), check=True, timeout=280)
    assert len(find_runs(tmp_path)) == 1


def start_machines(namespaces, address, arguments, logs=None):
    """Start torchrun on each of two machines, one process each; what they say goes into `logs`, a folder."""
    started = []
    for number, (name, link) in enumerate(namespaces):
        options = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"]
        options += ["--redirects", "3", "--log-dir", str(logs / str(number))] if logs else []
        command = torchrun(*options, "--master-addr", address, "--master-port", "29500")
        within = ["ip", "netns", "exec", name]
        started.append(subprocess.Popen([*within, *command, *arguments], env=environment(GLOO_SOCKET_IFNAME=link)))
    return started


@pytest.mark.strategies
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_machines_are_one_run(toys, tmp_path, machines, strategy):
    arguments = toys.arguments(*ALL, "trainer.devices=1", "trainer.nodes=2", f"strategy={strategy}", runs=tmp_path)
    started = start_machines(*machines, arguments)
    try:
        assert [process.wait(timeout=280) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    (run,) = find_runs(tmp_path)
    assert read_metrics(run / "metrics.csv")[-1]["step"] == STEPS


@pytest.mark.strategies
@pytest.mark.timeout(600)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_torchrun_ends_on_both_sides_of_a_cut_and_both_go_on(toys, tmp_path, machines, strategy):
    namespaces, _ = machines
    chosen = [f"strategy={strategy}", "stage.max_steps=60", "trainer.save_every=4", "data.val=none"]
    chosen += ["trainer.devices=1", "trainer.nodes=2"]
    given = {each.partition("=")[0]: each for each in [*ALL, *chosen]}.values()

    def train(name, *more, cut_at=None):
        logs = tmp_path / f"logs_{name}{len(more)}"
        started = start_machines(*machines, [*toys.arguments(*given, runs=tmp_path / name), *more], logs)
        try:
            if cut_at:
                wait_for_step(tmp_path / name, cut_at)
                set_link(namespaces[1], "down")
            began = time.monotonic()
            codes = [process.wait(timeout=280) for process in started]
            return codes, time.monotonic() - began, [last_words(logs / str(number)) for number in range(2)]
        finally:
            for process in started:
                process.kill()

    codes, seconds, said = train("cut", cut_at=10)
    assert codes == [1, 1]  # torchrun's for any of ours but 0
    assert seconds < 60
    assert "TrainingError: rank 1 has given no sign of life" in said[0]
    assert "TrainingError: rank 0, or torchrun on its machine, cannot be reached any more" in said[1]
    set_link(namespaces[1], "up")
    assert train("cut", "resume=last")[0] == [0, 0]
    assert train("straight")[0] == [0, 0]
    (ours,), (theirs,) = find_runs(tmp_path / "cut"), find_runs(tmp_path / "straight")
    assert_same(state_of(ours, 60)["state_dict"], state_of(theirs, 60)["state_dict"])
    keep_figure("host_cut_seconds", strategy, round(seconds, 1))


def wait_for_step(runs, step):
    """Wait until a run has come so far."""
    while not any(
        read_metrics(path)[-1:] and read_metrics(path)[-1]["step"] >= step for path in runs.glob("*/metrics.csv")
    ):
        time.sleep(0.02)


def last_words(logs):
    """Return the last line that a process of torchrun's has said."""
    (log,) = logs.glob("**/stderr.log")
    return log.read_text(encoding="utf-8").strip().splitlines()[-1]
