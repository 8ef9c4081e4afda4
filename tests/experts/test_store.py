"""The store: layouts, alignment, size classes, and that nothing incomplete or misplaced gets in."""

from __future__ import annotations

import mmap
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.experts.helpers import make_experts, random_raw
from turbomoe.errors import IntegrityError, ModelError, OutOfMemoryError
from turbomoe.experts.arena import ALIGN, TAIL, allocate
from turbomoe.experts.store import ExpertStore, StoreBuilder, make_layout
from turbomoe.files.blocks import FORMATS

PARTS = [("gate", (64, 32), "F32"), ("up", (64, 32), "F32"), ("down", (32, 64), "F32")]


def layout(layer: int = 0, parts: list = PARTS, experts: int = 2, activation: str = "silu"):
    return make_layout(layer, experts, 32, 64, activation, parts)


@given(st.tuples(*[st.sampled_from(list(FORMATS))] * 3), st.booleans())
def test_parts_lie_aligned_apart_and_whole_in_the_blob(formats: tuple[str, str, str], biases: bool) -> None:
    parts = [(n, (256, 256), f) for n, f in zip(("gate", "up", "down"), formats, strict=True)]
    parts += [(f"{n}_bias", (256,), "F32") for n in ("gate", "up", "down")] if biases else []
    made = make_layout(3, 4, 256, 256, "silu", parts)
    end = 0
    for part, (name, shape, fmt) in zip(made.parts, parts, strict=True):
        assert (part.name, part.shape, part.format) == (name, shape, fmt)
        assert part.offset % ALIGN == 0 and end <= part.offset < end + ALIGN
        assert part.nbytes * FORMATS[fmt].values == torch.Size(shape).numel() * FORMATS[fmt].bytes
        end = part.offset + part.nbytes
    assert made.blob_bytes % ALIGN == 0 and end <= made.blob_bytes < end + ALIGN


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (PARTS[:2], "'down'"),
        ([*PARTS, PARTS[1]], "'up'"),
        ([*PARTS, ("norm", (32,), "F32")], "'norm'"),
        ([*PARTS[:2], ("down", (64, 32), "F32")], "(64, 32), not (32, 64)"),
        ([*PARTS, ("up_bias", (32,), "F32")], "(32,), not (64,)"),
        ([*PARTS, ("up_bias", (64,), "F32"), ("up_bias", (64,), "F32")], "'up_bias'"),
        ([*PARTS[:2], ("down", (32, 64), "Q9_Z")], "Q9_Z"),
        ([*PARTS[:2], ("down", (32, 64), "Q4_K")], "256"),
    ],
)
def test_a_layout_that_is_no_expert_is_refused_by_name(parts: list, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        layout(5, parts)
    assert said in str(caught.value)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ModelError, match="'relu'"):
        layout(activation="relu")


@pytest.mark.parametrize(("experts", "hidden", "width"), [(0, 32, 64), (2, 0, 64), (2, 32, -1)])
def test_a_layout_without_experts_or_sizes_is_refused(experts: int, hidden: int, width: int) -> None:
    with pytest.raises(ModelError, match="cannot have"):
        make_layout(1, experts, hidden, width, "silu", PARTS)


NAMES = st.sampled_from(["gate", "up", "down", "gate_bias", "up_bias", "down_bias", "x", ""])
SHAPES = st.lists(st.sampled_from([-1, 0, 32, 64]), max_size=3).map(tuple)


@given(st.lists(st.tuples(NAMES, SHAPES, st.sampled_from([*FORMATS, "", "f32"])), max_size=6), st.booleans())
@settings(max_examples=500)
def test_random_parts_are_laid_out_or_refused(parts: list, complete: bool) -> None:
    try:
        made = layout(parts=[*PARTS, *parts] if complete else parts)
    except ModelError:
        return
    assert {"gate", "up", "down"} <= {part.name for part in made.parts}
    assert len(made.parts) == len(parts) + 3 * complete


def test_layers_of_equal_blobs_share_an_arena_and_keep_their_bytes_apart() -> None:
    made = make_experts({0: ("F32",) * 3, 3: ("BF16",) * 3, 4: ("F32",) * 3, 9: ("Q8_0", "F32", "Q4_0")}, num_experts=5)
    store = made.store
    assert store.layers == (0, 3, 4, 9)
    assert list(store.size_classes.values()) == [10, 5, 5]
    assert store.nbytes == sum(size * rows for size, rows in store.size_classes.items())
    for (layer, expert), raw in made.raw.items():
        assert store.blob(layer, expert).data_ptr() % ALIGN == 0
        for name, view in store.parts(layer, expert).items():
            assert torch.equal(view, raw[name])
    addresses = [store.blob(layer, expert).data_ptr() for layer, expert in made.raw]
    assert len(set(addresses)) == len(addresses) == 20


