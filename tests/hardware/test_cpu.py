"""The processor, and this process's share of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hardware.machines import join_v2, write
from turbomoe.hardware.cpu import describe_cpu, usable_cores


@pytest.mark.parametrize(
    ("allowed", "quota", "usable"), [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (4, 16.0, 4), (0, None, 1)]
)
def test_usable_cores(allowed: int, quota: float | None, usable: int) -> None:
    assert usable_cores(allowed, quota) == usable


def test_x86(tmp_path: Path) -> None:
    write(
        tmp_path,
        "proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Fast 9000\nflags\t\t: fpu avx2 amx_bf16\n\nmodel name: Other",
    )
    join_v2(tmp_path, "/")
    write(tmp_path, "sys/fs/cgroup/cpu.max", "100000 100000")
    cpu = describe_cpu(tmp_path)
    assert (cpu.model, cpu.features) == ("Fast 9000", ("avx2", "amx_bf16"))
    assert (cpu.cores, cpu.usable, cpu.quota) == (os.cpu_count(), 1, 1.0)


def test_arm_has_no_model_name(tmp_path: Path) -> None:
    write(tmp_path, "proc/cpuinfo", "processor : 0\nFeatures : fp asimddp i8mm")
    cpu = describe_cpu(tmp_path)
    assert cpu.model
    assert cpu.features == ("asimddp", "i8mm")


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    cpu = describe_cpu(tmp_path)
    assert (cpu.features, cpu.quota) == ((), None)
    assert 1 <= cpu.usable <= cpu.cores
