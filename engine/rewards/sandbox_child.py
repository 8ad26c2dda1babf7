"""The inside of the sandbox: sent by `engine.rewards.sandbox` to a bare interpreter, never imported.

    caller --socket--> launcher --fork--> keeper --fork, exec--> program
                       leaves the         PID 1: hides the       unprivileged: rlimits,
                       machine's          files, watches and     Landlock, seccomp
                       namespaces         ends the program

Who waits for whom: the caller for the launcher's one answer, the launcher for the keeper's end, the keeper for the
program or for a limit. Who ends whom: the kernel ends the launcher with the caller, the keeper with the launcher, and
everything in the PID namespace with the keeper. Only the standard library, and little of it, so that it starts fast.
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import resource
import select
import signal
import struct
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_libc = ctypes.CDLL(None, use_errno=True)

_NEW_USER, _NEW_OTHERS = 0x10000000, 0x20000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000  # mount pid net ipc uts
_NEW_ANY = _NEW_USER | _NEW_OTHERS | 0x2000000 | 0x80  # cgroup, time
_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_EXECUTION, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 0x40000
_PR_DEATH_SIGNAL, _PR_DUMPABLE, _PR_SECCOMP, _PR_SUBREAPER, _PR_NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38
_CAP_SYS_ADMIN = 21

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column in the tables below, AUDIT_ARCH."""
_PIVOT_ROOT = (155, 41)
_CLONE, _CLONE3 = (56, 220), 435
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446
_DENIED = {
    "socket": (41, 198),  # every family: also vsock and netlink, which a network namespace does not hold
    "memfd_create": (319, 279),  # memory that no process maps, which the keeper would not see
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": _PIVOT_ROOT,
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (_MOUNT_SETATTR, _MOUNT_SETATTR),
    "mknodat": (259, 33),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
}
"""System calls that no program here needs and that reach past what the namespaces hold, on x86_64 and aarch64."""

_FS_EXECUTE, _FS_WRITE, _FS_READ, _FS_LIST, _FS_DEVICES, _FS_TRUNCATE = 1, 2, 4, 8, 1 << 6 | 1 << 11, 1 << 14
_FS_ALL = (1 << 16) - 1
_LANDLOCK_ABI_LEAST, _LANDLOCK_ABI_FULL = 3, 6
_OWN_PROCESSES = 2
"""Launcher and keeper, which a user namespace counts with the program's."""
_OPTIONS = ("-s", "-S", "-B", "-X", "utf8")
_START = """if True:
    import builtins, sys
    builtins.exit = builtins.quit = sys.exit
    sys.argv, __file__ = ["program.py"], "program.py"
    exec(compile(open(__file__, "rb").read(), __file__, "exec"))
"""
"""Runs the program as `python program.py` would, but without site-packages, whose start-up may cost more than the rest.
"""


class LayerError(Exception):
    """A layer could not be put in place."""


