"""Files that only this user may use, in directories that nobody else can change.

A path is walked one directory at a time. Each directory is opened by its name in the one before, so
the directory that was checked is the one that is used: nobody can replace it in between.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import secrets
import stat
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

_T = TypeVar("_T")

#: opens a directory for access to its files; it need not be readable
_ENTER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: follows no link, and does not wait for the other end of a pipe
_PLAINLY = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_MAX_LINKS = 40
#: user ids of a namespace that has all of them
_ALL_IDS = ["0", "0", "4294967295"]


class SharedDirectoryError(OSError):
    """Others can write to a directory.

    Attributes:
        directory: its path.
        sticky: whether a directory in it could belong to this user alone, as in /tmp.
    """

    def __init__(self, directory: Path, sticky: bool) -> None:
        super().__init__(f"other users can write to {directory}")
        self.directory, self.sticky = directory, sticky


class Folder:
    """A directory that only this user can change, or root.

    - The directory and those above it belong to this user or to root.
    - Others cannot write to the directory. They can write to those above it only where these are
      sticky, as /tmp is.
    - Links on the path belong to this user or to root.
    - Missing directories are made, for this user alone.
    - Write permission of a group counts only if somebody else is in the group.

    Args:
        path: the path of the directory.

    Attributes:
        path: the path without links.

    Raises:
        OSError: one of these rules is broken; the message is for people.
    """

    def __init__(self, path: Path) -> None:
        self._trusted = _trusted()
        self._handle = os.open("/", _ENTER)
        self.path = Path("/")
        try:
            self._walk(path)
            status = os.fstat(self._handle)
            if _others_write(status):
                raise SharedDirectoryError(self.path, bool(status.st_mode & stat.S_ISVTX))
        except BaseException:
            os.close(self._handle)
            raise

    def close(self) -> None:
        """Close the directory."""
        os.close(self._handle)

    def open(self, name: str, flags: int) -> int:
        """Open a file that belongs to this user alone. A missing one is made with mode 0600.

        Returns:
            The descriptor.

        Raises:
            OSError: it is a link, has further hard links, is no regular file, or belongs to
                another user.
        """
        path = self.path / name
        try:
            file = os.open(name, flags | _PLAINLY, 0o600, dir_fd=self._handle)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EMLINK):
                raise OSError(f"{path} is a link") from error
            raise OSError(error.errno, error.strerror, str(path)) from error
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{path} is not a regular file")
            if status.st_uid != os.geteuid():
                raise OSError(f"{path} belongs to another user (id {status.st_uid})")
            if status.st_nlink > 1:
                raise OSError(f"{path} is one of {status.st_nlink} names of a file (hard links)")
        except BaseException:
            os.close(file)
            raise
        return file

    def keep(self, name: str, stack: ExitStack) -> int:
        """Open or make a file for reading and writing; the stack closes it."""
        file = self.open(name, os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, file)
        return file

    def existing(self, name: str, stack: ExitStack) -> list[int]:
        """Open a file for reading, if it exists; the stack closes it. Returns its descriptor."""
        with suppress(FileNotFoundError):
            file = self.open(name, os.O_RDONLY)
            stack.callback(os.close, file)
            return [file]
        return []

    def holds(self, name: str, file: int) -> bool:
        """Whether that name, and the path to it, still lead to an open file."""
        found = os.fstat(file)
        inside = os.stat(name, dir_fd=self._handle, follow_symlinks=False)
        return os.path.samestat(found, inside) and os.path.samestat(
            found, os.stat(self.path / name)
        )

    def sync(self) -> None:
        """Write new names in the directory to the disk."""
        listed = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._handle)
        try:
            os.fsync(listed)
        finally:
            os.close(listed)

    def _walk(self, path: Path) -> None:
        """Go to a directory, one name at a time."""
        try:
            start = path if path.is_absolute() else Path.cwd() / path
        except FileNotFoundError as error:
            raise OSError("the current directory does not exist any more") from error
        pending, links = [*reversed(start.parts)], 0
        while pending:
            name = pending.pop()
            here = os.fstat(self._handle)
            if _others_write(here) and not here.st_mode & stat.S_ISVTX:
                raise SharedDirectoryError(self.path, sticky=False)
            if name == "/":
                self._enter("/", Path("/"))
                continue
            if not stat.S_ISLNK(self._status(name).st_mode):
                self._enter(name, self.path.parent if name == ".." else self.path / name)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(f"{self.path / name} is a link to itself")
            pending += reversed(Path(os.readlink(name, dir_fd=self._handle)).parts)

    def _status(self, name: str) -> os.stat_result:
        """The status of a name in this directory. A missing directory is made."""
        with suppress(FileExistsError):
            try:
                return self._checked(name)
            except FileNotFoundError:
                self._named(os.mkdir, name, 0o700)
        return self._checked(name)

    def _checked(self, name: str) -> os.stat_result:
        status = self._named(os.stat, name, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode) and status.st_uid not in self._trusted:
            raise OSError(f"{self.path / name} is a link of another user (id {status.st_uid})")
        return status

    def _named(self, call: Callable[..., _T], name: str, *args: Any, **options: Any) -> _T:
        """Do a system call for a name in this directory; errors show the whole path."""
        try:
            return call(name, *args, dir_fd=self._handle, **options)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error

    def _enter(self, name: str, path: Path) -> None:
        """Go into a directory."""
        handle = self._named(os.open, name, _ENTER)
        os.close(self._handle)
        self._handle, self.path = handle, path
        owner = os.fstat(handle).st_uid
        if owner not in self._trusted:
            raise OSError(f"the directory {path} belongs to another user (id {owner})")


def restrict(files: Iterable[int]) -> None:
    """Remove the permissions of other users from files of this user."""
    for file in files:
        if os.fstat(file).st_mode & 0o077:
            os.fchmod(file, 0o600)


def replace_file(path: Path, text: str) -> os.stat_result:
    """Write a file that others may read. It gets a new name first, so no link is written through.

    Returns:
        The status of the file, for :func:`remove_file`.

    Raises:
        OSError: it cannot be written, or its name belongs to something that is no regular file.
    """
    folder = os.open(path.parent, _ENTER & ~os.O_NOFOLLOW)
    made = f".{path.name}.{secrets.token_hex(8)}"
    try:
        with suppress(FileNotFoundError):
            found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("there is something else than a regular file")
        file = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _PLAINLY, 0o644, dir_fd=folder)
        try:
            with open(file, "w", encoding="ascii") as stream:
                stream.write(text)
                status = os.fstat(file)
            os.rename(made, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(made, dir_fd=folder)
            raise
        return status
    finally:
        os.close(folder)


def remove_file(path: Path, status: os.stat_result) -> None:
    """Remove the file of :func:`replace_file`, unless another file has its name by now."""
    with suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), status):
            path.unlink()


def _trusted() -> set[int]:
    """User ids whose directories and links are as good as this user's."""
    found = {0, os.geteuid()}
    with suppress(OSError, ValueError):
        # in a user namespace, root and all other users outside of it appear under one id
        if Path("/proc/self/uid_map").read_text().split() != _ALL_IDS:
            found.add(int(Path("/proc/sys/kernel/overflowuid").read_text()))
    return found


def _others_write(status: os.stat_result) -> bool:
    """Whether somebody else than this user and root can write to a directory."""
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and _is_shared(status.st_gid)


def _is_shared(group: int) -> bool:
    """Whether somebody else than this user is in a group, as far as the machine knows.

    Many systems give every user a group of their own, and Kubernetes gives a pod a group for its
    volumes (``fsGroup``). Members of root's group count as root.
    """
    if group == 0:
        return False
    users = pwd.getpwall()
    members = {user.pw_name for user in users if user.pw_gid == group}
    with suppress(KeyError):
        members.update(grp.getgrgid(group).gr_mem)
    return bool(members - {user.pw_name for user in users if user.pw_uid in (0, os.geteuid())})
