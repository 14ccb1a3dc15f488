"""Starts model servers by forking a process that has imported everything: `python -m serving.zygote --uds PATH`.

The imports are paid once and their memory is shared; what a server adds is its model. A server that dies touches no
other, and servers outlive the zygote. One JSON line per connection to its private Unix socket:

    {"argv": [...], "log": "FILE"}  ->  {"pid": 4711}               a server with these arguments, output to FILE
    {"exits": true}                 ->  {"exits": {"4711": 3}}      how the latest children ended (-9: by signal 9)
    anything else                   ->  {"error": "one sentence"}
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from serving.errors import CannotServe
from serving.listening import free
from serving.log import complain, say

_LINE_MAX = 65_536
_EXITS_MAX = 256
_PATIENCE_S = 5.0


class Zygote:
    """The client: asks the zygote that listens on the socket. Raises CannotServe when it is not there or refuses."""

    def __init__(self, uds: Path) -> None:
        self._uds = uds

    def spawn(self, argv: Sequence[str], log: Path) -> int:
        """Starts a server with the command line `argv`; its process id. Its output is appended to `log`."""
        return int(self._ask({"argv": list(argv), "log": str(log)})["pid"])

    def exits(self) -> dict[int, int]:
        """Exit codes of the latest children that ended, by process id."""
        return {int(pid): code for pid, code in self._ask({"exits": True})["exits"].items()}

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        try:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(_PATIENCE_S)
                peer.connect(str(self._uds))
                peer.sendall(json.dumps(question).encode() + b"\n")
                answer: dict[str, Any] = json.loads(_line(peer))
        except (OSError, ValueError) as exc:
            raise CannotServe(f"the zygote at {self._uds} does not answer: {exc}") from exc
        if "error" in answer:
            raise CannotServe(answer["error"])
        return answer


class _Nursery:
    """The zygote itself: one thread, nothing open but the socket."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._exits: dict[int, int] = {}
        self._leaving = False

    def run(self) -> None:
        """Answers until SIGTERM. The servers live on."""
        woken, wake = socket.socketpair()
        for end in (woken, wake, self._listener):
            end.setblocking(False)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._leave)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(woken, selectors.EVENT_READ)
            while not self._leaving:
                ready = {key.fileobj for key, _ in selector.select()}
                if woken in ready:
                    woken.recv(4096)
                    self._reap()
                if self._listener in ready:
                    self._accept()

    def _leave(self, *_: object) -> None:
        self._leaving = True

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                self._exits[pid] = os.waitstatus_to_exitcode(status)
                if len(self._exits) > _EXITS_MAX:
                    del self._exits[next(iter(self._exits))]

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except BlockingIOError:
            return
        with peer:
            peer.settimeout(_PATIENCE_S)
            try:
                question = json.loads(_line(peer))
                if _gave_up(peer):
                    return
                answer = self._answer(question)
            except (OSError, ValueError) as exc:
                answer = {"error": f"this is no question for a zygote: {exc}"}
            with contextlib.suppress(OSError):  # who asked is gone; the child, if any, is seen by its socket
                peer.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, question: Any) -> dict[str, Any]:
        if not isinstance(question, dict):
            return {"error": "a question must be a JSON object"}
        if question.get("exits"):
            self._reap()  # whoever asks has seen a child end, which the signal may tell us later
            return {"exits": self._exits}
        argv, log = question.get("argv"), question.get("log")
        if not isinstance(argv, list) or not all(isinstance(word, str) for word in argv) or not isinstance(log, str):
            return {"error": "'argv' must be a list of strings and 'log' a file name"}
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_server(argv, output)
        finally:
            os.close(output)
        return {"pid": pid}

    def _become_server(self, argv: list[str], output: int) -> NoReturn:
        """In the child: leaves everything of the zygote behind and serves. Never returns."""
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            os.setsid()
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.closerange(3, 64)  # the zygote's few descriptors, inherited by the fork
            from serving.server import main

            code = main(argv)
        except SystemExit as exc:  # argparse: wrong usage
            code = exc.code if isinstance(exc.code, int) else 2
        except BaseException:  # noqa: BLE001 - nothing of the child may go back into the zygote's loop
            complain(traceback.format_exc())
        finally:
            os._exit(code)


def _gave_up(peer: socket.socket) -> bool:
    """Whether who asked no longer waits: it has started a server without us by now, and needs no second one."""
    peer.setblocking(False)
    try:
        return not peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    finally:
        peer.settimeout(_PATIENCE_S)


def _line(peer: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        part = peer.recv(4096)
        if not part or len(data) > _LINE_MAX:
            raise ValueError("the line is not whole")
        data += part
    return data


def main(argv: Sequence[str] | None = None) -> int:
    """Imports everything, listens, forks when asked; the exit code."""
    asked = argparse.ArgumentParser(prog="serving.zygote", description="Start model servers by forking.")
    asked.add_argument("--uds", required=True, type=Path, help="listen on this Unix socket (mode 0600)")
    given = asked.parse_args(argv)
    # Threads do not survive a fork: nothing imported here may start one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import pyarrow as pa
    import pyarrow.ipc

    # Not used here: what is imported before a fork is shared by all servers, and costs none of them time or memory.
    import serving.runtime
    import serving.server  # noqa: F401

    pa.set_cpu_count(1)
    try:
        free(given.uds)
        listener = socket.socket(socket.AF_UNIX)
        before = os.umask(0o177)
        try:
            listener.bind(str(given.uds))
        finally:
            os.umask(before)
        listener.listen(64)
    except OSError as exc:
        complain(f"cannot listen on {given.uds}: {exc.strerror or exc}")
        return 3
    gc.collect()
    gc.freeze()  # the collector would write into every shared page
    say(f"zygote at unix:{given.uds}")
    _Nursery(listener).run()
    given.uds.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
