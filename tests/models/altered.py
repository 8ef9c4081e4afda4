"""A model source with other metadata and other tensor declarations than its file: bad input without a bad file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from turbomoe.files.base import ModelSource, TensorInfo


class Altered(ModelSource):
    """Metadata and tensor table as given; ``load`` makes zeros, ``raw`` too."""

    def __init__(
        self, kind: str, metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo], path: str = "altered"
    ) -> None:
        self.kind, self.metadata, self.tensors, self.path = kind, metadata, tensors, Path(path)

    def raw(self, name: str) -> torch.Tensor:
        return torch.zeros(self.tensors[name].nbytes, dtype=torch.uint8)

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(self.tensors[name].shape, dtype=dtype)

    def identity(self) -> str:
        return "0" * 64

    def close(self) -> None:
        pass
