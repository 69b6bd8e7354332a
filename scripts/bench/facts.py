"""What the figures depend on besides the code: versions and hardware."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("hcot_lmeval", "torch", "transformers", "llama-cpp-python", "vllm", "flash-attn", "numpy")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what is installed of the packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: str, threads: int) -> dict[str, str]:
    """Returns what computes.

    Args:
        device: as torch names it.
        threads: CPU threads of the engines.
    """
    import psutil
    import torch

    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    name = f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"
    cpu = {"cpu": name, "cores": str(os.cpu_count()), "memory": memory, "threads": str(threads)}
    if not device.startswith("cuda"):
        return cpu
    return {"gpu": torch.cuda.get_device_name(device), "cuda": str(torch.version.cuda), **cpu}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor()
