"""Directories and files that nobody else may change: what is refused, and what is made."""

import asyncio
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dllmserve.errors import ConfigError
from dllmserve.server import private_files
from dllmserve.server.config import ServerConfig
from dllmserve.server.private_files import (
    Folder,
    SharedDirectoryError,
    remove_file,
    replace_file,
    restrict,
)
from dllmserve.server.serve import _address_file
from dllmserve.server.store import SqliteStore

#: somebody else
OTHER = 4321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def entered(path: Path) -> Path:
    with closing(Folder(path)) as folder:
        return folder.path


def store_refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        asyncio.run(SqliteStore(path).open())
    message = str(refused.value)
    assert "\n" not in message and str(path.parent) in message
    return message


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_missing_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert entered(tmp_path / "a" / "b" / ".." / "c") == tmp_path / "a" / "c"
    assert [mode(tmp_path / name) for name in ("a", "a/b", "a/c")] == [0o700] * 3


def test_relative_paths_and_links_of_this_user_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "far").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "near").symlink_to("../other")
    (tmp_path / "real" / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    assert entered(Path("far/near/x")) == tmp_path / "other" / "x"
    assert entered(Path()) == tmp_path
    with pytest.raises(OSError, match="real/loop is a link to itself"):
        Folder(Path("far/loop"))


def test_where_the_current_directory_is_gone_whole_paths_are_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert entered(tmp_path / "a") == tmp_path / "a"
    with pytest.raises(ConfigError, match="current directory does not exist any more; give anoth"):
        asyncio.run(SqliteStore(Path("b") / "jobs.db").open())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_made_is_named_whole(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=str(tmp_path / "mine" / "new")):
        Folder(tmp_path / "mine" / "new" / "er")


def test_a_name_that_is_too_long_is_named_whole(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"File name too long: '{tmp_path}/a/{'n' * 300}'"):
        Folder(tmp_path / "a" / ("n" * 300))


@pytest.mark.parametrize("bits", [0o777, 0o1777, 0o703])
def test_a_directory_that_others_can_write_to_is_refused(tmp_path: Path, bits: int) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(bits)
    with pytest.raises(SharedDirectoryError, match=f"other users can write to {shared}"):
        Folder(shared)
    message = store_refusal(shared / "jobs.db")
    assert list(shared.iterdir()) == []
    if bits & stat.S_ISVTX:  # as /tmp: what the message names works
        own = shared / f"dllmserve-{os.geteuid()}" / "jobs.db"
        assert f"give another file with --job-store, such as {own}: " in message
        asyncio.run(opened(own))
        assert (mode(own.parent), mode(own)) == (0o700, 0o600)
    else:
        assert f"(chmod go-w {shared} ends that)" in message
        with pytest.raises(SharedDirectoryError):  # others can put another in its place
            Folder(shared / "own")
        assert list(shared.iterdir()) == []


async def opened(path: Path) -> None:
    store = SqliteStore(path)
    await store.open()
    await store.close()


def test_the_temporary_directory_is_no_place_for_a_store() -> None:
    place = Path(tempfile.gettempdir()).resolve()
    if not mode(place) & stat.S_IWOTH:
        pytest.skip("this one is nobody else's")
    assert f"such as {place}/dllmserve-" in store_refusal(place / "dllmserve-test.sqlite3")


@pytest.mark.parametrize(
    ("members", "users", "is_shared"),
    [
        (None, {}, False),  # Kubernetes' fsGroup has no name in a container
        (["me", "root"], {"me": (None, 7), "root": (0, 0)}, False),  # a group for each user
        (["me", "bob"], {"me": (None, 7)}, True),
        ([], {"me": (None, 7), "bob": (OTHER, 7)}, True),  # all users have one group
        (None, {"bob": (OTHER, 7)}, True),
    ],
)
def test_who_is_in_a_group(
    monkeypatch: pytest.MonkeyPatch,
    members: list[str] | None,
    users: dict[str, tuple[int | None, int]],
    is_shared: bool,
) -> None:
    def getgrgid(group: int) -> Any:
        if members is None:
            raise KeyError(f"getgrgid(): gid not found: {group}")
        return SimpleNamespace(gr_mem=members)

    listed = [
        SimpleNamespace(pw_name=name, pw_uid=os.geteuid() if uid is None else uid, pw_gid=gid)
        for name, (uid, gid) in users.items()
    ]
    monkeypatch.setattr(private_files.grp, "getgrgid", getgrgid)
    monkeypatch.setattr(private_files.pwd, "getpwall", lambda: listed)
    assert private_files._is_shared(7) == is_shared
    assert not private_files._is_shared(0)  # who is in root's group may do what root may


def test_a_group_that_can_write_counts_if_it_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(0o2775)
    asked: list[int] = []
    monkeypatch.setattr(private_files, "_is_shared", lambda gid: bool(asked.append(gid)))
    for path in (volume, volume / "own"):
        assert entered(path) == path
    assert set(asked) == {volume.stat().st_gid}
    monkeypatch.setattr(private_files, "_is_shared", lambda gid: True)
    for path in (volume, volume / "own"):
        with pytest.raises(SharedDirectoryError):
            Folder(path)
    volume.chmod(0o755)
    assert entered(volume) == volume


@as_root
def test_directories_links_and_files_of_others_are_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "below").mkdir()
    os.chown(theirs, OTHER, -1)
    for path in (theirs, theirs / "below", theirs / "new"):
        with pytest.raises(OSError, match=rf"{theirs} belongs to another user \(id {OTHER}\)"):
            Folder(path)
    assert not (theirs / "new").exists()
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    os.chown(link, OTHER, -1, follow_symlinks=False)
    assert f"link is a link of another user (id {OTHER})" in store_refusal(link / "jobs.db")
    for name in ("jobs.db", "jobs.db.lock", "jobs.db-wal", "jobs.db-shm", "jobs.db-journal"):
        place = tmp_path / name
        place.touch()
        place.chmod(0o666)
        os.chown(place, OTHER, -1)
        assert f"{place} belongs to another user (id {OTHER})" in store_refusal(
            tmp_path / "jobs.db"
        )
        assert mode(place) == 0o666
        place.unlink()


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with closing(Folder(tmp_path)) as folder:
        os.close(folder.open("file", os.O_RDWR))
        real = os.geteuid()
        monkeypatch.setattr(private_files.os, "geteuid", lambda: real + 1)
        with pytest.raises(OSError, match=rf"file belongs to another user \(id {real}\)"):
            folder.open("file", os.O_RDWR)


