"""What a model's codes lack (``kv/means.py``): fitted once over a built-in text, then kept in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch

from turbomoe.config import KVSettings, state_dir
from turbomoe.engine.runner import ModelRunner
from turbomoe.experts.base import Phase
from turbomoe.files.atomic import WriteError
from turbomoe.kv.codecs import make_codec
from turbomoe.kv.fit import TransformFit
from turbomoe.kv.means import KVMeans, MeansError, OlderMeansError
from turbomoe.kv.shape import AttentionShape
from turbomoe.models.base import LoadedModel
from turbomoe.notices import Notice, board

CALIBRATION_TOKENS = 2048
CHUNK = 512
Progress = Callable[[int, int], None]
_unkept: dict[Path, KVMeans] = {}  # what the disk would not take, for the rest of this process


def means_path(identity: str) -> Path:
    """Where the means of the model with this identity are kept."""
    return state_dir() / "models" / identity / "kv-means.safetensors"


def needs_means(model: LoadedModel, kv: KVSettings) -> bool:
    """Whether these settings subtract means anywhere in this model."""
    full = [s for s in model.layers if isinstance(s, AttentionShape) and not s.window]
    return kv.means and any(make_codec(t, s.head_dim).rotated for s in full for t in (kv.type_k, kv.type_v))


def is_calibrated(model: LoadedModel, kv: KVSettings) -> bool:
    """Whether ``means_for`` will answer without running the model."""
    path = means_path(model.identity)
    return not needs_means(model, kv) or path in _unkept or path.exists()


def means_for(model: LoadedModel, kv: KVSettings, progress: Progress | None = None) -> KVMeans | None:
    """The model's means, calibrated now if they are not on disk yet; None where the settings do not use any.

    ``progress(done, total)`` hears of calibration tokens. Means that cannot be kept are a note, not an error.
    """
    if not needs_means(model, kv):
        return None
    path = means_path(model.identity)
    if path in _unkept:
        return _unkept[path]
    if path.exists():
        try:
            return KVMeans.load(path, model.identity)
        except OlderMeansError as error:
            board.post(Notice("calibrating again", error.what, "a few seconds", expected=True))
        except MeansError as error:
            board.post(Notice("calibrating again", str(error).rstrip("."), "a few seconds"))
    means = calibrate(model, progress)
    _keep(means, path)
    return means


def _keep(means: KVMeans, path: Path) -> None:
    try:
        means.save(path)
    except WriteError as error:
        _unkept[path] = means
        avoid = "make room there, or set TURBOMOE_HOME to a folder that can be written"
        board.post(Notice("the means are not kept", str(error).rstrip("."), "calibrating again next time", avoid))


def calibrate(model: LoadedModel, progress: Progress | None = None) -> KVMeans:
    """Run the model over the calibration text with an exact cache and fit its full-attention keys and values."""
    from turbomoe.upstream.rotary import rotary_frequencies

    ids = calibration_ids(model)
    runner = ModelRunner(model, KVSettings("f32", "f32"), slots=1, ctx_size=len(ids), measuring=True)
    report = progress or (lambda done, total: None)
    fit = TransformFit(len(ids))
    full = {s.layer for s in model.layers if isinstance(s, AttentionShape) and not s.window}

    def observe(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> None:
        if layer in full:
            fit.add(layer, q, k, v, scale)

    runner.memory.observer = observe
    for at in range(0, len(ids), CHUNK):
        report(at, len(ids))
        runner.forward([0], torch.tensor([ids[at : at + CHUNK]]), Phase.PREFILL)
    report(len(ids), len(ids))
    frequencies = rotary_frequencies(model.shell)
    if frequencies is None:
        board.post(Notice("key means do not turn with the position", "this model's rotary angles depend on the length",
                          "larger errors of coded keys far from the start", "-ctk q8_0 for long contexts"))  # fmt: skip
    return fit.finish(model.identity, frequencies)


def calibration_ids(model: LoadedModel) -> list[int]:
    """The built-in text in the model's tokens; evenly spread numbers for a model without a tokenizer."""
    if model.tokenizer is None:
        vocabulary = int(model.config.vocab_size)
        return [(i * 7919) % vocabulary for i in range(min(256, model.context_length))]
    text = (files("turbomoe.kv") / "calibration_text.txt").read_text("utf-8")
    ids: list[int] = model.tokenizer(text)["input_ids"]
    return ids[: min(CALIBRATION_TOKENS, model.context_length)]
