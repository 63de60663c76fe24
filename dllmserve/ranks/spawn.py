"""Starting the other ranks as processes of this one's own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllmserve._environment import child_environment
from dllmserve.cores import THREAD_VARIABLES, wait_variables
from dllmserve.ranks.ranks import EXCHANGE_S, Peer, Ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: how a rank is started; the descriptor of its connection and the owner's process id follow
COMMAND = (sys.executable, "-m", "dllmserve.engine.follower")


def spawn_ranks(
    size: int,
    options: Mapping[str, Any],
    *,
    threads: int,
    command: Sequence[str] = COMMAND,
) -> Ranks:
    """Start ranks 1 to ``size - 1``.

    Args:
        size: ranks, this one included.
        options: fields of EngineConfig.
        threads: of a rank, for torch on a CPU.
        command: program and arguments.

    Raises:
        RankError: the system has no room for them.
    """
    store, port = make_store(size)

    def launch() -> list[Peer]:
        peers: list[Peer] = []
        try:
            for rank in range(1, size):
                setup = {
                    "options": dict(options),
                    "rank": rank,
                    "size": size,
                    "port": port,
                }
                peers.append(_start(rank, command, threads))
                peers[-1].connection.send_bytes(json.dumps(setup).encode())
        except BaseException:
            for peer in peers:
                peer.end(0.0)
            raise
        return peers

    return Ranks(launch, store)


def _start(rank: int, command: Sequence[str], threads: int) -> Peer:
    # a pair of sockets has no name that another engine, or another user, could meet
    mine, other = socket.socketpair()
    source = str(Path(__file__).parents[2])  # where this package was imported from
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = child_environment(
        wait_variables(),
        dict.fromkeys(THREAD_VARIABLES, str(threads)),
        {"PYTHONPATH": os.pathsep.join(paths)},
    )
    with mine, other:
        process = subprocess.Popen(
            [*command, str(other.fileno()), str(os.getpid())],
            pass_fds=(other.fileno(),),
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C in a terminal is for rank 0 alone
        )
        return Peer(rank, Connection(mine.detach()), process.pid, process)


def make_store(size: int) -> tuple[Store, int]:
    """A store for the ranks of one engine, at a free port that only this host can reach."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port: int = listening.getsockname()[1]
        return open_store(port, size, listening.detach()), port


def open_store(port: int, size: int, listening: int | None = None) -> Store:
    """The store at a port; the descriptor of the listening socket makes it."""
    from torch import distributed as public

    distributed: Any = public  # much of it has no types
    store: Store = distributed.TCPStore(
        "127.0.0.1",
        port,
        size,
        is_master=listening is not None,
        timeout=timedelta(seconds=EXCHANGE_S),
        wait_for_workers=False,
        master_listen_fd=listening,
        use_libuv=False,  # the other kind takes no descriptor
    )
    return store
