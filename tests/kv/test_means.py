"""Key and value means: the right numbers, one digest, and files that are refused when they are not what they say."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from turbomoe.errors import TurbomoeError
from turbomoe.kv import means as module
from turbomoe.kv.means import FORMAT, VERSION, KVMeans, MeansError

IDENTITY = "7f" * 32


def some_means(identity: str = IDENTITY) -> KVMeans:
    generator = torch.Generator().manual_seed(3)
    keys, values, scales = ({layer: torch.randn(2, 16, generator=generator) for layer in (0, 3, 11)} for _ in range(3))
    return KVMeans(keys, values, identity, {layer: s.exp() for layer, s in scales.items()}, 0.5 ** torch.arange(5))


def assert_same(a: KVMeans, b: KVMeans) -> None:
    assert a.identity == b.identity and a.digest == b.digest
    assert torch.equal(a.frequencies, b.frequencies)
    for left, right in ((a.keys, b.keys), (a.values, b.values), (a.scales, b.scales)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[layer], right[layer]) for layer in left)


def test_saved_means_come_back(tmp_path: Path) -> None:
    some_means().save(tmp_path / "new folder" / "means")
    assert_same(KVMeans.load(tmp_path / "new folder" / "means", IDENTITY), some_means())


def test_the_digest_is_pinned_and_sees_every_change() -> None:
    means = some_means()
    fixed = KVMeans({1: torch.arange(8.0).view(2, 4)}, {1: -torch.arange(8.0).view(2, 4)}, "model")
    assert fixed.digest == "41355f8085b487f3d3d687cba2ef33f6e900e1caae9df14655eea590a89c2246"
    others = [some_means("other"), KVMeans(means.values, means.keys, IDENTITY)]
    others.append(
        KVMeans({l + 1: m for l, m in means.keys.items()}, {l + 1: m for l, m in means.values.items()}, IDENTITY)
    )
    others.append(
        KVMeans(*({l: m.view(4, 8) for l, m in side.items()} for side in (means.keys, means.values)), IDENTITY)
    )
    tables = ("keys", "values", "scales")
    for side in tables:
        changed = {name: {l: m.clone() for l, m in getattr(means, name).items()} for name in tables}
        changed[side][11][1, 15] = torch.nextafter(changed[side][11][1, 15], torch.tensor(9.0))
        others.append(replace(means, **changed))
    others += [replace(means, scales={}), replace(means, frequencies=means.frequencies[:4])]
    others.append(replace(means, frequencies=torch.nextafter(means.frequencies, torch.tensor(0.0))))
    assert len({means.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_the_order_of_layers_does_not_matter() -> None:
    means = some_means()
    tables = {name: dict(reversed(getattr(means, name).items())) for name in ("keys", "values", "scales")}
    assert replace(means, **tables).digest == means.digest


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ({0: torch.zeros(2, 8)}, {}),
        ({0: torch.zeros(2, 8)}, {1: torch.zeros(2, 8)}),
        ({0: torch.zeros(2, 8)}, {0: torch.zeros(2, 4)}),
        ({0: torch.zeros(8)}, {0: torch.zeros(8)}),
        ({0: torch.zeros(2, 0)}, {0: torch.zeros(2, 0)}),
        ({0: torch.zeros(2, 8).double()}, {0: torch.zeros(2, 8).double()}),
        ({-1: torch.zeros(2, 8)}, {-1: torch.zeros(2, 8)}),
        ({0: torch.full((2, 8), torch.nan)}, {0: torch.zeros(2, 8)}),
        ({0: torch.zeros(2, 8)}, {0: torch.full((2, 8), torch.inf)}),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(
    keys: dict[int, torch.Tensor], values: dict[int, torch.Tensor], tmp_path: Path
) -> None:
    with pytest.raises(MeansError):
        KVMeans(keys, values, IDENTITY)
    tensors = {f"key.{layer}": mean for layer, mean in keys.items()}
    tensors |= {f"value.{layer}": mean for layer, mean in values.items()}
    tensors |= {"frequencies": torch.zeros(0)}
    save_file(tensors, tmp_path / "means", {"format": FORMAT, "version": VERSION, "identity": IDENTITY})
    with pytest.raises(MeansError, match="KV means in"):
        KVMeans.load(tmp_path / "means", IDENTITY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scales": {0: torch.ones(2, 8)}},
        {"scales": {0: torch.ones(2, 4), 1: torch.ones(2, 8)}},
        {"scales": {0: torch.zeros(2, 8), 1: torch.ones(2, 8)}},
        {"scales": {0: torch.full((2, 8), -1.0), 1: torch.ones(2, 8)}},
        {"scales": {0: torch.full((2, 8), 1e9), 1: torch.ones(2, 8)}},
        {"scales": {0: torch.full((2, 8), torch.nan), 1: torch.ones(2, 8)}},
        {"scales": {0: torch.ones(2, 8).double(), 1: torch.ones(2, 8)}},
        {"frequencies": torch.ones(5)},
        {"frequencies": torch.ones(2, 2)},
        {"frequencies": torch.ones(2).double()},
        {"frequencies": torch.tensor([1.0, torch.inf])},
    ],
)
def test_scales_and_frequencies_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    good = KVMeans(*({0: torch.zeros(2, 8), 1: torch.zeros(2, 8)} for _ in range(2)), IDENTITY)
    replace(good, scales={0: torch.ones(2, 8), 1: torch.ones(2, 8)}, frequencies=torch.ones(4))
    with pytest.raises(MeansError):
        replace(good, **wrong)


def test_means_of_another_model_are_refused(tmp_path: Path) -> None:
    some_means("another model").save(tmp_path / "means")
    with pytest.raises(MeansError, match="another model"):
        KVMeans.load(tmp_path / "means", IDENTITY)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", "1")
    some_means().save(tmp_path / "means")
    monkeypatch.undo()
    with pytest.raises(MeansError, match="version '1'"):
        KVMeans.load(tmp_path / "means", IDENTITY)


def test_what_is_no_file_of_means_is_refused_with_the_reason(tmp_path: Path) -> None:
    labels = {"version": VERSION, "identity": IDENTITY}
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("means\n" * 100)
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    save_file({"key.0": torch.zeros(1, 3)}, tmp_path / "foreign", {"format": "other", **labels})
    save_file(
        {"key.x": torch.zeros(1, 3), "frequencies": torch.zeros(0)}, tmp_path / "name", {"format": FORMAT, **labels}
    )
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(module.LARGEST_FILE + 1)
    reasons = {
        "absent": "not there", "empty": "header", "text": "header", "weights": "not a file of KV means",
        "foreign": "not a file of KV means", "name": "'x'", "huge": "bytes long", ".": "not a regular file",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(MeansError, match=rf"KV means in .*{reason}"):
            KVMeans.load(tmp_path / name, IDENTITY)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """One wound: a flipped bit, an overwritten, inserted or lost stretch, a cut."""
    at, length = chance.randrange(len(data)), chance.randrange(1, 9)
    junk = chance.randbytes(length)
    kind = chance.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + junk + data[at + length :]
    if kind == 2:
        return data[:at] + junk + data[at:]
    if kind == 3:
        return data[:at] + data[at + length :]
    return data[:at]


def test_damaged_files_are_refused_or_harmless(tmp_path: Path) -> None:
    """Half of the wounds hit the header. Whatever still loads has the same numbers (a blank became a tab)."""
    path, means, chance = tmp_path / "means", some_means(), random.Random(11)
    means.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    refused = 0
    for round_ in range(300):
        damaged = mutate(whole[:header], chance) + whole[header:] if round_ % 2 else mutate(whole, chance)
        path.write_bytes(damaged)
        try:
            assert_same(KVMeans.load(path, IDENTITY), means)
        except TurbomoeError as error:
            assert "means" in str(error)
            refused += 1
    assert refused >= 280


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "means"
    some_means().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(MeansError):
            KVMeans.load(path, IDENTITY)


def test_the_calibration_text_is_pinned() -> None:
    """Changing it changes the means of every model, and with them what saved caches can be read with."""
    text = (files("turbomoe.kv") / "calibration_text.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == "f62930ad06e04546e00d53904dcd48fd4f76004b083828351e4df332fa78e129"
    assert 12_000 <= len(text) <= 16_384
    assert "whale" not in text.decode().lower()  # fidelity is measured on that novel
