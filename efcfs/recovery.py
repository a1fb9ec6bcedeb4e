"""The composition root of `efcfs recover`: what a mount left unwritten, a client for its server, and no daemon."""

import json
from pathlib import Path

import trio

from efcfs.config import MountConfig
from efcfs.nfs.connect import ConnectError, connect
from efcfs.vfs.handles import OtherVersion
from efcfs.vfs.recover import open_unwritten


class Impossible(Exception):
    """Nothing could be done; str() says why."""


def recover(place: Path, into: Path | None) -> tuple[list[str], list[str]]:
    """Write what is unwritten in `place` to its server, or save it below `into`.

    Returns a line for each file that is done, and for each that the server refuses. Raises Impossible.
    """
    done: list[str] = []
    refused: list[str] = []

    async def write_all(config: MountConfig, root_fh: bytes) -> None:
        with open_unwritten(place, root_fh) as unwritten:
            if into is not None:
                for file in unwritten.files:
                    done.append(f"saved {unwritten.save(file, into)}, {file.length_bytes} bytes")
                return
            async with connect(config.server, config.export) as client:
                for file in unwritten.files:
                    why = await unwritten.write(client, file)
                    if why is None:
                        done.append(f"wrote {file.path}, {file.length_bytes} bytes")
                    else:
                        refused.append(f"{file.path}: {why}")

    try:
        mount = json.loads((place / "mount.json").read_text())
        root_fh = bytes.fromhex(json.loads((place / "server.json").read_text())[1][2])
        trio.run(write_all, MountConfig.from_json(mount["config"]), root_fh)
    except (ConnectError, OtherVersion) as error:
        raise Impossible(str(error)) from None
    except OSError as error:
        raise Impossible(f"{place}: {error.strerror or error}") from None
    return done, refused
