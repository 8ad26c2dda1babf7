"""Programs that mean harm, and what is left of it. `pytest -s` shows a table of how each ended."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from engine.config import UserError
from engine.rewards import sandbox
from engine.rewards.sandbox import Limits, Outcome, SandboxError, protections, run_program

MISSING = [name for name, there in protections().items() if not there]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"this machine has no {', '.join(MISSING)} for this user")

ROOT = Path(__file__).parents[2]
LAYERS = ("namespaces", "landlock", "seccomp")
SMALL = Limits(
    wall_seconds=1.0, cpu_seconds=5.0, memory_bytes=256 << 20, output_bytes=100_000, file_bytes=8 << 20,
    space_bytes=16 << 20,
)  # fmt: skip
FIGURES: list[str] = []


@dataclass
class Scene:
    """What a program could harm: files anyone may read and change, sockets that listen, this process."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    unix: socket.socket
    marker: str
    signals: list[int] = field(default_factory=list)
    secret: str = "the-secret-that-must-not-be-read"

    def fill(self, program: str) -> str:
        """The program with the scene's names in it."""
        names = {
            "SECRET_FILE": str(self.folder / "secret.txt"),
            "OPEN_FOLDER": str(self.folder / "open"),
            "TCP_PORT": self.tcp.getsockname()[1],
            "UDP_PORT": self.udp.getsockname()[1],
            "UNIX_NAME": self.unix.getsockname(),
            "TEST_PID": os.getpid(),
            "TEST_FILE": __file__,
            "ROOT": str(ROOT),
            "HOME": str(Path.home()),
            "MARKER": self.marker,
        }
        heading = "import os, sys, signal, time, socket, threading, ctypes, resource, stat, json\n"
        return heading + "".join(f"{k} = {v!r}\n" for k, v in names.items()) + "print('tried', flush=True)\n" + program

    def harm(self, outcome: Outcome) -> list[str]:
        """All that has happened to it."""
        found = [f"signal {number}" for number in self.signals]
        if self.secret in outcome.stdout + outcome.stderr:
            found.append("secret read")
        if "HARM" in outcome.stdout:
            found.append(outcome.stdout)
        if (self.folder / "secret.txt").read_text() != self.secret or (self.folder / "secret.txt").stat().st_nlink != 1:
            found.append("secret changed")
        if list((self.folder / "open").iterdir()):
            found.append("file written")
        places = (Path(tempfile.gettempdir()), Path.home(), ROOT, Path("/var/tmp"), Path("/dev/shm"), Path("/"))
        found += [f"file written in {place}" for place in places if (place / self.marker).exists()]
        for name in ("tcp", "unix"):
            with contextlib.suppress(BlockingIOError):
                getattr(self, name).accept()
                found.append(f"connection over {name}")
        with contextlib.suppress(BlockingIOError):
            self.udp.recv(100)
            found.append("datagram")
        return found + [f"process {process}" for process in marked(self.marker)]


def marked(marker: str) -> list[int]:
    """Processes that carry the marker in their arguments."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """Whatever a program in the sandbox must not reach, open to everybody by the machine's own rules."""
    folder = Path(tempfile.mkdtemp(prefix="scene-"))
    folder.chmod(0o755)
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    (folder / "secret.txt").write_text(Scene.secret)
    (folder / "secret.txt").chmod(0o666)
    monkeypatch.setenv("GNOMON_TEST_SECRET", Scene.secret)
    marker = f"marker-{os.getpid()}-{time.monotonic_ns()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(f"\0{marker}")
            unix.listen()
            for listening in (tcp, udp, unix):
                listening.setblocking(False)
            built = Scene(folder, tcp, udp, unix, marker)
            before = {
                n: signal.signal(n, lambda n, _: built.signals.append(n)) for n in (signal.SIGTERM, signal.SIGUSR1)
            }
            yield built
            for number, handler in before.items():
                signal.signal(number, handler)
    shutil.rmtree(folder)


@pytest.fixture(scope="module", autouse=True)
def figures() -> Iterator[None]:
    """Show how each program ended."""
    yield
    print("\n" + "\n".join(FIGURES))