def call(name: str, result: int) -> int:
    """The result of a C function; LayerError if it is negative."""
    if result < 0:
        raise LayerError(f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def syscall(name: str, number: int, *arguments: Any) -> int:
    """A system call that the C library does not wrap."""
    passed = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return call(name, _libc.syscall(ctypes.c_long(number), *passed))


def prctl(name: str, option: int, *arguments: Any) -> None:
    """prctl, whose arguments are all longs."""
    call(
        name, _libc.prctl(option, *[ctypes.c_ulong(a) if isinstance(a, int) else a for a in (*arguments, 0, 0, 0)][:4])
    )


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """Mount a file system, or change a mount."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    call(f"mount {target}", _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode()))


def machine() -> tuple[int, int]:
    """Column in the tables, AUDIT_ARCH."""
    try:
        return _MACHINES[os.uname().machine]
    except KeyError:
        raise LayerError(f"its system call numbers on {os.uname().machine} are not known here") from None


# The layers


def unprivileged() -> int:
    """A user that nobody else is, the largest ids of this user namespace: limits per user then count this run alone."""
    with open("/proc/self/uid_map") as file:
        first, _, length = max((tuple(map(int, line.split())) for line in file), key=lambda span: span[0] + span[2])
    last = min(first + length - 1, 2**31 - 1)
    return last - 1 - os.getpid() % max(1, min(length // 2, 1 << 22))


def become(user: int) -> None:
    """Leave root for a user without any right."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def leave_namespaces(user: int) -> None:
    """Children of this process live in user, mount, PID, network, IPC and host name namespaces of their own."""
    with open("/proc/self/status") as file:
        rights = int(next(line for line in file if line.startswith("CapEff")).split()[1], 16)
    if rights >> _CAP_SYS_ADMIN & 1:
        call("unshare", _libc.unshare(_NEW_OTHERS))
        return
    if os.geteuid() == 0:
        become(user)  # root's processes are not counted, in no namespace
        prctl("dumpable", _PR_DUMPABLE, 1)
    ids = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    call("unshare", _libc.unshare(_NEW_OTHERS | _NEW_USER))
    for name, text in [("setgroups", "deny"), *((name, f"{number} {number} 1") for name, number in ids.items())]:
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def hide_files(readable: list[str], space: int, folder: str) -> int:
    """Only what is readable is left of the file system, and a folder in memory to write to; /proc only for the caller.

    Returns:
        A descriptor of the /proc of this PID namespace.
    """
    column, _ = machine()
    mount(None, "/", None, _RECURSIVE | _PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", _NO_SETUID, "size=1m,mode=755")
    os.mkdir("/tmp/.old")
    syscall("pivot_root", _PIVOT_ROOT[column], b"/tmp", b"/tmp/.old")
    os.chdir("/")
    for path in readable:
        copy(path)
    for path in ("/proc", "/dev", folder):
        os.makedirs(path, exist_ok=True)
    os.symlink(folder, "/dev/shm")
    mount("proc", "/proc", "proc", _NO_SETUID | _NO_DEVICES | _NO_EXECUTION)
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    call("umount /proc", _libc.umount2(b"/proc", 2))
    call("umount the old root", _libc.umount2(b"/.old", 2))
    os.rmdir("/.old")
    attributes = struct.pack("QQQQ", _READ_ONLY | _NO_SETUID, 0, 0, 0)
    syscall("mount_setattr", _MOUNT_SETATTR, -100, b"/", 0x8000, attributes, len(attributes))
    limits = f"size={space},nr_inodes={max(64, space // 4096)},mode=1777"
    mount("tmpfs", folder, "tmpfs", _NO_SETUID | _NO_DEVICES | _NO_EXECUTION, limits)
    return proc


def copy(path: str) -> None:
    """Make a path of the old root visible in the new one."""
    old = f"/.old{path}"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.makedirs(path, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT, 0o644))
    mount(old, path, None, _BIND | _RECURSIVE)


def landlock(readable: list[str], executable: list[str], folder: str, scoped: bool) -> None:
    """This process may read what is readable, run what is executable, change what is in the folder, and signal only
    its own children; with `scoped` false, a kernel that cannot hold the signals will do."""
    abi = syscall("landlock", _LANDLOCK_CREATE, None, 0, 1)
    least = _LANDLOCK_ABI_FULL if scoped else _LANDLOCK_ABI_LEAST
    if abi < least:
        raise LayerError(f"landlock: this kernel has its version {abi}, not {least}")
    files = _FS_ALL if abi >= 5 else _FS_ALL >> 1
    network, scopes = 3 if abi >= 4 else 0, 3 if abi >= 6 else 0
    attributes = struct.pack("QQQ", files, network, scopes)[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    rules = syscall("landlock", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    of_files = _FS_EXECUTE | _FS_WRITE | _FS_READ | _FS_TRUNCATE
    allowed = [(path, _FS_READ | _FS_LIST | (_FS_WRITE if path.startswith("/dev/") else 0)) for path in readable]
    allowed += [(path, _FS_EXECUTE | _FS_READ) for path in executable]
    allowed += [(folder, files & ~_FS_EXECUTE & ~_FS_DEVICES)]
    for path, rights in allowed:
        try:
            beneath = os.open(path, os.O_PATH)
        except FileNotFoundError:
            continue
        rights &= -1 if os.path.isdir(path) else of_files
        syscall("landlock", _LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, beneath), 0)
        os.close(beneath)
    syscall("landlock", _LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def seccomp() -> None:
    """System calls of `_DENIED`, and namespaces, are refused to this process."""
    column, architecture = machine()
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x50000
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    program += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse | errno.EPERM)]  # the x32 numbers of x86_64
    for numbers in _DENIED.values():
        program += [(equal, 0, 1, numbers[column]), (give, 0, 0, refuse | errno.EPERM)]
    program += [(equal, 0, 1, _CLONE3), (give, 0, 0, refuse | errno.ENOSYS)]  # its flags cannot be seen; clone's can
    program += [(equal, 0, 3, _CLONE[column]), (load, 0, 0, 16), (any_bit, 0, 1, _NEW_ANY & ~0x80)]
    program += [(give, 0, 0, refuse | errno.EPERM), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in program))
    described = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    prctl("seccomp", _PR_SECCOMP, 2, ctypes.c_char_p(described))


