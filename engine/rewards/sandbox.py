"""Runs a Python program that nobody has read: a model wrote it, and what it is after is the reward.

The program gets a machine of its own that holds nothing: Python with its standard library and the system's libraries,
read-only; one writable folder in memory; no network; no other process; no environment. Three layers hold it, so that a
hole in one is not a hole in the wall:

    namespaces  mount, PID, network, IPC (and user, where the caller is not root): what is outside has no name inside
    landlock    files, signals and TCP once more, from within the process; a domain that cannot be left
    seccomp     sockets of all families, namespaces, ptrace, memory without an owner, and other system calls

Limits are the kernel's (rlimits, per process) and those of a keeper that adds up the whole tree. What a machine lacks
is refused, not papered over (`Limits.allow_weaker`). `sandbox_child` is the inside.

What remains: the kernel itself (its system calls beyond the filter's list are open to the program), side channels of
shared hardware, and memory that belongs to no process (pipes, socket pairs, the folder), which is bounded by the open
files and `space_bytes` but not counted in `memory_bytes`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import marshal
import math
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import CodeType
from typing import Any, Literal

from engine.config import UserError

Kind = Literal["ok", "error", "timeout", "cpu", "memory", "output", "killed"]

_START = """if True:
    import marshal, sys
    control = int(sys.argv[1])
    code, job = marshal.load(open(control, "rb", closefd=False))
    scope = {"__name__": "sandbox_child"}
    exec(code, scope)
    scope["main"](job, control)
"""
"""The launcher: it reads `sandbox_child`, compiled here once, and its job from the socket that its argument names."""
_PYTHON = os.path.realpath(sys.executable)
_LEAST_MEMORY = 64 << 20
_START_SECONDS = 60.0
"""What the launcher may take beyond the program's own limit before it counts as broken."""
_MEND = {
    "namespaces": "as a user, set sysctl user.max_user_namespaces above 0 (Debian: kernel.unprivileged_userns_clone=1; "
    "Ubuntu: kernel.apparmor_restrict_unprivileged_userns=0); in a container, add CAP_SYS_ADMIN, seccomp=unconfined "
    "and an unmasked /proc",
    "landlock": "run Linux 6.2 or newer with landlock in the boot parameter lsm=, and in a container a seccomp profile "
    "that lets its system calls through",
    "seccomp": "run a kernel with CONFIG_SECCOMP_FILTER on x86_64 or aarch64",
}


class SandboxError(RuntimeError):
    """The sandbox could not be put up or did not answer: nothing is known about the program."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. A limit on a process holds for each; one on the run, for all of them together."""

    wall_seconds: float = 10.0
    """Of the run, from the start of its interpreter."""
    cpu_seconds: float = 10.0
    """Of the run."""
    memory_bytes: int = 512 << 20
    """Of the run: what is not backed by files, seen every 5 to 20 ms. Of a process: its address space."""
    processes: int = 16
    """Processes and threads of the run."""
    output_bytes: int = 1 << 20
    """stdout and stderr together."""
    file_bytes: int = 16 << 20
    """Of one file."""
    open_files: int = 64
    """Of a process."""
    space_bytes: int = 64 << 20
    """Of the folder, which lies in memory."""
    allow_weaker: bool = False
    """Run with the layers that the machine has, as long as one of them closes the network and one the files. Without
    namespaces the folder lies on the machine's disk, `space_bytes` does not hold, and what the program started may
    outlive a caller that is killed."""

    def __post_init__(self) -> None:
        for name in ("wall_seconds", "cpu_seconds"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"sandbox limit {name}={getattr(self, name)}: must be a number of seconds above 0")
        for name in ("processes", "output_bytes", "file_bytes", "open_files", "space_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"sandbox limit {name}={getattr(self, name)}: must be at least 1")
        if self.memory_bytes < _LEAST_MEMORY:
            raise UserError(f"sandbox limit memory_bytes={self.memory_bytes}: Python itself takes {_LEAST_MEMORY}")


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    kind: Kind
    """ok: exit code 0; error: another one; killed: by a signal that no limit sent, or for too many processes; the
    others name the limit that ended it. memory is also an uncaught MemoryError."""
    exit_code: int | None
    """-n: by signal n; None: ended from outside."""
    stdout: str
    """What was read within `output_bytes`, decoded; bytes that are not UTF-8 are replaced."""
    stderr: str
    """The same."""
    seconds: float
    """Of the run, wall clock."""


def protections() -> dict[str, bool]:
    """Layer (namespaces, landlock, seccomp) -> whether this machine has it for this user; tried once, for real."""
    return {name: not reason for name, reason in _lacks().items()}


def check_limits(limits: Limits) -> None:
    """Raise UserError, as `run_program` would, if this machine cannot hold programs in the way that is asked for."""
    _layers(limits.allow_weaker)


def run_program(
    source: str, *, stdin: str = "", limits: Limits | None = None, files: Mapping[str, str] | None = None
) -> Outcome:
    """Run a Python program in the sandbox and wait until it and all that it started have ended.

    Any thread may call it, several at a time. About 40 ms on an idle core, most of it the start of two interpreters.

    Args:
        source: the program; it lies in its working folder as `program.py`.
        stdin: what it reads.
        limits: default `Limits()`.
        files: relative path -> text of further files in its working folder, which can be imported as modules.

    Raises:
        UserError: the machine lacks a layer; the message names it and how to mend it.
        ValueError: a path in `files` leaves the folder or is taken.
        SandboxError: the sandbox could not be put up.
    """
    limits = limits or Limits()
    layers = _layers(limits.allow_weaker)
    contents = {_checked(name): text.encode() for name, text in (files or {}).items()}
    contents["program.py"] = source.encode(errors="replace")
    with contextlib.ExitStack() as stack:
        # the folder is made in memory inside; without namespaces it is one of the machine's
        folder = "/tmp"
        if "namespaces" not in layers:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True))
        job = _job(layers, folder, limits) | {"files": contents}
        given = stack.enter_context(_sealed(stdin.encode(errors="replace")))
        answer, stdout, stderr, over = _converse(job, given, limits)
    return _outcome(answer, stdout, stderr, over)