def run_hostile(scene: Scene, name: str, program: str, limits: Limits = SMALL) -> Outcome:
    """Run it; it must have been tried, have done no harm, and have ended in time."""
    began = time.monotonic()
    outcome = run_program(scene.fill(program), limits=limits)
    took = time.monotonic() - began
    FIGURES.append(f"{name:45} {outcome.kind:8} {outcome.exit_code!s:5} {took:6.2f} s")
    assert "tried" in outcome.stdout, outcome
    assert scene.harm(outcome) == []
    assert took < limits.wall_seconds + 5
    return outcome


ATTEMPT = """
def attempt(f, *a, **k):
    try:
        return f(*a, **k)
    except (OSError, ValueError, AttributeError) as e:
        print(type(e).__name__, flush=True)
libc = ctypes.CDLL(None, use_errno=True)
def put(path, mode='w'):
    def write():
        with open(path, mode) as f: f.write('overwritten')
    attempt(write)
def show(path):
    attempt(lambda: print(open(path).read()))
"""

REACHING = {
    "writes outside": "for p in (OPEN_FOLDER + '/x', '/tmp/' + MARKER, HOME + '/' + MARKER, ROOT + '/' + MARKER, "
    "'/var/tmp/' + MARKER, '/dev/shm/' + MARKER, '/' + MARKER, SECRET_FILE): put(p)",
    "climbs out by dots": "put('../../../../../..' + OPEN_FOLDER + '/x'); show('../../../../../..' + SECRET_FILE)",
    "overwrites Python's files": "put(json.__file__, 'r+'); put(os.__file__, 'r+'); put(sys.executable, 'r+')\n"
    "attempt(os.chmod, json.__file__, 0o777); attempt(os.unlink, json.__file__)\n"
    "if b'overwritten' in open(json.__file__, 'rb').read(): print('HARM')",
    "connects over TCP": "attempt(socket.create_connection, ('127.0.0.1', TCP_PORT), 0.3)",
    "sends over UDP": "attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', UDP_PORT)))",
    "connects to an abstract socket": "attempt(lambda: socket.socket(socket.AF_UNIX).connect(UNIX_NAME))",
    "reads the environment": "print(dict(os.environ))\n"
    "for p in ('self', 'thread-self', 1, os.getppid(), TEST_PID): show(f'/proc/{p}/environ')",
    "reads a secret": "show(SECRET_FILE)",
    "reads the tests and the project": "show(TEST_FILE); show(ROOT + '/pyproject.toml')\n"
    "for p in (ROOT, '/home', '/proc'):\n"
    "    if attempt(os.listdir, p): print('HARM', p)",
    "looks into a password file": "for p in ('/etc/passwd', '/etc/shadow', '/etc/hostname'):\n"
    "    if attempt(lambda: open(p).read()): print('HARM', p)",
    "signals its parent": "for n in (15, 10): attempt(os.kill, os.getppid(), n)",
    "signals the test": "for n in (15, 10): attempt(os.kill, TEST_PID, n)",
    "signals by ctypes": "for n in (15, 10): libc.kill(TEST_PID, n); libc.syscall(62, TEST_PID, n)",
    "signals everyone": "attempt(os.kill, -1, 10); attempt(os.killpg, 0, 10)",
    "signals through a pidfd": "attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(TEST_PID), 15))",
    "writes through a symlink": "os.symlink(OPEN_FOLDER + '/x', 'l'); put('l'); os.symlink(OPEN_FOLDER, 'd'); put('d/x')",
    "reads through a symlink": "os.symlink(SECRET_FILE, 'l'); show('l'); os.symlink('/', 'r'); show('r' + SECRET_FILE)",
    "makes a hard link": "attempt(os.link, SECRET_FILE, 'copy'); show('copy'); attempt(os.link, json.__file__, 'j')\n"
    "attempt(os.rename, SECRET_FILE, 'mine'); show('mine')",
    "escapes by chroot": "attempt(os.mkdir, 'c'); attempt(os.chroot, 'c')\n"
    "for _ in range(20): attempt(os.chdir, '..')\nattempt(os.chroot, '.'); show(SECRET_FILE); put(OPEN_FOLDER + '/x')",
    "escapes by mounts": "print(libc.unshare(0x10020000)); os.makedirs('m', exist_ok=True)\n"
    "for device in (b'/dev/vda', b'/dev/sda', b'proc', b'/'):\n"
    "    for kind, flags in ((b'ext4', 0), (b'proc', 0), (None, 4096 | 16384)): libc.mount(device, b'm', kind, flags, None)\n"
    "libc.umount2(b'/tmp', 2); libc.umount2(b'/', 2); libc.mount(None, b'/', None, 32, None)\n"
    "show('m' + SECRET_FILE); show(SECRET_FILE); show(f'm/{TEST_PID}/environ'); put('/' + MARKER); put('m' + OPEN_FOLDER + '/x')\n"
    "put(json.__file__, 'r+')\nif b'overwritten' in open(json.__file__, 'rb').read(): print('HARM')",
    "enters other namespaces": "for p in (1, TEST_PID, 'self'):\n    for n in ('mnt', 'pid', 'net', 'user'):\n"
    "        f = attempt(os.open, f'/proc/{p}/ns/{n}', 0)\n        if f is not None and not libc.setns(f, 0): print('HARM')",
    "traces its parent": "for p in (os.getppid(), TEST_PID):\n    if p and libc.ptrace(16, p, 0, 0) == 0: print('HARM')",
    "opens devices": "for p in ('mem', 'kmem', 'kmsg', 'port', 'vda', 'sda', 'kvm', 'ptmx', 'tty', 'fuse', 'net/tun', "
    "'vsock', 'nvidia0'):\n    for m in (0, 1):\n        if attempt(os.open, '/dev/' + p, m) is not None: print('HARM', p)",
    "makes a device": "attempt(os.mknod, 'd', stat.S_IFBLK | 0o666, os.makedev(254, 0))\n"
    "if attempt(os.open, 'd', 0) is not None: print('HARM')",
    "changes kernel settings": "for p in ('kernel/hostname', 'kernel/core_pattern', 'vm/overcommit_memory'):\n"
    "    if attempt(os.open, '/proc/sys/' + p, os.O_RDWR) is not None: print('HARM', p)\n"
    "if attempt(os.open, '/sys/kernel/mm/transparent_hugepage/enabled', os.O_RDWR) is not None: print('HARM')",
    "runs a shell": "os.environ.clear()\nfor p in ('/bin/sh', '/bin/bash', '/bin/busybox', '/usr/bin/env'):\n"
    "    attempt(lambda: __import__('subprocess').run([p, '-c', 'echo HA''RM']))",
    "runs a setuid program": "for p in ('/bin/su', '/usr/bin/su', '/usr/bin/mount', '/usr/bin/passwd', '/usr/bin/sudo'):\n"
    "    if attempt(lambda: __import__('subprocess').run([p, '--help'])): print('HARM', p)",
    "becomes root": "for f in (os.setuid, os.setgid): attempt(f, 0)\nattempt(os.setgroups, [0])\n"
    "if os.geteuid() == 0 or os.getegid() == 0: print('HARM')",
    "raises its limits": "for n in ('CPU', 'AS', 'NPROC', 'FSIZE', 'NOFILE'):\n"
    "    r = getattr(resource, 'RLIMIT_' + n)\n    attempt(resource.setrlimit, r, (-1, -1))\n"
    "    if -1 in resource.getrlimit(r): print('HARM', n)",
    "looks for inherited files": "for f in range(3, 300):\n    if attempt(os.fstat, f): print('HARM', f)",
    "leaves a daemon": "r, w = os.pipe(); os.set_inheritable(w, True)\nif not os.fork():\n    os.setsid()\n"
    "    if not os.fork():\n        os.execv(sys.executable, [sys.executable, '-S', '-c', "
    "f'import os, time; os.write({w}, b\"x\"); time.sleep(60)', MARKER])\n    os._exit(0)\n"
    "if os.read(r, 1) == b'x': print('daemon runs')",
    "changes its stdin for the next": "attempt(os.write, 0, b'x'); attempt(os.ftruncate, 0, 1 << 30)\n"
    "if os.fstat(0).st_size: print('HARM')",
}
"""Name -> a program that reaches for something outside."""


