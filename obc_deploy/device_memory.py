"""How much of a GPU's memory may be used: the limit is the CUDA allocator's own, for this process.

A request beyond it is refused like one beyond the device (`torch.OutOfMemoryError`), so the solvers
need no other bookkeeping: they size their batches by what is left and halve those that do not fit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from obc_deploy.errors import DeviceMemoryError

if TYPE_CHECKING:
    import torch

_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def memory_bytes(size: int | str) -> int:
    """Bytes of a size such as "8GiB", "750 MB" or a plain number of bytes.

    Raises:
        DeviceMemoryError: it cannot be read, or is less than a byte.
    """
    found = _SIZE.fullmatch(str(size).strip())
    unit = _UNITS.get((found[2] or "b").lower()) if found else None
    total = int(float(found[1]) * unit) if found and unit else 0
    if total < 1:
        raise DeviceMemoryError(f"memory '{size}' is no size; give one such as 8GiB or 750MiB")
    return total


def limit_device_memory(device: torch.device, limit: int | str) -> None:
    """Keep everything that this process allocates on a GPU within `limit`.

    Raises:
        DeviceMemoryError: the limit cannot be read, exceeds the device, or the device is the CPU.
    """
    import torch

    wanted = memory_bytes(limit)
    if device.type != "cuda":
        raise DeviceMemoryError(
            f"a device memory of {in_units(wanted)} limits a GPU, and the work is done on "
            f"'{device}'; leave the limit out, or use a CUDA device"
        )
    whole = torch.cuda.get_device_properties(device).total_memory
    if wanted > whole:
        raise DeviceMemoryError(
            f"a device memory of {in_units(wanted)} is more than the {in_units(whole)} of "
            f"'{device}'; give less"
        )
    torch.cuda.set_per_process_memory_fraction(wanted / whole, device)


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on a CUDA device."""
    import torch

    free, whole = torch.cuda.mem_get_info(device)
    return bytes_left(
        free=free,
        whole=whole,
        reserved=torch.cuda.memory_reserved(device),
        allocated=torch.cuda.memory_allocated(device),
        fraction=torch.cuda.get_per_process_memory_fraction(device),
    )


def bytes_left(*, free: int, whole: int, reserved: int, allocated: int, fraction: float) -> int:
    """What the allocator can still hand out: what it holds unused, and what it may ask for.

    Args:
        free: bytes of the device that nobody holds.
        whole: bytes of the device.
        reserved: bytes that this process's allocator holds, in use or not.
        allocated: bytes of those that tensors use.
        fraction: share of the device that this process may reserve.
    """
    may_reserve = min(free, int(fraction * whole) - reserved)
    return max(0, reserved - allocated + max(0, may_reserve))


def in_units(size: int) -> str:
    """A size for readers, in MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
