"""Scalar codebooks for Gaussian coordinates: the levels of Lloyd and Max, as whole multiples of a step.

A rotated head vector of norm sqrt(D) has coordinates close to N(0, 1), so one fixed codebook serves every model
(Lloyd 1982, Max 1960; the TurboQuant_mse codebooks of arXiv 2504.19874 in the limit of a large D). Whole multiples, so
that a GPU's integer products take them as bytes; steps were chosen for the least error, which they raise by 0.22% at 4
bits and by less than 0.01% at 2 and 3. Fitting levels to data is left out on purpose: it lowers the squared error and
makes the attention weights worse.
"""

from __future__ import annotations

from itertools import pairwise

# By bits per value: the step, and the positive half of the levels in steps; the other half is its mirror image.
STEPS: dict[int, float] = {2: 0.15103, 3: 0.02445, 4: 0.0448}
POSITIVE_STEPS: dict[int, tuple[int, ...]] = {
    2: (3, 10),
    3: (10, 31, 55, 88),
    4: (3, 9, 15, 21, 28, 36, 46, 61),
}
POSITIVE_LEVELS = {bits: tuple(n * STEPS[bits] for n in steps) for bits, steps in POSITIVE_STEPS.items()}

# Mean squared error on N(0, 1), which is also the error relative to the energy of the signal.
GAUSSIAN_NMSE: dict[int, float] = {2: 0.117481912251, 3: 0.0345485814231, 4: 0.00952201289244}


def levels(bits: int) -> list[float]:
    """The ``2**bits`` levels for N(0, 1) in ascending order; ``bits`` is 2, 3 or 4."""
    positive = POSITIVE_LEVELS[bits]
    return [-level for level in reversed(positive)] + list(positive)


def thresholds(bits: int) -> list[float]:
    """The ``2**bits - 1`` borders between neighbouring levels (their midpoints), in ascending order."""
    table = levels(bits)
    return [(low + high) / 2 for low, high in pairwise(table)]
