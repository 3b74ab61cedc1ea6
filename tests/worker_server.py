"""Has imported what every worker imports, and forks a worker for each request on a socket.

Twice, so that the worker becomes a child of the process that asks: see forked_workers.py.
"""

import fcntl
import json
import os
import socket
import sys
import time

import torch  # noqa: F401

import chela_bench.bench.interleave
import chela_bench.bench.leftovers
import chela_bench.bench.measure
import chela_bench.bench.worker  # noqa: F401


def serve(channel):
    """Returns in a worker alone: the code that it is to run."""
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 20, 4)
        if not data:
            sys.exit()
        child = os.fork()
        if child == 0:
            if os.fork():
                os._exit(0)
            return become_worker(channel, fds, **json.loads(data))
        os.waitpid(child, 0)
        for fd in fds:
            os.close(fd)


def become_worker(channel, fds, code, arguments, env, cwd, parent):
    deadline = time.monotonic() + 10
    while os.getppid() != parent:
        assert time.monotonic() < deadline, f"a child of {os.getppid()}, not of {parent}"
        time.sleep(0.001)
    os.setsid()
    channel.send(str(os.getpid()).encode())
    channel.close()
    above = [fcntl.fcntl(fd, fcntl.F_DUPFD, 256) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(above, (0, 1, 2, int(arguments[0])), strict=True):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    paths = map(os.path.abspath, filter(None, env.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:0] = [path for path in paths if path not in sys.path]
    sys.argv[1:] = arguments
    return code


if __name__ == "__main__":
    assert not {"triton", "torch._dynamo"} & set(sys.modules)  # a worker imports these if need be
    exec(serve(socket.socket(fileno=int(sys.argv[1]))))
