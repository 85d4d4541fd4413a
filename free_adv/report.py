"""What the replays know about the training, added up on the device until somebody asks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from free_adv.threat import ThreatModel

EDGE = 1e-4  # relative distance within which delta is at the edge of the ball


class Report:
    """Sums over the replays since the last `read`, by replay; none before the first."""

    def __init__(self) -> None:
        self.sums: list[dict[str, list[Tensor]]] = []  # of each replay, once it was asked for
        self.updates = self.skipped = 0

    def gradient(self, turn: int, delta: Tensor, grad: Tensor, threat: ThreatModel) -> None:
        """Note how delta and the gradient at the point that it has led to lie, before it moves."""
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
            self._add(turn, "alignment", cosine.where(known, 0).sum(), known.sum())
            self._add(turn, "edge", edge.sum(), torch.full_like(edge.sum(), edge.numel()))

    def loss(self, turn: int, loss: Tensor) -> None:
        """Note the loss of a batch."""
        if self.sums:
            value = loss.detach().double().reshape(())
            self._add(turn, "loss", value, torch.ones_like(value))

    def _add(self, turn: int, name: str, value: Tensor, count: Tensor) -> None:
        new = torch.stack([value, count.to(value.dtype)])
        held = self.sums[turn].setdefault(name, [])
        if held and held[0].device == new.device:
            held[0] = held[0] + new
        else:
            held.insert(0, new)

    def read(self, replays: int) -> dict[str, Any]:
        """The means, as plain numbers; begins anew."""
        on = bool(self.sums)
        report: dict[str, Any] = {"updates": on * self.updates, "skipped": on * self.skipped}
        for name in ("alignment", "edge", "loss"):
            report[name] = []
            for sums in self.sums or [{}] * replays:
                total = [
                    sum(values)
                    for values in zip(*(t.tolist() for t in sums.get(name, ())), strict=True)
                ]
                report[name].append(total[0] / total[1] if total and total[1] else math.nan)
        self.sums, self.updates, self.skipped = [{} for _ in range(replays)], 0, 0
        return report
