"""Triton: tiles of stored keys or values, decoded in registers to what a dot product takes.

``vectors`` reads N stored vectors of one head and returns [N, head_dim], unscaled, with dims in the order of
``layout.column_dims``. Two forms: packed halves, or bytes for keys, by inline assembly (``assembly.py``), and a plain
twin that looks levels up in a table, for Triton's interpreter and for devices without that assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from turbomoe.kv.kernels.layout import SCALAR_BITS, block, byte_offset, byte_unit
from turbomoe.kv.trellis_codebook import TRELLISES

NAMES = (*SCALAR_BITS, *TRELLISES)
# Of each codec's assembly for values and for keys: the text, its constraints, how many words go in and come out.
VALUES, KEYS = (
    tl.constexpr({name: (*(made := block(name, for_scores)).parts, made.inputs, made.outputs) for name in NAMES})
    for for_scores in (False, True)
)
OFFSETS = tl.constexpr({name: byte_offset(name) for name in NAMES})
UNITS = tl.constexpr({name: byte_unit(name) for name in NAMES})


@triton.constexpr_function
def are_bytes(kind, offsets):
    """Whether keys of this kind are decoded to bytes (``layout.in_bytes``), by ``OFFSETS``."""
    return kind in offsets


@triton.constexpr_function
def of_kind(kind, each):
    """Its own of ``OFFSETS`` or ``UNITS``: a value is twice a byte and the offset, times half of the unit."""
    return each[kind]


@triton.constexpr_function
def _part(kind, blocks, number):
    return blocks[kind][number]


@triton.constexpr_function
def _place(kind, as_bytes, number):
    """Where the assembly's table words lie among those of ``lookup``: not always one after the other from the first."""
    if kind == "tcq2.5" and as_bytes:
        return number + 4
    return 2 * number if kind == "tq2" and not as_bytes else number


@triton.constexpr_function
def _so_many(many):
    return (tl.int32,) * many