def test_an_unmapped_owner_counts_in_a_user_namespace_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overflow = int(Path("/proc/sys/kernel/overflowuid").read_text())
    real = Path.read_text

    def mapped(text: str) -> set[int]:
        def read(self: Path, *given: Any, **more: Any) -> str:
            return text if self.name == "uid_map" else real(self, *given, **more)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", read)
            return private_files._trusted()

    assert overflow not in mapped("         0          0 4294967295\n")
    assert overflow in mapped("      1000       1000          1\n")


def test_files_are_restricted(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o664)
    with file.open() as stream:
        restrict([stream.fileno()])
    assert mode(file) == 0o600


def test_what_is_put_in_the_place_of_a_file_is_noticed(tmp_path: Path) -> None:
    with closing(Folder(tmp_path / "folder")) as folder:
        file = folder.open("name", os.O_RDWR | os.O_CREAT)
        assert folder.holds("name", file)
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "name").touch()
        assert not folder.holds("name", file)
        os.close(file)


def test_another_store_in_its_place_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Folder, "holds", lambda self, name, file: False)
    assert "another file was put in its place" in store_refusal(tmp_path / "jobs.db")


def test_the_address_file_replaces_and_follows_nothing(tmp_path: Path) -> None:
    victim, link, file = tmp_path / "victim", tmp_path / "link", tmp_path / "file"
    victim.write_text("kept")
    link.symlink_to(victim)
    (tmp_path / "dir").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "dir", "pipe"):
        config = ServerConfig(address_file=str(tmp_path / name))
        with pytest.raises(ConfigError, match="something else than a regular file"):
            _address_file(config).__enter__()
    with pytest.raises(ConfigError, match="cannot be written: No such file or directory"):
        _address_file(ServerConfig(address_file=str(tmp_path / "no" / "x"))).__enter__()
    assert victim.read_text() == "kept"
    file.hardlink_to(victim)  # of an earlier server, say
    with _address_file(ServerConfig(address_file=str(file), port=9000)):
        assert file.read_text() == "http://127.0.0.1:9000\n"
        assert (victim.read_text(), mode(file)) == ("kept", 0o644)
    assert not file.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"victim", "link", "dir", "pipe"}


def test_the_address_file_of_another_server_is_left(tmp_path: Path) -> None:
    file = tmp_path / "file"
    first = replace_file(file, "first")
    second = replace_file(file, "second")
    remove_file(file, first)
    assert file.read_text() == "second"
    remove_file(file, second)
    remove_file(file, second)
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(private_files.os, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []
