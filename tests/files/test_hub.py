"""Downloads from a hub on loopback: what is fetched, resumed, refused, and how each failure reads."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save

from tests.files.loopback_hub import COMMIT, LoopbackHub, oid
from turbomoe.errors import ModelFileError, ModelReferenceError, TurbomoeError
from turbomoe.files import hub, hub_transfer, open_model
from turbomoe.files.atomic import WriteError
from turbomoe.files.hub import HubUnreachableError, download
from turbomoe.files.reference import resolve
from turbomoe.notices import board

REPO = "some-org/some-model"
BIG = bytes(range(256)) * 2000  # 512,000 bytes
HALF = 256_000
CHUNK = 16_000  # the library hands bytes on in steps of 10 MB: what a cut connection costs
Serve = Callable[..., LoopbackHub]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    real_sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: real_sleep(min(seconds, 0.002)))  # the library's retries
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def serve(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    hubs: list[LoopbackHub] = []

    def start(files: dict[str, bytes], **behaviour: Any) -> LoopbackHub:
        hubs.append(LoopbackHub(REPO, files, **behaviour))
        template = hubs[-1].url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hubs[-1].url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return hubs[-1]

    yield start
    for server in hubs:
        server.close()


def partials(cache: Path) -> list[Path]:
    return list(cache.rglob("*.partial"))


def failure(*arguments: str) -> str:
    """The message of the one error that this download must end in."""
    with pytest.raises(TurbomoeError) as caught:
        download(REPO, *arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_one_gguf_file_is_fetched_whole_and_once(serve: Serve, cache: Path) -> None:
    server = serve({"README.md": b"hello", "model-Q8_0.gguf": BIG})
    path = resolve(f"hf:{REPO}")
    assert path.read_bytes() == BIG
    assert path == cache / "models--some-org--some-model" / "snapshots" / COMMIT / "model-Q8_0.gguf"
    assert path.resolve() == cache / "models--some-org--some-model" / "blobs" / oid(BIG)
    assert download(REPO) == path
    assert server.downloads() == [("model-Q8_0.gguf", None)]
    assert partials(cache) == []


def test_all_shards_of_a_series_come_from_one_commit(serve: Serve) -> None:
    shards = {f"Q4_K_M/model-Q4_K_M-0000{n}-of-00003.gguf": BIG + bytes([n]) for n in (1, 2, 3)}
    server = serve({**shards, "model-Q8_0.gguf": b"other" * 999})
    first = download(REPO, "q4_k_m")
    assert first.name == "model-Q4_K_M-00001-of-00003.gguf"
    assert [(first.parent / Path(name).name).read_bytes() for name in sorted(shards)] == list(shards.values())
    assert server.downloads() == [(name, None) for name in sorted(shards)]
    resolved = [request.path for request in server.requests if "/resolve/" in request.path]
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved)


def test_small_files_are_checked_too(serve: Serve) -> None:
    serve({"tiny-Q4_0.gguf": b"GGUF tiny"})  # listed by git blob id, not by SHA-256
    assert download(REPO).read_bytes() == b"GGUF tiny"


def test_long_listings_are_read_to_the_end(serve: Serve) -> None:
    serve({f"doc-{n}.md": b"text" for n in range(9)} | {"z-Q4_K_M.gguf": BIG}, tree_page=4)
    assert download(REPO).name == "z-Q4_K_M.gguf"


def weights(*names: str) -> bytes:
    return save({name: torch.full((400,), float(len(name))) for name in names})


@pytest.mark.parametrize("sharded", [False, True])
def test_a_safetensors_model_comes_without_anything_it_does_not_need(serve: Serve, sharded: bool) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "bb": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": names}).encode()
    files = {"model.safetensors.index.json": index, **{shard: weights(name) for name, shard in names.items()}}
    needed = files if sharded else {"model.safetensors": weights("a", "bb")}
    companions = {"config.json": b"{}", "tokenizer.json": b"[]", "chat_template.jinja": b"{{ messages }}"}
    others = {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"P" * 2000, "original/model.safetensors": BIG}
    server = serve({**needed, **companions, **others})
    source = open_model(download(REPO))
    assert source.load("bb")[0] == 2 and source.metadata["chat_template"] == "{{ messages }}"
    assert {name for name, _ in server.downloads()} == {*needed, *companions}


def test_an_index_naming_a_file_the_repository_lacks(serve: Serve) -> None:
    index = json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode()
    serve({"model.safetensors.index.json": index, "config.json": b"{}"})
    assert "is incomplete. Its index names model-00001-of-00001.safetensors" in failure()


def test_an_index_leading_out_of_the_folder(serve: Serve) -> None:
    index = json.dumps({"weight_map": {"a": "../../../evil.safetensors"}}).encode()
    serve({"model.safetensors.index.json": index, "config.json": b"{}"})
    assert failure().startswith("ModelFileError") and "plain .safetensors name" in failure()


def test_a_repository_of_pickles_has_no_model(serve: Serve) -> None:
    server = serve({"config.json": b"{}", "pytorch_model.bin": BIG})
    assert "holds no model for turbomoe. It has neither GGUF" in failure()
    assert server.downloads() == []


def test_several_candidates_are_listed_with_sizes(serve: Serve) -> None:
    server = serve({"m-Q5_K_M.gguf": BIG, "m-Q8_0.gguf": BIG * 2})
    assert f"hf:{REPO}:Q5_K_M (0.5 MB), hf:{REPO}:Q8_0 (1.0 MB)" in failure()
    assert f"has no 'Q2_K'. It has hf:{REPO}:Q5_K_M" in failure("Q2_K")
    assert server.downloads() == []


# --- interruptions


def test_a_cut_connection_is_resumed_in_place(serve: Serve) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=HALF, cuts=1)
    assert download(REPO).read_bytes() == BIG
    assert server.downloads() == [("m-Q4_K_M.gguf", None), ("m-Q4_K_M.gguf", f"bytes={HALF}-")]


def test_the_next_run_goes_on_where_the_last_one_stopped(serve: Serve, cache: Path) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=HALF, cuts=1, resume_status=503)
    assert "is in trouble (HTTP 503). Try again in a minute" in failure()
    assert partials(cache)[0].read_bytes() == BIG[:HALF]
    server.resume_status = 0
    server.requests.clear()
    assert download(REPO).read_bytes() == BIG
    assert server.downloads() == [("m-Q4_K_M.gguf", f"bytes={HALF}-")]
    assert partials(cache) == []


def test_a_connection_that_keeps_breaking_still_arrives(serve: Serve) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=CHUNK, cuts=20)
    assert download(REPO).read_bytes() == BIG
    assert server.downloads() == [("m-Q4_K_M.gguf", f"bytes={n * CHUNK}-" if n else None) for n in range(21)]


def test_ctrl_c_keeps_what_is_here(serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=HALF, cuts=1)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(time, "sleep", interrupted)
        download(REPO)
    assert partials(cache)[0].stat().st_size == HALF
    assert download(REPO).read_bytes() == BIG
    assert server.downloads()[1:] == [("m-Q4_K_M.gguf", f"bytes={HALF}-")]


def test_kill_9_loses_little_and_the_endpoint_comes_from_the_environment(serve: Serve, cache: Path) -> None:
    data = BIG * 48  # 24.6 MB: the child's library really writes in steps of 10 MB
    server = serve({"m-Q4_K_M.gguf": data}, cut_after=15_000_000, cuts=1, stall=True)
    env = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(cache), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
    script = f"from turbomoe.files.reference import resolve; print(resolve('hf:{REPO}'))"
    command, root = [sys.executable, "-c", script], Path(__file__).parents[2]
    child = subprocess.Popen(command, env=env, cwd=root, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while sum(path.stat().st_size for path in partials(cache)) < 10 << 20:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    kept = partials(cache)[0].stat().st_size
    assert kept == 10 << 20
    server.requests.clear()
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == data
    assert server.downloads() == [("m-Q4_K_M.gguf", f"bytes={kept}-")]


def test_a_hub_that_cannot_resume_is_read_from_the_start(serve: Serve) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=HALF, cuts=1, ignore_range=True)
    assert download(REPO).read_bytes() == BIG
    assert server.downloads()[1] == ("m-Q4_K_M.gguf", f"bytes={HALF}-")


@pytest.mark.parametrize("left", [b"", BIG, BIG + b"more than all", b"x" * 10])
def test_any_partial_file_ends_in_the_right_bytes_or_an_error(serve: Serve, cache: Path, left: bytes) -> None:
    serve({"m-Q4_K_M.gguf": BIG})
    partial = hub_transfer.partial_path(cache / "models--some-org--some-model" / "blobs" / oid(BIG))
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    if left.startswith(b"x"):
        assert failure().startswith("ModelFileError") and partials(cache) == []
    assert download(REPO).read_bytes() == BIG


def test_damaged_bytes_are_noticed_and_thrown_away(serve: Serve, cache: Path) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, corrupt=True)
    message = failure()
    assert message.startswith("ModelFileError") and "is not what it had promised" in message
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size >= len(BIG)]
    server.corrupt = False
    assert download(REPO).read_bytes() == BIG


def test_two_downloads_at_once_fetch_once(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG}, cut_after=HALF, cuts=1, stall=True)
    before = board.counts["waiting for m-Q4_K_M.gguf"]
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(download(REPO))) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while board.counts["waiting for m-Q4_K_M.gguf"] == before and time.monotonic() < deadline:
        time.sleep(0.01)
    server.go_on.set()
    for thread in threads:
        thread.join()
    assert board.counts["waiting for m-Q4_K_M.gguf"] == before + 1
    assert [path.read_bytes() == BIG for path in paths] == [True, True]
    assert server.downloads() == [("m-Q4_K_M.gguf", None)]


# --- room on the disk


def only_this_much(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = SimpleNamespace(total=10**12, used=0, free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_a_disk_too_small_is_refused_before_the_download(
    serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = {f"m-Q4_K_M-0000{n}-of-00002.gguf": BIG + bytes([n]) for n in (1, 2)}
    server = serve(shards)
    only_this_much(monkeypatch, 2 * len(BIG) + 1)
    message = failure()
    assert message.startswith("WriteError") and f"1.0 MB to download, 1.0 MB free in {cache}" in message
    assert "HF_HUB_CACHE" in message
    assert server.downloads() == [] and not cache.exists()
    only_this_much(monkeypatch, 2 * len(BIG) + 2)
    download(REPO)


def test_what_is_already_here_needs_no_room(serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve({f"m-Q4_K_M-0000{n}-of-00002.gguf": BIG + bytes([n]) for n in (1, 2)})
    blobs = cache / "models--some-org--some-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / oid(BIG + b"\1")).write_bytes(BIG + b"\1")
    hub_transfer.partial_path(blobs / oid(BIG + b"\2")).write_bytes(BIG[:HALF])
    only_this_much(monkeypatch, HALF)
    assert "0.3 MB to download" in failure()
    only_this_much(monkeypatch, HALF + 1)
    assert download(REPO).read_bytes() == BIG + b"\1"


def test_a_disk_that_fills_up_meanwhile(serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve({"m-Q4_K_M.gguf": BIG})
    real = hub_transfer.http_get

    def fills_up(url: str, out: Any, **options: Any) -> None:
        out.write(BIG[:HALF])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_transfer, "http_get", fills_up)
    message = failure()
    assert message.startswith("WriteError") and "is full; what was downloaded is kept" in message
    assert partials(cache)[0].stat().st_size == HALF
    monkeypatch.setattr(hub_transfer, "http_get", real)
    assert download(REPO).read_bytes() == BIG


# --- refusals


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "ModelReferenceError: The hub has no repository some-org/some-model that you may see"),
        (401, "RepoNotFound", "ModelReferenceError: The hub has no repository"),
        (401, "", r"ModelReferenceError: The hub refuses access to some-org/some-model \(HTTP 401\).* HF_TOKEN"),
        (403, "GatedRepo", "ModelReferenceError: some-org/some-model is open only to those who accept its conditions"),
        (403, "", r"ModelReferenceError: The hub refuses access to some-org/some-model \(HTTP 403\).* HF_TOKEN"),
        (404, "EntryNotFound", r"ModelReferenceError: The hub no longer has a file .*HTTP 404"),
        (429, "", r"HubUnreachableError: The hub at \S+ is in trouble \(HTTP 429\). Try again"),
        (500, "", r"HubUnreachableError: The hub at \S+ is in trouble \(HTTP 500\). Try again"),
        (503, "", r"HubUnreachableError: The hub at \S+ is in trouble \(HTTP 503\). Try again"),
    ],
)
def test_each_refusal_is_a_sentence_with_a_next_step(serve: Serve, status: int, code: str, expected: str) -> None:
    serve({"m-Q4_K_M.gguf": BIG}, status=status, error_code=code)
    message = failure()
    assert re.match(expected, message), message
    assert "\n" not in message and "Traceback" not in message


def test_an_answer_that_is_no_hub(serve: Serve) -> None:
    serve({}, garbage=True)
    message = failure()
    assert message.startswith("HubUnreachableError: The hub at http://127.0.0.1") and "HF_ENDPOINT" in message


def test_no_hub_at_all(serve: Serve) -> None:
    serve({}).close()
    assert "cannot be reached" in failure() and "Check the connection" in failure()


@pytest.mark.parametrize(
    "name",
    [
        *("../m-Q4_K_M.gguf", "/tmp/m-Q4_K_M.gguf", "a/../../m-Q4_K_M.gguf", "a\\..\\m-Q4_K_M.gguf", "./m-Q4_K_M.gguf"),
        *("a//m-Q4_K_M.gguf", "m\0-Q4_K_M.gguf", "C:m-Q4_K_M.gguf", "n" * 300 + "-Q4_K_M.gguf", "", "m\n-Q4_K_M.gguf"),
    ],
)
def test_names_that_lead_out_of_the_folder_are_refused(serve: Serve, cache: Path, name: str) -> None:
    entry = {"type": "file", "path": name, "size": 3, "oid": "1" * 40}
    server = serve({"m-Q4_K_M.gguf": BIG}, listing=[entry])
    assert "cannot be trusted. Its listing holds the name" in failure()
    assert server.downloads() == [] and not cache.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"oid": "../../../../evil"}, "the digest '../../../../evil'"),
        ({"oid": ""}, "the digest ''"),
        ({"size": -1}, "the size -1"),
        ({"size": "3"}, "the size '3'"),
    ],
)
def test_entries_that_make_no_sense_are_refused(serve: Serve, cache: Path, change: Any, reason: str) -> None:
    entry = {"type": "file", "path": "m-Q4_K_M.gguf", "size": 3, "oid": "1" * 40, **change}
    serve({}, listing=[entry])
    assert reason in failure()
    assert not cache.exists()


@pytest.mark.parametrize("commit", ["../../evil", "main", "", "C0FFEE" + "0" * 34])
def test_a_commit_that_is_none_is_refused(serve: Serve, cache: Path, commit: str) -> None:
    serve({"m-Q4_K_M.gguf": BIG}, commit=commit)
    assert f"it names the commit '{commit}'" in failure()
    assert not cache.exists()


# --- what is here already


def test_other_tools_find_our_files_and_we_find_theirs(serve: Serve, cache: Path) -> None:
    server = serve({"a-Q4_K_M.gguf": BIG, "b-Q8_0.gguf": BIG[::-1]})
    ours = download(REPO, "Q4_K_M")
    found = hf_hub_download(REPO, "a-Q4_K_M.gguf", revision=COMMIT, cache_dir=cache, local_files_only=True)
    assert Path(found) == ours
    hf_hub_download(REPO, "b-Q8_0.gguf", cache_dir=cache)
    server.requests.clear()
    assert download(REPO, "Q8_0").read_bytes() == BIG[::-1]
    assert server.downloads() == []


def test_without_a_hub_the_copy_here_is_used_and_said(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    server = serve({f"m-Q4_K_M-0000{n}-of-00002.gguf": BIG + bytes([n]) for n in (1, 2)})
    path = download(REPO)
    server.status = 503
    assert download(REPO) == path
    assert f"using the copy of {REPO} in the cache" in capsys.readouterr().err
    path.with_name("m-Q4_K_M-00002-of-00002.gguf").unlink()
    assert "HTTP 503" in failure()


def test_offline_the_copy_here_is_used_and_nobody_is_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve({"config.json": b"{}", "model.safetensors": weights("a")})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "is not whole in the cache, and the hub may not be asked. Unset HF_HUB_OFFLINE" in failure()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = download(REPO)
    server.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO) == path
    assert server.requests == []


def test_the_newest_whole_copy_wins(serve: Serve, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG})
    old = download(REPO)
    server.commit, server.files = "d00d" + "0" * 36, {"m-Q4_K_M.gguf": BIG[::-1]}
    new = download(REPO)
    assert old != new and new.read_bytes() == BIG[::-1]
    os.utime(old.parent, ns=(1, 1))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(REPO) == new
    new.resolve().unlink()
    assert download(REPO) == old


def test_the_token_goes_to_the_hub(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve({"m-Q4_K_M.gguf": BIG})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download(REPO)
    assert {request.authorization for request in server.requests} == {"Bearer hf_secret"}


def test_files_beyond_plain_http_are_left_to_the_library_and_said(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    serve({"m-Q4_K_M.gguf": BIG})
    monkeypatch.setattr(hub, "can_resume", lambda file: False)
    assert download(REPO).read_bytes() == BIG
    assert "m-Q4_K_M.gguf is downloaded by the hub library" in capsys.readouterr().err


def test_the_listed_errors_are_the_ones_we_promise() -> None:
    assert issubclass(HubUnreachableError, ModelReferenceError)
    assert issubclass(WriteError, TurbomoeError) and issubclass(ModelFileError, TurbomoeError)