@triton.jit
def _merge(a, b):
    """[N, W] twice to [N, 2 W], taking turns."""
    return tl.reshape(tl.join(a, b), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def _merge4(a, b, c, d):
    return _merge(_merge(a, c), _merge(b, d))


@triton.jit
def _halves(x):
    """Registers int32 [N, W] to the two values in each: float16 [N, 2 W]."""
    low = (x & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return _merge(low, high)


@triton.jit
def _bytes(x):
    """Registers int32 [N, W] to the four bytes in each: int8 [N, 4 W]."""
    even = tl.join(x.to(tl.int8), (x >> 16).to(tl.int8))
    odd = tl.join((x >> 8).to(tl.int8), (x >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), (x.shape[0], 4 * x.shape[1]))


@triton.jit
def _word(codes, rows, index):
    """Words int32 [N, W] of the vectors at byte offsets ``rows`` [N], at word ``index`` [W]."""
    return tl.load((codes + rows[:, None]).to(tl.pointer_type(tl.int32)) + index[None, :])


@triton.jit
def _arranged(x, G: tl.constexpr, FOR_SCORES: tl.constexpr, BYTES: tl.constexpr):
    """Registers int32 [N, registers] of G groups, by group, to float16 [N, 2 * registers] or, BYTES, int8 [N, 4 *
    registers]; see ``layout.column_dims``.

    For scores every thread's registers take turns with those of the three that share its vector: just as the tensor
    cores want an operand in registers, so nothing passes through shared memory. For sums, which read it across
    vectors and so have to, a thread's values form runs of 32 bytes, which the swizzle spreads over all banks.
    """
    THREADS: tl.constexpr = G // max(1, min(4, G // 4))
    EACH: tl.constexpr = x.shape[1] // THREADS
    if FOR_SCORES:
        x = tl.permute(tl.reshape(x, (x.shape[0], THREADS, EACH)), (0, 2, 1))
    else:
        RUN: tl.constexpr = min(8, EACH)
        x = tl.permute(tl.reshape(x, (x.shape[0], THREADS, EACH // RUN, RUN)), (0, 2, 1, 3))
    x = tl.reshape(x, (x.shape[0], THREADS * EACH))
    return _bytes(x) if BYTES else _halves(x)


@triton.jit
def _next_group(first, codes, rows, index, GROUPS: tl.constexpr):
    """For each group of ``index`` the first word of the group after it, of GROUPS in a ring: like ``first``, its own.

    Read in aligned runs, as ``first`` is: a load one word off would be split, and come in another layout.
    """
    G: tl.constexpr = first.shape[1]
    OWN: tl.constexpr = max(1, min(4, G // 4))
    following = _word(codes, rows, (index // OWN + 1) % (GROUPS // OWN) * OWN + index % OWN)
    if OWN == 1:
        return following
    elif OWN == 2:
        _, b = tl.split(tl.reshape(first, (first.shape[0], G // 2, 2)))
        c, _ = tl.split(tl.reshape(following, (first.shape[0], G // 2, 2)))
        return _merge(b, c)
    else:
        even, odd = tl.split(tl.reshape(first, (first.shape[0], G // 4, 2, 2)))
        _, c = tl.split(even)
        b, d = tl.split(odd)
        even, _ = tl.split(tl.reshape(following, (first.shape[0], G // 4, 2, 2)))
        e, _ = tl.split(even)
        return _merge4(b, c, d, e)


@triton.jit
def lookup(table, KIND: tl.constexpr):
    """What the assembly looks up, int32 six times, behind the levels in ``layout.table``. Read it once."""
    SCALAR: tl.constexpr = 4 if KIND == "tq2" else (8 if KIND == "tq3" else (16 if KIND == "tq4" else 0))
    LARGE: tl.constexpr = 2048 if KIND == "tcq2.5" else (1024 if KIND == "tcq3" or KIND == "tcq4" else 0)
    LEVELS: tl.constexpr = 512 if KIND == "tcq2" else SCALAR + LARGE
    if LEVELS == 0:
        return 0, 0, 0, 0, 0, 0
    at = (table + LEVELS).to(tl.pointer_type(tl.int32))
    if KIND == "tcq2.5" or KIND == "tcq4":
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    else:
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), 0, 0


@triton.jit
def words(codes, rows, D: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """The codes of a chunk of the vectors at byte offsets ``rows`` int64 [N], as words: a tuple for ``decoded``."""
    # The compiler chooses a thread's run by what it knows of alignment; this makes it forget, then tells it.
    rows = tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [rows], dtype=tl.int64, is_pure=True, pack=1)
    four_bits: tl.constexpr = KIND == "tq4" or KIND == "tcq4"
    VALUES: tl.constexpr = 64 if KIND == "tcq2.5" else (32 if KIND == "tcq3" else (8 if four_bits else 16))
    GROUPS: tl.constexpr = D // VALUES
    G: tl.constexpr = GROUPS // CHUNKS
    rows = tl.multiple_of(rows, 4 * max(1, min(4, G // 4)))
    index = CHUNK * G + tl.arange(0, G)
    first = _word(codes, rows, index)
    if KIND == "tq2" or KIND == "tq4":
        return (first,)
    elif KIND == "tq3":
        high = _word(codes + D // 4, rows, index % (D // 32)) >> (index // (D // 32))[None, :]
        return first, high
    elif KIND == "tcq2.5":
        tl.static_assert(CHUNKS == 1, "planes are followed by those of the other chunk")
        second, third = _word(codes, rows, GROUPS + index), _word(codes, rows, 2 * GROUPS + index)
        fourth, fifth = _word(codes, rows, 3 * GROUPS + index), _word(codes, rows, 4 * GROUPS + index)
        return first, second, third, fourth, fifth
    else:
        following = _next_group(first, codes, rows, index, GROUPS)
        if KIND == "tcq3":
            return first, _word(codes, rows, G * CHUNKS + index), _word(codes, rows, 2 * GROUPS + index), following
        else:
            return first, following


@triton.jit
def _turned(planes):
    """Of five planes [N, groups], all of a vector, the words of the group after each, in a ring.

    The four threads of a vector hand them on: loaded again they would take registers, and come in another layout.
    """
    GROUPS: tl.constexpr = planes[0].shape[1]
    after = (tl.arange(0, GROUPS) + 1) % GROUPS
    after = tl.broadcast_to(after[None, :], planes[0].shape)
    found = ()
    for plane in tl.static_range(5):
        found += (tl.gather(planes[plane], after, 1),)
    return found


@triton.jit
def _registers(group, tables, KIND: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr):
    """int32 [N, registers], by group: two values each, or four bytes of keys."""
    arguments = group
    for number in tl.static_range(_part(KIND, BLOCKS, 2) - len(group)):
        arguments += (tables[_place(KIND, BYTES, number)],)
    found = tl.inline_asm_elementwise(
        _part(KIND, BLOCKS, 0), _part(KIND, BLOCKS, 1), arguments, dtype=_so_many(_part(KIND, BLOCKS, 3)), is_pure=True,
        pack=1,
    )  # fmt: skip
    # Halves of the list take turns until one is left, so that registers stand in their order.
    for _ in tl.static_range(5):
        if len(found) > 1:
            merged = ()
            for i in tl.static_range(len(found) // 2):
                merged += (_merge(found[i], found[i + len(found) // 2]),)
            found = merged
    return found[0]


@triton.jit
def decoded(group, tables, KIND: tl.constexpr, FOR_SCORES: tl.constexpr):
    """[64, D / CHUNKS] of ``words`` and ``lookup``: what ``vectors`` returns."""
    BYTES: tl.constexpr = FOR_SCORES and are_bytes(KIND, OFFSETS)
    if KIND == "tcq2.5":
        group = group + _turned(group)
    registers = _registers(group, tables, KIND, KEYS if BYTES else VALUES, BYTES)
    return _in_row_order(_arranged(registers, group[0].shape[1], FOR_SCORES, BYTES))


@triton.jit
def _window(codes, rows, step, D: tl.constexpr, KIND: tl.constexpr):
    """The windows int32 [N, W] of these steps, of one value each."""
    WINDOW: tl.constexpr = 9 if KIND == "tcq2" else 10
    STEP: tl.constexpr = 2 if KIND == "tcq2" else (3 if KIND == "tcq3" else 4)
    WORDS_: tl.constexpr = D * STEP // 32
    # Word n of the stream lies in plane n % PLANES.
    PLANES: tl.constexpr = 3 if KIND == "tcq3" else 1
    bit = step * STEP
    n, m = bit // 32, (bit // 32 + 1) % WORDS_
    low = _word(codes, rows, n % PLANES * (WORDS_ // PLANES) + n // PLANES).to(tl.int64) & 0xFFFFFFFF
    high = _word(codes, rows, m % PLANES * (WORDS_ // PLANES) + m // PLANES).to(tl.int64) << 32
    return (((low | high) >> (bit % 32).to(tl.int64)[None, :]) & ((1 << WINDOW) - 1)).to(tl.int32)


@triton.jit
def _window_in_planes(codes, rows, step, D: tl.constexpr):
    """The windows int32 [N, W] of these steps of tcq2.5: five bits of each, then five of the step after it."""
    after = (step + 1) % (D // 2)
    code = tl.zeros((rows.shape[0], step.shape[0]), tl.int32)
    for plane in tl.static_range(5):
        first = plane * (D // 64)
        code |= ((_word(codes, rows, first + step // 32) >> (step % 32)[None, :]) & 1) << plane
        code |= ((_word(codes, rows, first + after // 32) >> (after % 32)[None, :]) & 1) << (5 + plane)
    return code


@triton.jit
def _looked_up(codes, rows, dims, table, D: tl.constexpr, KIND: tl.constexpr):
    """The plain twin: codes of the given dims, their levels from the table."""
    if KIND == "tq2" or KIND == "tq4":
        BITS: tl.constexpr = 2 if KIND == "tq2" else 4
        WIDTH: tl.constexpr = D * BITS // 8
        byte = tl.load(codes + rows[:, None] + (dims % WIDTH)[None, :]).to(tl.int32)
        code = (byte >> (dims // WIDTH * BITS)[None, :]) & ((1 << BITS) - 1)
    elif KIND == "tq3":
        byte = tl.load(codes + rows[:, None] + (dims % (D // 4))[None, :]).to(tl.int32)
        high = tl.load(codes + rows[:, None] + (D // 4 + dims % (D // 8))[None, :]).to(tl.int32)
        low = (byte >> (dims // (D // 4) * 2)[None, :]) & 3
        code = low | (((high >> (dims // (D // 8))[None, :]) & 1) << 2)
    else:
        code = _window_in_planes(codes, rows, dims // 2, D) if KIND == "tcq2.5" else _window(codes, rows, dims, D, KIND)
        if KIND == "tcq2.5":
            code = code + (dims % 2 << 10)[None, :]
    return tl.load(table + code)


@triton.jit
def row_order(n):
    """Which of 64 vectors stands in row n of a tile: the tensor cores' warps own 16 rows, loads' eight twice."""
    return n // 8 % 2 * 32 + n // 16 * 8 + n % 8


@triton.jit
def _in_row_order(x):
    return tl.reshape(tl.permute(tl.reshape(x, (2, 4, 8, x.shape[1])), (1, 0, 2, 3)), (64, x.shape[1]))


@triton.jit
def vectors(
    codes, rows, dims, table, D: tl.constexpr, KIND: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    FOR_SCORES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """float16 [64, D / CHUNKS]: a chunk of the vectors at byte offsets ``rows`` int64 [64] from ``codes``, without
    scales. For scores int8, where ``are_bytes``, in units and from an offset ``of_kind``.

    Row n holds vector ``row_order(n)``. ``dims`` int32 [D / CHUNKS] are the chunk's part of ``layout.column_dims``.
    """
    if ASM:
        return decoded(words(codes, rows, D, KIND, CHUNK, CHUNKS), lookup(table, KIND), KIND, FOR_SCORES)
    x = _looked_up(codes, rows, dims, table, D, KIND)
    if FOR_SCORES and are_bytes(KIND, OFFSETS):
        steps = tl.floor(x.to(tl.float32) * (2 / of_kind(KIND, UNITS)) + 0.5)
        x = ((steps - of_kind(KIND, OFFSETS)) * 0.5).to(tl.int8)
    return _in_row_order(x)
