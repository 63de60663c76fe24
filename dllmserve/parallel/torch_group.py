"""TorchGroup: ranks that are connected by NCCL, or gloo."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as public

from dllmserve.parallel.group import Group

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, Work


class TorchGroup(Group):
    """A process group of torch.distributed, NCCL on GPUs and gloo elsewhere.

    It is made without torch's default group, which belongs to the application and of which
    there is only one: two engines, or an engine and a training loop, share a process.

    Args:
        store: where the ranks find each other.
        rank, size: this rank, of so many.
        device: of the tensors.
        timeout_s: seconds after which an exchange that does not end has failed.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

        distributed: Any = public  # much of it has no types
        super().__init__(rank, size)
        self._device = device
        self._group: Any
        timeout = timedelta(seconds=timeout_s)
        self._reduce_how = AllreduceOptions()
        self._gather_how = AllgatherOptions()
        # on the current stream, where it needs no events and a graph can record it
        self._reduce_how.asyncOp = self._gather_how.asyncOp = False
        if device.type == "cuda":
            self.captures = True
            nccl = distributed.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            with _unwatched():
                self._group = distributed.ProcessGroupNCCL(store, rank, size, nccl)
        else:
            self.captures = False
            gloo = distributed.ProcessGroupGloo._Options()
            gloo._timeout = timeout
            # ranks share a host, and nothing listens on an address that others can reach
            gloo._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._group = distributed.ProcessGroupGloo(store, rank, size, gloo)

    def connect(self) -> None:
        """Meet the others with a first exchange, before anything depends on it. All ranks do."""
        self.all_reduce(torch.zeros(1, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def all_reduce(self, x: Tensor) -> Tensor:
        """See :class:`Group`; in place."""
        x = x.contiguous()
        _wait(self._group.allreduce([x], self._reduce_how))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See :class:`Group`."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        # flat, because gloo counts the first dimension
        flat = x.contiguous().view(-1)
        _wait(self._group._allgather_base(out.view(-1), flat, self._gather_how))
        return out

    def abort(self) -> None:
        """End exchanges that wait for a rank that is gone. Of no use afterwards.

        NCCL returns from it when the graphs that hold exchanges are gone, too. gloo needs no
        telling: the connections of a process end with it.
        """
        if self.captures:
            self._group.abort()


_environment = threading.Lock()


@contextmanager
def _unwatched() -> Iterator[None]:
    """Without NCCL's watchdog: it would end the whole process, and cannot see into graphs.

    Whoever made the group watches the ranks.
    """
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read when a group is made
    with _environment:
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _wait(work: Work | None) -> None:
    """Wait until an exchange is in order with what the current stream does next."""
    if work is not None:
        work.wait()
