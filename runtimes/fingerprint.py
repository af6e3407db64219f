"""What machine a measurement was taken on."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "sve",
)
"""The features that decide how fast a network runs, as the Linux kernel spells them."""


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: product name.
        memory_bytes: its memory.
        driver: driver version.
        compute_capability: "9.0" and the like.
    """

    name: str
    memory_bytes: int
    driver: str
    compute_capability: str


@dataclass(frozen=True)
class Fingerprint:
    """A machine, as far as it changes a measurement.

    Attributes:
        cpu: model name.
        cpu_features: those of `CPU_FEATURES` that it has.
        physical_cores: cores of the machine.
        logical_cores: hardware threads of the machine.
        usable_cores: hardware threads this process may use.
        memory_bytes: main memory.
        system: distribution.
        kernel: kernel release.
        governor: frequency governor of the first core, or None where unreadable.
        load_average: over 1, 5 and 15 minutes, when the fingerprint was taken.
        gpus: NVIDIA GPUs.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    physical_cores: int
    logical_cores: int
    usable_cores: int
    memory_bytes: int
    system: str
    kernel: str
    governor: str | None
    load_average: tuple[float, float, float]
    gpus: tuple[Gpu, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        described = asdict(self)
        for name in ("cpu_features", "load_average", "gpus"):
            described[name] = list(described[name])
        return described


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _cpuinfo_field(text: str, *names: str) -> str:
    for name in names:
        if match := re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE):
            return match[1].strip()
    return ""


def _physical_cores(logical: int) -> int:
    siblings = {
        path.read_text(encoding="ascii").strip()
        for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    }
    return len(siblings) or logical


def take_gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, as nvidia-smi lists them; none where it is missing."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = "name,memory.total,driver_version,compute_cap"
    try:
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in answer.stdout.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            memory = int(parts[1]) << 20 if parts[1].isdigit() else 0
            gpus.append(Gpu(parts[0], memory, parts[2], parts[3]))
    return tuple(gpus)


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def take_fingerprint() -> Fingerprint:
    """The machine this process runs on, now."""
    text = _read("/proc/cpuinfo") or ""
    flags = set(_cpuinfo_field(text, "flags", "Features").split())
    logical = os.cpu_count() or 1
    return Fingerprint(
        cpu=_cpuinfo_field(text, "model name", "Model", "CPU part") or platform.machine(),
        cpu_features=tuple(feature for feature in CPU_FEATURES if feature in flags),
        physical_cores=_physical_cores(logical),
        logical_cores=logical,
        usable_cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=_system(),
        kernel=platform.release(),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        load_average=os.getloadavg(),
        gpus=take_gpus(),
    )
