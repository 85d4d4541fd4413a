"""What a user is told of a likely mistake that is no error. Nothing here changes what is computed."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)
from torch.utils.hooks import RemovableHandle

from free_adv.batch import tensors

if TYPE_CHECKING:
    from free_adv.delta import Key
    from free_adv.flight import Visit
    from free_adv.loop import Loop

LOOKS = 8  # in how many replays calls are compared, which waits for the device
GAPS = 3  # how many times updates must lie equally far apart to be a rule


class Hints:
    """What one `FreeAdversarial` tells, each topic once."""

    def __init__(self) -> None:
        self.told: set[object] = set()
        self.shapes = 0  # of how many sample shapes batches were looked at
        self.bare: list[Tensor] = []  # what calls of `at` under no_grad were given
        self.looks = 0  # in how many replays they were compared with others
        self.updates: list[int] = []  # after how many batches an optimizer has stepped
        self.moved = False  # whether delta has
        # A weight that has a gradient of the micro-batches so far.
        self.summed: Tensor | None = None
        # Where the gradients of a new shape are zero, and whether they are of float16.
        self.zeros: dict[object, tuple[Tensor, Tensor]] = {}

    def first(self, topic: object) -> bool:
        """Whether the topic is new."""
        new = topic not in self.told
        self.told.add(topic)
        return new

    def tell(self, topic: str, text: str) -> None:
        """Warn of a topic, once."""
        if self.first(topic):
            warn(text)

    def of_the_loader(self, loop: Loop, loader: Any) -> None:
        """Ranks that all read the same; a loader that begins anew after a state of mid-epoch."""
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            self.tell(
                "dataset",
                f"the loader is a dataset, {type(loader).__name__}, whose items would be taken for batches: wrap it, as "
                "in DataLoader(dataset, batch_size=128, shuffle=True); ignore this if its items are batches",
            )
        many = distributed.is_available() and distributed.is_initialized()
        many = many and distributed.get_world_size() > 1
        if many and _plain(loader, RandomSampler, SequentialSampler):
            self.tell(
                "ranks",
                "every rank trains on all the data: this DataLoader is not split between the ranks of "
                "the process group. Call replay() after accelerator.prepare, or give the DataLoader a "
                "DistributedSampler; ignore this if the dataset itself is already split by rank",
            )
        if loop.resumed and _plain(loader, RandomSampler):
            self.tell(
                "resumed",
                f"the state was saved inside an epoch: {loop.flight.todo} replays that were left come first, and then "
                "this shuffled DataLoader from its beginning, so that there are more updates than a schedule "
                "expects. Save behind the loop, at the end of an epoch, or use a loader that resumes, such as "
                "torchdata's StatefulDataLoader; ignore this if yours goes on where it was",
            )

    def of_the_batches(self, loop: Loop) -> None:
        """Weights on another device; a tensor like an input that was not named."""
        for optimizer in loop.optimizers[:1]:
            self._of_the_device(loop, optimizer)
        if len(loop.delta.seen) == self.shapes or "key" in self.told:
            return
        self.shapes = len(loop.delta.seen)
        for micro in loop.flight.micros:
            named = {i.path: i.given for i in micro.inputs}
            shapes = {x.shape for x in named.values() if x.ndim > 1 and x[:1].numel() > 1}
            for path, t in tensors(micro.batch):
                if (
                    path in named
                    or t.is_nested
                    or t.layout != torch.strided
                    or t.shape not in shapes
                ):
                    continue
                # An input may be its own target.
                own = any(t is x or _equal(t, x) for x in named.values())
                if t.is_floating_point() and not own:
                    self.tell(
                        "key",
                        f"the batch holds a tensor like its input at {path}, which stays as it is: if it is an input "
                        "too, such as a second view, name both, as in key=[0, 1]; ignore this if it is a target",
                    )

    def _of_the_device(self, loop: Loop, optimizer: Any) -> None:
        inputs = [i for micro in loop.flight.micros for i in micro.inputs]
        if not inputs or not self.first("device"):
            return
        here = inputs[0].x.device
        there = next((p.device for g in optimizer.param_groups for p in g["params"]), here)
        if here.type == "cpu" != there.type:
            warn(
                f"the batches are on the CPU and the weights on {there}, so that delta and its gradient cross "
                f"between them in every replay: pass FreeAdversarial(..., device={str(there)!r}), which moves "
                "each batch once; ignore this if delta is to stay in the host's memory"
            )

    def watch(self, loop: Loop) -> RemovableHandle:
        """Look at optimizers as they step, whoever asked them to, until the first updates are through."""

        def look(optimizer: Any, args: Any, kwargs: Any) -> None:
            if self.enough(loop):  # it cannot go from here, where torch runs through all hooks
                return
            mine = optimizer in loop.optimizers
            if not loop.optimizers:
                self._of_the_device(loop, optimizer)
            closure = len(args) > 1 or kwargs  # which has yet to make the gradients
            early = (
                not loop.moving and loop.yielded == 1
            )  # a loop may step before its first backward pass
            if mine and not closure and not early and self.first("weights"):
                self._of_the_weights(loop)
            if loop.moving:
                return
            if mine and loop.stepped:
                self.tell(
                    "steps",
                    "the optimizer steps again after free.step(loss), which has moved the weights already: leave out "
                    "optimizer.step(), zero_grad() and loss.backward(); ignore this if it is an update of your own",
                )
            self._of_the_gaps(loop)

        handle = register_optimizer_step_pre_hook(look)
        if self.enough(loop):
            handle.remove()
        return handle

    def enough(self, loop: Loop) -> bool:
        """Whether there is nothing more to see of the optimizers."""
        return len(self.updates) > GAPS or (loop.driven and "step" in self.told)

    def _of_the_weights(self, loop: Loop) -> None:
        if all(p.grad is None for p in loop.parameters):
            warn(
                f"none of the {len(loop.parameters)} weights of the optimizer has a gradient, so that nothing is trained: "
                "pass the optimizer of the model that the loss comes from; look for a model that was copied or wrapped "
                "after the optimizer was made, and for frozen weights; ignore this if they are to stay as they are"
            )

    def sums(self, loop: Loop, ends: bool) -> None:
        """Remember a weight to which `step` has given a gradient that the next micro-batch adds to."""
        parameters = () if ends else loop.parameters
        self.summed = next((p for p in parameters if p.grad is not None), None)

    def of_the_sum(self, micro: int) -> None:
        """Gradients of weights that are gone between two micro-batches of an update."""
        if micro and self.summed is not None and self.summed.grad is None:
            self.tell(
                "sum",
                f"the gradients of this update's earlier micro-batches ({micro} so far) are gone, so that the weights move by "
                "those of the later ones only: leave out optimizer.zero_grad(), which free.step(loss) makes where an update begins; "
                "ignore this if they are to be dropped",
            )

    def _of_the_gaps(self, loop: Loop) -> None:
        if loop.driven:  # these are optimizers of something else
            return
        if self.updates and self.updates[-1] == loop.yielded:  # a further optimizer
            return
        self.updates.append(loop.yielded)
        gaps = {b - a for a, b in itertools.pairwise(self.updates)}
        even = len(self.updates) > GAPS and len(gaps) == 1
        if even and (gap := gaps.pop()) > loop.accumulate:
            self.tell(
                "gaps",
                f"the optimizer steps after every {gap} batches of the replay, which are replays of one minibatch: if "
                f"they are to be {gap} micro-batches of an update, pass FreeAdversarial(..., accumulate={gap}); "
                "ignore this if there are to be fewer updates than replays",
            )

    def of_a_minibatch(self, loop: Loop, watch: RemovableHandle | None) -> None:
        """Arguments that only `step` uses, once a minibatch is through without it; whether to go on watching."""
        if not self.moved:  # all were skipped, or came from a state with nothing left
            return
        scaler = None if loop.objective else loop.scaler  # which scales the objective's loss too
        given = {"scaler": scaler, "max_grad_norm": loop.max_norm}
        names = [f"{name}=" for name, value in given.items() if value is not None]
        if self.first("step") and names and not loop.driven:
            warn(
                f"{' and '.join(names)} {'does' if len(names) == 1 else 'do'} nothing here, since free.step(loss) is not "
                "called: call it in place of zero_grad(), backward() and optimizer.step(), or leave the argument out "
                "and scale and clip in the loop; ignore this if step is called later"
            )
        if watch is not None and self.enough(loop):
            watch.remove()

    def of_the_turn(self, turns: set[int]) -> None:
        """Batches out ahead that are of several replays."""
        if len(turns) > 1:
            self.tell(
                "turn",
                f"the batches that were taken ahead are replays {sorted(turns)} of a short minibatch, and turn is that of "
                "the last one: take them one by one, or leave out a short last group (drop_last=True); ignore this if "
                "nothing depends on it",
            )

    def of_the_latest(self, seen: list[bool]) -> None:
        """What belongs to the batch yielded last, while others are out, of which nobody has asked for it in their time."""
        if not all(seen):
            self.tell(
                "latest",
                f"the batches that were taken ahead are {len(seen)}, and free.clean and free.delta are those of the last one, so "
                "that a loss made with them pairs the others with wrong images: take batches one by one (in a framework, "
                "accumulate none), or let a batch hold its images twice; ignore this if they are only looked at",
            )

    def of_the_epochs(self, n: int, made: int, cost: float) -> None:
        """Epochs that cannot be divided by what one of them costs."""
        if made * cost > 1.25 * n:
            self.tell(
                "epochs",
                f"epochs({n}) is {made}, and each costs what {cost:.3g} natural ones do (replays + 2/3 ascents), in all "
                f"{made * cost:.3g}: take more epochs, or fewer replays; ignore this if the cost does not matter",
            )

    def of_the_climb(self, climbed: set[Key], visit: Visit) -> None:
        """Calls of the module `at` that the objective makes otherwise than the loop: they have another delta."""
        if not (climbed and visit.inside and visit.stop.turn == 0) or "climb" in self.told:
            return
        used = {rows.key for rows in visit.leaves}
        lost = {k for k in climbed if [*k.place[:2]] == [*visit.stop[1:3]]} - used
        if lost and used - climbed:
            what, own = (
                sorted({repr(k.place[2]) for k in keys}) for keys in (lost, used - climbed)
            )
            self.tell(
                "climb",
                f"the objective gives the module passed as at other tensors (its place: {', '.join(what)}) than the loop does "
                f"({', '.join(own)}), so that the ascents move a delta that the loop does not train on: give it the same ones in "
                "both, the batch's own in the same order, or a copy in both; ignore this if these calls are to differ",
            )

    def of_a_bare_call(self, args: list[Tensor]) -> None:
        """A call of the module `at` under no_grad."""
        if "cached" not in self.told:
            self.bare += args[:1]

    def of_a_call(self, args: list[Tensor]) -> None:
        """A call of the module `at` with gradients, maybe of samples that were through without."""
        for old in self.bare if args and args[0].ndim else ():
            t = args[0]
            form, other = ((a.shape[1:], a.dtype, a.device) for a in (t, old))
            alike = old.ndim and form == other and t[:1].numel() > 1  # one number says little
            if alike and (old == t[:1]).reshape(len(old), -1).all(1).any():
                self.tell(
                    "cached",
                    "samples that the module given as at has seen under torch.no_grad() come again with gradients in the "
                    "same replay: without gradients they are not perturbed, so that features cached from that pass are "
                    "those of the clean batch. Make that pass with gradients too, and detach() the features; ignore "
                    "this if clean features are meant, as those for a log or of a teacher",
                )

    def of_an_update(self) -> None:
        """Delta has moved: what comes next is another replay."""
        self.moved = True
        while self.zeros:
            zero, half = self.zeros.popitem()[1]
            still = int((zero.float().mean(1) >= (0.1 if half else 1)).sum())
            if still >= len(zero) / 2:
                what = "zero in a tenth of its entries or more" if half else "zero"
                warn(masked(still, len(zero), what, "in this replay"))
        if self.bare:
            self.bare = []
            self.looks += 1
            if self.looks == LOOKS:
                self.first("cached")

    def of_the_gradient(self, shape: object, moved: Tensor) -> None:
        """One that will be zero for half of the samples, of a shape that is new."""

        def look(grad: Tensor) -> None:  # each pass may be that of a part of the batch
            if grad.numel() and not grad.is_meta:
                zero = grad.detach().reshape(len(grad), -1) == 0
                old = self.zeros.get(shape)
                half = _of_float16(grad.detach())  # where what is too small becomes zero
                self.zeros[shape] = (zero if old is None else zero & old[0]), half

        if self.first(shape):
            moved.register_hook(look)  # type: ignore[no-untyped-call]

    def of_the_rank(self, theirs: list[int], mine: list[int]) -> None:
        """A state of another rank."""
        if theirs != mine:
            warn(
                f"the state is that of rank {theirs[0]} of {theirs[1]}, but this is rank {mine[0]} of {mine[1]}, "
                "whose delta and minibatch in flight were others: save the state of each rank in a file of "
                "its own; ignore this if the number of ranks has changed on purpose"
            )


def warn(text: str) -> None:
    """Warn at the line outside this package, and outside of torch, from which it was called."""
    level, frame = 1, sys._getframe()
    inner = ("free_adv.", "torch.")
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(inner):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def doubt(
    x: Tensor, seen: tuple[float, float], bounds: tuple[float, float] | None, eps: float
) -> None:
    """Warn of what is odd about the range of a batch, as the loader gave it and as `seen` in pixel units."""
    (low, high), (first, last) = seen, (float(v) for v in x.aminmax())
    range_ = f"the input's values run from {low:.3g} to {high:.3g} in pixel units"
    odd = ""
    if bounds and (first, last) != seen and bounds[0] <= first < last <= bounds[1]:
        odd = (
            f"mean and std are given, but the batch as the loader gives it runs from {first:.3g} to {last:.3g}, "
            f"inside bounds {bounds}, as images do before normalisation: leave out mean and std, or normalise"
        )
    elif bounds and 0 < high - low < (bounds[1] - bounds[0]) / 10:
        odd = (
            f"{range_}, less than a tenth of bounds {bounds}: look whether images are divided by 255 twice, or "
            "bounds are those of 0..255 for images in [0, 1]"
        )
    elif bounds and eps < (width := bounds[1] - bounds[0]) / 2550 and _of_grey_levels(eps):
        odd = (
            f"eps={eps:g} is less than a tenth of a grey level of bounds {bounds}: give eps in the units of bounds, "
            f"perhaps {eps * width:g}"
        )
    elif 0 < high - low < eps:
        odd = f"{range_}, and eps={eps:g} is more than that: give eps in the units of the input"
    if odd:
        warn(f"{odd}; ignore this if it is meant")


def _of_grey_levels(eps: float) -> bool:
    """Whether it is as one writes it for images in [0, 1]: 1/255 to 32/255."""
    return abs(eps * 255 - round(eps * 255)) < 1e-6 and 1 <= round(eps * 255) <= 32


def frames(x: Tensor, mean: tuple[Any, ...] | None) -> None:
    """Warn where the channels of a video may be dimension 2."""
    flat = mean is not None and not isinstance(mean[0], tuple) and len(mean) > 1
    if mean is not None and flat and x.ndim == 5 and x.shape[1] == x.shape[2] == len(mean):
        warn(
            f"mean and std are taken for those of dimension 1 of the input, of shape {tuple(x.shape)}, but dimension 2 "
            "would fit as well: if that one has the channels, as in (N, frames, C, H, W), pass tensors of shape "
            "(C, 1, 1); ignore this if dimension 1 has them"
        )


def masked(still: int, samples: int, what: str, when: str) -> str:
    """What to say of samples that have no gradient."""
    return (
        f"the input gradient of {still} of {samples} samples is {what} {when}, so that they are not "
        "moved: a model may look robust that is not. Look for a layer that rounds, probabilities in place of "
        "logits, float16 without a GradScaler; in an evaluation try loss='cw', attack='autoattack' or float32"
    )


def _of_float16(grad: Tensor) -> Tensor:
    """Whether a gradient was computed in float16, also where autocast has made it float32 since, and is small for it."""
    some = grad != 0
    least = some & (grad.abs() < 1e-6)  # where the grid of float16 is coarse, and no other's is
    return (grad == grad.half()).all() & some.any() & (2 * least.sum() >= some.sum())


def _equal(t: Tensor, other: Tensor) -> bool:
    return (
        t.shape == other.shape
        and t.device == other.device
        and not t.is_meta
        and bool((t == other).all())
    )


def _plain(loader: Any, *samplers: type) -> bool:
    """Whether it is a DataLoader of torch's own, with one of these samplers."""
    # Beside a batch sampler of the user's, the loader's own `sampler` says nothing.
    batches = getattr(loader, "batch_sampler", None)
    sampler = getattr(loader if batches is None else batches, "sampler", None)
    return (
        type(loader) is DataLoader
        and type(sampler) in samplers
        and type(batches) in (BatchSampler, type(None))
    )