def _outcome(answer: Mapping[str, Any], stdout: bytes, stderr: bytes, over: bool) -> Outcome:
    if "failed" in answer:
        raise SandboxError(f"the sandbox could not be put up: {answer['failed']}")
    exit_code = None if answer["status"] is None else os.waitstatus_to_exitcode(answer["status"])
    texts = [stream.decode(errors="replace") for stream in (stdout, stderr)]
    kind: Kind
    if over:
        kind = "output"
    elif answer["verdict"]:
        kind = "killed" if answer["verdict"] in ("processes", "stopped") else answer["verdict"]
    elif exit_code == -signal.SIGXCPU:
        kind = "cpu"
    elif exit_code is not None and exit_code < 0:
        kind = "killed"
    elif exit_code and texts[1].rstrip().rpartition("\n")[2].startswith("MemoryError"):
        kind = "memory"
    else:
        kind = "error" if exit_code else "ok"
    return Outcome(kind, exit_code, texts[0], texts[1], answer["seconds"])


def _checked(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or path == PurePosixPath("program.py"):
        raise ValueError(f"file {name!r}: must be a relative path inside the program's folder, and not program.py")
    return str(path)


def _layers(allow_weaker: bool) -> list[str]:
    """The layers to put in place.

    Raises:
        UserError: one is missing that may not be.
    """
    has = protections()
    missing = [name for name, there in has.items() if not there]
    held = (has["namespaces"] or has["seccomp"]) and (has["namespaces"] or has["landlock"])
    if missing and not (allow_weaker and held):
        reasons = "; ".join(f"{name} ({_lacks()[name]}): {_MEND[name]}" for name in missing)
        otherwise = (
            "or accept the remaining layers with allow_weaker"
            if held
            else "allow_weaker does not help: without namespaces, seccomp (the network) and landlock (files) are needed"
        )
        raise UserError(f"sandbox: programs cannot be held safely on this machine. It lacks {reasons}; {otherwise}")
    return [name for name, there in has.items() if there]


@functools.cache
def _lacks() -> dict[str, str]:
    """Layer -> why this machine does not have it, or ""."""
    job = _job([], "/tmp", Limits()) | {"files": {}, "probe": True}
    with _sealed(b"") as nothing:
        reasons, _, _, _ = _converse(job, nothing, Limits())
    if "failed" in reasons:
        raise SandboxError(f"the sandbox could not be tried out: {reasons['failed']}")
    return reasons


def _job(layers: list[str], folder: str, limits: Limits) -> dict[str, Any]:
    """What the launcher is told."""
    cpu = math.ceil(limits.cpu_seconds)
    rlimits = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_AS": (limits.memory_bytes,) * 2,
        "RLIMIT_NPROC": (limits.processes + 2,) * 2,
        "RLIMIT_FSIZE": (limits.file_bytes,) * 2,
        "RLIMIT_NOFILE": (limits.open_files,) * 2,
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_MEMLOCK": (0, 0),
        "RLIMIT_MSGQUEUE": (0, 0),
        "RLIMIT_STACK": (8 << 20,) * 2,
    }
    return {
        "probe": False,
        "caller": os.getpid(),
        "layers": layers,
        "folder": folder,
        "python": _PYTHON,
        "readable": _readable(),
        "executable": _executable(),
        "rlimits": rlimits,
        "seconds": limits.wall_seconds,
        "cpu_seconds": limits.cpu_seconds,
        "memory": limits.memory_bytes,
        "processes": limits.processes,
        "space": limits.space_bytes,
    }


