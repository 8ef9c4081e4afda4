"""From a model file to a runnable model: ``load_model``. One file a family under ``families/``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from turbomoe.config import EngineSettings
from turbomoe.errors import IntegrityError, SettingsError
from turbomoe.files import open_model
from turbomoe.files.base import ModelSource
from turbomoe.files.reference import title_of
from turbomoe.models.base import Forecast, LoadedModel
from turbomoe.models.configure import read_config
from turbomoe.models.families import find_family
from turbomoe.models.fast import make_body
from turbomoe.models.names import names_of
from turbomoe.models.packing import packed_weight_bytes, plan_packing
from turbomoe.models.plan import LoadPlan, make_plan
from turbomoe.models.sampling import sampling_defaults
from turbomoe.models.shapes import ExpertShape, expert_shape, layer_shapes
from turbomoe.models.weights import Meter, Progress, expert_layouts, fill_experts, fill_packed, fill_shell
from turbomoe.notices import Notice, board
from turbomoe.upstream.shell import build_shell, on_meta, swap_experts, tie_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from turbomoe.experts.base import ExpertLayout
    from turbomoe.experts.module import StoreExperts
    from turbomoe.experts.runtime import ExpertRuntime
    from turbomoe.native.pool import WorkerPool

__all__ = ["Forecast", "LoadedModel", "load_model"]


def load_model(
    path: Path,
    settings: EngineSettings,
    progress: Progress | None = None,
    *,
    attention: str = "turbomoe",
    before: Callable[[Forecast], None] | None = None,
) -> LoadedModel:
    """Open the model at ``path`` (a GGUF file or a safetensors folder) and make it runnable.

    ``before`` hears what the model is going to take once everything is checked and nothing is read yet; it may
    raise to stop. ``progress(done, total)`` hears of packed bytes read. ``attention`` names the attention
    implementation of the shell. Raises ``ModelFileError`` for a file that cannot be read and ``ModelError`` for one
    that is not a model we can run; nothing is guessed and nothing is left without weights.
    """
    with closing(open_model(path)) as source:
        return _load(source, settings, progress, attention, before)


def _load(
    source: ModelSource,
    settings: EngineSettings,
    progress: Progress | None,
    attention: str,
    before: Callable[[Forecast], None] | None,
) -> LoadedModel:
    device = usable_device(settings.device)
    family = find_family(source)
    config = read_config(source, family)
    layers = layer_shapes(config)
    dtype = choose_dtype(settings)
    _register(attention)
    shell = build_shell(config, attention=attention, dtype=dtype)
    routed = _swap(shell)
    experts = expert_shape(config) if routed else None
    plan = make_plan(source, names_of(source, family, config), shell, routed, experts)
    _tell_skipped(plan)
    pool = packing_pool(settings)
    packing = {} if pool is None else plan_packing(plan, shell)
    weight_bytes = packed_weight_bytes(shell, packing)
    layouts = expert_layouts(plan, experts, sorted(routed), planar=pool is not None) if experts else []
    if before is not None:
        expert_bytes = sum(layout.num_experts * layout.blob_bytes for layout in layouts)
        limit = config.max_position_embeddings
        before(Forecast(weight_bytes, expert_bytes, layers, limit, config, source.identity()))
    tokenizer = _tokenizer(source)  # before the weights: what it needs for a moment is not on top of them
    meter = Meter(plan.nbytes, progress)
    if pool is None:
        fill_shell(plan, source, shell, dtype, device, meter)
    else:
        fill_packed(plan, source, shell, packing, pool, meter)
    _finish(shell, device)
    runtime = _fill_store(plan, source, experts, layouts, settings, routed, pool, meter) if experts else None
    return LoadedModel(
        name=title_of(source.path),
        family=family.name,
        shell=shell,
        config=config,
        tokenizer=tokenizer,
        layers=layers,
        identity=source.identity(),
        context_length=config.max_position_embeddings,
        dtype=dtype,
        weight_bytes=weight_bytes,
        stop_ids=_stop_ids(source, tokenizer),
        sampling=sampling_defaults(source),
        experts=runtime,
        body=make_body(family.name, shell, layers) if settings.body == "auto" else None,
    )


def packing_pool(settings: EngineSettings) -> WorkerPool | None:
    """The threads that compute with packed weights, where the settings mean that: ``auto`` on the CPU.

    None elsewhere, and where there is no compiled core: float32 takes more memory, but unpacking every weight for
    every token takes far more time.
    """
    if settings.dtype != "auto" or torch.device(settings.device).type != "cpu":
        return None
    from turbomoe.native.shared import shared_pool

    return shared_pool(settings.threads)


def usable_device(name: str) -> torch.device:
    """The device of this name. Raises ``SettingsError`` where this machine or this PyTorch lacks it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"There is no device {name!r}", fix="Use cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        why = "this PyTorch sees no CUDA GPU"
        raise SettingsError(f"The device {name} cannot be used", why=why, fix="Use cpu, or a PyTorch built for CUDA")
    return device


