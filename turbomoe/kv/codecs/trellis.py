"""tcq2, tcq2.5, tcq3, tcq4: trellis-coded vectors, a path of overlapping windows for each, and one matched-norm scale.

At equal bits more than a third (2 bits) to more than two fifths (3 and 4 bits) below the error of one Lloyd-Max level a
coordinate. The input is already centred and rotated, as for tq2, tq3 and tq4, and the scale is theirs.
"""

from __future__ import annotations

import torch

from turbomoe.errors import SettingsError
from turbomoe.kv.base import Codec, Plane
from turbomoe.kv.codecs.lloydmax import look_up
from turbomoe.kv.codecs.scales import matched_scale, spread_out
from turbomoe.kv.codecs.windows import pack_steps, pair_table, read_pairs, to_planes
from turbomoe.kv.trellis_codebook import TRELLISES, by_dropped_bits, codebook
from turbomoe.kv.trellis_search import search
from turbomoe.native.library import Core, load_core
from turbomoe.native.trellis import encode

SMALLEST, LARGEST = 32, 512  # values of a head
VERSIONS = {"tcq2.5": 3}  # other codebooks in 1; tcq2.5's has its bits in planes since 3
HEAD_SIZES = (64, 128, 256)  # that the GPU's search takes


class TrellisCodec(Codec):
    """Exactly ``step_bits / values`` bits a coordinate in one circular stream, and an fp16 scale a vector.

    Bit b of the stream is bit b % 8 of byte b // 8; the window of step i is bits [step_bits * i, step_bits * i +
    window_bits), modulo the length. ``windows.to_planes`` says in which order its words or bits are stored. A vector
    with a NaN or an infinity has the codes of a zero vector and decodes to NaN throughout, a zero vector to zeros.
    Scales saturate and vanish as those of tq2, tq3 and tq4 do.
    """

    rotated = True

    def __init__(self, name: str, head_dim: int) -> None:
        super().__init__(head_dim)
        self.name, self.trellis = name, TRELLISES[name]
        self.version = VERSIONS.get(name, 2)
        if not SMALLEST <= head_dim <= LARGEST or head_dim & (head_dim - 1):
            raise SettingsError(
                f"{name} cannot store heads of {head_dim} values",
                why=f"the Hadamard rotation and the trellis need a power of two from {SMALLEST} to {LARGEST}",
                fix="choose q8_0 (heads of a multiple of 32) or bf16 for this model",
            )

    @property
    def planes(self) -> tuple[Plane, ...]:
        bits = self.head_dim // self.trellis.values * self.trellis.step_bits
        return Plane("codes", torch.uint8, bits // 8), Plane("scales", torch.float16, 1)

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The one place that picks: on a GPU Triton, on a CPU the C core, else the reference in PyTorch."""
        if x.device.type == "cuda" and self.head_dim in HEAD_SIZES:
            from turbomoe.kv.kernels.encoding import encode as encode_on_gpu
            from turbomoe.kv.kernels.encoding import passes

            if passes(self.name, self.head_dim, x.device):
                return encode_on_gpu(x, self.trellis)
        core = load_core() if x.device.type == "cpu" else None
        return self.encode_plainly(x) if core is None else self.encode_natively(core, x)

    def encode_natively(self, core: Core, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``encode`` in the C core, on the CPU."""
        tables = codebook(self.trellis), by_dropped_bits(self.trellis)
        return encode(core, self.name, x.float(), *tables, self.planes[0].width)

    def encode_plainly(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``encode`` in PyTorch, on any device: the reference."""
        spread, peak, norm = spread_out(x.float())
        # NaN stands for vectors of zeros and those that were not finite.
        windows = search(spread.nan_to_num(nan=0.0).reshape(-1, self.head_dim), self.trellis)
        chosen = self._values(windows).view(x.shape)
        stream = pack_steps(windows & (1 << self.trellis.step_bits) - 1, self.trellis.step_bits)
        codes = to_planes(stream, self.trellis)
        return codes.view(*x.shape[:-1], codes.shape[-1]), matched_scale(chosen, peak, norm)

    def decode(self, planes: tuple[torch.Tensor, ...]) -> torch.Tensor:
        codes, scales = planes
        return self._decoded(codes).mul_(scales.float())

    def read(self, planes: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        codes, scales = planes
        return self._decoded(codes), scales.float()

    def _values(self, windows: torch.Tensor) -> torch.Tensor:
        """Windows int64 [n, steps] to values float32 [n, head_dim]."""
        table = codebook(self.trellis, str(windows.device))
        return table.t()[windows].flatten(1)

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        """Values float32 [..., head_dim] of codes uint8 [..., bytes]."""
        index = read_pairs(codes, self.trellis)
        pairs = look_up(pair_table(self.trellis, str(codes.device)), index)
        return torch.view_as_real(pairs).reshape(*codes.shape[:-1], self.head_dim)
