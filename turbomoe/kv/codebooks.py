"""Scalar codebooks for Gaussian coordinates: the levels of Lloyd and Max, pinned.

A rotated head vector of norm sqrt(D) has coordinates close to N(0, 1), so one fixed codebook serves every model
(Lloyd 1982, Max 1960; the TurboQuant_mse codebooks of arXiv 2504.19874 in the limit of a large D). The levels were
iterated in 40-digit arithmetic; the tests compute them again. Fitting levels to data is left out on purpose:
it lowers the squared error and makes the attention weights worse.
"""

from __future__ import annotations

from itertools import pairwise

# The positive half of each codebook, by bits per value; the other half is its mirror image.
POSITIVE_LEVELS: dict[int, tuple[float, ...]] = {
    2: (0.45278003463649201, 1.5104176084990954),
    3: (0.24509417894422167, 0.75600528120587727, 1.3439092785049999, 2.1519457045369873),
    4: (
        0.12839502985114701,
        0.38804829949029020,
        0.65675911853246338,
        0.94234045648696137,
        1.2562311973471772,
        1.6180463860218826,
        2.0690172265313865,
        2.7325895709951631,
    ),
}

# Mean squared error on N(0, 1), which is also the error relative to the energy of the signal.
GAUSSIAN_NMSE: dict[int, float] = {2: 0.117481847829, 3: 0.0345477607885, 4: 0.00950100800819}


def levels(bits: int) -> list[float]:
    """The ``2**bits`` levels for N(0, 1) in ascending order; ``bits`` is 2, 3 or 4."""
    positive = POSITIVE_LEVELS[bits]
    return [-level for level in reversed(positive)] + list(positive)


def thresholds(bits: int) -> list[float]:
    """The ``2**bits - 1`` borders between neighbouring levels (their midpoints), in ascending order."""
    table = levels(bits)
    return [(low + high) / 2 for low, high in pairwise(table)]
