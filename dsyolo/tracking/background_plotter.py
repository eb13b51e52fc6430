"""Draws pictures in a thread, so that no rank waits for them."""

import threading
import warnings
from collections.abc import Callable


class BackgroundPlotter:
    """One drawing thread. Only the latest version of each picture waits; what waits at the end is drawn then.

    A picture that fails costs a warning, and does not stop the run.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], None]] = {}
        self._is_busy = self._is_closed = False
        self._changed = threading.Condition()
        # A daemon, so that it does not keep a broken program alive
        self._thread = threading.Thread(target=self._work, name="background-plotter", daemon=True)

    def draw(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` soon, in place of what waits under that name; after `close`, run it at once."""
        with self._changed:
            if not self._is_closed and self._is_started():
                self._waiting[name] = work
                self._changed.notify_all()
                return
        _tried(name, work)

    def _is_started(self) -> bool:
        if self._thread.ident is None:
            try:
                self._thread.start()
            except RuntimeError:  # no memory for its stack
                return False
        return True

    def wait(self) -> None:
        """Wait until everything is drawn."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._is_busy)

    def close(self) -> None:
        """Draw what waits, and end the thread. Further calls do nothing."""
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
    except Exception as error:  # OpenCV's, Matplotlib's, the disk's
        warnings.warn(f"{name} was not drawn. {type(error).__name__}: {error}", stacklevel=2)