# The three processes


def become_program(job: dict[str, Any], folder: str) -> NoReturn:
    """Give up every right and turn into the program."""
    os.setsid()
    if os.geteuid() == 0:
        become(job["user"])
    if not os.access(job["python"], os.X_OK):  # with namespaces it is always there
        raise LayerError(f"without namespaces the program's user, who has no rights, cannot reach {job['python']}")
    prctl("no_new_privs", _PR_NO_NEW_PRIVILEGES, 1)
    prctl("death signal", _PR_DEATH_SIGNAL, signal.SIGKILL)
    os.umask(0o077)
    os.chdir(folder)
    for name, data in job["files"].items():
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        with open(name, "wb") as file:
            file.write(data)
    if "landlock" in job["layers"]:
        landlock(job["readable"], job["executable"], folder, "namespaces" not in job["layers"])
    if "seccomp" in job["layers"]:
        seccomp()
    for name, (soft, hard) in job["rlimits"].items():
        if name != "RLIMIT_NPROC" or "namespaces" in job["layers"]:  # without, it would count the user's other work
            resource.setrlimit(getattr(resource, name), (soft, hard))
    environment = dict.fromkeys(("HOME", "TMPDIR"), folder) | {"LANG": "C.UTF-8", "PATH": "/nowhere"}
    environment |= {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    os.execve(job["python"], [job["python"], *_OPTIONS, "-c", _START], environment)


def keep(job: dict[str, Any], report: int) -> dict[str, Any]:
    """Start the program and watch it until it ends or passes a limit."""
    folder = job["folder"]
    os.umask(0o022)
    prctl("death signal", _PR_DEATH_SIGNAL, signal.SIGKILL)
    prctl("subreaper", _PR_SUBREAPER, 1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the first of its namespace it gets no signal without a handler
    if "namespaces" in job["layers"]:
        proc = hide_files(job["readable"], job["space"], folder)
    else:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        if os.geteuid() == 0:
            os.chown(folder, job["user"], job["user"])
    watched = select.poll()
    watched.register(report, 0)
    if watched.poll(0):
        os._exit(1)  # the launcher was gone before it could have been missed
    mine = prefer_for_oom_kill(proc, "1000")
    trouble, tell = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.dup2(tell, 3)
            os.set_inheritable(3, False)
            os.closerange(4, 1 << 20)
            become_program(job, folder)
        except BaseException as error:
            os.write(3, describe(error).encode())
            os._exit(127)
    os.close(tell)
    prefer_for_oom_kill(proc, mine)
    prctl("dumpable", _PR_DUMPABLE, 0)
    for stream in (0, 1, 2):
        os.close(stream)
    if failed := os.read(trouble, 4096):
        return {"failed": failed.decode()}
    verdict, status = watch(job, proc, child, started)
    return {"verdict": verdict, "status": status, "seconds": time.monotonic() - started}


def prefer_for_oom_kill(proc: int, score: str) -> str:
    """Set how soon the kernel ends this process, and children to come, where memory runs out; the score before."""
    own = os.open(f"{os.getpid()}/oom_score_adj", os.O_RDWR, dir_fd=proc)
    before = os.read(own, 32).decode()
    os.write(own, score.encode())
    os.close(own)
    return before


def watch(job: dict[str, Any], proc: int, child: int, started: float) -> tuple[str, int | None]:
    """Wait for the program; the limit it passed or "", and its wait status."""
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    pause = 5.0
    while True:
        left = started + job["seconds"] - time.monotonic()
        over = ended.poll(max(0.0, min(pause, left * 1000)))
        if over:
            return "", os.waitpid(child, 0)[1]
        reap_orphans(child)
        memory, cpu, count = usage(proc, os.getpid())
        pause = min(20.0, pause + 1)
        if memory > job["memory"]:
            return "memory", None
        if cpu > job["cpu_seconds"]:
            return "cpu", None
        if count > job["processes"] + _OWN_PROCESSES:
            return "processes", None
        if left <= 0:
            return "timeout", None


def reap_orphans(child: int) -> None:
    """Take in what has ended and was handed on to the keeper, but not the program itself."""
    while True:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None or ended.si_pid == child:
            return
        os.waitpid(ended.si_pid, 0)


def usage(proc: int, root: int) -> tuple[int, float, int]:
    """Bytes of memory that is not of files, CPU seconds, and processes that descend from `root`."""
    parents, seconds = {}, {}
    for name in os.listdir(proc):
        if name.isdigit() and (fields := read(proc, f"{name}/stat").rpartition(b")")[2].split()):
            parents[int(name)] = int(fields[1])
            seconds[int(name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    lines = [line for pid in found - {root} for line in read(proc, f"{pid}/status").splitlines()]
    memory = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith((b"RssAnon", b"RssShmem")))
    return memory, sum(seconds[pid] for pid in found if pid != root), len(found) - 1


def read(proc: int, path: str) -> bytes:
    """A small file of /proc; nothing if its process is gone."""
    try:
        opened = os.open(path, os.O_RDONLY, dir_fd=proc)
    except OSError:
        return b""
    try:
        return os.read(opened, 8192)
    except OSError:
        return b""
    finally:
        os.close(opened)


def launch(job: dict[str, Any], control: int) -> dict[str, Any]:
    """Run the keeper; its answer, once everything in the sandbox has ended."""
    prctl("subreaper", _PR_SUBREAPER, 1)
    if "namespaces" in job["layers"]:
        leave_namespaces(job["user"])
        prctl("death signal", _PR_DEATH_SIGNAL, signal.SIGKILL)  # a change of user cleared it
    answers, report = os.pipe()
    keeper = os.fork()
    if not keeper:
        os.close(answers)
        os.close(control)
        try:
            answer = keep(job, report)
        except BaseException as error:
            answer = {"failed": describe(error)}
        os.write(report, marshal.dumps(answer))
        os._exit(0)
    os.close(report)
    waiting = select.poll()
    waiting.register(answers, select.POLLIN)
    waiting.register(control, select.POLLIN)
    answered = b""
    if any(fd == answers for fd, _ in waiting.poll()):
        answered = os.read(answers, 65536)
    end_all(keeper)
    return marshal.loads(answered) if answered else {"verdict": "stopped", "status": None, "seconds": 0.0}


def end_all(keeper: int) -> None:
    """End the keeper, and with it its PID namespace; where there is none, whatever is handed on to this process."""
    os.kill(keeper, signal.SIGKILL)
    os.waitpid(keeper, 0)
    try:
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            for name in filter(str.isdigit, os.listdir(proc)):
                fields = read(proc, f"{name}/stat").rpartition(b")")[2].split()
                if fields and int(fields[1]) == os.getpid():
                    os.kill(int(name), signal.SIGKILL)
            os.close(proc)
    except ChildProcessError:
        return


def probe(job: dict[str, Any]) -> dict[str, str]:
    """Layer -> "" if this machine has it, else why not; each is tried in a process of its own."""

    def namespaces() -> None:
        leave_namespaces(job["user"])
        if child := os.fork():
            if os.waitpid(child, 0)[1]:
                os._exit(1)
            return
        try:
            hide_files(job["readable"], job["space"], job["folder"])
        except BaseException as error:
            os.write(tell, describe(error).encode())
            os._exit(1)
        os._exit(0)

    def landlocked() -> None:
        prctl("no_new_privs", _PR_NO_NEW_PRIVILEGES, 1)
        landlock(job["readable"], job["executable"], "/tmp", False)

    def filtered() -> None:
        prctl("no_new_privs", _PR_NO_NEW_PRIVILEGES, 1)
        seccomp()

    reasons = {}
    for name, attempt in {"namespaces": namespaces, "landlock": landlocked, "seccomp": filtered}.items():
        trouble, tell = os.pipe()
        if not os.fork():
            try:
                attempt()
            except BaseException as error:
                os.write(tell, describe(error).encode())
            os._exit(0)
        os.close(tell)
        reasons[name] = os.read(trouble, 4096).decode()
        os.wait()
    return reasons


def describe(error: BaseException) -> str:
    """What failed, on one line."""
    return str(error) if isinstance(error, LayerError) else f"{type(error).__name__}: {error}"


def main(job: dict[str, Any], control: int) -> None:
    """Do the job and answer on the socket `control`."""
    prctl("death signal", _PR_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != job["caller"]:
        os._exit(1)
    job["user"] = unprivileged()
    try:
        answer = probe(job) if job["probe"] else launch(job, control)
    except (LayerError, OSError) as error:
        answer = {"failed": describe(error)}
    os.write(control, marshal.dumps(answer))
