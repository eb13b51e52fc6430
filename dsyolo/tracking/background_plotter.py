"""Draws pictures of a run while it goes on: the other ranks do not wait for them."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable


class BackgroundPlotter:
    """One thread that draws. Of each picture only the latest version waits; what waits at the end is drawn then.

    What fails costs a warning: a picture is nothing to stop a run for.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        # ends with the program where that breaks, instead of keeping it alive
        self._thread = threading.Thread(target=self._work, name="background-plotter", daemon=True)

    def draw(self, name: str, work: Callable[[], None]) -> None:
        """Has `work` done soon, instead of what waits under that name. After `close` at once."""
        with self._changed:
            if not self._is_closed:
                self._waiting[name] = work
                if self._thread.ident is None:
                    self._thread.start()
                self._changed.notify_all()
                return
        _tried(name, work)

    def wait(self) -> None:
        """Until all is drawn."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def close(self) -> None:
        """Draws what waits, and ends the thread. Further calls do nothing."""
        self.wait()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return
                name = next(iter(self._waiting))
                work = self._waiting.pop(name)
                self._is_busy = True
            _tried(name, work)


def _tried(name: str, work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:  # of OpenCV, Matplotlib, the disk: whatever it is
        warnings.warn(f"{name} was not drawn. {type(error).__name__}: {error}", stacklevel=2)