def choose_dtype(settings: EngineSettings) -> torch.dtype:
    """The dtype of activations and of dense weights: ``auto`` is float32 on the CPU and bfloat16 elsewhere."""
    if settings.dtype == "auto":
        return torch.float32 if torch.device(settings.device).type == "cpu" else torch.bfloat16
    return cast(torch.dtype, getattr(torch, settings.dtype))


def _register(attention: str) -> None:
    if attention == "turbomoe":
        from turbomoe.upstream.attention import register

        register()


def _swap(shell: nn.Module) -> dict[int, StoreExperts]:
    def make(layer: int) -> nn.Module:
        from turbomoe.experts.module import StoreExperts

        return StoreExperts(layer)

    return cast("dict[int, StoreExperts]", swap_experts(shell, make))


def _finish(shell: nn.Module, device: torch.device) -> None:
    """Tie what is tied, move the buffers, and make sure that nothing was left without storage."""
    head = shell.get_output_embeddings()  # type: ignore[operator]
    if shell.config.tie_word_embeddings and isinstance(head, nn.Linear):  # type: ignore[union-attr]
        tie_embeddings(shell)
    if left := on_meta(shell):
        raise IntegrityError(f"The weight {left[0]} was planned but never loaded")
    shell.to(device)


def _fill_store(
    plan: LoadPlan,
    source: ModelSource,
    experts: ExpertShape,
    layouts: Sequence[ExpertLayout],
    settings: EngineSettings,
    routed: dict[int, StoreExperts],
    pool: WorkerPool | None,
    meter: Meter,
) -> ExpertRuntime:
    from turbomoe.experts.runtime import ExpertRuntime
    from turbomoe.experts.store import StoreBuilder

    builder = StoreBuilder(layouts, pool)
    fill_experts(plan, source, experts, builder.fill, meter)
    device = torch.device(settings.device)
    runtime = ExpertRuntime(builder.finish(), settings.experts, device, experts.top_k, pool=pool)
    bind(routed.values(), runtime)
    return runtime


def bind(modules: Iterable[StoreExperts], runtime: ExpertRuntime) -> None:
    """Let every expert module compute through ``runtime``."""
    for module in modules:
        module.bind(runtime)


def _tell_skipped(plan: LoadPlan) -> None:
    if not plan.skipped:
        return
    parts = [f"{count} {reason} tensors ({nbytes:,} bytes)" for reason, (count, nbytes) in plan.skipped.items()]
    why = f"{' and '.join(parts)} are not used by the text model"
    board.post(Notice("tensors left out", why, expected=True))


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for a file that holds none (bare weights, as tests write them)."""
    wanted = ("tokenizer.ggml.tokens",) if source.kind == "gguf" else ("tokenizer", "tokenizer_config")
    if not any(key in source.metadata for key in wanted):
        return None
    from turbomoe.upstream.tokenizer import build_tokenizer

    return build_tokenizer(source)


def _stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    if tokenizer is None:
        return frozenset()
    from turbomoe.upstream.tokenizer import stop_ids

    return stop_ids(source, tokenizer)
