"""Every codec against its contract, an independent encoder, theory, and inputs that nobody wants.

A new codec joins the matrix by one line in ``ERROR``.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turbomoe.errors import SettingsError
from turbomoe.kv.codebooks import levels, thresholds
from turbomoe.kv.codecs import CODECS, make_codec
from turbomoe.kv.codecs.lloydmax import nearest_level
from turbomoe.kv.trellis_codebook import GAUSSIAN_NMSE
from turbomoe.kv_types import ALIASES, KV_TYPES

SIZES = [64, 128, 256]
SHAPES = [(), (1,), (5,), (2, 3, 7), (0,), (2, 0, 3)]
TQ = {"tq2": 2, "tq3": 3, "tq4": 4}
TCQ = {"tcq2": 2, "tcq2.5": 2.5, "tcq3": 3, "tcq4": 4}
ROTATED = [*TQ, *TCQ]


def sphere_nmse(bits: int, dim: int) -> float:
    """Theory: error of Lloyd-Max levels with matched norm on vectors spread evenly over a sphere of ``dim`` dims.

    A coordinate t of such a vector of norm sqrt(dim) has density ~ (1 - t^2/dim)^((dim-3)/2). With a = E[t Q] and
    b = E[Q^2], scaling the levels to the norm of the vector leaves 2 - 2 a / sqrt(b), less what the scale of each
    single vector corrects: the variance of its radial error, of which the fixed norm already takes a part.
    """
    t = torch.linspace(-math.sqrt(dim), math.sqrt(dim), 200_001, dtype=torch.float64)
    weight = (1 - t * t / dim).clamp(min=0) ** ((dim - 3) / 2)
    weight /= weight.sum()
    borders = torch.tensor(thresholds(bits), dtype=torch.float64)
    chosen = torch.tensor(levels(bits), dtype=torch.float64)[torch.bucketize(t, borders)]

    def covariance(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((weight * x * y).sum() - (weight * x).sum() * (weight * y).sum())

    radial, square = t * (t - chosen), t * t
    variance = covariance(radial, radial) - covariance(radial, square) ** 2 / covariance(square, square)
    a, b = float((weight * t * chosen).sum()), float((weight * chosen * chosen).sum())
    return 2 - 2 * a / math.sqrt(b) - variance / dim


# Error relative to the energy of Gaussian vectors: (lowest, highest) by codec and head size.
ERROR = {
    "f32": lambda dim: (0.0, 0.0),
    "f16": lambda dim: (2e-8, 8e-8),  # uniform rounding to 11 bits: 2^-22 / 12 times 1 to 4
    "bf16": lambda dim: (1.2e-6, 5.1e-6),  # to 8 bits
    "q8_0": lambda dim: (2e-5, 4e-5),  # steps of amax/127, amax about 2.1 sigma: (2.1/127)^2 / 12 on average
    **{name: lambda dim, bits=bits: (0.985 * sphere_nmse(bits, dim), 1.015 * sphere_nmse(bits, dim))
       for name, bits in TQ.items()},
    **{name: lambda dim, name=name: (0.985 * GAUSSIAN_NMSE[name][dim], 1.015 * GAUSSIAN_NMSE[name][dim])
       for name in TCQ},
}  # fmt: skip
MATRIX = list(itertools.product(ERROR, SIZES))


def nmse(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((y.double() - x).square().sum() / x.double().square().sum())


def assert_same_planes(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> None:
    """Bit for bit (NaN equals NaN)."""
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        assert torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def test_the_matrix_covers_the_registry() -> None:
    assert ERROR.keys() == CODECS.keys()


@pytest.mark.parametrize(("name", "dim"), MATRIX)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_planes_have_the_declared_widths_and_types(name: str, dim: int, shape: tuple[int, ...]) -> None:
    codec = make_codec(name, dim)
    x = torch.randn(*shape, dim)
    before = x.clone()
    planes = codec.encode(x)
    assert [(p.dtype, p.shape) for p in planes] == [(p.dtype, (*shape, p.width)) for p in codec.planes]
    decoded = codec.decode(planes)
    assert decoded.dtype == torch.float32 and decoded.shape == x.shape
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "dim"), MATRIX)
def test_bytes_are_counted_whole(name: str, dim: int) -> None:
    codec = make_codec(name, dim)
    planes = codec.encode(torch.randn(10, dim))
    assert sum(plane.numel() * plane.element_size() for plane in planes) == 10 * codec.bytes_per_vector
    assert codec.bits_per_value == 8 * codec.bytes_per_vector / dim


@pytest.mark.parametrize(
    ("name", "dim", "bits"),
    [
        ("f32", 64, 32), ("f16", 64, 16), ("bf16", 128, 16), ("q8_0", 64, 8.5), ("q8_0", 96, 8.5),
        ("tq2", 64, 2.25), ("tq2", 128, 2.125), ("tq2", 256, 2.0625), ("tq3", 64, 3.25), ("tq3", 128, 3.125),
        ("tq3", 256, 3.0625), ("tq4", 64, 4.25), ("tq4", 128, 4.125), ("tq4", 256, 4.0625),
        ("tcq2", 64, 2.25), ("tcq2", 256, 2.0625), ("tcq2.5", 64, 2.75), ("tcq2.5", 128, 2.625),
        ("tcq2.5", 256, 2.5625), ("tcq3", 64, 3.25), ("tcq3", 128, 3.125), ("tcq4", 64, 4.25), ("tcq4", 128, 4.125),
    ],
)  # fmt: skip
def test_bits_per_value(name: str, dim: int, bits: float) -> None:
    assert make_codec(name, dim).bits_per_value == bits


@pytest.mark.parametrize(("name", "dim"), MATRIX)
def test_error_on_gaussian_vectors(name: str, dim: int) -> None:
    codec = make_codec(name, dim)
    x = torch.randn(300_000 // dim, dim)
    low, high = ERROR[name](dim)
    assert low <= nmse(x, codec.decode(codec.encode(x))) <= high


@pytest.mark.parametrize(("name", "dim"), MATRIX)
def test_a_batch_equals_its_vectors_one_by_one(name: str, dim: int) -> None:
    codec = make_codec(name, dim)
    x = torch.randn(40, dim) * torch.logspace(-4, 4, 40)[:, None]
    together = codec.encode(x)
    decoded = codec.decode(together)
    for row in range(40):
        alone = codec.encode(x[row])
        assert_same_planes(alone, tuple(plane[row] for plane in together))
        assert torch.equal(codec.decode(alone), decoded[row])
    assert_same_planes(codec.encode(x.view(2, 20, dim)), tuple(plane.unflatten(0, (2, 20)) for plane in together))
    assert_same_planes(codec.encode(x.t().contiguous().t()), together)


@pytest.mark.parametrize(("name", "dim"), MATRIX)
def test_decode_takes_planes_that_are_views(name: str, dim: int) -> None:
    codec = make_codec(name, dim)
    planes = codec.encode(torch.randn(3, 4, 5, dim))
    views = tuple(plane.transpose(0, 1)[:, ::2] for plane in planes)
    assert torch.equal(codec.decode(views), codec.decode(planes).transpose(0, 1)[:, ::2])


@pytest.mark.parametrize("name", ERROR)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_input_does_not_matter(name: str, dtype: torch.dtype) -> None:
    codec, x = make_codec(name, 64), torch.randn(6, 64).bfloat16().half().float()
    assert_same_planes(codec.encode(x.to(dtype)), codec.encode(x))


def test_plain_codecs_keep_what_their_type_holds() -> None:
    for name, dtype in (("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)):
        codec, x = make_codec(name, 64), torch.randn(50, 64).to(dtype).float()
        assert torch.equal(codec.decode(codec.encode(x)), x)


# The bytes of one fixed vector of 64 values: stored caches depend on them.
GOLDEN = {
    "q8_0": (
        "ad43d66bfe9126b94fe2770a9d32c65bee8116a93ed267fa8d22b54bde7306992ec257ea7f12a53ace63f6891eb147da"
        "6f02952abd53e67b0ea136ca5ff2851af023f023"
    ),
    "tq2": "e492399379e44ee59339934ee44e2993603c",
    "tq3": "9d256276a789d99e26637a948dd95226d269964bb45a2dd2c93c",
    "tq4": "a34bc56dd78239a45bc67d28934ab56cd78229a34bc56cd78239a45bc67d2893933c",
    "tcq2": "1d7e3dc368875fcf30a2a076f8f50ca3b23c",
    "tcq2.5": "e8e72b0c49ba66600a798db10026bbf51cdbcb37a43c",
    "tcq3": "6c1337a30cac68b1318526fd8438cdb1fc2e4a4c8f9e6334a63c",
    "tcq4": "618a6b8798086b80442d652b90ff6d3daf12833eb1cd87c80469cecd551373c99e3c",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    x = (torch.arange(64) * 37 + 11) % 64 / 16 - 1.96875  # exact in float32
    stored = b"".join(plane.numpy().tobytes() for plane in make_codec(name, 64).encode(x))
    assert stored.hex() == GOLDEN[name]


def codes_by_the_book(x: list[float], bits: int) -> list[int]:
    """The nearest level of each coordinate, by trying all, in float64."""
    factor = math.sqrt(len(x)) / math.sqrt(sum(v * v for v in x))
    table = levels(bits)
    return [min(range(2**bits), key=lambda code: abs(table[code] - v * factor)) for v in x]


def plane_by_the_book(codes: list[int], bits: int) -> bytes:
    """Byte i holds dims i, i + w, i + 2w... from the lowest bits up, w the width of the plane."""
    width = len(codes) * bits // 8
    return bytes(sum(codes[i + k * width] << k * bits for k in range(8 // bits)) for i in range(width))


@pytest.mark.parametrize(("name", "dim"), list(itertools.product(TQ, [8, 64, 256])))
def test_codes_scales_and_layout_by_the_book(name: str, dim: int) -> None:
    bits, codec = TQ[name], make_codec(name, dim)
    for x in torch.randn(20, dim):
        codes, scales = codec.encode(x)
        book = codes_by_the_book(x.tolist(), bits)
        if bits == 3:
            expected = plane_by_the_book([c & 3 for c in book], 2) + plane_by_the_book([c >> 2 for c in book], 1)
        else:
            expected = plane_by_the_book(book, bits)
        assert codes.numpy().tobytes() == expected
        chosen = torch.tensor(levels(bits), dtype=torch.float64)[book]
        scale = float(x.double().norm() / chosen.norm())
        assert float(scales) == pytest.approx(scale, rel=2**-11 + 1e-6)
        assert torch.equal(codec.decode((codes, scales)), chosen.float() * scales.float())


@pytest.mark.parametrize(("name", "dim"), list(itertools.product(ROTATED, SIZES)))
def test_the_decoded_vector_has_the_norm_of_the_original(name: str, dim: int) -> None:
    codec = make_codec(name, dim)
    x = torch.randn(200, dim) * torch.logspace(-3, 4, 200)[:, None]
    ratio = codec.decode(codec.encode(x)).double().norm(dim=-1) / x.double().norm(dim=-1)
    assert float((ratio - 1).abs().max()) <= 2**-11 + 1e-6


@pytest.mark.parametrize("name", TQ)
def test_a_mirrored_vector_decodes_to_the_mirror_image(name: str) -> None:
    codec, x = make_codec(name, 128), torch.randn(50, 128)
    assert torch.equal(codec.decode(codec.encode(-x)), -codec.decode(codec.encode(x)))


@pytest.mark.parametrize("name", ROTATED)
@settings(max_examples=60)
@given(exponent=st.integers(-110, 110), seed=st.integers(0, 1000))
def test_codes_do_not_depend_on_the_size_of_a_vector(name: str, exponent: int, seed: int) -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    codec = make_codec(name, 64)
    assert torch.equal(codec.encode(x * 2.0**exponent)[0], codec.encode(x)[0])


def test_q8_0_equals_the_oracle() -> None:
    codec = make_codec("q8_0", 128)
    x = torch.randn(500, 128) * torch.logspace(-4, 4, 500)[:, None]
    x[7] = 0
    x[8] = torch.arange(128) - 63.5
    x[9, :32], x[9, 3] = 0.5, 127.0  # step 1 exactly: 0.5 is a tie, and ties go away from zero
    x[10, :32], x[10, 3] = -0.5, 127.0
    # Ties up to rounding, which a division would decide otherwise than ggml's product with the inverse.
    x[11:300] = torch.randint(-253, 254, (289, 128)) / 2 * torch.logspace(-3, 3, 289)[:, None]
    x[11:300, ::32] = 127 * torch.logspace(-3, 3, 289)[:, None]
    oracle = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType.Q8_0)
    codes, scales = codec.encode(x)
    assert int(codes[9, 0]) == 1 and int(codes[10, 0]) == -1
    blocks = torch.from_numpy(oracle).view(500, 4, 34)
    assert torch.equal(blocks[..., 2:].view(torch.int8).flatten(1), codes)
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16).flatten(1), scales)
    restored = torch.from_numpy(gguf.quants.dequantize(oracle, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(restored, codec.decode((codes, scales)))


SPECIAL = [0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, 65504.0, 6e-8]
BAD = torch.tensor([math.nan, math.inf, -math.inf])


def finite_vectors(count: int) -> torch.Tensor:
    """[count, 64]: a third of special values, a third of any finite bit patterns, a third Gaussian of any size."""
    generator = torch.Generator().manual_seed(count)
    special = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), (count, 64), generator=generator)]
    special *= torch.rand(count, 64, generator=generator) < torch.rand(count, 1, generator=generator)
    patterns = torch.randint(-(1 << 31), 1 << 31, (count, 64), generator=generator).int().view(torch.float32)
    gaussian = torch.randn(count, 64, generator=generator) * 2.0 ** torch.randint(
        -145, 120, (count, 1), generator=generator
    )
    kind = torch.arange(count)[:, None] % 3
    return torch.where(kind == 0, special, torch.where(kind == 1, patterns.nan_to_num(1.0, 1.0, -1.0), gaussian))


def assert_faithful(name: str, x: torch.Tensor) -> None:
    """Finite [n, 64] in, finite out; the norm (q8_0: each value) is right wherever fp16 scales reach."""
    codec = make_codec(name, 64)
    decoded = codec.decode(codec.encode(x)).double()
    assert bool(torch.isfinite(decoded).all())
    assert not decoded[(x == 0).all(-1)].any()
    norm, peak = x.double().norm(dim=-1), x.abs().amax(-1).double()
    if name in ROTATED:
        # Scales below 6e-5 are multiples of 6e-8, so they are off by at most half of that.
        within = (decoded.norm(dim=-1) - norm).abs() <= norm * (2**-11 + 1e-5) + 8 * 3e-8 * 1.6
        assert bool(within[norm < 4e5].all())
    else:
        error = (decoded - x).abs().amax(-1)
        assert bool((error <= peak * (0.5 / 127 + 2**-11) * 1.001 + 127 * 3e-8)[peak < 8e6].all())


@pytest.mark.parametrize("name", ["q8_0", *ROTATED])
def test_finite_vectors_stay_finite_and_keep_their_norm(name: str) -> None:
    assert_faithful(name, finite_vectors(9000))


@pytest.mark.parametrize("name", ["q8_0", *ROTATED])
@settings(max_examples=40)
@given(values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8))
def test_no_short_pattern_breaks_a_codec(name: str, values: list[float]) -> None:
    assert_faithful(name, torch.tensor([values * 64])[:, :64])


@pytest.mark.parametrize("name", ["q8_0", *ROTATED])
def test_what_is_not_finite_decodes_to_nan_and_nothing_else_does(name: str) -> None:
    """Every third vector is hit in up to three places; the others keep their bits."""
    codec, block = make_codec(name, 64), 32 if name == "q8_0" else 64
    whole = finite_vectors(9000)
    x, places = whole.clone(), torch.randint(64, (3000, 3))
    x[1::3] = x[1::3].scatter(1, places, BAD[torch.randint(3, (3000, 3))])
    planes = codec.encode(x)
    blocks = (~torch.isfinite(x)).unflatten(-1, (-1, block)).any(-1)
    assert torch.equal(torch.isnan(codec.decode(planes)), blocks.repeat_interleave(block, -1))
    untouched = ~blocks.any(-1)
    assert_same_planes(tuple(p[untouched] for p in planes), tuple(p[untouched] for p in codec.encode(whole)))
    # Their codes are those of zeros: stored bytes are the same on every machine.
    zeros = codec.encode(torch.zeros(64))[0].unflatten(-1, (64 // block, -1))
    assert bool((planes[0].unflatten(-1, (64 // block, -1)) == zeros)[blocks].all())


@pytest.mark.parametrize("name", TQ)
def test_zeros_inside_a_vector_take_the_smallest_positive_level(name: str) -> None:
    codec, x = make_codec(name, 64), torch.randn(64)
    x[:2] = torch.tensor([0.0, -0.0])
    codes, scales = codec.encode(x)
    smallest = torch.tensor(levels(TQ[name])[2 ** TQ[name] // 2]) * scales.float()
    assert torch.equal(codec.decode((codes, scales))[:2], smallest.expand(2))


@pytest.mark.parametrize("bits", TQ.values())
def test_a_magnitude_on_a_border_takes_the_larger_level(bits: int) -> None:
    borders = torch.tensor([border for border in thresholds(bits) if border > 0])
    below = torch.nextafter(borders, torch.zeros(()))
    assert nearest_level(borders, bits).tolist() == list(range(1, len(borders) + 1))
    assert nearest_level(below, bits).tolist() == list(range(len(borders)))
    assert nearest_level(torch.tensor([0.0, math.nan, math.inf]), bits).tolist() == [0, 0, len(borders)]


@pytest.mark.parametrize("name", ["q8_0", *ROTATED])
def test_scales_saturate_and_vanish(name: str) -> None:
    codec = make_codec(name, 64)
    huge, tiny = codec.encode(torch.full((64,), 3e38)), codec.encode(torch.full((64,), 1e-9))
    assert set(huge[1].tolist()) == {65504.0}
    # The level nearest to 1, or on a path several of that mean, times the largest scale.
    assert float(codec.decode(huge).mean()) >= 4e4
    assert not codec.decode(tiny).any()


@pytest.mark.parametrize(("name", "number"), [("f32", np.float32), ("f16", np.float16)])
def test_plain_codecs_round_as_numpy_does(name: str, number: type[np.floating]) -> None:
    patterns = torch.randint(-(1 << 31), 1 << 31, (2000, 64)).int().view(torch.float32)
    (stored,) = make_codec(name, 64).encode(patterns)
    with np.errstate(all="ignore"):
        assert np.array_equal(stored.numpy(), patterns.numpy().astype(number), equal_nan=True)


def test_bf16_keeps_the_upper_half_rounded_to_even() -> None:
    patterns = torch.randint(-(1 << 31), 1 << 31, (2000, 64))
    patterns = patterns[torch.isfinite(patterns.int().view(torch.float32)).all(-1)]
    (stored,) = make_codec("bf16", 64).encode(patterns.int().view(torch.float32))
    expected = (patterns + 0x7FFF + (patterns >> 16 & 1)) >> 16
    assert torch.equal(stored.view(torch.int16), expected.to(torch.int16))


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_mean_the_codec_they_name(alias: str) -> None:
    assert make_codec(alias, 64).name == ALIASES[alias]


@pytest.mark.parametrize("name", CODECS)
def test_names_agree(name: str) -> None:
    codec = make_codec(name, 64)
    assert codec.name == name and codec.rotated == (name in ROTATED)


def test_every_name_that_is_known_has_a_codec() -> None:
    assert tuple(CODECS) == KV_TYPES


def test_auto_is_a_name_without_a_codec() -> None:
    with pytest.raises(SettingsError, match="'auto' is a wish and no codec"):
        make_codec("auto", 64)


@pytest.mark.parametrize("name", ["", "tq5", "q4_0", "turbo", "../tq3", "tq3 ", "🦊"])
def test_an_unknown_name_is_told_all_names(name: str) -> None:
    with pytest.raises(SettingsError) as caught:
        make_codec(name, 64)
    assert repr(name) in str(caught.value)
    assert all(known in str(caught.value) for known in [*CODECS, *ALIASES])


@pytest.mark.parametrize(("name", "dim"), [*itertools.product(TQ, [0, 4, 80, 96, 112, -64]), ("q8_0", 80), ("q8_0", 0),
                                             *itertools.product(TCQ, [0, 8, 16, 80, 96, 1024, -64])])  # fmt: skip
def test_a_head_size_that_does_not_fit_is_refused(name: str, dim: int) -> None:
    with pytest.raises(SettingsError, match=f"{name} cannot store heads of {dim} values"):
        make_codec(name, dim)


def test_the_plain_path_loads_no_codec() -> None:
    """Off is off: a cache in bf16 imports neither the other codecs nor the rotation."""
    script = (
        "import sys; from turbomoe.kv.codecs import make_codec; make_codec('bf16', 64)\n"
        "print(*sorted(m for m in sys.modules if m.startswith('turbomoe.kv.')))"
    )
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["turbomoe.kv.base", "turbomoe.kv.codecs", "turbomoe.kv.codecs.plain"]