@pytest.mark.parametrize(
    "absent", [None, "landlock", "seccomp"], ids=lambda absent: f"no {absent}" if absent else "all"
)
@pytest.mark.parametrize("name", REACHING)
def test_nothing_outside_is_reached_even_with_a_layer_less(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, name: str, absent: str | None
) -> None:
    limits = SMALL
    if absent:
        monkeypatch.setattr(sandbox, "_lacks", lambda: dict.fromkeys(LAYERS, "") | {absent: "not there"})
        limits = Limits(wall_seconds=1.0, allow_weaker=True)
    outcome = run_hostile(scene, f"{name}{f', no {absent}' if absent else ''}", ATTEMPT + REACHING[name], limits)
    assert "Traceback" not in outcome.stderr
    if name == "leaves a daemon":
        assert "daemon runs" in outcome.stdout


@dataclass(frozen=True)
class Greedy:
    """A program that takes more than it should, and how it ends."""

    program: str
    kinds: tuple[str, ...]
    stdout: str = ""
    """Is in its stdout."""


GREEDY = {
    "loops for ever": Greedy("while True: pass", ("timeout",)),
    "sleeps for ever": Greedy("time.sleep(60)", ("timeout",)),
    "ignores signals": Greedy(
        "for n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\n"
        "time.sleep(60)", ("timeout",)),
    "stops itself": Greedy("os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)", ("timeout",)),
    "closes its output and goes on": Greedy("os.close(1); os.close(2); time.sleep(60)", ("timeout",)),
    "floods memory": Greedy(
        "held = []\nfor _ in range(100): held.append(bytearray(b'x' * (10 << 20)))\nprint('HARM')", ("memory",)),
    "floods memory in many processes": Greedy(
        "for _ in range(8):\n    if not os.fork():\n        held = bytearray(b'x' * (100 << 20)); time.sleep(60)\n"
        "time.sleep(60)", ("memory",)),
    "floods shared memory": Greedy(
        "import mmap\nfor _ in range(8):\n    if not os.fork():\n        m = mmap.mmap(-1, 100 << 20); m.write(b'x' * (100 << 20))\n"
        "        time.sleep(60)\ntime.sleep(60)", ("memory",)),
    "hides memory in files without names": Greedy(
        "f = os.memfd_create('x')\nfor _ in range(40): os.write(f, bytes(8 << 20)); f = os.memfd_create('x')\nprint('HARM')",
        ("error",)),
    "forks like a bomb": Greedy(
        "n = 0\nfor _ in range(200):\n    try:\n        if not os.fork(): time.sleep(60)\n        n += 1\n"
        "    except OSError: break\nprint('HARM' if n > 18 else 'bounded')", ("ok",), "bounded"),
    "starts many threads": Greedy(
        "n = 0\nfor _ in range(200):\n    try: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "    except RuntimeError: break\nprint('HARM' if n > 18 else 'bounded')", ("ok",), "bounded"),
    "floods stdout": Greedy("for _ in range(500): print('x' * 100_000)\nopen('/HARM')", ("output",)),
    "floods stderr": Greedy("for _ in range(500): sys.stderr.write('x' * 100_000)\nprint('HARM')", ("output",)),
    "writes a huge file": Greedy(
        "with open('f', 'wb') as f:\n    for _ in range(20): f.write(bytes(1 << 20))\nprint('HARM')", ("error",)),
    "makes a huge file with a hole": Greedy("open('f', 'wb').truncate(1 << 40)\nprint('HARM')", ("error",)),
    "fills the disk": Greedy(
        "n = 0\ntry:\n    for i in range(100):\n        with open(f'f{i}', 'wb', buffering=0) as f:\n"
        "            for _ in range(4): n += f.write(bytes(1 << 20))\n"
        "except OSError: pass\nprint('HARM' if n > 16 << 20 else 'bounded')", ("ok",), "bounded"),
    "makes files without end": Greedy(
        "n = 0\ntry:\n    for i in range(20000): open(str(i), 'w').close(); n += 1\nexcept OSError: pass\n"
        "print('HARM' if n > 5000 else 'bounded')", ("ok",), "bounded"),
    "opens files without end": Greedy(
        "held = []\ntry:\n    for _ in range(1000): held.append(open('/dev/null'))\nexcept OSError: pass\n"
        "print('HARM' if len(held) > 64 else 'bounded')", ("ok",), "bounded"),
    "recurses without end": Greedy(
        "sys.setrecursionlimit(10**8)\ndef f(): f()\ntry: f()\nexcept RecursionError: sys.exit(3)\nprint('HARM')",
        ("killed", "error", "memory", "timeout")),
    "crashes": Greedy("ctypes.string_at(0)\nprint('HARM')", ("killed",)),
    "nests brackets": Greedy("eval('(' * 100000)\nprint('HARM')", ("error", "killed", "memory", "output")),
    "opens sockets of every family": Greedy(
        "for n in range(46):\n    for k in (1, 2, 3, 5):\n        try: socket.socket(n, k); print('HARM', n)\n"
        "        except OSError: pass", ("ok",)),
}  # fmt: skip
"""Name -> a program that would use the machine up, but for its limits; each is bounded, should they not hold."""


@pytest.mark.parametrize("name", GREEDY)
def test_nobody_takes_more_than_the_limits(scene: Scene, name: str) -> None:
    outcome = run_hostile(scene, name, GREEDY[name].program)
    assert outcome.kind in GREEDY[name].kinds, outcome
    assert GREEDY[name].stdout in outcome.stdout
    assert len(outcome.stdout.encode()) + len(outcome.stderr.encode()) <= SMALL.output_bytes


def test_not_even_the_names_of_folders_are_told() -> None:
    for folder in ("/", "/usr", "/tmp/.."):
        assert "PermissionError" in run_program(f"import os\nos.listdir({folder!r})").stderr


def test_cpu_time_of_all_processes_counts_together(scene: Scene) -> None:
    busy = "if os.fork(): time.sleep(60)\nfor _ in range(3): os.fork()\nwhile True: pass"
    limits = Limits(wall_seconds=20.0, cpu_seconds=1.0)
    assert run_hostile(scene, "burns CPU in eight processes", busy, limits).kind == "cpu"


def test_nothing_outlives_a_caller_that_is_killed(scene: Scene) -> None:
    program = scene.fill(
        "os.execv(sys.executable, [sys.executable, '-S', '-c', 'import time; time.sleep(60)', MARKER])"
    )
    calls = "import sys; from engine.rewards.sandbox import run_program; run_program(sys.stdin.read())"
    caller = subprocess.Popen([sys.executable, "-c", calls], stdin=subprocess.PIPE, cwd=ROOT)
    assert caller.stdin is not None
    caller.stdin.write(program.encode())
    caller.stdin.close()
    wait_until(lambda: bool(marked(scene.marker)), "the program runs")
    caller.kill()
    caller.wait()
    wait_until(lambda: not marked(scene.marker), "the program is gone")


def wait_until(holds: object, what: str) -> None:
    """Fail if it does not come to hold within 20 s."""
    assert callable(holds)
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


HONEST = {
    "prints": ("print('hello ä')", "hello ä\n"),
    "reads stdin": ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", "6\n"),
    "reads stdin by lines": ("print(input() + '|' + input())", "1 2|3\n"),
    "uses the standard library": (
        "import json, re, math, collections, itertools, heapq, bisect, functools, random, decimal, fractions, datetime\n"
        "import hashlib, statistics, string, dataclasses, enum, typing, zlib, zoneinfo\n"
        "print(json.dumps({'a': math.gcd(4, 6)}), heapq.nsmallest(1, [3, 1]), hashlib.sha256(b'').hexdigest()[:4])",
        '{"a": 2} [1] e3b0\n',
    ),
    "uses threads": (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(4) as p: print(sum(p.map(abs, [-1, -2])))", "3\n"),
    "uses processes": ("import multiprocessing\nwith multiprocessing.Pool(2) as p: print(p.map(abs, [-1, -2]))", "[1, 2]\n"),
    "uses asyncio": ("import asyncio\nasync def f(): return 7\nprint(asyncio.run(f()))", "7\n"),
    "writes files of its own": (
        "import tempfile, pathlib\nwith tempfile.NamedTemporaryFile('w+') as f: f.write('x'); f.seek(0); print(f.read())\n"
        "pathlib.Path('a/b').mkdir(parents=True); pathlib.Path('a/b/c').write_text('y'); print(open('a/b/c').read())",
        "x\ny\n",
    ),
    "imports a file it was given": ("from pack.helper import twice\nprint(twice(4))", "8\n"),
    "ends by exit()": ("print(1)\nexit()", "1\n"),
    "is the main module": ("if __name__ == '__main__': print(__file__)", "program.py\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs_run_as_they_would_outside(name: str) -> None:
    program, expected = HONEST[name]
    files = {"pack/helper.py": "def twice(x): return 2 * x"}
    outcome = run_program(program, stdin="1 2\n3\n", files=files)
    assert (outcome.kind, outcome.exit_code, outcome.stdout, outcome.stderr) == ("ok", 0, expected, "")


def test_sets_have_one_order_in_every_run() -> None:
    printed = {run_program("print({str(i) for i in range(50)})").stdout for _ in range(3)}
    assert len(printed) == 1


def test_a_run_finds_nothing_of_the_one_before() -> None:
    leave = "import pathlib\nprint(sorted(p.name for p in pathlib.Path().iterdir()))\nopen('left', 'w').write('x')"
    assert {run_program(leave).stdout for _ in range(2)} == {"['program.py']\n"}


def test_how_a_program_failed_is_told_with_its_own_line() -> None:
    outcome = run_program("x = 1\nraise ValueError('no')")
    assert (outcome.kind, outcome.exit_code) == ("error", 1)
    assert 'File "program.py", line 2' in outcome.stderr
    assert outcome.stderr.endswith("ValueError: no\n")
    assert run_program("import sys\nsys.exit(7)").exit_code == 7


def test_threads_may_run_programs_at_the_same_time_without_sharing_limits() -> None:
    program = (
        "import os, time\nfor _ in range(10):\n    if not os.fork(): time.sleep(0.3); os._exit(0)\nprint('forked')"
    )
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda _: run_program(program), range(6)))
    assert [outcome.stdout for outcome in outcomes] == ["forked\n"] * 6


def test_no_process_thread_or_descriptor_is_left_in_the_caller() -> None:
    run_program("print(1)")
    me = psutil.Process()

    def held() -> tuple[int, int, int]:
        return me.num_fds(), len(me.children(recursive=True)), threading.active_count()

    gc.collect()  # what earlier tests left behind must not go in between
    gc.disable()
    try:
        before = held()
        for program in ("print(1)", "while True: pass", "print('x' * 10**6)"):
            run_program(program, limits=SMALL)
        assert held() == before
    finally:
        gc.enable()


def test_more_stdin_than_a_pipe_holds_arrives_whole_and_unread_stdin_does_not_block() -> None:
    text = "x" * 3_000_000
    assert run_program("import sys\nprint(len(sys.stdin.read()))", stdin=text).stdout == "3000000\n"
    assert run_program("print(1)", stdin=text).kind == "ok"


@pytest.mark.parametrize("name", ["/etc/x", "../x", "program.py", "./program.py", ""])
def test_files_stay_in_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="inside the program's folder"):
        run_program("", files={name: ""})


@pytest.mark.parametrize("absent", LAYERS)
def test_a_missing_layer_is_refused_by_name_with_its_remedy(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    monkeypatch.setattr(sandbox, "_lacks", lambda: dict.fromkeys(LAYERS, "") | {absent: "Function not implemented"})
    with pytest.raises(UserError, match=rf"lacks {absent} \(Function not implemented\): .*; or accept .* allow_weaker"):
        run_program("print(1)")


@pytest.mark.parametrize("second", ["seccomp", "landlock"])
def test_even_allow_weaker_keeps_the_network_and_the_files_closed(monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    lacks = dict.fromkeys(LAYERS, "") | {"namespaces": "no", second: "no"}
    monkeypatch.setattr(sandbox, "_lacks", lambda: lacks)
    with pytest.raises(UserError, match="allow_weaker does not help"):
        run_program("print(1)", limits=Limits(allow_weaker=True))


def test_a_sandbox_that_cannot_start_is_no_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_START", "raise SystemExit('broken')")
    with pytest.raises(SandboxError, match="broken"):
        run_program("print(1)")
    monkeypatch.undo()
    monkeypatch.setattr(sandbox, "_readable", lambda: ["/usr/lib"])
    with pytest.raises(SandboxError, match="could not be put up"):
        run_program("print(1)")


@pytest.mark.parametrize(
    ("name", "value"),
    [("wall_seconds", 0), ("cpu_seconds", float("nan")), ("memory_bytes", 1000), ("processes", 0), ("space_bytes", -1)],
)
def test_limits_without_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]


def test_a_run_costs_little() -> None:
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        run_program("print(1)")
        seconds.append(time.perf_counter() - began)
    FIGURES.append(
        f"{'print(1), median of 15':45} {statistics.median(seconds) * 1000:.0f} ms; {json.dumps(protections())}"
    )
    assert statistics.median(seconds) < 1
