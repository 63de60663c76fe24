"""EngineProcess: a worker that runs an engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from dllmserve.errors import EngineStartError, error_named
from dllmserve.process.devices import Share
from dllmserve.process.messages import Configure, EngineInfo, NotLoaded, Ready
from dllmserve.process.worker import Worker


class EngineStoppedError(EngineStartError):
    """A signal stopped the engine while it was starting: nothing is wrong with it."""


class EngineProcess(Worker):
    """A worker whose model is loaded by :meth:`load`.

    Args:
        share: what the engine is started with.
        command: see :class:`Worker`.
        log: gets what the process writes, and what happens to the process.

    Attributes:
        info: the loaded engine.

    Raises:
        EngineStartError: the system cannot start another process.
    """

    info: EngineInfo

    def __init__(self, share: Share, command: Sequence[str], log: logging.Logger) -> None:
        self._options = share.options
        try:
            super().__init__(
                "the engine", command, environment=share.environment, log=log, relayed=True
            )
        except OSError as error:  # too many processes or open files
            raise EngineStartError(f"the engine could not be started: {error}") from error

    async def load(self, timeout_s: float) -> None:
        """Wait until the model is loaded; after an error the process has ended.

        Args:
            timeout_s: for all of it.

        Raises:
            DllmServeError: what the engine says is wrong with model or options.
            EngineStartError: it died, or took too long; an EngineStoppedError if a signal had
                stopped it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._load()
        except TimeoutError as error:
            await self.end()
            raise EngineStartError(
                f"the engine was not ready after {timeout_s:g} s: give it more time, or "
                "look at its log"
            ) from error
        except BaseException:
            await self.end()
            raise

    async def _load(self) -> None:
        await self.open()
        self.send(Configure(self._options))
        while (message := await self.receive()) is not None:
            if isinstance(message, NotLoaded):
                if message.stopped:
                    raise EngineStoppedError(message.message)
                raise error_named(message.error, message.message)
            if isinstance(message, Ready):
                self.info = message.info
                return
        death = await self.death()
        await self.relayed()  # what it wrote may be the reason
        kind = EngineStoppedError if death.frozen else EngineStartError
        raise kind(f"{death.text} while it started")
