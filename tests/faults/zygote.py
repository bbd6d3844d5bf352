"""Starts cassbackup processes without starting Python each time: it has imported everything, and forks.

    python zygote.py SCRIPT SOCKET

Each connection is one process: the client sends a line of JSON (`args`, `env`, `log`, `out`), and is answered the pid,
then the exit code as `Popen.returncode` would have it. The process is the shipped program, from its `main` on; it dies
with the one who asked for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import socket
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def import_all(script: str) -> Any:
    """Import the program, and what it imports only when it needs it."""
    spec = importlib.util.spec_from_file_location("cassbackup", script)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["cassbackup"] = module
    spec.loader.exec_module(module)
    for name in ("boto3", "botocore.session", "botocore.config", "botocore.exceptions", "pyinotify", "requests"):
        importlib.import_module(name)
    read_the_models_once()
    return module


def read_the_models_once() -> None:
    """Let botocore parse its models, 0.2 s of CPU, for all processes to come."""
    import boto3
    from botocore import loaders

    read = loaders.JSONFileLoader.load_file
    known: dict[str, Any] = {}

    def load(self: Any, path: str) -> Any:
        if path not in known:
            known[path] = read(self, path)
        return known[path]

    loaders.JSONFileLoader.load_file = load
    boto3.session.Session("-", "-", region_name="us-east-1").client("s3")


def die_with_the_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def become(program: Any, request: dict[str, Any], script: str) -> None:
    """Be a cassbackup process from here on."""
    os.setsid()
    die_with_the_parent()
    os.environ.clear()
    os.environ.update(request["env"])
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd, place in ((null, 0), (out, 1), (log, 2)):
        os.dup2(fd, place)
        os.close(fd)
    sys.argv = [script, *request["args"]]
    code = 1
    try:
        code = program.main(request["args"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(program: Any, client: socket.socket, script: str) -> None:
    """Start one process, tell its pid, and later how it ended."""
    die_with_the_parent()
    request = json.loads(client.makefile("rb").readline())
    pid = os.fork()
    if not pid:
        client.close()
        become(program, request, script)
    client.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def main() -> None:
    """Listen until the one who started us ends."""
    script, path = sys.argv[1:]
    die_with_the_parent()
    program = import_all(script)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path + ".new")
    listener.listen(128)
    os.rename(path + ".new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # whoever serves a connection is not waited for
    while True:
        client, _ = listener.accept()
        if os.fork():
            client.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        serve(program, client, script)
        os._exit(0)


if __name__ == "__main__":
    main()
