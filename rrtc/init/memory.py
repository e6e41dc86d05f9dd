"""Freed memory goes back to the system."""

import ctypes
import sys

MMAP_THRESHOLD = -3  # the option's number in glibc's malloc.h
LEAST_BYTES = 1 << 20


def return_freed_memory() -> None:
    """Has the C library give back every block of LEAST_BYTES and more as soon as it is freed. Does nothing where that
    is not glibc.

    By default glibc raises that size to 32 MiB as such blocks are freed, and keeps smaller ones: while tensors of all
    sizes come and go, memory in use and memory that is kept end up half as large again as what tensors hold.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, LEAST_BYTES)
