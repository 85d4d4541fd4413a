"""What the replays know about the training, added up on the device until somebody asks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from free_adv.threat import ThreatModel

Sums = dict[str, list[Tensor]]  # by name, of each device: the sum and how many there were
EDGE = 1e-4  # relative distance within which delta is at the edge of the ball


class Report:
    """Sums over the replays since the last `read`, by replay; none before the first."""

    def __init__(self) -> None:
        self.sums: list[Sums] = []  # of each replay, once it was asked for
        self.climbs: list[Sums] = []  # of each ascent before the first of them
        self.updates = self.skipped = 0

    def gradient(self, turn: int, delta: Tensor, grad: Tensor, threat: ThreatModel) -> None:
        """Note how delta and the gradient at the point that it has led to lie, before it moves."""
        self._look(self.sums[turn], delta, grad, threat)

    def ascent(self, number: int, delta: Tensor, grad: Tensor, threat: ThreatModel) -> None:
        """The same for an ascent before the first replay."""
        if self.sums:
            self.climbs += [{} for _ in range(number + 1 - len(self.climbs))]
            self._look(self.climbs[number], delta, grad, threat)

    def _look(self, sums: Sums, delta: Tensor, grad: Tensor, threat: ThreatModel) -> None:
        if len(delta):
            grad = grad.to(delta.device)
            # A unit of the loader, in pixel units.
            unit = threat.displacement(torch.zeros_like(grad), torch.ones_like(grad))
            grad = (grad / unit).reshape(len(delta), -1).double()
            flat = delta.detach().reshape(len(delta), -1).double()
            lengths = flat.norm(dim=1) * grad.norm(dim=1)
            cosine = (flat * grad).sum(1) / lengths
            edge = (threat.ball.size(flat) >= threat.eps * (1 - EDGE)).double()
            known = lengths > 0  # there is an angle
            _add(sums, "alignment", cosine.where(known, 0).sum(), known.sum())
            _add(sums, "edge", edge.sum(), torch.full_like(edge.sum(), edge.numel()))

    def loss(self, turn: int, loss: Tensor) -> None:
        """Note the loss of a batch."""
        if self.sums:
            value = loss.detach().double().reshape(())
            _add(self.sums[turn], "loss", value, torch.ones_like(value))

    def read(self, replays: int) -> dict[str, Any]:
        """The means, as plain numbers; begins anew."""
        on = bool(self.sums)
        report: dict[str, Any] = {"updates": on * self.updates, "skipped": on * self.skipped}
        for name in ("alignment", "edge", "loss"):
            report[name] = [_mean(sums, name) for sums in self.sums or [{}] * replays]
        report["ascents"] = [_mean(sums, "alignment") for sums in self.climbs]
        self.sums, self.climbs = [{} for _ in range(replays)], []
        self.updates = self.skipped = 0
        return report


def _add(sums: Sums, name: str, value: Tensor, count: Tensor) -> None:
    new = torch.stack([value, count.to(value.dtype)])
    held = sums.setdefault(name, [])
    if held and held[0].device == new.device:
        held[0] = held[0] + new
    else:
        held.insert(0, new)


def _mean(sums: Sums, name: str) -> float:
    pairs = zip(*(t.tolist() for t in sums.get(name, ())), strict=True)
    value, count = [sum(values) for values in pairs] or (0.0, 0.0)
    return value / count if count else math.nan
