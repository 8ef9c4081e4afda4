"""The atomic writer under kill -9, failing disks, read-only folders, links and rivals. The one place this is tested."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from turbomoe.errors import TurbomoeError
from turbomoe.files import atomic
from turbomoe.files.atomic import sweep_orphans, write_atomically, write_bytes, write_text

ROOT = Path(__file__).parents[2]
TEMPORARIES = ".turbomoe-*.tmp"


def run(script: str, *arguments: object, **environment: str) -> list[str]:
    """Run ``script`` in a fresh Python that can import turbomoe; its lines of output."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def temporary(folder: Path, pid: int) -> Path:
    path = folder / f".turbomoe-{pid}-{'0' * 16}.tmp"
    path.write_bytes(b"half a fi")
    return path


def test_it_writes_bytes_text_and_streams(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"\0\xff")
    write_text(tmp_path / "new" / "folder" / "b", "grüße\r\n")
    write_atomically(str(tmp_path / "c"), lambda file: [file.write(b"x" * 10_000) for _ in range(100)])
    assert (tmp_path / "a").read_bytes() == b"\0\xff"
    assert (tmp_path / "new" / "folder" / "b").read_bytes() == "grüße\r\n".encode()
    assert (tmp_path / "c").stat().st_size == 1_000_000
    assert not list(tmp_path.glob(TEMPORARIES))