def test_padding_is_zero_so_that_equal_experts_have_equal_blobs() -> None:
    store = make_experts({0: ("Q4_0", "Q8_0", "F32")}, num_experts=1, width=9).store
    used = torch.zeros(store.layout(0).blob_bytes, dtype=torch.bool)
    for part in store.layout(0).parts:
        used[part.offset : part.offset + part.nbytes] = True
    assert not used.all()
    assert not store.blob(0, 0)[~used].any()


def test_rows_may_be_read_past_the_last_one() -> None:
    arena = allocate(3, 128, torch.device("cpu"))
    assert arena.untyped_storage().nbytes() == 3 * 128 + TAIL
    assert arena.data_ptr() % ALIGN == 0


def test_a_host_arena_is_private_memory_that_may_lie_on_huge_pages() -> None:
    """The kernel's own word: a shared mapping (``s``) would lie in its shared memory, which ignores the advice."""
    arena = allocate(4, 4 << 20, torch.device("cpu"))
    arena.fill_(1)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [at for at, line in enumerate(lines) if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line)]
    for at, following in pairwise([*starts, len(lines)]):
        low, high = (int(end, 16) for end in lines[at].split()[0].split("-"))
        if low <= arena.data_ptr() < high:
            assert lines[at].split()[1] == "rw-p"
            flags = next((line.split()[1:] for line in lines[at:following] if line.startswith("VmFlags:")), ["hg"])
            assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
            return
    pytest.fail("the arena is not among the mappings")


def test_a_kernel_without_huge_pages_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pages(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Pages)
    assert allocate(2, 128, torch.device("cpu")).shape == (2, 128)


def test_memory_that_does_not_exist_is_refused_in_one_sentence() -> None:
    with pytest.raises(OutOfMemoryError, match="--moe-cache"):
        allocate(1 << 20, 1 << 40, torch.device("cpu"))


def test_finish_names_the_first_missing_part() -> None:
    builder = StoreBuilder([layout(2), layout(7)])
    for layer in (2, 7):
        for expert in range(2):
            for name, shape, fmt in PARTS:
                if (layer, expert, name) not in ((7, 1, "up"), (7, 1, "down")):
                    builder.fill(layer, expert, name, random_raw(fmt, shape, 0))
    with pytest.raises(ModelError, match="Layer 7, expert 1: part 'up'"):
        builder.finish()
    for name in ("up", "down"):
        builder.fill(7, 1, name, random_raw("F32", (64, 32), 0))
    assert builder.finish().layout(7).layer == 7


GOOD = random_raw("F32", (64, 32), 0)


@pytest.mark.parametrize(
    ("where", "raw", "said"),
    [
        ((1, 0, "gate"), GOOD, "Layer 1 has no routed experts"),
        ((0, 2, "gate"), GOOD, "0 to 1, not 2"),
        ((0, -1, "gate"), GOOD, "0 to 1, not -1"),
        ((0, 0, "gates"), GOOD, "'gates' is not in the layout"),
        ((0, 0, "gate"), GOOD[:-1], "8191"),
        ((0, 0, "gate"), torch.cat([GOOD, GOOD]), "16384"),
        ((0, 0, "gate"), GOOD.view(torch.float32), "float32"),
        ((0, 1, "up"), GOOD, "given twice"),
    ],
)
def test_bytes_that_do_not_belong_are_refused(where: tuple[int, int, str], raw: torch.Tensor, said: str) -> None:
    builder = StoreBuilder([layout()])
    builder.fill(0, 1, "up", GOOD)
    with pytest.raises(ModelError) as caught:
        builder.fill(*where, raw)
    assert said in str(caught.value)


def test_truth_is_closed_once_finished() -> None:
    builder = StoreBuilder([layout(experts=1)])
    for name, shape, fmt in PARTS:
        builder.fill(0, 0, name, random_raw(fmt, shape, 1))
    builder.finish()
    with pytest.raises(IntegrityError):
        builder.fill(0, 0, "gate", GOOD)


@pytest.mark.parametrize("layouts", [[], [layout(1), layout(1)]])
def test_a_store_has_each_layer_once(layouts: list) -> None:
    with pytest.raises(ModelError, match="each layer once"):
        ExpertStore(layouts)
