"""What a C library's heap becomes when memory is taken and given back in a run's order: gaps are memory too.

Run as a program of its own, so that its heap is empty at the start: it reads lines `NUMBER BYTES`, bytes below 0 where
a block is freed, and prints the largest heap in bytes; 0 where the C library does not tell. Blocks are taken and not
written, so that they cost no memory here.
"""

import ctypes
import subprocess
import sys
from collections.abc import Iterable

from vlm_tune.model.kernels.freed import keep_freed_memory

ALIGNED = 64  # bytes: as torch asks for its memory
OFTEN = 64  # events between two looks at the heap
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Facts(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def heap_bytes(events: list[tuple[int, int]]) -> int:
    """Ask a process of its own for the largest heap of these events."""
    text = "".join(f"{number} {size}\n" for number, size in events)
    command = [sys.executable, "-m", "vlm_tune.planning.heap"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip().isdecimal() else 0


def replay(events: Iterable[tuple[int, int]]) -> int:
    """Take and give back blocks; return the largest heap."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = Facts
    library.aligned_alloc.restype, library.aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
    library.free.argtypes = [ctypes.c_void_p]
    keep_freed_memory()
    blocks: dict[int, int] = {}
    start, most = _held(library), 0
    for count, (number, size) in enumerate(events):
        if size > 0:
            blocks[number] = library.aligned_alloc(ALIGNED, -(-size // ALIGNED) * ALIGNED)
        elif number in blocks:
            library.free(blocks.pop(number))
        if count % OFTEN == 0:
            most = max(most, _held(library))
    return max(most, _held(library)) - start


def _held(library: ctypes.CDLL) -> int:
    facts = library.mallinfo2()
    return int(facts.arena + facts.hblkhd)


if __name__ == "__main__":
    sys.stdout.write(str(replay([(int(a), int(b)) for a, b in map(str.split, sys.stdin)])))
