"""Which bytes of a weight file tell it apart from a sister with the same header and size."""

from __future__ import annotations

SAMPLES = 32
SAMPLE_BYTES = 4096


def sample_offsets(first: int, size: int) -> list[int]:
    """Offsets of ``SAMPLES`` pages of ``SAMPLE_BYTES``, spread evenly over bytes [first, size) of a file."""
    last = max(first, size - SAMPLE_BYTES)
    return [first + (last - first) * sample // (SAMPLES - 1) for sample in range(SAMPLES)]
