"""Processes that torchrun or SLURM started are one run: in one folder, on one machine or on two."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import PARENTS_PROCESSES, ROOT
from processes import PATIENCE, fork_cli

from vlm_tune.model.checkpoint import find_runs
from vlm_tune.training.callbacks.metrics import read_metrics

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


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


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


@pytest.fixture
def machines():
    """Give two network namespaces that see each other as two machines would: their names and addresses."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root, and the command ip")
    names, addresses = ("vlm_tune_a", "vlm_tune_b"), ("10.77.0.1", "10.77.0.2")
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


@pytest.mark.strategies
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_two_machines_are_one_run(toys, tmp_path, machines, strategy):
    namespaces, first = machines
    arguments = toys.arguments(*ALL, "trainer.devices=1", "trainer.nodes=2", f"strategy={strategy}", runs=tmp_path)
    started = []
    for number, (name, link) in enumerate(namespaces):
        options = ("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1")
        command = torchrun(*options, "--master-addr", first, "--master-port", "29500")
        within = ["ip", "netns", "exec", name]
        started.append(subprocess.Popen([*within, *command, *arguments], env=environment(GLOO_SOCKET_IFNAME=link)))
    try:
        assert [process.wait(timeout=280) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    (run,) = find_runs(tmp_path)
    assert read_metrics(run / "metrics.csv")[-1]["step"] == STEPS
