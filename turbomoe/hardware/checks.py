"""What ``doctor`` looks at on a machine: each check is a value, whether it is well, and what to do if not."""

from __future__ import annotations

import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbomoe.config import state_dir
from turbomoe.errors import TurbomoeError
from turbomoe.hardware.cgroup import read_text
from turbomoe.hardware.cpu import Cpu, describe_cpu
from turbomoe.hardware.memory import gpus, ram
from turbomoe.units import format_bytes

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Check:
    """One finding. A ``note`` costs something and works; a ``problem`` has to be mended first."""

    name: str
    value: str
    state: State = "ok"
    advice: str = ""


def machine_checks(root: Path = Path("/")) -> list[Check]:
    """Everything about the machine; ``root`` is where its /proc and /sys are."""
    return [
        platform_check(platform.system(), platform.machine(), platform.release()),
        cpu_check(describe_cpu(root)),
        memory_check(root),
        *gpu_checks(root),
        compiler_check(),
        state_check(state_dir()),
    ]


def platform_check(system: str, machine: str, release: str) -> Check:
    """Linux is what turbomoe is built for and tested on."""
    if system == "Linux":
        return Check("platform", f"Linux {release} on {machine}")
    advice = "Run turbomoe on Linux; WSL2 and containers count"
    return Check("platform", f"{system or 'unknown'} on {machine}", "problem", advice)


def cpu_check(cpu: Cpu) -> Check:
    """Model, instruction sets and usable cores; a note when this process gets fewer cores than there are."""
    value = f"{cpu.model}, {cpu.usable} of {cpu.cores} cores usable"
    if cpu.features:
        value += f", {' '.join(cpu.features)}"
    if cpu.usable >= cpu.cores:
        return Check("cpu", value)
    limit = f"a quota of {cpu.quota:g} CPUs" if cpu.quota and cpu.quota < cpu.cores else "its affinity mask"
    return Check("cpu", value, "note", f"This process is limited by {limit}")


def memory_check(root: Path) -> Check:
    """Available system memory, and the control group that limits it."""
    try:
        memory = ram(root)
    except TurbomoeError as error:
        return Check("memory", error.what, "problem", error.fix)
    value = f"{format_bytes(memory.available)} available of {format_bytes(memory.total)}"
    return Check("memory", value, "note", f"It is {memory.note}") if memory.note else Check("memory", value)


def gpu_checks(root: Path) -> list[Check]:
    """Every GPU that torch can use, or why there is none."""
    import torch

    found = [
        Check(gpu.device, f"{gpu.note}, {format_bytes(gpu.available)} free of {format_bytes(gpu.total)}")
        for gpu in gpus()
    ]
    driver = read_text(root / "proc/driver/nvidia/version").strip()
    return found or [no_gpu_check(bool(driver), torch.version.cuda)]


def no_gpu_check(driver: bool, cuda: str | None) -> Check:
    """Why torch finds no GPU: none there, a CPU build of torch, or a driver that does not answer."""
    if not driver:
        return Check("gpu", "none: models run on the CPU")
    if cuda is None:
        return Check(
            "gpu", "an NVIDIA driver, but torch is a CPU build", "note", "Install torch's CUDA build to use it"
        )
    return Check(
        "gpu", f"an NVIDIA driver that torch (CUDA {cuda}) cannot use", "note", "Try nvidia-smi for the reason"
    )


def compiler_check() -> Check:
    """The C compiler that the native core is built with."""
    path = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if path is None:
        return Check("c compiler", "none", "note", "The C core for experts is built with one (apt install gcc)")
    return Check("c compiler", _first_line([path, "--version"]) or path)


def _first_line(command: list[str]) -> str:
    """First line that ``command`` prints, empty when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.partition("\n")[0].strip()


def state_check(folder: Path) -> Check:
    """Whether what turbomoe keeps between runs can be written, and how much room there is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"turbomoe")
        return Check("state folder", f"{folder}, {format_bytes(shutil.disk_usage(folder).free)} free")
    except OSError as error:
        advice = "Make it writable, or name another folder in TURBOMOE_HOME"
        return Check("state folder", f"{folder}: {error.strerror or error}", "problem", advice)
