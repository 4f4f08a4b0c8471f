#!/usr/bin/env bash
# PyAV 18.1.0 (its wheel's SVT-AV1): writing one AV1 video makes the Python process that writes it a real-time one, for good.
#
# Expected: an encoder sets, at most, how its own threads are scheduled; the caller's is as it was when the file is closed.
# Seen, where the process may do so (root, as in most containers): the calling thread leaves SCHED_OTHER for SCHED_FIFO at
# priority 99 and stays there; threads and processes that it starts later inherit that. A data preparation or test suite
# that writes one AV1 clip then outranks everything else on the machine: its loader workers, the desktop, other ranks.
# H.264 by the same wheel leaves the scheduling alone. Take it back with os.sched_setscheduler, or encode in a process.
set -euo pipefail
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'av==18.1.0' 'numpy==2.4.6'
cd "$work" && "$work/venv/bin/python" - <<'P'
import os
import sys

import av
import numpy as np

usual = os.sched_getscheduler(0), os.sched_getparam(0)
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
    os.sched_setscheduler(0, *usual)
except PermissionError:
    sys.exit("this process may not become a real-time one: run as root")


def scheduling_after(codec: str, name: str) -> tuple[int, int]:
    with av.open(name, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority


plain, seen = scheduling_after("libx264", "clip.mp4"), scheduling_after("libsvtav1", "clip.webm")
print("av", av.__version__, "| (policy, priority) after H.264:", plain, "| after AV1:", seen)
assert plain == (os.SCHED_OTHER, 0) and seen == (os.SCHED_FIFO, 99), "behaviour changed"
P
