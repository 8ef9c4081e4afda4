"""From the model's vectors to the vectors a codec stores, and back: subtract a fixed mean, then rotate.

Softmax does not see a constant added to all scores of a query, so a key mean may be subtracted as long as it is the
same for every key that shares the softmax (the cache adds q.mean back where exact keys stand beside stored ones).
Weights sum to 1, so a value mean is added to the output once. The mean never changes while a sequence is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbomoe.kv.hadamard import rotate, unrotate


@dataclass(frozen=True)
class HeadTransform:
    """The transform of one layer's keys, or of its values, for a codec with ``rotated`` as here.

    ``mean`` is float32 [kv_heads, head_dim] or None. Results are float32 and, vector by vector, independent of the
    batch. Rotation keeps dot products: ``rotate_query(q) . forward(k) == q . (k - mean)``.
    """

    rotated: bool
    mean: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [..., kv_heads, tokens, head_dim] to what the codec stores, same shape."""
        centred = x.float() if self.mean is None else x.float() - self.mean.unsqueeze(-2)
        return rotate(centred) if self.rotated else centred

    def rotate_query(self, q: torch.Tensor) -> torch.Tensor:
        """Queries [..., head_dim] into the domain of the stored keys."""
        return rotate(q) if self.rotated else q.float()

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Weighted sums of stored values [..., head_dim] out of the stored domain, still without the mean."""
        return unrotate(y) if self.rotated else y.float()
