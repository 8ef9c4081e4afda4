"""Loss of held-out texts, and how the model routes them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from batches import Plan
from data import Part
from model import DemoModel
from routing import Routing, transfer


class Evaluation:
    """Measures a model on the held-out parts and the evaluation texts, in windows of the plan's batch and length."""

    def __init__(self, model: DemoModel, parts: list[Part], plan: Plan, device: torch.device) -> None:
        self._model, self._plan, self._device = model, plan, device
        self._parts = [part for part in parts if part.split != "train"]

    def glance(self) -> dict[str, float]:
        """Loss of one batch of every held-out part."""
        held = (part for part in self._parts if part.split == "held")
        return {part.domain: round(self.loss(part, most=1)[0], 4) for part in held}

    def loss(self, part: Part, most: int = 10**9, routing: Routing | None = None) -> tuple[float, int]:
        """(mean loss, tokens) over whole windows of a part, at most ``most`` batches.

        Gradients stay on, unused: without them a compiled model would be compiled anew.
        """
        batch, length = self._plan.batch, self._plan.length
        windows = torch.from_numpy(part.tokens.astype("int64"))
        count = min((len(windows) - 1) // length, batch * most)
        total = 0.0
        for start in range(0, count, batch):
            used = min(batch, count - start)
            picks = torch.arange(start, start + batch).clamp(max=count - 1)[:, None] * length
            both = windows[picks + torch.arange(length + 1)].to(self._device)
            with precision(self._device):
                losses, _, routes = self._model(both[:, :-1].contiguous(), both[:, 1:].contiguous())
            total += float(losses.detach()[:used].sum())
            if routing is not None:
                routing.add(routes, batch, used)
        return total / max(1, count), count * length

    def report(self) -> dict[str, Any]:
        """Losses of every held-out part and text, and the routing."""
        texts, domains = {}, {}
        for part in self._parts:
            routing = self._nothing_routed()
            loss, tokens = self.loss(part, routing=routing)
            texts[f"{part.split}/{part.domain}"] = _row(part, loss, tokens)
            if routing is not None and part.split == "held":
                domains[part.domain] = routing
        return {"texts": texts} | (self._routing(domains) if domains else {})

    def _nothing_routed(self) -> Routing | None:
        shape = self._model.shape
        return Routing.empty(shape.layers, shape.experts) if shape.experts else None

    def _routing(self, domains: dict[str, Routing]) -> dict[str, Any]:
        whole = Routing.empty(self._model.shape.layers, self._model.shape.experts)
        for routing in domains.values():
            whole.counts += routing.counts / routing.counts.sum()
        return {
            "load_of_all_domains": whole.report()["effective_experts"],
            "routing": {name: routing.report() for name, routing in domains.items()},
            "transfer": transfer(domains),
        }


def _row(part: Part, loss: float, tokens: int) -> dict[str, Any]:
    bits = loss * len(part.tokens) / part.text_bytes / math.log(2)
    return {
        "tokens": tokens,
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(bits, 4),
    }


def precision(device: torch.device) -> Any:
    """bfloat16 products on a GPU, plain float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()
