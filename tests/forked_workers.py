"""Workers for tests that start many, forked from a server that has imported torch: a tenth of the
processor time that an interpreter of their own takes.

The process that asks for one is a subreaper meanwhile, so that the worker is its child as any: what
it waits for and kills, and what the worker dies with.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

from chela_bench.bench import runner
from tests.running import environment

_PR_SET_CHILD_SUBREAPER = 36
_LIMIT_S = 60
_SERVER = Path(__file__).resolve().parent / "worker_server.py"
_WORKER = runner._WORKER


class Server:
    def __init__(self):
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.settimeout(_LIMIT_S)
        self._asking = threading.Lock()  # a crew starts its workers side by side
        self._process = subprocess.Popen(
            [sys.executable, "-P", _SERVER, str(theirs.fileno())],
            env=environment(**{**runner.worker_environment(), "PYTHONPATH": runner.PACKAGE_ROOT}),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()

    def close(self):
        self._channel.close()
        self._process.wait(timeout=_LIMIT_S)

    def fork(self, fds, **wanted):
        """A worker's process id; standard streams and the pipe for its answers are `fds`."""
        message = json.dumps({**wanted, "cwd": str(Path.cwd()), "parent": os.getpid()})
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        with self._asking:
            assert prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, os.strerror(ctypes.get_errno())
            try:
                socket.send_fds(self._channel, [message.encode()], fds)
                self.last_pid = int(self._channel.recv(64))
                return self.last_pid
            finally:
                prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def subprocess(self):
        """What stands for the module of that name in bench.runner."""
        server = self

        class Popen(subprocess.Popen):
            def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, *others):
                if args[3] != _WORKER:  # another revision's, or one without torch
                    start = super()._execute_child
                    start(args, executable, preexec_fn, close_fds, pass_fds, *others)
                    return
                env, pipes = others[1], others[5:11]
                fds = [pipes[0], pipes[3], pipes[5], *pass_fds]
                self.pid = server.fork(fds, code=_WORKER, arguments=args[4:], env=env)
                self._child_created = True
                self._close_pipe_fds(*pipes)

        return SimpleNamespace(**{**vars(subprocess), "Popen": Popen})
