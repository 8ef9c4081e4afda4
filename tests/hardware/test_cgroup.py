"""Limits of control groups, read from machines laid out in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hardware.machines import GIB, NO_LIMIT_V1, join_v1, join_v2, v1_group, v2_group, write
from turbomoe.hardware.cgroup import UNLIMITED, cpu_quota, memory_limits, read_limit, read_table


def headrooms(root: Path) -> list[int]:
    return [limit.headroom for limit in memory_limits(root)]


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert memory_limits(tmp_path) == []
    assert cpu_quota(tmp_path) is None


def test_v2_counts_dropped_file_pages_as_room(tmp_path: Path) -> None:
    join_v2(tmp_path, "/job")
    v2_group(tmp_path, "/job", used=3 * GIB, idle=2 * GIB, max=4 * GIB, high="max")
    (limit,) = memory_limits(tmp_path)
    assert (limit.limit, limit.used, limit.headroom) == (4 * GIB, GIB, 3 * GIB)
    assert limit.source.endswith("job/memory.max")


def test_v2_high_is_a_limit_too(tmp_path: Path) -> None:
    join_v2(tmp_path, "/job")
    v2_group(tmp_path, "/job", max="max", high=GIB)
    assert [Path(limit.source).name for limit in memory_limits(tmp_path)] == ["memory.high"]


def test_v2_parents_limit_their_children(tmp_path: Path) -> None:
    join_v2(tmp_path, "/slice/job")
    v2_group(tmp_path, "/slice/job", max="max")
    v2_group(tmp_path, "/slice", max=2 * GIB, used=GIB)
    v2_group(tmp_path, "/", max=5 * GIB)
    assert headrooms(tmp_path) == [GIB, 5 * GIB]


def test_in_a_container_only_its_own_root_is_visible(tmp_path: Path) -> None:
    join_v2(tmp_path, "/docker/0123abcd")  # no such folder below the mount
    v2_group(tmp_path, "/", max=2 * GIB, used=GIB // 2)
    assert headrooms(tmp_path) == [3 * GIB // 2]


def test_a_group_outside_the_namespace_does_not_leave_the_mount(tmp_path: Path) -> None:
    join_v2(tmp_path, "/../../../outside")
    v2_group(tmp_path, "/", max=GIB)
    write(tmp_path, "outside/memory.max", 1)
    assert headrooms(tmp_path) == [GIB]


def test_v2_in_hybrid_mode(tmp_path: Path) -> None:
    join_v2(tmp_path, "/job")
    write(tmp_path, "sys/fs/cgroup/unified/job/memory.max", GIB)
    assert headrooms(tmp_path) == [GIB]


def test_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    join_v2(tmp_path, "/job")
    v2_group(tmp_path, "/job", max=GIB, used=2 * GIB)
    assert headrooms(tmp_path) == [0]


def test_v1(tmp_path: Path) -> None:
    join_v1(tmp_path, "/job", "cpu,memory")
    v1_group(tmp_path, "/job", 4 * GIB, used=2 * GIB, idle=GIB)
    v1_group(tmp_path, "/", NO_LIMIT_V1, used=20 * GIB)
    assert headrooms(tmp_path) == [3 * GIB]


def test_v1_limit_of_an_invisible_parent(tmp_path: Path) -> None:
    join_v1(tmp_path, "/job")
    v1_group(tmp_path, "/job", NO_LIMIT_V1, used=GIB, inherited=3 * GIB)
    assert headrooms(tmp_path) == [2 * GIB]


def test_v1_of_other_controllers_is_ignored(tmp_path: Path) -> None:
    join_v1(tmp_path, "/job", "memoryless")
    v1_group(tmp_path, "/job", GIB)
    assert memory_limits(tmp_path) == []


@pytest.mark.parametrize(("text", "quota"), [("150000 100000", 1.5), ("max 100000", None), ("100 0", None), ("", None)])
def test_v2_cpu_quota(tmp_path: Path, text: str, quota: float | None) -> None:
    join_v2(tmp_path, "/job")
    write(tmp_path, "sys/fs/cgroup/job/cpu.max", text)
    assert cpu_quota(tmp_path) == quota


def test_the_tightest_cpu_quota_wins(tmp_path: Path) -> None:
    join_v2(tmp_path, "/slice/job")
    write(tmp_path, "sys/fs/cgroup/slice/job/cpu.max", "400000 100000")
    write(tmp_path, "sys/fs/cgroup/slice/cpu.max", "200000 100000")
    assert cpu_quota(tmp_path) == 2.0


@pytest.mark.parametrize(("quota", "share"), [("50000", 0.5), ("-1", None)])
def test_v1_cpu_quota(tmp_path: Path, quota: str, share: float | None) -> None:
    join_v1(tmp_path, "/job", "cpu,cpuacct")
    write(tmp_path, "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us", quota)
    write(tmp_path, "sys/fs/cgroup/cpu/job/cpu.cfs_period_us", "100000")
    assert cpu_quota(tmp_path) == share


@given(content=st.binary(max_size=200) | st.integers(0, 1 << 90).map(lambda n: str(n).encode()))
def test_any_bytes_in_a_kernel_file_are_a_limit_or_none(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("odd") / "memory.max"
    path.write_bytes(content)
    limit = read_limit(path)
    assert limit is None or 0 <= limit < UNLIMITED
    assert all(isinstance(value, int) for value in read_table(path).values())


@given(groups=st.text(max_size=60))
def test_any_list_of_groups_is_survived(tmp_path_factory: pytest.TempPathFactory, groups: str) -> None:
    root = tmp_path_factory.mktemp("odd")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups, encoding="utf-8", errors="replace")
    assert memory_limits(root) == []
