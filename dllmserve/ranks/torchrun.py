"""Ranks that torchrun has started, or whatever sets the same environment variables."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from secrets import token_hex
from typing import TYPE_CHECKING, Any

from dllmserve.errors import ConfigError
from dllmserve.ranks.ranks import Peer, Ranks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: engines of this process, so that one does not read what another wrote
_engines = itertools.count()


@dataclass(frozen=True)
class World:
    """The processes that were started together.

    Attributes:
        rank, size: this process, of so many.
        local_size: processes on this host.
    """

    rank: int
    size: int
    local_size: int


def world(environment: Mapping[str, str] = os.environ) -> World | None:
    """What the environment says; None if this process was started by itself.

    Raises:
        ConfigError: it says something that makes no sense.
    """
    given = {name: environment.get(name, "") for name in _VARIABLES}
    if not all(given.values()):
        return None
    try:
        rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
        local_size = int(environment.get("LOCAL_WORLD_SIZE") or size)
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_WORLD_SIZE is no number: {error}") from error
    return World(rank, size, local_size) if size > 1 else None


def check_world(found: World, size: int) -> None:
    """Raise ConfigError unless the processes are the ranks of one model, on one host."""
    if found.size != size:
        raise ConfigError(
            f"torchrun has started {found.size} processes and tensor_parallel_size is {size}: "
            f"use torchrun --nproc-per-node {size}, or start the program without torchrun"
        )
    if found.local_size != found.size:
        raise ConfigError(
            f"tensor_parallel_size={size} over several hosts is not supported: all ranks have "
            "to be on one host"
        )


def open_meeting() -> Store:
    """The store where the ranks of this process's next engine find each other.

    The same number of engines must have been made in all ranks.
    """
    from torch import distributed as public

    distributed: Any = public  # much of it has no types
    if distributed.is_initialized():
        base = distributed.distributed_c10d._get_default_store()
    else:
        base = next(iter(distributed.rendezvous("env://")))[0]
    store: Store = distributed.PrefixStore(f"dllmserve/{next(_engines)}", base)
    return store


def meet_ranks(found: World) -> Ranks:
    """Rank 0: wait for the others."""
    store = open_meeting()

    def meet() -> list[Peer]:
        key = token_hex()
        with Listener(family="AF_UNIX", authkey=key.encode()) as listener:
            store.set("meeting", f"{key} {listener.address}")
            peers = []
            for _ in range(1, found.size):
                connection = listener.accept()
                rank, pid = map(int, connection.recv_bytes().split())
                peers.append(Peer(rank, connection, pid))
        return sorted(peers, key=lambda peer: peer.rank)

    return Ranks(meet, store)


def meet_lead(found: World) -> tuple[Connection, Store]:
    """Another rank: the connection to rank 0, and the store."""
    store = open_meeting()
    key, _, address = store.get("meeting").decode().partition(" ")
    connection = Client(address, family="AF_UNIX", authkey=key.encode())
    connection.send_bytes(f"{found.rank} {os.getpid()}".encode())
    return connection, store
