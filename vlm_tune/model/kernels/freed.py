"""Memory that was freed stays with the process, for the next step."""

import ctypes


def keep_freed_memory() -> None:
    """Keep freed memory for the next step: glibc would hand it back, and each page be cleared anew when it is used.

    Beside products on a CPU that is a tenth of a step. Other C libraries have no such switch.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, its largest value: smaller blocks are never returned alone
        set_option(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """Give freed memory back, so that what a process then uses can be measured."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
