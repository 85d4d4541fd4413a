"""The one place where the tests look at, or patch, what is private in the package."""

import collections
import contextlib
from unittest import mock

from free_adv import delta as module
from free_adv import threat

__all__ = [
    "SHAPES",
    "ascents",
    "balls",
    "buffers",
    "counted",
    "delta_of",
    "keeping",
    "leaf",
    "optimizers_of",
    "rows",
]

SHAPES = module.SHAPES  # of how many sample shapes delta is kept


def balls():
    """What each norm decides."""
    return threat.BALLS


def delta_of(free):
    """What holds all of its delta."""
    return free._loop.delta


def buffers(free):
    """Its delta by place, sample shape and precision: not copies."""
    return delta_of(free).buffers


def leaf(free):
    """The rows of delta that wait for the gradient of the oldest batch in flight."""
    (found,) = free._loop.flight.waiting[0].leaves.values()
    return found


def optimizers_of(free):
    """What `step` drives."""
    return free._loop.optimizers


def rows(free):
    """Which rows each input in flight has."""
    return [i.rows for micro in free._loop.flight.micros for i in micro.inputs]


def ascents(free):
    """Each ascent of delta from now on: the rows before it, the gradient, and the rows after it."""
    delta, made = delta_of(free), []
    ascend = delta.ascend

    def watched(rows, grad):
        before, given = delta[rows].clone(), grad.clone()
        ascend(rows, grad)
        made.append((before, given, delta[rows].clone()))

    delta.ascend = watched
    return made


def counted(free):
    """How often delta moves a batch, and ascends, from now on."""
    delta, counts = delta_of(free), collections.Counter()

    def count(name, method):
        def counting(*args, **kwargs):
            counts[name] += 1
            return method(*args, **kwargs)

        return counting

    delta.ascend = count("ascend", delta.ascend)
    module.Move.apply = count("move", module.Move.apply)
    return counts


@contextlib.contextmanager
def keeping(shapes):
    """As if delta were kept of so many sample shapes."""
    with mock.patch.object(module, "SHAPES", shapes):
        yield
