"""The families turbomoe can run. A new one is one file here and one line in ``FAMILIES``."""

from __future__ import annotations

from turbomoe.errors import ModelError
from turbomoe.files.base import ModelSource
from turbomoe.models.families import gemma3, llama, qwen2, qwen3, qwen3moe, qwen35, qwen35moe
from turbomoe.models.family import Family

FAMILIES: tuple[Family, ...] = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    gemma3.FAMILY,
    qwen3moe.FAMILY,
    qwen35.FAMILY,
    qwen35moe.FAMILY,
)


def find_family(source: ModelSource) -> Family:
    """The family of a model file; ``ModelError`` with the supported ones if there is none."""
    if source.kind == "gguf":
        wanted, field = source.metadata.get("general.architecture"), "general.architecture"
        found = [family for family in FAMILIES if family.architecture == wanted]
        known = [family.architecture for family in FAMILIES]
    else:
        wanted, field = source.metadata.get("config", {}).get("model_type"), "model_type in config.json"
        found = [family for family in FAMILIES if wanted in family.model_types]
        known = [name for family in FAMILIES for name in family.model_types]
    if found:
        return found[0]
    what = f"has the architecture {str(wanted)[:60]!r}" if wanted else "does not say its architecture"
    raise ModelError(f"{source.path} {what} ({field})", why=f"Supported are {', '.join(known)}")
