"""What the C library does with freed memory: handed back after loading, kept between steps."""

import ctypes


def keep_freed_memory() -> None:
    """Keep freed memory for the next step: glibc would hand it back, and each page be cleared anew when it is used.

    Beside products on a CPU that is a tenth of a step. Other C libraries have no such switch.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its largest value: smaller blocks are never returned alone
        set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def hand_back_freed_memory() -> None:
    """Hand back what loading a model freed between the blocks that it kept: 0.4 GB of the demo's 1.6.

    Other C libraries do so themselves.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
