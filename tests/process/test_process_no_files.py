"""A listener leaves nothing behind, not even when no more files can be opened."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path

import pytest

from dllmserve.process.channel import Listener


def test_the_directory_goes_without_a_free_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    async def main() -> None:
        listener = Listener()
        await listener.start()
        assert len(list(tmp_path.iterdir())) == 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        probe = os.open(os.devnull, os.O_RDONLY)
        os.close(probe)
        # the lowest free number is the first that is refused
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                os.open(os.devnull, os.O_RDONLY)
            listener.close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert not list(tmp_path.iterdir())

    asyncio.run(main())
