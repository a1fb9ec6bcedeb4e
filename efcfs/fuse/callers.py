"""On whose behalf a request is: the kernel tells pid, uid and one group, the server wants the others too."""

import time

from efcfs.nfs.rpc import Credential

# Reading the groups of a process costs 25 µs; they change with the process's next exec, if at all.
GROUPS_TTL_S = 1.0
MAX_GROUPS = 16
MAX_KNOWN = 1024


class Callers:
    """Credentials of the processes that asked lately."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], tuple[float, Credential]] = {}

    def credential(self, uid: int, gid: int, pid: int) -> Credential:
        """The caller with supplementary groups."""
        key = (uid, gid, pid)
        now = time.monotonic()
        known = self._known.get(key)
        if known is not None and now - known[0] < GROUPS_TTL_S:
            return known[1]
        if len(self._known) > MAX_KNOWN:
            self._known.clear()
        credential = Credential(uid, gid, _groups(pid))
        self._known[key] = (now, credential)
        return credential


def _groups(pid: int) -> tuple[int, ...]:
    """Supplementary groups of the process; none when it is gone, in a foreign pid namespace (pid 0), or not ours to see
    (a /proc with hidepid)."""
    if not pid:
        return ()
    try:
        with open(f"/proc/{pid}/status", "rb") as status:
            for line in status:
                if line.startswith(b"Groups:"):
                    return tuple(int(group) for group in line.split()[1:])[:MAX_GROUPS]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return ()
