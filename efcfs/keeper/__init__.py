"""The keeper: a small process that owns /dev/fuse and survives everything else.

It has the daemon connect to the server first; then it mounts, reads the kernel's INIT request and hands both to the
daemon. A daemon that dies or hangs is replaced by another one over the same fd, and so is one that asks for
its own upgrade. It parses nothing else, and imports nothing outside the standard library and this package: it is
run by its path (`python -S -E efcfs/keeper FD`), so there is never a reason to restart it. All imports are
made at the start: later the files may be those of another version.

`keep.py` the life of a mount, `child.py` one daemon's process, `kernel.py` mounting, `service.py` systemd,
`directories.py` the mount's directories and what becomes of data that could not be written.

The contract between keeper and daemon
--------------------------------------
An upgrade runs a newer daemon under an older keeper, so what is written here is only ever added to. Messages are JSON
objects over a SOCK_SEQPACKET socket, whose number is the daemon's last argument. Both sides ignore
messages and keys that they do not know.

Keeper to daemon:

1. The request, at once or when the daemon that serves has died: what `efcfs mount` asked for (config, source,
   mountpoint, state_dir, runtime_dir, log, verbose …) with keeper_pid, started_at (of the mount), patient (false: an
   error ends the daemon; true: it waits for a server that is away), init (base64 of the kernel's INIT request; null at
   the very first start), failovers, upgrades, last_exit (of the last daemon that died, "" for none: "signal SIGKILL",
   "exit code 1", "hung for 10 s").
2. {"serve": true, "init": …, "first": bool} with the fd of /dev/fuse. first: nobody has answered INIT yet. Not first:
   requests that another daemon had taken must be asked for again (FUSE_NOTIFY_RESEND).
3. {"drain": true}: take no more requests, end those in flight, say drained; keep all that is needed to go on.
4. {"upgraded": true}: another one serves now; exit with 0.
   {"upgrade_failed": "why", "served": bool}: go on as before, also after drained. served: another one had the fd
   meanwhile, so what it had taken must be asked for again.
The end of the socket before the request, or before `serve`: the keeper has changed its mind; exit. Later: the keeper
is gone; serve on.

Daemon to keeper:

{"loaded": true}              all modules are loaded; it waits for the request
{"connected": true}           ready to be given the fd
{"ready": true}               serving
{"beat": true}                each second from the request to its end, by the loop that serves; also while it waits for
                              a server that is away, which it may for ever, before connected and between serve and ready
{"error": "line", "code": n}  it ends; the line is for the user, the code is the command's
{"upgrade": {"daemon": [argv …], "config": {…} or null}}   replace me by this one, with this config (null: the same)
{"drained": true}             it has no request and will take none; until it is told more it does nothing at all
{"unmounted": true, "dirty_bytes": n}   the mount has ended; it ends

And in the state: each file of `dirty/` tells in bytes 8 to 12, little-endian, how many records no server has yet.
"""

import logging
import logging.handlers

MESSAGE_BYTES = 65536


def log_to(target: str, verbose: bool) -> None:
    """To stderr, syslog, or a file of that name."""
    handler: logging.Handler = logging.StreamHandler()
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if target == "syslog":
        handler = logging.handlers.SysLogHandler("/dev/log")
        line = "efcfs[%(process)d]: %(levelname)s %(name)s: %(message)s"
    elif target != "stderr":
        handler = logging.FileHandler(target)
    handler.setFormatter(logging.Formatter(line))
    logging.basicConfig(level=logging.DEBUG if verbose else logging.INFO, handlers=[handler])
