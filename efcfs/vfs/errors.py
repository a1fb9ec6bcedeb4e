"""The one place where what went wrong becomes an errno."""

import errno
import logging

from efcfs.nfs import nfs3
from efcfs.nfs.client import NfsError
from efcfs.nfs.link import CallFailed, ServerAway, TimedOut
from efcfs.nfs.rpc import RpcRefused

log = logging.getLogger(__name__)

# RFC 1813 §2.6. Where POSIX has no such error the kernel's NFS client is followed.
ERRNO_OF_STATUS = {
    nfs3.NFS3ERR_PERM: errno.EPERM,
    nfs3.NFS3ERR_NOENT: errno.ENOENT,
    nfs3.NFS3ERR_IO: errno.EIO,
    nfs3.NFS3ERR_NXIO: errno.ENXIO,
    nfs3.NFS3ERR_ACCES: errno.EACCES,
    nfs3.NFS3ERR_EXIST: errno.EEXIST,
    nfs3.NFS3ERR_XDEV: errno.EXDEV,
    nfs3.NFS3ERR_NODEV: errno.ENODEV,
    nfs3.NFS3ERR_NOTDIR: errno.ENOTDIR,
    nfs3.NFS3ERR_ISDIR: errno.EISDIR,
    nfs3.NFS3ERR_INVAL: errno.EINVAL,
    nfs3.NFS3ERR_FBIG: errno.EFBIG,
    nfs3.NFS3ERR_NOSPC: errno.ENOSPC,
    nfs3.NFS3ERR_ROFS: errno.EROFS,
    nfs3.NFS3ERR_MLINK: errno.EMLINK,
    nfs3.NFS3ERR_NAMETOOLONG: errno.ENAMETOOLONG,
    nfs3.NFS3ERR_NOTEMPTY: errno.ENOTEMPTY,
    nfs3.NFS3ERR_DQUOT: errno.EDQUOT,
    nfs3.NFS3ERR_STALE: errno.ESTALE,
    nfs3.NFS3ERR_REMOTE: errno.EREMOTE,
    nfs3.NFS3ERR_BADHANDLE: errno.EIO,
    nfs3.NFS3ERR_NOT_SYNC: errno.EIO,
    nfs3.NFS3ERR_BAD_COOKIE: errno.EIO,
    nfs3.NFS3ERR_NOTSUPP: errno.EOPNOTSUPP,
    nfs3.NFS3ERR_TOOSMALL: errno.EINVAL,
    nfs3.NFS3ERR_SERVERFAULT: errno.EIO,
    nfs3.NFS3ERR_BADTYPE: errno.EINVAL,
    nfs3.NFS3ERR_JUKEBOX: errno.EAGAIN,
}
_WORTH_A_LINE = {nfs3.NFS3ERR_BADHANDLE, nfs3.NFS3ERR_SERVERFAULT, nfs3.NFS3ERR_BAD_COOKIE}

# What an operation of the file system may raise besides OSError.
SERVER_ERRORS = (NfsError, TimedOut, ServerAway, CallFailed, RpcRefused)


def is_of_the_daemon(error: Exception) -> bool:
    """Whether it tells of this daemon and of no file: memory or a thread is not to be had, or a part of it has failed,
    whose nursery takes no more tasks. Another daemon can do what was asked."""
    out_of_memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    return out_of_memory or isinstance(error, RuntimeError)


def errno_of(error: Exception) -> int:
    """The errno that the program sees for `error`."""
    if isinstance(error, NfsError):
        if error.status in _WORTH_A_LINE or error.status not in ERRNO_OF_STATUS:
            log.error("server answered %s", error)
        elif error.status == nfs3.NFS3ERR_STALE:
            log.info("server answered %s", error)
        return ERRNO_OF_STATUS.get(error.status, errno.EIO)
    if isinstance(error, ServerAway):
        return errno.ETIMEDOUT
    if isinstance(error, TimedOut):
        log.warning("%s timed out (soft mount)", error)
        return errno.ETIMEDOUT
    if isinstance(error, OSError) and error.errno:
        return error.errno
    log.error("call failed: %s", error)
    return errno.EIO
