"""An index that may be damaged: tried out before it is used, and put aside when it cannot be.

LMDB trusts its file. What it does not find out itself takes the process down that reads it, so a child reads first.
"""

import contextlib
import logging
import os
import time
from pathlib import Path

import lmdb

from efcfs.cache.index import Index, Unusable

log = logging.getLogger(__name__)

# Reading an index before it is used, as a rule and after a crash.
TRY_S, TRY_ALL_S = 0.1, 5.0
# What LMDB says of a file that is not what it wrote.
DAMAGE = (
    lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError, lmdb.IncompatibleError, lmdb.BadTxnError,
    lmdb.PanicError, lmdb.VersionMismatchError, lmdb.PageFullError, lmdb.CursorFullError, lmdb.BadValsizeError,
)  # fmt: skip


def open_index(directory: Path, *, durable: bool, try_s: float) -> Index:
    """The index; one that cannot be used is put aside, and with it all that it alone knew the way to."""
    if try_s and _fails(directory, durable=durable, try_s=try_s):
        put_aside(directory, "reading it fails")
    try:
        return Index(directory, durable=durable)
    except (Unusable, *DAMAGE) as error:
        put_aside(directory, str(error))
    try:
        return Index(directory, durable=durable)
    except DAMAGE as error:
        raise Unusable(str(error)) from None


def put_aside(directory: Path, why: str) -> None:
    aside = directory / f"index.bad-{time.time():.6f}"
    log.error("cache in %s: %s; put aside as %s, the cache starts empty", directory, why, aside.name)
    with contextlib.suppress(FileNotFoundError):
        os.rename(directory / "index.lmdb", aside)


def _fails(directory: Path, *, durable: bool, try_s: float) -> bool:
    """Try the index out in a child process: LMDB trusts its file, and may take who reads a damaged one down."""
    if not (directory / "index.lmdb").exists():
        return False
    child = os.fork()
    if child == 0:
        try:
            Index(directory, durable=durable).try_out(try_s)
            os._exit(0)
        except DAMAGE:
            os._exit(1)
        except (Unusable, OSError, lmdb.Error):
            os._exit(0)  # the parent meets it too, and says why; a full disk is no damage
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0
