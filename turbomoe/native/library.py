"""Finds and opens the C core: its functions by ctypes, its structs as ctypes structures.

Nothing here knows torch. Where no core is there, ``load_core`` returns None and says so, once, on the notice board.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path

from turbomoe.config import state_dir
from turbomoe.errors import TurbomoeError
from turbomoe.native.build import LIBRARY_NAME, SOURCE_DIR, build_id, is_current
from turbomoe.notices import Notice, board

ABI_VERSION = 5
LEVELS = ("avx512", "avx2", "portable")
TYPES = {"float32": 0, "bfloat16": 1, "float16": 2}  # of activations and results, by torch's names
GATES = {"silu": 0, "gelu_tanh": 1, "swiglu_clipped": 2}
LINEAR_MATRICES = 8
PROJECTION_MATRICES = 3


class NativeError(TurbomoeError):
    """A call that the C core refused, or a library that does not fit this package."""


class CExperts(c.Structure):
    """``tm_experts`` of experts.h."""

    _fields_ = [
        *[(n, c.c_int) for n in ("hidden", "width", "experts", "gate_format", "up_format", "down_format")],
        *[(n, c.c_int64) for n in ("gate_at", "up_at", "down_at", "gate_bias_at", "up_bias_at", "down_bias_at")],
        ("gate", c.c_int),
        ("alpha", c.c_float),
        ("limit", c.c_float),
        ("blobs", c.POINTER(c.c_void_p)),
    ]


class CExpertsRoom(c.Structure):
    """``tm_experts_room``."""

    _fields_ = [(n, c.c_int) for n in ("hidden", "width", "experts", "rows", "top")]


class CExpertsCall(c.Structure):
    """``tm_experts_call``."""

    _fields_ = [
        ("work", c.c_void_p),
        ("layer", c.POINTER(CExperts)),
        *[(n, c.c_int) for n in ("rows", "top", "hidden_type", "out_type", "many")],
        *[(n, c.c_void_p) for n in ("hidden", "ids", "weights", "out")],
        ("status", c.c_int),
    ]


class CLinear(c.Structure):
    """``tm_linear`` of linear.h."""

    _fields_ = [
        *[(n, c.c_int) for n in ("format", "rows", "cols")],
        *[(n, c.c_void_p) for n in ("blob", "bias", "out")],
        ("out_stride", c.c_long),
    ]


class CLinearCall(c.Structure):
    """``tm_linear_call``."""

    _fields_ = [
        ("work", c.c_void_p),
        *[(n, c.c_int) for n in ("count", "tokens")],
        ("x", c.c_void_p),
        *[(n, c.c_int) for n in ("x_type", "out_type", "many", "status")],
        ("matrices", CLinear * LINEAR_MATRICES),
    ]


class CBell(c.Structure):
    """``tm_bell`` of bell.h: 128 bytes, to be placed at a multiple of 64."""

    _fields_ = [
        ("ring", c.c_uint32),
        ("errand", c.c_uint32),
        ("_pad0", c.c_uint8 * 56),
        ("answer", c.c_uint32),
        ("status", c.c_int32),
        ("_pad1", c.c_uint8 * 56),
    ]


class CErrand(c.Structure):
    """``tm_errand``."""

    _fields_ = [("run", c.c_void_p), ("call", c.c_void_p), ("status", c.c_void_p)]


class CTrellis(c.Structure):
    """``tm_trellis`` of trellis.h."""

    _fields_ = [
        *[(n, c.c_int) for n in ("kind", "dim")],
        *[(n, c.c_void_p) for n in ("x", "codebook", "by_dropped", "codes", "scales")],
    ]


class CKVSide(c.Structure):
    """``tm_kv_side`` of attend.h."""

    _fields_ = [
        *[(n, c.c_int) for n in ("kind", "exact_type")],
        *[(n, c.c_void_p) for n in ("sinks", "ring", "codes", "scales", "mean", "scale", "turns")],
        ("pairs", c.c_int),
        ("levels", c.c_float * 16),
        ("codebook", c.c_void_p),
    ]


class CKVLayer(c.Structure):
    """``tm_kv_layer``."""

    _fields_ = [
        *[(n, c.c_int) for n in ("heads", "kv_heads", "dim", "sink", "recent")],
        *[(n, CKVSide) for n in ("keys", "values")],
        ("signs", c.c_void_p),
    ]


class CProjection(c.Structure):
    """``tm_projection`` of decoder.h."""

    _fields_ = [*[(n, c.c_int) for n in ("count", "rows")], ("matrices", CLinear * PROJECTION_MATRICES)]


class CDecoderLayer(c.Structure):
    """``tm_decoder_layer``."""

    _fields_ = [
        ("kv", CKVLayer),
        *[(n, CProjection) for n in ("qkv", "out", "up", "down")],
        *[(n, c.c_void_p) for n in ("mixer_norm", "ffn_norm", "head_norm")],
        *[(n, c.c_float) for n in ("eps", "scale")],
        ("rotary", c.c_int),
    ]


class CDecoderCall(c.Structure):
    """``tm_decoder_call``."""

    _fields_ = [
        *[(n, c.c_void_p) for n in ("work", "linear", "layers")],
        *[(n, c.c_int) for n in ("count", "hidden")],
        *[(n, c.c_long) for n in ("slot", "length")],
        *[(n, c.c_void_p) for n in ("pages", "x", "cos", "sin")],
        ("status", c.c_int),
    ]


_STRUCTS = (
    CExperts,
    CExpertsRoom,
    CExpertsCall,
    CLinear,
    CLinearCall,
    CBell,
    CErrand,
    CDecoderLayer,
    CDecoderCall,
    CTrellis,
)

# name -> (result, arguments, keeps the GIL). Short calls keep it: giving it up can cost a whole switch interval.
_FUNCTIONS: dict[str, tuple[object, list[object], bool]] = {
    "tm_abi_version": (c.c_int, [], True),
    "tm_abi_size": (c.c_size_t, [c.c_int], True),
    "tm_build_id": (c.c_char_p, [], True),
    "tm_level_name": (c.c_char_p, [], True),
    "tm_level_force": (c.c_int, [c.c_char_p], True),
    "tm_packed_bytes": (c.c_size_t, [c.c_int, c.c_int, c.c_int], True),
    "tm_pool_new": (c.c_void_p, [c.c_int, c.c_long], False),
    "tm_pool_free": (None, [c.c_void_p], False),
    "tm_pool_threads": (c.c_int, [c.c_void_p], True),
    "tm_pool_helpers": (c.c_int, [c.c_void_p], True),
    "tm_pack": (c.c_long, [c.c_void_p, c.c_int, c.c_int, c.c_int, c.c_void_p, c.c_void_p], False),
    "tm_read": (c.c_ulonglong, [c.c_void_p, c.c_void_p, c.c_size_t], False),
    "tm_experts_work_new": (c.c_void_p, [c.c_void_p, c.POINTER(CExpertsRoom)], False),
    "tm_experts_work_free": (None, [c.c_void_p], False),
    "tm_experts_submit": (c.c_int, [c.c_void_p], True),
    "tm_experts_wait": (None, [c.c_void_p], False),
    "tm_experts_run": (None, [c.c_void_p], False),
    "tm_linear_work_new": (c.c_void_p, [c.c_void_p, c.c_int, c.c_int], False),
    "tm_linear_work_free": (None, [c.c_void_p], False),
    "tm_linear_submit": (c.c_int, [c.c_void_p], True),
    "tm_linear_wait": (None, [c.c_void_p], False),
    "tm_linear_run": (None, [c.c_void_p], False),
    "tm_decoder_work_new": (c.c_void_p, [c.c_void_p, c.c_int, c.c_int, c.c_int, c.c_int], False),
    "tm_decoder_work_free": (None, [c.c_void_p], False),
    "tm_decoder_run": (None, [c.c_void_p], False),
    "tm_trellis_encode": (c.c_int, [c.c_void_p, c.POINTER(CTrellis), c.c_long], False),
    "tm_bell_start": (c.c_void_p, [c.c_void_p, c.POINTER(CErrand), c.c_uint32, c.c_long], False),
    "tm_bell_stop": (None, [c.c_void_p], False),
}

_ERRORS = {
    -1: "an expert id is outside the layer, or of an expert that has no weights here",
    -2: "more rows, experts per row or columns than were made room for",
    -3: "a matrix whose format and shape do not exist or do not fit together",
    -4: "an unknown element type or activation function",
    -5: "a bell was rung for an errand that does not exist",
}


class Core:
    """The opened library. Its C functions are attributes without the ``tm_`` prefix (``core.pool_new``...)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        free, held = c.CDLL(str(path)), c.PyDLL(str(path))
        for name, (result, arguments, keeps_gil) in _FUNCTIONS.items():
            function = getattr(held if keeps_gil else free, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("tm_"), function)
        self._check()

    def __getattr__(self, name: str) -> c._NamedFuncPointer:  # for type checkers: set in __init__
        raise AttributeError(name)

    def _check(self) -> None:
        version = self.abi_version()
        sizes = [self.abi_size(i) for i in range(len(_STRUCTS))]
        if version != ABI_VERSION or sizes != [c.sizeof(s) for s in _STRUCTS]:
            raise NativeError(
                f"The C core at {self.path} does not fit this package",
                why=f"it speaks interface {version}, the package {ABI_VERSION}",
                fix="build it again: python -m turbomoe.native.build",
            )

    @property
    def level(self) -> str:
        """The dispatch level in use."""
        name: bytes = self.level_name()
        return name.decode()

    def force_level(self, name: str) -> None:
        """Use level ``name`` of ``LEVELS`` from now on, or ``auto``. ``NativeError`` if this processor lacks it."""
        if self.level_force(name.encode()):
            raise NativeError(f"The dispatch level {name} does not run here", why=f"levels are {', '.join(LEVELS)}")

    def levels(self) -> list[str]:
        """The levels that this processor runs, best first."""
        now, here = self.level, []
        for name in LEVELS:
            if not self.level_force(name.encode()):
                here.append(name)
        self.force_level(now)
        return here


