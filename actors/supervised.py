"""Runs a command in a session of its own and ends it, with all its processes, when standard input closes.

    python supervised.py COMMAND ...

A process that holds the other end of the pipe cannot die without closing it, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    """Exit with the command's code, or once it is killed."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def leave_with_it() -> None:
        code = command.wait()
        _kill_group(command.pid)
        os._exit(code if code >= 0 else 128 - code)

    threading.Thread(target=leave_with_it, daemon=True).start()
    sys.stdin.buffer.read()
    _kill_group(command.pid)
    command.wait()


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


if __name__ == "__main__":
    main()
