"""Key and value means: the right numbers, one digest, and files that are refused when they are not what they say."""

from __future__ import annotations

import hashlib
import random
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from turbomoe.errors import IntegrityError, TurbomoeError
from turbomoe.kv import means as module
from turbomoe.kv.means import FORMAT, KVMeans, MeanAccumulator, MeansError

IDENTITY = "7f" * 32


def some_means(identity: str = IDENTITY) -> KVMeans:
    generator = torch.Generator().manual_seed(3)
    keys, values = ({layer: torch.randn(2, 16, generator=generator) for layer in (0, 3, 11)} for _ in range(2))
    return KVMeans(keys, values, identity)


def assert_same(a: KVMeans, b: KVMeans) -> None:
    assert a.identity == b.identity and a.digest == b.digest
    for left, right in ((a.keys, b.keys), (a.values, b.values)):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[layer], right[layer]) for layer in left)


def test_the_means_of_what_was_added() -> None:
    keys, values = torch.randn(2, 3, 50, 8) + 4, torch.randn(2, 3, 50, 8) - 1
    accumulator = MeanAccumulator()
    for first, last in ((0, 1), (1, 30), (30, 50)):
        accumulator.add(5, keys[:, :, first:last], values[:, :, first:last])
    accumulator.add(2, keys[0].bfloat16(), values[0].bfloat16())
    found = accumulator.finish(IDENTITY)
    assert found.identity == IDENTITY and set(found.keys) == {2, 5}
    assert torch.allclose(found.keys[5].double(), keys.double().mean((0, 2)), atol=1e-6)
    assert torch.allclose(found.values[5].double(), values.double().mean((0, 2)), atol=1e-6)
    assert torch.allclose(found.keys[2].double(), keys[0].bfloat16().double().mean(1), atol=1e-6)
    assert found.keys[5].dtype == torch.float32 and found.keys[5].shape == (3, 8)


def test_large_constants_do_not_drown_small_differences() -> None:
    """Float32 sums would lose them: 20,000 tokens at 1,000 with a spread of 0.01."""
    keys = 1000 + 0.01 * torch.randn(1, 20_000, 4)
    accumulator = MeanAccumulator()
    for chunk in keys.split(1000, dim=1):
        accumulator.add(0, chunk, chunk)
    assert torch.equal(accumulator.finish(IDENTITY).keys[0], keys.double().mean(1).float())


def test_bad_additions_and_empty_sums_are_refused() -> None:
    accumulator = MeanAccumulator()
    with pytest.raises(MeansError, match="no tokens"):
        accumulator.finish(IDENTITY)
    with pytest.raises(IntegrityError):
        accumulator.add(0, torch.zeros(2, 5, 8), torch.zeros(2, 4, 8))
    accumulator.add(0, torch.zeros(2, 0, 8), torch.zeros(2, 0, 8))
    with pytest.raises(MeansError, match="no tokens"):
        accumulator.finish(IDENTITY)
    accumulator.add(0, torch.zeros(2, 5, 8), torch.zeros(2, 5, 8))
    with pytest.raises(IntegrityError):
        accumulator.add(0, torch.zeros(1, 5, 8), torch.zeros(1, 5, 8))
    accumulator.add(0, torch.full((2, 5, 8), torch.inf), torch.zeros(2, 5, 8))
    with pytest.raises(MeansError, match="not finite"):
        accumulator.finish(IDENTITY)


def test_saved_means_come_back(tmp_path: Path) -> None:
    some_means().save(tmp_path / "new folder" / "means")
    assert_same(KVMeans.load(tmp_path / "new folder" / "means", IDENTITY), some_means())


def test_the_digest_is_pinned_and_sees_every_change() -> None:
    means = some_means()
    fixed = KVMeans({1: torch.arange(8.0).view(2, 4)}, {1: -torch.arange(8.0).view(2, 4)}, "model")
    assert fixed.digest == "d347e1d9035172ea749a6fcb09a5018865851690eb3ae7bd3daefc6d7b41de42"
    others = [some_means("other"), KVMeans(means.values, means.keys, IDENTITY)]
    others.append(
        KVMeans({l + 1: m for l, m in means.keys.items()}, {l + 1: m for l, m in means.values.items()}, IDENTITY)
    )
    others.append(
        KVMeans(*({l: m.view(4, 8) for l, m in side.items()} for side in (means.keys, means.values)), IDENTITY)
    )
    for side in ("keys", "values"):
        changed = {name: {l: m.clone() for l, m in getattr(means, name).items()} for name in ("keys", "values")}
        changed[side][11][1, 15] = torch.nextafter(changed[side][11][1, 15], torch.tensor(9.0))
        others.append(KVMeans(changed["keys"], changed["values"], IDENTITY))
    assert len({means.digest, *(other.digest for other in others)}) == 1 + len(others)


def test_the_order_of_layers_does_not_matter() -> None:
    means = some_means()
    turned = [dict(reversed(list(side.items()))) for side in (means.keys, means.values)]
    assert KVMeans(*turned, IDENTITY).digest == means.digest


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
    save_file(tensors, tmp_path / "means", {"format": FORMAT, "version": "1", "identity": IDENTITY})
    with pytest.raises(MeansError, match="KV means in"):
        KVMeans.load(tmp_path / "means", IDENTITY)


def test_means_of_another_model_are_refused(tmp_path: Path) -> None:
    some_means("another model").save(tmp_path / "means")
    with pytest.raises(MeansError, match="another model"):
        KVMeans.load(tmp_path / "means", IDENTITY)


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", "2")
    some_means().save(tmp_path / "means")
    monkeypatch.undo()
    with pytest.raises(MeansError, match="version '2'"):
        KVMeans.load(tmp_path / "means", IDENTITY)


def test_what_is_no_file_of_means_is_refused_with_the_reason(tmp_path: Path) -> None:
    labels = {"version": "1", "identity": IDENTITY}
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("means\n" * 100)
    save_file({"weight": torch.zeros(3)}, tmp_path / "weights")
    save_file({"key.0": torch.zeros(1, 3)}, tmp_path / "foreign", {"format": "other", **labels})
    save_file({"key.x": torch.zeros(1, 3)}, tmp_path / "name", {"format": FORMAT, **labels})
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
