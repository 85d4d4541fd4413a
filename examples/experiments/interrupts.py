"""Ctrl-C and SIGTERM as a wish that a training loop asks for after each update, so that no update is torn or lost."""

import signal
import threading
from types import FrameType


class Interrupts:
    """Within `with Interrupts(...) as stop:` a first signal ends nothing: `stop.wanted` is its number, 0 before.

    Args:
        kinds: The signals.
        at_once: A second signal raises KeyboardInterrupt where the program stands, as Ctrl-C does without this. Not for
            processes that a launcher hands its own signals on to: each of them gets one Ctrl-C twice.
    """

    def __init__(self, *kinds: signal.Signals, at_once: bool = True) -> None:
        self.kinds, self.at_once, self.wanted = kinds, at_once, 0

    def __enter__(self) -> "Interrupts":
        mine = threading.current_thread() is threading.main_thread()  # others cannot take signals
        self.before = {kind: signal.signal(kind, self._note) for kind in self.kinds if mine}
        return self

    def __exit__(self, *_: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def _note(self, kind: int, _: FrameType | None) -> None:
        if self.wanted and self.at_once:
            raise KeyboardInterrupt
        self.wanted = kind
