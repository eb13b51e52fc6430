"""Python's `logging` for one rank: a console on the main process, a file in the run's folder on every rank."""

import io
import logging
import logging.handlers
import sys
import warnings
from pathlib import Path

from dsyolo.base.atomic_file import open_appending, refuse_planted_link
from dsyolo.base.text import escaped
from dsyolo.tracking.progress_bar import write_above_bar
from dsyolo.tracking.terminal_lines import terminal_width, wrapped

LOGS = "logs"  # folder of the ranks' log files, in the run's folder
LINE = "%(asctime)s %(levelname)s rank %(rank)d: %(source)s%(message)s"
FILE_ONLY = {"is_for_console": False}  # `extra` of a record that the console must not show
MOST_WAITING = 100_000  # records that are kept until the run's folder is known
PACKAGE = Path(__file__).resolve().parents[1]
log, others = logging.getLogger("dsyolo"), logging.getLogger("py.warnings")


class RunLog:
    """The handlers of this rank, from construction to the end of the process.

    On ranks other than 0 the console shows only warnings. It shows plain lines on a terminal, broken to its width, and
    lines with time, level and rank elsewhere. DeepSpeed's lines, which engine/process_group.py hands over, go to the
    file alone until `show_deepspeed` is called.
    """

    def __init__(self, rank: int) -> None:
        self._rank, self._shows_deepspeed = rank, False
        self._file = logging.handlers.MemoryHandler(MOST_WAITING, flushLevel=logging.CRITICAL + 1)
        self._file.addFilter(self._add_rank)
        console = _Console(is_main=rank == 0)
        console.addFilter(self._add_rank)
        console.addFilter(self._is_for_console)
        logging.basicConfig(level=logging.WARNING, handlers=[console, self._file], force=True)
        log.setLevel(logging.DEBUG)  # what the console does not show is in the file
        others.setLevel(logging.INFO)
        logging.raiseExceptions = False  # a full disk must not flood the terminal with tracebacks
        warnings.showwarning = _log_warning

    def open_file(self, folder: Path) -> None:
        """Write all that was and will be logged to `logs/rank_0000.log` in the run's folder; warn if that fails."""
        path = folder / LOGS / f"rank_{self._rank:04d}.log"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_planted_link(path.parent)
            raw = io.BufferedWriter(open_appending(path))
            file = logging.StreamHandler(
                io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)
            )
        except OSError as error:
            log.warning("%s cannot be written: %s. The run goes on without it.", path, error.strerror)
            return
        file.setFormatter(_Escaping(LINE))
        file.addFilter(self._add_rank)
        self._file.setTarget(file)
        self._file.flush()
        root = logging.getLogger()
        root.removeHandler(self._file)
        root.addHandler(file)

    def show_deepspeed(self) -> None:
        """Show DeepSpeed's lines on the console from now on, as a JSON with `steps_per_print` asks for."""
        self._shows_deepspeed = True

    def _add_rank(self, record: logging.LogRecord) -> bool:
        record.rank = self._rank
        record.source = "DeepSpeed: " if record.name == "DeepSpeed" else ""
        return True

    def _is_for_console(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "is_for_console", True):
            return False
        is_shown = record.name.startswith("dsyolo") or (record.name == "DeepSpeed" and self._shows_deepspeed)
        return is_shown or record.levelno >= logging.WARNING


class _Escaping(logging.Formatter):
    """Escapes what would control a terminal, also that of somebody who reads the log."""

    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


class _Console(logging.Handler):
    """Standard output, above a progress bar if there is one; errors go to standard error."""

    def __init__(self, *, is_main: bool) -> None:
        super().__init__(logging.INFO if is_main else logging.WARNING)
        self._is_plain = sys.stdout is not None and sys.stdout.isatty()
        self.setFormatter(_Escaping(LINE))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if record.levelno >= logging.ERROR:
                text, stream = f"\n{escaped(record.getMessage())}\n", sys.stderr
            elif self._is_plain:
                mark = "WARNING: " if record.levelno == logging.WARNING else ""
                stream = sys.stdout
                text = wrapped(f"{mark}{escaped(record.getMessage())}", terminal_width(stream))
            else:
                text, stream = self.format(record), sys.stdout
            write_above_bar(text, stream)
        except Exception:  # a closed stream
            self.handleError(record)


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    """Log the text of our own warnings; others go to the file only, with their place."""
    if category is UserWarning and PACKAGE in Path(filename).parents:
        log.warning("%s", message)
    else:
        others.info("%s:%d: %s: %s", filename, lineno, category.__name__, message)
