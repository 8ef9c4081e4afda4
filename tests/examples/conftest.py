"""The example's modules import each other by bare names: its folder goes onto the path."""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_demo_moe"
sys.path.insert(0, str(EXAMPLE))
