"""The circular bit stream of a trellis code: steps packed into bytes, and its windows read two values at a time.

Step i adds bits [step_bits * i, step_bits * (i + 1)), the lowest of its window: packing need not know of windows.
The stream's 32-bit words are stored plane by plane (``to_planes``), or the bits of its steps are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from turbomoe.kv.codecs.lloydmax import look_up
from turbomoe.kv.trellis_codebook import Trellis, codebook


def pack_steps(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Symbols [..., steps] below ``2**bits`` into uint8 [..., steps * bits / 8], the lowest bits first."""
    each = symbols.unsqueeze(-1) >> torch.arange(bits, device=symbols.device) & 1
    return _octets(each.flatten(-2))


def _octets(bits: torch.Tensor) -> torch.Tensor:
    """Bits [..., n] as uint8 [..., n / 8], the lowest first."""
    packed: torch.Tensor = (bits.unflatten(-1, (-1, 8)) << torch.arange(8, device=bits.device)).sum(-1).to(torch.uint8)
    return packed


def to_planes(stream: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Bytes [..., bytes] as they are stored: of every group of ``group_words`` 32-bit words all first ones, all second
    ones...

    A group holds whole steps, so equal words of all groups are cut alike, and a GPU reads them as one run. Where a
    group's bits lie in planes, its first word has the first bit of each of its 32 steps, from the lowest bit on, and so
    forth. A stream that is no whole number of groups is stored as it is.
    """
    words = trellis.group_words
    if words == 1 or stream.shape[-1] % (4 * words):
        return stream
    if trellis.magnitudes is not None:
        bits = stream.unsqueeze(-1) >> torch.arange(8, device=stream.device) & 1
        stream = _octets(bits.flatten(-2).unflatten(-1, (-1, 32, words)).transpose(-1, -2).flatten(-3))
    planes: torch.Tensor = stream.unflatten(-1, (-1, words, 4)).transpose(-3, -2).flatten(-3)
    return planes


def from_planes(codes: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """The stream that ``to_planes`` stored."""
    words = trellis.group_words
    if words == 1 or codes.shape[-1] % (4 * words):
        return codes
    if trellis.magnitudes is not None:
        return _eight_steps(codes, words).unsqueeze(-1).view(torch.uint8)[..., :words].flatten(-2)
    stream: torch.Tensor = codes.unflatten(-1, (words, -1, 4)).transpose(-3, -2).flatten(-3)
    return stream


def _eight_steps(codes: torch.Tensor, step_bits: int) -> torch.Tensor:
    """Eight steps at a time, whose bits lie in whole bytes together: int64 [..., steps / 8], from planes of bits."""
    planes = codes.unflatten(-1, (step_bits, -1)).unbind(-2)
    tables = _bits_apart(step_bits, str(codes.device))
    found = look_up(tables[0], planes[0].int())
    for table, plane in zip(tables[1:], planes[1:], strict=True):
        found |= look_up(table, plane.int())
    return found


@lru_cache(maxsize=32)
def _bits_apart(step_bits: int, device: str) -> torch.Tensor:
    """Of every byte its bits as those of a plane in eight steps: int64 [planes, 256]."""
    places = torch.arange(8)
    apart = ((torch.arange(256)[:, None] >> places & 1) << places * step_bits).sum(-1)
    return (apart << torch.arange(step_bits)[:, None]).to(device)


@dataclass(frozen=True)
class PairWindows:
    """Windows of ``bits`` bits that lie ``stride`` bits apart, each enough for two neighbouring values.

    ``group`` of them start in ``group * stride / 8`` whole bytes, and are shifted out of one word.
    """

    bits: int
    stride: int

    @property
    def group(self) -> int:
        """As many as whole bytes and an int32 allow; where that is none, eight, of an int64."""
        fitting = (n for n in (8, 4, 2, 1) if n * self.stride % 8 == 0 and (n - 1) * self.stride + self.bits <= 32)
        return next(fitting, 8)

    def read(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [..., bytes] to windows [..., words, group], int32 or int64, in order of the values."""
        span = (self.group - 1) * self.stride + self.bits
        word = torch.int32 if span <= 32 else torch.int64
        columns = codes.unflatten(-1, (-1, self.group * self.stride // 8)).unbind(-1)
        columns += tuple(column.roll(-1, -1) for column in columns)
        words = columns[0].to(word)
        for place, column in enumerate(columns[1 : -(-span // 8)], start=1):
            words |= column.to(word) << 8 * place
        return self.cut(words)

    def cut(self, words: torch.Tensor) -> torch.Tensor:
        """The windows in words [...] that each hold a group: [..., group]."""
        each: torch.Tensor = words.unsqueeze(-1) >> _multiples(self.stride, self.group, str(words.device), words.dtype)
        return each.bitwise_and_((1 << self.bits) - 1)


@lru_cache(maxsize=32)
def _multiples(stride: int, count: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(count, device=device, dtype=dtype) * stride


@lru_cache(maxsize=32)
def pair_windows(trellis: Trellis) -> PairWindows:
    """One step where it yields two values, else two."""
    steps = 2 // trellis.values
    return PairWindows(trellis.window_bits + (steps - 1) * trellis.step_bits, steps * trellis.step_bits)


def read_pairs(codes: torch.Tensor, trellis: Trellis) -> torch.Tensor:
    """Codes uint8 [..., bytes], as they are stored, to windows [..., words, group] of two values each."""
    pairs, words = pair_windows(trellis), trellis.group_words
    if trellis.magnitudes is None or codes.shape[-1] % (4 * words):
        return pairs.read(from_planes(codes, trellis))
    steps = _eight_steps(codes, words)
    return pairs.cut(steps | steps.roll(-1, -1) << 8 * words)


@lru_cache(maxsize=32)
def pair_table(trellis: Trellis, device: str) -> torch.Tensor:
    """Both values of every pair window, disguised as one complex number: a look-up then copies 8 bytes."""
    table = codebook(trellis)
    window = torch.arange(1 << pair_windows(trellis).bits)
    if trellis.values == 1:
        table = table.expand(2, -1)
        both = (table[0][window & trellis.states - 1], table[1][window >> trellis.step_bits])
    else:
        both = (table[0], table[1])
    return torch.view_as_complex(torch.stack(both, -1).contiguous()).to(device)
