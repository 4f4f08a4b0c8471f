"""What the trainer sets up around the loop."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from vlm_tune.training.trainer import keep_freed_memory

if "keep" in sys.argv:
    keep_freed_memory()
for step in range(6):
    if step == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(8)]  # a step of 32 MiB
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
def test_freed_memory_is_kept_for_the_next_step():
    without, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, word], capture_output=True, text=True, check=True).stdout)
        for word in ("give", "keep")
    )
    assert kept < 500 < without


HOLES = """
import torch
from vlm_tune.model.kernels.freed import hand_back_freed_memory, keep_freed_memory

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20

keep_freed_memory()
blocks = [torch.ones(2**18) for _ in range(200)]  # of 1 MiB
del blocks[::2]
before = held()
hand_back_freed_memory()
print(before - held())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps memory between blocks in use")
def test_what_loading_freed_is_handed_back_from_between_what_it_kept():
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80


COLLECTED = """
import gc, os
from vlm_tune.data.datamodule import start_reader

def own():  # MB that no other process shares
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_Dirty")) // 1024

if os.fork() == 0:
    start_reader(0)
    before = own()
    gc.collect()
    print(own() - before, flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux tells what processes share")
def test_a_collection_in_a_data_worker_copies_nothing_that_it_inherited():
    done = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30
