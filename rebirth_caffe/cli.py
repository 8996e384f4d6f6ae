"""What every command shares: errors become one line and exit status 2, never a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from .errors import RebirthError


def run(main: Callable[[], object]) -> None:
    """Run a command's ``main``.

    Bad input (RebirthError, OSError) prints ``error: ...`` on one line and exits with 2, an interrupt
    exits with 130, and a closed pipe ends quietly.
    """
    try:
        main()
        sys.exit(0)
    except RebirthError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        where = error.filename if error.filename is not None else "input/output"
        fail(f"{where}: {error.strerror or error}; check the path, its permissions and the free space")
    except KeyboardInterrupt:
        sys.exit(130)


def fail(message: str) -> None:
    """Print ``error: message`` as one line on stderr and exit with 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
