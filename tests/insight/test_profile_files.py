"""Profile and trace files: what is written comes back, and whatever is wrong with a file is refused with a reason."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.insight.routing import dice_trace, model
from turbomoe.errors import SettingsError
from turbomoe.files import array_file
from turbomoe.files.array_file import RecordError, save_arrays
from turbomoe.insight import profile, trace
from turbomoe.insight.profile import LAGS, Profile, RoutingStats, check_domain
from turbomoe.insight.trace import Trace

OF = model()


def random_stats(seed: int) -> RoutingStats:
    rng = np.random.default_rng(seed)
    stats = RoutingStats.zeros(*OF.shape)
    stats.tokens[:] = rng.integers(1, 99, 2)
    stats.counts[:] = rng.integers(0, 50, stats.counts.shape)
    stats.mass[:], stats.recent[:] = rng.random(stats.mass.shape), rng.random(stats.recent.shape)
    for name in ("reuse", "recall"):
        pairs = getattr(stats, f"{name}_pairs")
        pairs[:] = rng.integers(1, 99, pairs.shape)
        getattr(stats, f"{name}_hits")[:] = rng.integers(0, pairs + 1)
    return stats


PROFILE = Profile(OF, 32.0, {"prose": random_stats(0), "code": random_stats(1)})
TRACE = dice_trace(OF, 12, 5, rows=2)


def same_stats(a: RoutingStats, b: RoutingStats) -> bool:
    pairs = zip(a.arrays().values(), b.arrays().values(), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def same_profile(a: Profile, b: Profile) -> bool:
    same = a.model == b.model and a.half_life == b.half_life and list(a.domains) == list(b.domains)
    return same and all(same_stats(a.domains[name], b.domains[name]) for name in a.domains)


def same_trace(a: Trace, b: Trace) -> bool:
    names = ("ids", "weights", "rows", "phases", "after")
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in names)
    return arrays and (a.model, a.domain) == (b.model, b.domain)


@pytest.fixture
def profile_path(tmp_path: Path) -> Path:
    PROFILE.save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


@pytest.fixture
def trace_path(tmp_path: Path) -> Path:
    TRACE.save(tmp_path / "t.safetensors")
    return tmp_path / "t.safetensors"


def test_what_is_saved_comes_back(profile_path: Path, trace_path: Path) -> None:
    assert same_profile(Profile.load(profile_path, OF.identity), PROFILE)
    assert same_trace(Trace.load(trace_path), TRACE)


def test_an_empty_trace_is_one(tmp_path: Path) -> None:
    empty = trace.TraceRecorder(OF).finish("nothing")
    empty.save(tmp_path / "t")
    assert same_trace(Trace.load(tmp_path / "t"), empty) and empty.decode_rows == 0


# -- merging -----------------------------------------------------------------------------------------------------


def test_merging_adds_equal_domains_and_keeps_the_others() -> None:
    other = Profile(OF, 32.0, {"code": random_stats(2), "docs": random_stats(3)})
    merged = PROFILE.merged(other)
    assert list(merged.domains) == ["prose", "code", "docs"]
    assert same_stats(merged.domains["code"], random_stats(1) + random_stats(2))
    assert same_stats(merged.domains["prose"], random_stats(0)) and same_stats(merged.domains["docs"], random_stats(3))
    assert np.array_equal(merged.total().counts, sum(random_stats(i).counts for i in range(4)))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_merging_does_not_depend_on_the_order(seeds: list[int], shuffle: int) -> None:
    parts = [Profile(OF, 32.0, {f"d{seed % 2}": random_stats(seed)}) for seed in seeds]
    shuffled = random.Random(shuffle).sample(parts, len(parts))
    one, other = parts[0], shuffled[0]
    for a, b in zip(parts[1:], shuffled[1:], strict=True):
        one, other = one.merged(a), other.merged(b)
    for name, stats in one.domains.items():
        for field, array in stats.arrays().items():
            assert np.allclose(array, other.domains[name].arrays()[field], rtol=1e-12), field


def test_profiles_that_do_not_belong_together_do_not_merge() -> None:
    with pytest.raises(RecordError, match="another model"):
        PROFILE.merged(Profile(replace(OF, identity="b" * 64), 32.0, {}))
    with pytest.raises(RecordError, match="half-life"):
        PROFILE.merged(Profile(OF, 16.0, {}))


def test_the_prior_weighs_every_domain_the_same() -> None:
    few, many = RoutingStats.zeros(*OF.shape), RoutingStats.zeros(*OF.shape)
    few.counts[1, :, 0], many.counts[:, :, 1] = 1, 1000
    prior = Profile(OF, 32.0, {"few": few, "many": many, "none": RoutingStats.zeros(*OF.shape)}).prior()
    assert prior[:, 0].tolist() == prior[:, 1].tolist() == [0.5, 0.5] and prior.sum() == 2


# -- refusals ----------------------------------------------------------------------------------------------------


def test_another_model_s_profile_is_refused(profile_path: Path) -> None:
    with pytest.raises(RecordError, match="another model") as caught:
        Profile.load(profile_path, "f" * 64)
    assert "aaaaaaaaaaaa" in str(caught.value) and "ffffffffffff" in str(caught.value)


@pytest.mark.parametrize("kind", [profile, trace])
def test_a_future_version_is_refused_before_anything_else(kind: Any, tmp_path: Path) -> None:
    save_arrays(tmp_path / "f", kind.KIND, kind.VERSION + 1, {"unknown": 1}, {"x": np.zeros(3)})
    with pytest.raises(
        RecordError, match=r"its version is '2', and this turbomoe reads 1.*Use the turbomoe that wrote"
    ):
        loader(kind)(tmp_path / "f")


def loader(kind: Any) -> Callable[[Path], object]:
    return Profile.load if kind is profile else Trace.load


def test_files_of_another_kind_are_refused(profile_path: Path, trace_path: Path, tmp_path: Path) -> None:
    for load, path in ((Profile.load, trace_path), (Trace.load, profile_path)):
        with pytest.raises(RecordError, match="another kind"):
            load(path)
    save_file({"x": np.zeros(3)}, tmp_path / "plain")
    (tmp_path / "text").write_text("a profile")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(profile_path.read_bytes()[:100])
    wrong = {"plain": "another kind", "text": "another kind", "empty": "damaged", "cut": "damaged", "none": "not there"}
    for name, said in wrong.items():
        with pytest.raises(RecordError, match=said):
            Profile.load(tmp_path / name)
    with pytest.raises(RecordError, match="not a regular file"):
        Profile.load(tmp_path)


def test_a_file_larger_than_any_is_not_read(profile_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "LARGEST_FILE", 100)
    with pytest.raises(RecordError, match="more than 100"):
        Profile.load(profile_path)


def mutants(data: bytes, count: int, seed: int) -> list[bytes]:
    """Flipped bits, cut tails, cut middles, doubled and overwritten stretches."""
    dice, made = random.Random(seed), []
    for number in range(count):
        at, size = dice.randrange(len(data)), dice.randrange(1, 40)
        if number % 5 == 0:
            made.append(data[:at])
        elif number % 5 == 1:
            made.append(data[:at] + data[at + size :])
        elif number % 5 == 2:
            made.append(data[:at] + data[at : at + size] + data[at:])
        elif number % 5 == 3:
            made.append(data[:at] + dice.randbytes(size) + data[at + size :])
        else:
            made.append(data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :])
    return made


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that is to be had: thousands of files are written."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("kind", [profile, trace])
def test_every_mutant_is_refused_or_says_the_same(kind: Any, fast_folder: Path) -> None:
    path = fast_folder / "mutant"
    (PROFILE if kind is profile else TRACE).save(path)
    original, refused = path.read_bytes(), 0
    for mutant in mutants(original, 3000, 7):
        path.write_bytes(mutant)
        try:
            found = loader(kind)(path)
        except RecordError as error:
            assert str(path) in str(error) and len(str(error)) < 600
            refused += 1
            continue
        assert same_profile(found, PROFILE) if kind is profile else same_trace(found, TRACE)
    assert refused > 2900


def signed(path: Path, kind: Any, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """A file whose checksum agrees, whatever it holds."""
    save_arrays(path, kind.KIND, kind.VERSION, header, arrays)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["header"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


BAD_VALUES = [None, -1, 0, 2**70, 1.5, True, "x", [], {}, [-1, 0], [True, True], [0], [0, 0], [[0], [1]], [2**41] * 2]
FIELDS = ("identity", "name", "layers", "experts", "top_k", "blob_bytes")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("kind", [profile, trace])
def test_a_signed_file_with_a_senseless_model_is_refused(
    kind: Any, field: str, profile_path: Path, trace_path: Path
) -> None:
    path = profile_path if kind is profile else trace_path
    header, arrays = contents(path)
    bad = [value for value in BAD_VALUES if not (field in ("identity", "name") and value == "x")]
    for value in bad:
        signed(path, kind, header | {"model": header["model"] | {field: value}}, arrays)
        with pytest.raises(RecordError):
            loader(kind)(path)
    for broken in (None, [], {}, {k: v for k, v in header["model"].items() if k != field}):
        signed(path, kind, header | {"model": broken}, arrays)
        with pytest.raises(RecordError):
            loader(kind)(path)


def swap(arrays: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return arrays | {name.replace("__", "."): value for name, value in changes.items()}


def test_a_signed_profile_with_senseless_sums_is_refused(profile_path: Path) -> None:
    header, arrays = contents(profile_path)
    counts, pairs = arrays["0.counts"], arrays["0.reuse_pairs"]
    bad = [
        swap(arrays, **{"0__counts": -counts}),
        swap(arrays, **{"0__counts": counts.astype(np.int32)}),
        swap(arrays, **{"0__counts": counts[:, :, :-1]}),
        swap(arrays, **{"0__counts": counts[:1]}),
        swap(arrays, **{"0__mass": np.full(counts.shape, np.nan)}),
        swap(arrays, **{"0__recent": np.full(counts.shape[1:], np.inf)}),
        swap(arrays, **{"0__reuse_hits": pairs + 1}),
        swap(arrays, **{"0__recall_hits": arrays["0.recall_pairs"] + 1}),
        swap(arrays, **{"2__counts": counts}),
        swap(arrays, extra=counts),
        {name: array for name, array in arrays.items() if name != "1.tokens"},
    ]
    for number, changed in enumerate(bad):
        signed(profile_path, profile, header, changed)
        with pytest.raises(RecordError):
            Profile.load(profile_path)
            pytest.fail(f"number {number} was taken")
    for key in ("domains", "half_life"):
        for value in (*BAD_VALUES, ["a/b", "c"], ["prose", "prose"], float("inf"), -3.0, "prose"):
            signed(profile_path, profile, header | {key: value}, arrays)
            if key == "half_life" and value == 1.5:
                assert Profile.load(profile_path).half_life == 1.5
                continue
            with pytest.raises(RecordError):
                Profile.load(profile_path)


def test_counts_of_experts_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    narrow = replace(OF, experts=(8, 5))
    stats = random_stats(0)
    Profile(narrow, 32.0, {"a": stats}).save(tmp_path / "p")
    with pytest.raises(RecordError, match="experts that its model does not have"):
        Profile.load(tmp_path / "p")


def test_a_signed_trace_with_senseless_routing_is_refused(trace_path: Path) -> None:
    header, arrays = contents(trace_path)
    ids, rows = arrays["ids"], arrays["rows"]
    bad = [
        arrays | {"ids": np.full_like(ids, 8)},
        arrays | {"ids": ids[:-1]},
        arrays | {"ids": ids.astype(np.int32)},
        arrays | {"ids": ids[:, :1]},
        arrays | {"weights": arrays["weights"][:-1]},
        arrays | {"weights": arrays["weights"].astype(np.float32)},
        arrays | {"rows": rows + 1},
        arrays | {"rows": -rows},
        arrays | {"rows": rows[:-1]},
        arrays | {"phases": np.full_like(arrays["phases"], 2)},
        arrays | {"after": np.full_like(arrays["after"], 3)},
        arrays | {"after": arrays["after"][:-1]},
        arrays | {"extra": rows},
        {name: array for name, array in arrays.items() if name != "weights"},
    ]
    for number, changed in enumerate(bad):
        signed(trace_path, trace, header, changed)
        with pytest.raises(RecordError):
            Trace.load(trace_path)
            pytest.fail(f"number {number} was taken")
    signed(trace_path, trace, header | {"domain": 3}, arrays)
    with pytest.raises(RecordError):
        Trace.load(trace_path)


def test_a_header_that_is_no_object_or_too_deep_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signed(tmp_path / "f", profile, [1, 2], {})  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="not an object"):
        Profile.load(tmp_path / "f")
    monkeypatch.setattr(array_file.json, "dumps", lambda value, **_: "[" * 100_000 if value == "deep" else str(value))
    signed(tmp_path / "f", profile, "deep", {})  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="damaged"):
        Profile.load(tmp_path / "f")


def test_a_file_that_cannot_be_written_leaves_the_old_one(profile_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = profile_path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(Exception, match="no space"):
        Profile(OF, 32.0, {}).save(profile_path)
    assert profile_path.read_bytes() == before and [p.name for p in profile_path.parent.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "x" * 65, "a\n", "\x00"])
def test_tags_that_cannot_be_names_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="cannot tag"):
        check_domain(name)
    assert check_domain("prose-1.2_x+y") == "prose-1.2_x+y" and LAGS == 32
