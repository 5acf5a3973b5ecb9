"""How Petal's programs run and end: whatever went wrong is one line that says what to do, never a stack trace."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import typer

# Exit codes: of a fault, and of a wrong command line.
FAULT, USAGE = 1, 2
# Set to see where an error came from.
DEBUG = "PETAL_DEBUG"
# Errors whose message is a sentence for whoever typed the command, as are all of Petal's own.
_SAID = (ValueError, OSError, RuntimeError)
_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room on that disk",
    errno.EROFS: "name a place that can be written to",
    errno.EACCES: "name a place that you may use",
    errno.EPERM: "name a place that you may use",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EEXIST: "name another place",
    errno.EISDIR: "name a file, not a folder",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}
_LONGEST = 600
# Columns that help in boxes needs.
_WIDE = 100


def die_quietly_of_signals() -> None:
    """From the first moment on: an interrupt while Python still imports has nothing to clean up, nor to say."""

    def end(number: int, frame: FrameType | None) -> None:
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def run(app: typer.Typer, name: str, arguments: Sequence[str], *, alone: bool) -> NoReturn:
    """Run a command line to its end, which is the program's. `alone`: nothing else runs in this process."""
    code = _code(app, name, arguments)
    if alone and any(thread.daemon for thread in threading.enumerate()):
        # Nobody waits for a model that still loads; but torch does not bear to be torn down meanwhile.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code)
    sys.exit(code)


def _code(app: typer.Typer, name: str, arguments: Sequence[str]) -> int:
    """Its exit code; why it is not 0 is said."""
    import typer

    # click's own, wherever typer keeps click
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    _tolerate_any_text()
    if shutil.get_terminal_size().columns < _WIDE:
        app.rich_markup_mode = None  # columns would cut the names of options
    try:
        code = app(arguments, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except usage_error as error:
        return _said(USAGE, _usage(name, error))
    except (typer.Abort, KeyboardInterrupt):
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Python flushes once more on its way out, and would say that it cannot.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAULT
    except Exception as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        return _said(getattr(error, "exit_code", FAULT), f"{name}: {sentence(error)}")


def show_version(asked: bool) -> None:
    """A callback of typer's."""
    if asked:
        import typer

        print(f"petal-swarm {version('petal-swarm')}")
        raise typer.Exit


def sentence(error: BaseException) -> str:
    """What an error says, in one line; of one that nobody foresaw, what it is and how to see more."""
    text = " ".join(str(error).split())[:_LONGEST]
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        remedy = _REMEDIES.get(error.errno or 0)
        return f"{place}{error.strerror}" + (f"; {remedy}" if remedy else "")
    if text and (isinstance(error, _SAID) or type(error).__module__.startswith("petal.")):
        return text
    return (
        f"this should not have happened ({type(error).__name__}: {text or 'no reason given'}); "
        f"{DEBUG}=1 shows where, for a report"
    )


def _said(code: int, line: str) -> int:
    print(line, file=sys.stderr)
    return code


def _usage(name: str, error: Any) -> str:
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error.format_message())
    message = " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if error.ctx else name
    return f"{name}: {message}; `{command} --help` shows what there is"


def _tolerate_any_text() -> None:
    """Text that the terminal's encoding lacks is printed as well as it goes."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="backslashreplace")
