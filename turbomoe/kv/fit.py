"""Fits what a model's codes lack: means and key scales, from keys, values and queries of a calibration text.

Errors hurt where attention looks, so a token weighs as much as the attention that it gets from beyond the exact
windows: SmolLM2 looks at tokens whose values are small, and a plain mean made their errors larger than no mean did.

Keys are divided by a scale a channel, and queries multiplied by it, before both are rotated: the rotation spreads
a code's error evenly, and its size in the scores is sum(E q^2 s^2) * sum(E k^2 / s^2), least at s^4 = E k^2 / E q^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbomoe.errors import IntegrityError
from turbomoe.kv.means import KVMeans, MeansError
from turbomoe.kv.pages import PAGE_TOKENS
from turbomoe.kv.turns import angles, page_turns, turn

SINK, RECENT = 64, 256  # as in the default windows; shorter texts take an eighth and a quarter
FLOOR = 0.1  # weight of a token that no query looks at, relative to the average
LEAST = 1e-4  # moment given to every channel, relative to the average: what is never asked for gets a scale too
QUERY_ROWS = 128


@dataclass
class _Layer:
    """What was seen of a layer: keys and values [kv_heads, n, head_dim], attention mass float64 [kv_heads, n]."""

    keys: torch.Tensor
    values: torch.Tensor
    mass: torch.Tensor
    query_squares: torch.Tensor  # sums, float64 [kv_heads, head_dim]
    queries: int = 0


class TransformFit:
    """Collects ``tokens`` tokens of one sequence, chunk by chunk, layer by layer.

    Keeps their keys and values (a copy of the calibration cache) until ``finish``.
    """

    def __init__(self, tokens: int) -> None:
        self._sink, self._recent = min(SINK, tokens // 8), min(RECENT, tokens // 4)
        self._layers: dict[int, _Layer] = {}

    def add(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        """The next tokens, post-RoPE: queries [1, query_heads, S, head_dim], keys, values [1, kv_heads, S, head_dim].

        ``scale`` is that of the scores.
        """
        if k.shape != v.shape:
            raise IntegrityError(f"Keys {tuple(k.shape)} and values {tuple(v.shape)} of layer {layer} differ")
        heads, count, dim = k.shape[1:]
        seen = self._layers.get(layer)
        if seen is not None and (len(seen.mass), seen.keys.shape[2]) != (heads, dim):
            raise IntegrityError(f"Layer {layer} changed its number or size of heads while its means were taken")
        before = seen or _Layer(k[0, :, :0].float(), v[0, :, :0].float(), *_zeros(k))
        q = q[0].float().reshape(heads, -1, count, dim)
        keys = torch.cat((before.keys, k[0].float()), 1)
        mass = torch.cat((before.mass, before.mass.new_zeros(heads, count)), 1)
        mass += self._mass(q * scale, keys)
        squares = before.query_squares + q.double().square().sum((1, 2))
        values = torch.cat((before.values, v[0].float()), 1)
        self._layers[layer] = _Layer(keys, values, mass, squares, before.queries + q[0, :, :, 0].numel())

    def _mass(self, q: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Attention that keys [kv_heads, n, dim] get, as codes, from the newest queries [kv_heads, group, S, dim]."""
        heads, n = keys.shape[:2]
        mass = keys.new_zeros(heads, n, dtype=torch.float64)
        at = torch.arange(n, device=keys.device)
        for rows, t in zip(q.split(QUERY_ROWS, 2), at[n - q.shape[2] :].split(QUERY_ROWS), strict=True):
            t = t[:, None]
            scores = (rows @ keys[:, None].mT).masked_fill_(at > t, float("-inf")).softmax(-1)
            coded = (at >= self._sink) & (at < t - self._recent)
            mass += (scores * coded).double().sum((1, 2))
        return mass

    def finish(self, identity: str, frequencies: torch.Tensor | None) -> KVMeans:
        """Means and scales of what was added, as float32 on the CPU. Raises ``MeansError`` if that was nothing.

        ``frequencies`` [r]: radians a token by which the rotary embedding turns channels i and i + r; None: none.
        """
        if not self._layers or any(seen.keys.shape[1] <= self._sink for seen in self._layers.values()):
            raise MeansError("KV means cannot be taken", why="no tokens were counted")
        turning = torch.zeros(0) if frequencies is None else frequencies.detach().to("cpu", torch.float32)
        keys, values, scales = {}, {}, {}
        for layer, seen in self._layers.items():
            weights = self._weights(seen.mass)
            keys[layer], scales[layer] = self._keys(seen, weights, turning.to(seen.keys.device))
            values[layer] = _average(seen.values[:, self._sink :].double(), weights).to("cpu", torch.float32)
        return KVMeans(keys, values, identity, scales, turning)

    def _weights(self, mass: torch.Tensor) -> torch.Tensor:
        """Shares of the tokens behind the sinks: float64 [kv_heads, n - sink, 1], each head's sum is 1."""
        mass = mass[:, self._sink :]
        average = mass.mean(1, keepdim=True)
        shares = torch.where(average > 0, mass / average, 1.0) + FLOOR
        return (shares / shares.sum(1, keepdim=True))[..., None]

    def _keys(
        self, seen: _Layer, weights: torch.Tensor, frequencies: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean of a page's keys, turned back to its first position, and the scales: [kv_heads, head_dim] each."""
        keys = seen.keys[:, self._sink :].double()
        at = torch.arange(keys.shape[1], device=keys.device)
        still = _average(turn(keys, angles(frequencies, -(self._sink + at))), weights)
        within = torch.arange(PAGE_TOKENS, device=keys.device)
        mean = turn(still[:, None], angles(frequencies, within)).expand(-1, PAGE_TOKENS, -1).mean(1)
        pages = at // PAGE_TOKENS
        means = turn(mean[:, None], page_turns(frequencies, self._sink, int(pages[-1]) + 1)[pages])
        spread = _average((keys - means).square(), weights)
        scale = _balance(spread, seen.query_squares / seen.queries)
        return mean.to("cpu", torch.float32), scale.to("cpu", torch.float32)


def _zeros(k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = k.shape[1], k.shape[3]
    return k.new_zeros(heads, 0, dtype=torch.float64), k.new_zeros(heads, dim, dtype=torch.float64)


def _average(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (x * weights).sum(1)


def _balance(keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Scales from second moments [kv_heads, head_dim]; their geometric mean is 1 in every head."""
    tiny = torch.finfo(torch.float32).tiny
    keys, queries = (x + LEAST * x.mean(1, keepdim=True) + tiny for x in (keys, queries))
    scale = (keys / queries).pow(0.25)
    return scale / scale.log().mean(1, keepdim=True).exp()
