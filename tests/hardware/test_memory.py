"""The memory table: what is available, what a run takes, and what it says when that is too much."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.hardware.machines import GIB, join_v2, meminfo, v2_group
from turbomoe.errors import OutOfMemoryError, TurbomoeError
from turbomoe.hardware.memory import PARTS, REMEDIES, DeviceMemory, MemoryUse, devices, memory_table, ram

CPU = DeviceMemory("cpu", 32 * GIB, 16 * GIB)
GPU = DeviceMemory("cuda:0", 8 * GIB, 7 * GIB, "Some GPU")
sizes = st.integers(0, 1 << 45)
uses = st.builds(MemoryUse, sizes, sizes, sizes, sizes)


def test_without_limits_the_kernel_is_believed(tmp_path: Path) -> None:
    meminfo(tmp_path, 32 * GIB, 20 * GIB)
    assert ram(tmp_path) == DeviceMemory("cpu", 32 * GIB, 20 * GIB)


def test_a_control_group_caps_both_figures(tmp_path: Path) -> None:
    meminfo(tmp_path, 32 * GIB, 20 * GIB)
    join_v2(tmp_path, "/job")
    v2_group(tmp_path, "/job", max=4 * GIB, used=3 * GIB, idle=GIB)
    memory = ram(tmp_path)
    assert (memory.total, memory.available) == (4 * GIB, 2 * GIB)
    assert "limited to 4.0 GiB" in memory.note
    assert memory.note.endswith("job/memory.max")


def test_a_limit_that_does_not_bind_is_not_mentioned(tmp_path: Path) -> None:
    meminfo(tmp_path, 8 * GIB, 2 * GIB)
    join_v2(tmp_path, "/job")
    v2_group(tmp_path, "/job", max=6 * GIB)
    assert ram(tmp_path) == DeviceMemory("cpu", 8 * GIB, 2 * GIB)


def test_another_system_gets_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(TurbomoeError, match=r"/proc/meminfo is missing.*Linux"):
        ram(tmp_path)


def test_this_machine_has_memory() -> None:
    first = devices()[0]
    assert first.device == "cpu"
    assert 0 < first.available <= first.total


def test_gpus_come_after_system_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (index + 1, 10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    assert devices()[1:] == [DeviceMemory("cuda:0", 10, 1, "GPU 0"), DeviceMemory("cuda:1", 10, 2, "GPU 1")]


def test_render_is_aligned_and_whole() -> None:
    use = {"cpu": MemoryUse(weights=3 * GIB, kv=GIB // 2), "cuda:0": MemoryUse(experts=GIB)}
    head, cpu, gpu, note = memory_table(use, [CPU, GPU]).render().splitlines()
    assert head.split() == ["device", *PARTS, "total", "available", "free"]
    assert len(head) == len(cpu) == len(gpu)
    assert cpu.split() == "cpu 3.0 GiB 512.0 MiB 0 B 0 B 3.5 GiB 16.0 GiB 12.5 GiB".split()
    assert gpu.split() == "cuda:0 0 B 0 B 0 B 1.0 GiB 1.0 GiB 7.0 GiB 6.0 GiB".split()
    assert note == "cuda:0: Some GPU"


def test_json_says_the_same_in_bytes() -> None:
    table = memory_table({"cpu": MemoryUse(1, 2, 3, 4)}, [CPU])
    (row,) = json.loads(json.dumps(table.to_json()))
    expected = {"device": "cpu", "total": 32 * GIB, "available": 16 * GIB, "note": "", "free": 16 * GIB - 10}
    assert row == {**expected, "weights": 1, "kv": 2, "workspace": 3, "experts": 4}


@pytest.mark.parametrize("part", PARTS)
def test_too_much_names_the_numbers_and_what_to_lower(part: str) -> None:
    use = MemoryUse(**{name: GIB for name in PARTS if name != part}, **{part: 20 * GIB})
    with pytest.raises(OutOfMemoryError) as caught:
        memory_table({"cpu": use}, [CPU]).check_fits()
    text = str(caught.value)
    assert "needs 23.0 GiB on cpu and 16.0 GiB are available" in text
    assert f"{part} 20.0 GiB" in text
    assert text.endswith(f"The largest part is {part}: {REMEDIES[part]}.")


def test_the_limit_that_binds_is_named() -> None:
    limited = DeviceMemory("cpu", 2 * GIB, GIB, "limited to 2.0 GiB by /sys/fs/cgroup/memory.max")
    with pytest.raises(OutOfMemoryError, match=r"are available, limited to 2\.0 GiB by /sys/fs/cgroup/memory\.max"):
        memory_table({"cpu": MemoryUse(kv=GIB + 1)}, [limited]).check_fits()


def test_a_full_device_still_fits_and_one_byte_more_does_not() -> None:
    memory_table({"cpu": MemoryUse(kv=16 * GIB)}, [CPU]).check_fits()
    with pytest.raises(OutOfMemoryError):
        memory_table({"cpu": MemoryUse(kv=16 * GIB + 1)}, [CPU]).check_fits()


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(OutOfMemoryError, match=r"There is no device cuda:1.*cpu, cuda:0"):
        memory_table({"cuda:1": MemoryUse()}, [CPU, GPU])


@given(cpu=uses, gpu=uses)
def test_free_and_fit_agree_whatever_the_sizes(cpu: MemoryUse, gpu: MemoryUse) -> None:
    table = memory_table({"cpu": cpu, "cuda:0": gpu}, [CPU, GPU])
    assert [row["free"] for row in table.to_json()] == [16 * GIB - cpu.total, 7 * GIB - gpu.total]
    assert len({len(line) for line in table.render().splitlines()[:3]}) == 1
    if cpu.total <= 16 * GIB and gpu.total <= 7 * GIB:
        table.check_fits()
    else:
        with pytest.raises(OutOfMemoryError):
            table.check_fits()