def test_a_failing_callback_leaves_the_old_file_and_its_own_exception(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def broken(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, broken)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    seen = []

    def slowly(file: object) -> None:
        for _ in range(3):
            file.write(b"n" * 100_000)  # type: ignore[attr-defined]
            file.flush()  # type: ignore[attr-defined]
            seen.append(path.read_bytes())

    write_atomically(path, slowly)
    assert seen == [b"old"] * 3
    assert path.stat().st_size == 300_000


def test_it_follows_links_and_keeps_permissions(tmp_path: Path) -> None:
    real = tmp_path / "real" / "file"
    real.parent.mkdir()
    real.write_bytes(b"old")
    real.chmod(0o600)
    link = tmp_path / "link"
    link.symlink_to(real)
    write_bytes(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o600
    assert os.listdir(tmp_path / "real") == ["file"]


def test_a_dangling_link_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_bytes(tmp_path / "link", b"new")
    assert (tmp_path / "target").read_bytes() == b"new"


def test_a_new_file_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_bytes(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "file for a folder", "loop", "name too long"])
def test_targets_that_are_no_files_are_refused_untouched(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path(os.devnull)
    elif kind == "file for a folder":
        path.write_bytes(b"old")
        path = path / "below"
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path = tmp_path / ("n" * 300)
    with pytest.raises(TurbomoeError, match="Cannot write") as caught:
        write_bytes(path, b"new")
    assert str(path) in str(caught.value)
    assert not list(tmp_path.glob(TEMPORARIES))
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


def test_a_read_only_folder_is_one_clear_error() -> None:
    # Root may write anywhere, so a child gives its rights up first.
    script = """
        import os, sys, tempfile
        from turbomoe.files.atomic import write_bytes
        folder = tempfile.mkdtemp()
        write_bytes(folder + "/file", b"old")
        os.chmod(folder, 0o555)
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            write_bytes(folder + "/file", b"new")
        except Exception as error:
            print(type(error).__name__, error)
        print(open(folder + "/file").read(), os.listdir(folder))
        print(folder)
    """
    message, state, folder = run(script)
    os.chmod(folder, 0o755)
    shutil.rmtree(folder)
    assert message.startswith(f"WriteError Cannot write {folder}/file: Permission denied. Make the folder writable")
    assert state == "old ['file']"


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the failing disk is a small C library: needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("shim") / "failing_io.so"
    source = Path(__file__).with_name("failing_io.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


FAILING = """
    import ctypes, json, os, sys
    from turbomoe.files.atomic import WriteError, write_bytes, write_atomically
    library, path, error = ctypes.CDLL(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    library.failed_call.restype = ctypes.c_char_p
    new = bytes(range(256)) * 128
    def write(file):
        for start in range(0, len(new), 12_000):
            file.write(new[start : start + 12_000])
    for k in range(1, 100):
        write_bytes(path, b"old")
        library.arm(k, error)
        try:
            write_atomically(path, write)
            message = ""
        except WriteError as caught:
            message = str(caught)
        calls = library.disarm()
        content = open(path, "rb").read()
        state = {b"old": "old", new: "new"}.get(content, "torn")
        row = dict(k=k, call=library.failed_call().decode(), message=message, state=state)
        print(json.dumps(row | dict(files=os.listdir(os.path.dirname(path)))))
        if calls < k:
            break
"""


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EINTR, errno.EROFS, 0])
def test_every_call_may_fail(tmp_path: Path, shim: Path, error: int) -> None:
    """The k-th of open, write, fsync, close, rename fails, for every k; 0 stands for a write cut short."""
    rows = [json.loads(line) for line in run(FAILING, shim, tmp_path / "file", error, LD_PRELOAD=str(shim))]
    calls = [row["call"] for row in rows]
    renamed = calls.index("rename")
    assert calls[0] == "open" and set(calls[1 : renamed - 2]) == {"write"}
    assert calls[renamed - 2 : renamed] == ["fsync", "close"]  # of the file, before the rename
    assert calls[renamed + 1 :] == ["open", "fsync", "close", ""]  # of the folder, after it
    assert rows[-1]["state"] == "new"  # the last round ran to its end undisturbed
    for place, row in enumerate(rows):
        assert row["files"] == ["file"], row
        assert row["state"] == ("old" if row["message"] and place <= renamed else "new"), row
        if row["message"]:
            assert os.strerror(error) in row["message"]
    if error == 0:
        assert not any(row["message"] for row in rows)
    elif error != errno.EINTR:  # Python itself repeats most interrupted calls
        assert all(row["message"] for row in rows[:-1])
    if error == errno.ENOSPC:
        assert "Free space on that disk" in rows[1]["message"]


CRASHING = """
    import hashlib, json, os, random, signal, sys, time
    from turbomoe.files.atomic import sweep_orphans, write_atomically
    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)
    def scribble():
        for turn in range(1_000_000):
            body = os.urandom(rng.choice([10, 5_000, 300_000]))
            whole = hashlib.sha256(body).digest() + body
            write_atomically(path, lambda file: [file.write(whole[i : i + 9_000]) for i in range(0, len(whole), 9_000)])
    orphans, corrupt, swept = 0, 0, 0
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            scribble()
        time.sleep(rng.uniform(0.005, 0.04))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if os.path.exists(path):
            data = open(path, "rb").read()
            corrupt += hashlib.sha256(data[32:]).digest() != data[:32]
        orphans += len(os.listdir(os.path.dirname(path))) - os.path.exists(path)
        swept += sweep_orphans(os.path.dirname(path))
    print(json.dumps([orphans, corrupt, swept, os.listdir(os.path.dirname(path))]))
"""


def test_fifty_kills_and_not_one_torn_file(tmp_path: Path) -> None:
    kills = int(os.environ.get("TURBOMOE_KILLS", "50"))
    orphans, corrupt, swept, left = json.loads(run(CRASHING, tmp_path / "file", kills, 7)[0])
    assert corrupt == 0
    assert left == ["file"]
    assert orphans == swept
    assert orphans > kills / 10  # the kills really fell into the middle of writes


def test_two_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    script = """
        import sys
        from turbomoe.files.atomic import write_atomically
        letter = sys.argv[2].encode()
        for turn in range(100):
            write_atomically(sys.argv[1], lambda file: [file.write(letter * 10_000) for _ in range(10)])
    """
    path = tmp_path / "file"
    write_bytes(path, b"a" * 100_000)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    writers = [subprocess.Popen([*command, letter], env=env) for letter in "ab"]
    letters: set[bytes] = set()
    while any(writer.poll() is None for writer in writers):
        data = path.read_bytes()
        assert data in (b"a" * 100_000, b"b" * 100_000)
        letters.add(data[:1])
    assert [writer.returncode for writer in writers] == [0, 0]
    assert letters == {b"a", b"b"}
    assert os.listdir(tmp_path) == ["file"]


def test_orphans_of_the_dead_are_swept(tmp_path: Path, dead_pid: int) -> None:
    orphan = temporary(tmp_path, dead_pid)
    assert sweep_orphans(tmp_path) == 1
    assert not orphan.exists()


def test_the_first_write_into_a_folder_sweeps_it(tmp_path: Path, dead_pid: int) -> None:
    temporary(tmp_path, dead_pid)
    write_bytes(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


def test_a_recycled_process_id_is_no_excuse(tmp_path: Path) -> None:
    # In a container every run of turbomoe may be process 1.
    temporary(tmp_path, os.getpid())
    assert sweep_orphans(tmp_path) == 1


def test_a_live_writer_in_this_process_is_left_alone(tmp_path: Path) -> None:
    counts = []
    write_atomically(tmp_path / "file", lambda file: counts.append(sweep_orphans(tmp_path)))
    assert counts == [0]
    assert os.listdir(tmp_path) == ["file"]
    assert not atomic._live


def test_the_moment_before_the_lock_is_safe_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    monkeypatch.setattr(atomic, "_lock", lambda descriptor: counts.append(sweep_orphans(tmp_path)))
    write_bytes(tmp_path / "file", b"new")
    assert counts == [0]
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def stranger(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another live process that holds a lock on the file named on its standard input."""
    script = """
import fcntl, sys
file = open(sys.stdin.readline().strip(), "r+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_live_process_keeps_its_file(tmp_path: Path, stranger: subprocess.Popen[str]) -> None:
    path = temporary(tmp_path, stranger.pid)
    assert sweep_orphans(tmp_path) == 0
    assert path.exists()


def test_a_locked_file_of_another_container_is_left_alone(
    tmp_path: Path, stranger: subprocess.Popen[str], dead_pid: int
) -> None:
    path = temporary(tmp_path, dead_pid)
    assert stranger.stdin and stranger.stdout
    stranger.stdin.write(f"{path}\n")
    stranger.stdin.flush()
    assert stranger.stdout.readline() == "held\n"
    assert sweep_orphans(tmp_path) == 0
    assert path.exists()


def test_the_writer_holds_the_lock_while_it_writes(tmp_path: Path) -> None:
    refused = []

    def look(file: object) -> None:
        (path,) = tmp_path.glob(TEMPORARIES)
        with open(path, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(path)

    write_atomically(tmp_path / "file", look)
    assert len(refused) == 1


def test_the_sweeper_touches_nothing_else(tmp_path: Path, dead_pid: int) -> None:
    names = ["notes.tmp", ".turbomoe-x-0000000000000000.tmp", f".turbomoe-{dead_pid}-1.tmp", f"turbomoe-{dead_pid}.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / f".turbomoe-{dead_pid}-{'a' * 16}.tmp").symlink_to(tmp_path / "notes.tmp")
    (tmp_path / f".turbomoe-{dead_pid}-{'b' * 16}.tmp").mkdir()
    before = sorted(os.listdir(tmp_path))
    assert sweep_orphans(tmp_path) == 0
    assert sorted(os.listdir(tmp_path)) == before
    assert sweep_orphans(tmp_path / "nowhere") == 0


def test_the_check_for_torn_files_can_fail(tmp_path: Path) -> None:
    """The oracle of the kill test does notice a torn file."""
    body = b"0123456789"
    whole = hashlib.sha256(body).digest() + body
    assert hashlib.sha256(whole[32:-1]).digest() != whole[:32]