def check_status(status: int) -> None:
    """``NativeError`` for a status that is not 0."""
    if status:
        raise NativeError("The C core refused a call", why=_ERRORS.get(status, f"status {status}"))


def _places() -> list[Path]:
    """Where a library may lie: beside the package (wheels, editable installs), or in the state folder."""
    kept = [state_dir() / "native" / build_id() / LIBRARY_NAME] if SOURCE_DIR.exists() else []
    return [Path(__file__).parent / LIBRARY_NAME, *kept]


def find_library() -> Path | None:
    """The library built from the sources as they are, or None."""
    return next((path for path in _places() if is_current(path)), None)


def absence() -> str:
    """Why there is no core, in one line for people."""
    if any(path.exists() for path in _places()):
        return "the compiled core is older than its sources"
    return "the compiled core is not there"


def describe_core() -> str:
    """Which path runs and why, in one line for ``doctor``."""
    path = find_library()
    if path is None:
        return f"plain PyTorch, tens of times slower: {absence()}"
    core = Core(path)
    return f"compiled core, {core.level} kernels (this processor runs {', '.join(core.levels())})"


_opened: list[Core] = []  # what this process uses, at most one


def load_core() -> Core | None:
    """The C core, opened once a process; None, with a notice, while it is not there (every call looks again)."""
    path = None if _opened else find_library()
    if path is not None:
        _opened.append(Core(path))
    if _opened:
        return _opened[0]
    board.post(
        Notice(
            "experts, packed weights and trellis codes on the CPU run in plain PyTorch",
            absence(),
            cost="tens of times slower than the compiled core",
            avoid="python -m turbomoe.native.build (needs a C compiler)",
        )
    )
    return None
