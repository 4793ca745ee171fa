"""Whose the data folder is: what root starts works as its owner, so that no file of root's ever bars the service.

Knows users, processes and files alone.
"""

import contextlib
import ctypes
import json
import os
import pwd
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from crmbridge.errors import BridgeError, Misconfigured

_MB = 2**20
_MOST_SAID = 4 * _MB
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


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


def opened(path: Path, reader: Owner | None) -> BinaryIO:
    """Open a file to read, as that user. Raises Misconfigured for a link and whatever is no file; waits for nothing."""
    with acting(reader):
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if path.is_symlink():
                raise Misconfigured(f"{path} is a link: name the file that it leads to") from None
            raise error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Misconfigured(f"{path} is no file")
    return os.fdopen(handle, "rb")


def apart(whose: Owner | None, folder: Path, job: Callable[[], Any], *, memory_mb: int, cpu_s: int) -> Any:
    """Do a job in a process of its own that is this user for good and takes no more than so much; return its answer.

    For what reads a file of unknown origin. The answer comes as JSON, so nothing in it is run here. It ends with this
    process. Raises Misconfigured.
    """
    here, there = os.pipe()
    child = os.fork()
    if not child:
        try:
            become(whose, folder)
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory_mb * _MB,) * 2)
            resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
            with os.fdopen(there, "wb") as pipe:
                pipe.write(json.dumps(_answer(job, memory_mb)).encode())
        finally:
            os._exit(0)
    os.close(there)
    try:
        with os.fdopen(here, "rb") as pipe:
            said = pipe.read(_MOST_SAID)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == -signal.SIGXCPU:
        raise Misconfigured(f"it took more than {cpu_s} s of computing: nothing that crmbridge made does")
    try:
        answer = json.loads(said)
    except ValueError:
        raise Misconfigured(f"the process that read it ended with {os.waitstatus_to_exitcode(status)}") from None
    if "problem" in answer:
        raise Misconfigured(answer["problem"])
    return answer["done"]


def _answer(job: Callable[[], Any], memory_mb: int) -> dict[str, Any]:
    try:
        return {"done": job()}
    except BridgeError as error:
        return {"problem": error.message}
    except MemoryError:
        return {"problem": f"it took more than {memory_mb} MB of memory: nothing that crmbridge made does"}
    except Exception as error:  # noqa: BLE001 - what a file of unknown origin leads to is for the one who asked
        return {"problem": f"it cannot be used: {type(error).__name__}: {error}"}