@functools.cache
def _readable() -> list[str]:
    """What a program may read: Python's own installation, system libraries, time zones, and three devices."""
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"]
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib", vars={"platbase": sys.base_exec_prefix})]
    shared = sysconfig.get_config_var("LIBDIR")
    if shared and Path(shared, str(sysconfig.get_config_var("INSTSONAME"))).exists():
        own.append(str(Path(shared, str(sysconfig.get_config_var("INSTSONAME")))))
    others = ["/etc/ld.so.cache", "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"]
    kept: list[str] = []
    for path in [*libraries, *own, _PYTHON, *others]:
        if os.path.lexists(path) and not any(path == k or path.startswith(f"{k}/") for k in kept):
            kept.append(path)
    return kept


@functools.cache
def _executable() -> list[str]:
    """What a program may execute: Python and the loader of shared libraries."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if line.count("/")}
    return [_PYTHON, *sorted(path for path in mapped if os.path.basename(path).startswith("ld"))]


@functools.cache
def _child() -> CodeType:
    path = Path(__file__).with_name("sandbox_child.py")
    return compile(path.read_bytes(), str(path), "exec")


@contextlib.contextmanager
def _sealed(data: bytes) -> Iterator[int]:
    """A file in memory that nobody can change any more, at its start."""
    descriptor = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(descriptor, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        yield descriptor
    finally:
        os.close(descriptor)


def _converse(job: dict[str, Any], stdin: int, limits: Limits) -> tuple[dict[str, Any], bytes, bytes, bool]:
    """Start the launcher, read the program's output within its bound, and wait for the answer.

    Returns:
        The answer, stdout, stderr, and whether they were more than allowed.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(_START_SECONDS)
        launcher = subprocess.Popen(
            [_PYTHON, "-I", "-S", "-c", _START, str(theirs.fileno())],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
            env={},
            cwd="/",
            start_new_session=True,
        )
        theirs.close()
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # its death shows in the missing answer
                ours.sendall(marshal.dumps((_child(), job)))
            return _listen(launcher, ours, limits)
        finally:
            launcher.kill()
            launcher.wait()
            for stream in (launcher.stdout, launcher.stderr):
                assert stream is not None
                stream.close()


def _listen(
    launcher: subprocess.Popen[bytes], control: socket.socket, limits: Limits
) -> tuple[dict[str, Any], bytes, bytes, bool]:
    assert launcher.stdout is not None
    assert launcher.stderr is not None
    streams = {launcher.stdout.fileno(): bytearray(), launcher.stderr.fileno(): bytearray()}
    answered, room, over = b"", limits.output_bytes, False
    deadline = time.monotonic() + limits.wall_seconds + _START_SECONDS
    with selectors.DefaultSelector() as selector:
        for source in (*streams, control.fileno()):
            selector.register(source, selectors.EVENT_READ)
        while selector.get_map():  # the launcher holds all three until it ends
            left = deadline - time.monotonic()
            if left <= 0:
                raise SandboxError(f"the sandbox did not answer within {limits.wall_seconds + _START_SECONDS:.0f} s")
            for key, _ in selector.select(left):
                try:
                    chunk = os.read(key.fd, 65536)
                except ConnectionResetError:
                    chunk = b""
                if not chunk:
                    selector.unregister(key.fd)
                elif key.fd == control.fileno():
                    answered += chunk
                else:
                    streams[key.fd] += chunk[:room]
                    if len(chunk) > room and not over:
                        over = True
                        control.shutdown(socket.SHUT_WR)
                    room -= min(room, len(chunk))
    stdout, stderr = (bytes(data) for data in streams.values())
    if not answered:
        raise SandboxError(f"the sandbox ended without an answer: {stderr.decode(errors='replace')[-500:] or 'killed'}")
    return marshal.loads(answered), stdout, stderr, over
