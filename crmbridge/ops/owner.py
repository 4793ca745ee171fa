"""Whose the data folder is: what root starts works as its owner, so that no file of root's ever bars the service.

Knows users and files alone.
"""

import contextlib
import os
import pwd
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A user that root is to become; `groups` are all of their groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def of(path: Path) -> Owner | None:
    """Return whose the folder of a file is; None where this process need not, or cannot, become anybody else."""
    if os.geteuid() != 0:
        return None
    folder = path.parent
    while not folder.exists():  # what is to be made belongs to whose folder it is made in
        folder = folder.parent
    found = folder.stat()
    if found.st_uid == 0:
        return None
    try:
        user = pwd.getpwuid(found.st_uid)
    except KeyError:  # a number without a name will do
        return Owner(found.st_uid, found.st_gid, (found.st_gid,))
    groups = {found.st_gid, *os.getgrouplist(user.pw_name, user.pw_gid)}
    return Owner(found.st_uid, user.pw_gid, tuple(sorted(groups)))


def beside(path: Path, whose: Owner | None) -> Owner | None:
    """Return that user where they can lay links on the way to a file, so that root must not follow it as root."""
    if whose is None:
        return None
    path = path.absolute()
    way = [*path.parents, *([path] if path.is_symlink() else [])]
    return whose if any(step.lstat().st_uid == whose.uid for step in way if os.path.lexists(step)) else None


def ids(owner: Owner | None) -> tuple[int, int] | None:
    """Return the user's and the group's number, for `chown`."""
    return (owner.uid, owner.gid) if owner else None


def become(owner: Owner | None, folder: Path) -> None:
    """Be that user from now on, for good, at home in the folder."""
    if owner is None:
        return
    os.setgroups(owner.groups)
    os.setresgid(owner.gid, owner.gid, owner.gid)
    os.setresuid(owner.uid, owner.uid, owner.uid)
    os.environ["HOME"] = str(folder)
    with contextlib.suppress(OSError):  # root's own folder is closed to others, and a shell started there complains
        os.chdir(folder)


@contextlib.contextmanager
def acting(owner: Owner | None) -> Iterator[None]:
    """Open and make files as that user for a while. Only for a process of one thread."""
    if owner is None:
        yield
        return
    mine = os.getgroups(), os.getegid(), os.geteuid()
    os.setgroups(owner.groups)
    os.setegid(owner.gid)
    os.seteuid(owner.uid)
    try:
        yield
    finally:
        os.seteuid(mine[2])
        os.setegid(mine[1])
        os.setgroups(mine[0])
