"""Windows, as far as Python can imitate it on Linux: ``python tests/support/systems.py``. macOS lacks less.

The modules of specdec get an ``os``, a ``signal``, a ``socket`` and a ``ctypes`` without what Windows lacks, none of
the modules that it lacks, no ``/proc`` and no compiled library; other packages see Linux, which they need here. Then
every module is imported, and commands and a server of a tiny model run. This cannot show how the paths, terminals,
signals, file locks and open files of Windows behave.
"""

import builtins
import errno
import importlib
import io
import pkgutil
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import httpx
from tiny import save_tiny
from typer.testing import CliRunner

POSIX = """register_at_fork fork forkpty getloadavg sysconf statvfs pathconf getuid geteuid getgid getpgid setsid killpg
uname wait3 wait4 openpty mkfifo mknod chown lchown chroot nice sync ttyname readv writev pread preadv pwrite pwritev
sendfile O_CLOEXEC O_NONBLOCK O_NOFOLLOW O_DIRECTORY O_SYNC WIFEXITED WIFSIGNALED"""
LINUX = """O_DIRECT O_TMPFILE O_LARGEFILE O_NOATIME O_PATH sched_getaffinity sched_setaffinity sched_setscheduler splice
getrandom posix_fadvise posix_fallocate memfd_create eventfd copy_file_range fdatasync pidfd_open getxattr setxattr"""
SIGNALS = """SIGALRM SIGKILL SIGHUP SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 SIGCHLD SIGTSTP SIGCONT alarm pause setitimer
sigwait siginterrupt pthread_kill pthread_sigmask"""
LACKING = {  # names by module; a module without names is not there at all
    "os": f"{POSIX} {LINUX}",
    "signal": SIGNALS,
    "socket": "AF_UNIX SO_REUSEPORT SO_PEERCRED socketpair send_fds",
    "mmap": "PROT_READ MAP_PRIVATE MAP_SHARED MAP_POPULATE MAP_HUGETLB MADV_DONTNEED MADV_HUGEPAGE",
    "shutil": "chown",
} | dict.fromkeys(("resource", "fcntl", "termios", "tty", "pty", "pwd", "grp", "posix", "syslog", "readline"), "")
HIDDEN = ("/proc", "/sys")
OPTIONAL = ("specdec.serve.ray", "specdec.integrations.lm_eval")  # of packages that take seconds to import


class View(ModuleType):
    """A module without the names ``absent``, and with the names ``own`` in place of its own."""

    def __init__(self, module: ModuleType, absent: str, **own: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(own, _module=module, _absent=absent.split())

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)


def become() -> None:
    """Make the modules of specdec see the other system, for the rest of the process."""
    import ctypes

    real, opened = builtins.__import__, io.open

    def library(name: str | None, *args: Any, **more: Any) -> Any:
        if name is None:
            raise TypeError("bad argument type for built-in operation")
        return ctypes.CDLL(name, *args, **more)

    views = {name: View(importlib.import_module(name), names) for name, names in LACKING.items() if names}
    views["sys"] = View(sys, "", platform="win32")
    views["ctypes"] = View(ctypes, "", CDLL=library)

    def shown(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        importer = str((globals or {}).get("__name__", ""))
        if level or not importer.startswith("specdec"):
            return real(name, globals, locals, fromlist, level)
        if LACKING.get(name) == "":
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        found = real(name, globals, locals, fromlist, level)
        return views.get(found.__name__, found)

    def open_visible(file: Any, *args: Any, **more: Any) -> Any:
        if str(file).startswith(HIDDEN):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(file))
        return opened(file, *args, **more)

    assert "specdec" not in sys.modules, "modules that are there already have seen Linux"
    builtins.__import__ = shown
    builtins.open = io.open = open_visible


def run(*arguments: str) -> str:
    from specdec import cli

    done = CliRunner().invoke(cli.app, list(arguments))
    if done.exit_code:
        raise SystemExit(f"specdec {' '.join(arguments)}: {done.output} {done.exception!r}")
    return done.output


def serve(model: Path) -> None:
    """Run a server of ``model`` in this thread; a client in another thread sends a request and ends the server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    found = list[httpx.Response]()

    def ask() -> None:
        transport = httpx.HTTPTransport(retries=8)  # until it listens
        with httpx.Client(transport=transport, base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            while client.get("/health").status_code != 200:  # the model loads
                time.sleep(0.1)
            found.append(client.post("/v1/completions", json={"model": "model", "prompt": "hello", "max_tokens": 4}))
        signal.raise_signal(signal.SIGTERM)

    client = threading.Thread(target=ask, daemon=True)
    client.start()
    run("serve", "--model", str(model), "--port", str(port))
    client.join()
    assert found[0].status_code == 200, found[0].text


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, prompts = save_tiny(folder / "model"), folder / "prompts.txt"
        prompts.write_text("".join(f"question {n}\n" for n in range(8)))
        become()
        from tiny_gguf import write_gguf

        import specdec
        from specdec.base import memory
        from specdec.runtimes.native import library
        from specdec.speculation import library as of_speculation

        library.LIBRARY = of_speculation.LIBRARY = folder / "none.so"
        for found in pkgutil.walk_packages(specdec.__path__, "specdec."):
            if found.name not in OPTIONAL and "._" not in found.name:  # no libraries, and no __main__
                importlib.import_module(found.name)
        memory.trim_heap()  # as after packing weights
        short = ("--model", str(model), "--max-new-tokens", "8")
        for command in ("doctor", "models", "drafters"):
            assert run(command)
        assert "torch" in run("generate", "hello", *short, "--dtype", "bfloat16", "--json")
        write_gguf(folder / "blocks.gguf", 64, packed=gguf.GGMLQuantizationType.Q8_0)
        packed = ("--model", str(folder / "blocks.gguf"), "--max-new-tokens", "8")
        run("bench", *packed, "--drafters", "hf,prompt-lookup", "--prompts", str(prompts), "--limit", "1")
        options = ["rank=2", "rows=4", "window=8", "draft_vocab=50", "max_new_tokens=8", "eval_fraction=0.25"]
        options = [word for option in (*options, "segments=[[2,4]]") for word in ("--set", option)]
        given = ["--model", str(model), "--prompts", str(prompts), "--output", str(folder / "drafter"), "--steps", "2"]
        run("train", "m2r2", *given, *options)
        run("generate", "hello", *short, "--drafter", str(folder / "drafter"))
        serve(model)


if __name__ == "__main__":
    main()
    print("done")
