"""The one place where mount options are declared, typed, validated and documented.

Options are spelled as nfs(5) spells them where the meaning is the same. `parse` turns the command line's
words into a `MountConfig`, which travels to the keeper and the daemon as JSON.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple

from efcfs.nfs.connect import ServerOptions
from efcfs.vfs.consistency import RuleError, parse_rules

# mount(2) flags
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS, MS_DIRSYNC = 1, 2, 4, 8, 16, 128
MS_NOATIME, MS_NODIRATIME, MS_RELATIME, MS_STRICTATIME = 1024, 2048, 1 << 21, 1 << 24


MIN_DIRTY_BYTES = 16 * 1024**2
# Of the cache in memory: an extent for each stream that is read, and some.
MIN_MEM_BYTES = 16 * 1024**2
MAX_IDENTITY_BYTES = 255
# They travel in messages of 64 KiB.
MAX_RULES_BYTES = 32 * 1024


class UsageError(Exception):
    """What the user asked for makes no sense; str() is the line for the user."""


@dataclass(frozen=True, slots=True)
class MountConfig:
    """One mount, as asked for. Seconds and bytes where the names say so."""

    host: str
    export: str
    mountpoint: str
    addresses: tuple[str, ...] = ()
    port: int | None = None
    mountport: int | None = None
    nconnect: int = 4
    rsize: int | None = None
    wsize: int | None = None
    timeo_s: float = 60.0
    retrans: int = 2
    soft: bool = False
    acregmin_s: float = 3.0
    acregmax_s: float = 60.0
    acdirmin_s: float = 30.0
    acdirmax_s: float = 60.0
    cto: bool = True
    lookupcache: str = "all"
    consistency: str = "close-to-open"
    # (pattern, consistency) of the rules file, the first that matches holds.
    rules: tuple[tuple[str, str], ...] = ()
    allow_other: bool = True
    resvport: bool = True
    # The memory tier of the cache; None: a share of the machine's memory.
    mem_bytes: int | None = None
    # (directory, bytes) of each disk tier.
    ssd: tuple[tuple[str, int], ...] = ()
    verify_memory: bool = False
    # What the cache knows the server by; "": by host and port.
    identity: str = ""
    # Bytes that may be written and not yet safe on the server.
    dirty_bytes: int = 128 * 1024**2
    read_only: bool = False
    mount_flags: int = MS_NODEV | MS_NOSUID
    verbose: bool = False

    @property
    def source(self) -> str:
        """SERVER:/EXPORT, as /proc/mounts shows it."""
        return f"[{self.host}]:{self.export}" if ":" in self.host else f"{self.host}:{self.export}"

    @property
    def server(self) -> ServerOptions:
        return ServerOptions(
            host=self.host, addresses=self.addresses, port=self.port, mountport=self.mountport,
            nconnect=self.nconnect, timeo_s=self.timeo_s, retrans=self.retrans, soft=self.soft,
            rsize=self.rsize, wsize=self.wsize, resvport=self.resvport,
        )  # fmt: skip

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, object]) -> "MountConfig":
        """Of another version's too: an upgrade hands it over, so there may be more words or fewer."""
        known = {field.name for field in fields(cls)}
        rest = {name: value for name, value in values.items() if name in known}
        addresses, ssd, rules = (rest.pop(name, ()) for name in ("addresses", "ssd", "rules"))
        assert isinstance(addresses, (list, tuple)) and isinstance(ssd, (list, tuple))
        assert isinstance(rules, (list, tuple))
        return cls(
            addresses=tuple(map(str, addresses)), ssd=tuple((str(path), int(size)) for path, size in ssd),
            rules=tuple((str(pattern), str(mode)) for pattern, mode in rules),
            **rest,  # type: ignore[arg-type]  # our own to_json
        )  # fmt: skip


class Option(NamedTuple):
    """One mount option: how its value is read and what it sets in MountConfig."""

    name: str
    value: str  # what stands after "=" in the help; "" for an option without
    help: str
    sets: Callable[[str], dict[str, object]]


def _number(name: str, low: int, high: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise UsageError(f"option {name}={text}: expected a whole number from {low} to {high}")
        return int(text)

    return read


def _setting(field: str, name: str, low: int, high: int, scale: float = 1) -> Callable[[str], dict[str, object]]:
    read = _number(name, low, high)
    return lambda text: {field: read(text) if scale == 1 else read(text) * scale}


def _seconds(name: str, *fields: str) -> Callable[[str], dict[str, object]]:
    read = _number(name, 0, 86_400)
    return lambda text: {field: float(read(text)) for field in fields}


def _fixed(**values: object) -> Callable[[str], dict[str, object]]:
    return lambda _: dict(values)


def _choice(name: str, choices: dict[str, dict[str, object]], why: str) -> Callable[[str], dict[str, object]]:
    def read(text: str) -> dict[str, object]:
        if text not in choices:
            raise UsageError(f"option {name}={text}: {why}")
        return dict(choices[text])

    return read


def _addresses(text: str) -> dict[str, object]:
    found = re.findall(r"\[([^\]]+)\]|([^:\[\]]+)", text)
    addresses = tuple(v6 or v4 for v6, v4 in found)
    if not addresses or ":".join(f"[{a}]" if ":" in a else a for a in addresses) != text:
        raise UsageError(f"option addr={text}: expected addresses such as 10.0.0.1:10.0.0.2 or [fd00::1]:[fd00::2]")
    return {"addresses": addresses}


_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", re.IGNORECASE)


def size_bytes(text: str, what: str, whole_bytes: int | None = None) -> int:
    """A size such as 200m, 15g or, where there is a whole, 30%. Raises UsageError."""
    if whole_bytes is not None and text.endswith("%") and text[:-1].isdecimal() and int(text[:-1]) <= 100:
        return whole_bytes * int(text[:-1]) // 100
    match = _SIZE.fullmatch(text)
    if match is None:
        share = " or a share such as 30%" if whole_bytes is not None else ""
        raise UsageError(f"{what}: '{text}' is not a size: write it as 200m, 15g or 2t{share}")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def memory_bytes() -> int:
    """How much memory the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _mem(text: str) -> dict[str, object]:
    wanted = size_bytes(text, f"option mem={text}", memory_bytes())
    if wanted > memory_bytes():
        raise UsageError(f"option mem={text}: the machine has {memory_bytes() >> 20} MiB of memory: ask for less")
    if 0 < wanted < MIN_MEM_BYTES:
        raise UsageError(f"option mem={text}: too small to be of use: at least 16m, or 0 for no cache")
    return {"mem_bytes": wanted}


def _dirty(text: str) -> dict[str, object]:
    wanted = size_bytes(text, f"option dirty={text}")
    if not MIN_DIRTY_BYTES <= wanted <= memory_bytes() // 4:
        raise UsageError(f"option dirty={text}: from 16m to a quarter of the machine's memory")
    return {"dirty_bytes": wanted}


def _rules(text: str) -> dict[str, object]:
    try:
        with open(text, encoding="utf-8", errors="surrogateescape") as file:
            found = file.read(MAX_RULES_BYTES + 1)
        if len(found) > MAX_RULES_BYTES:
            raise UsageError(f"option rules={text}: more than {MAX_RULES_BYTES >> 10} KiB: say it in fewer patterns")
        return {"rules": tuple(parse_rules(found))}
    except OSError as error:
        raise UsageError(f"option rules={text}: {error.strerror}: name a file of lines PATTERN MODE") from None
    except RuleError as error:
        raise UsageError(f"option rules={text}: {error}") from None


def _ssd(text: str) -> dict[str, object]:
    path, colon, size = text.rpartition(":")
    if not colon or not path.startswith("/"):
        raise UsageError(f"option ssd={text}: expected a directory and a size, as in ssd=/var/cache/efcfs:200g")
    wanted = size_bytes(size, f"option ssd={text}")
    if not wanted:
        raise UsageError(f"option ssd={text}: nothing fits into 0 bytes: leave the option out, or give it room")
    return {"ssd": ((path, wanted),)}


def _identity(text: str) -> dict[str, object]:
    if not 0 < len(os.fsencode(text)) <= MAX_IDENTITY_BYTES:
        raise UsageError(f"option identity={text}: expected a name of 1 to {MAX_IDENTITY_BYTES} bytes")
    return {"identity": text}


_AC_FIELDS = ("acregmin_s", "acregmax_s", "acdirmin_s", "acdirmax_s")
_V3 = _choice("vers", {"3": {}, "3.0": {}}, "efcfs speaks NFSv3 only: use vers=3 or leave it out")

OPTIONS = (
    Option("ro", "", "mount read-only", _fixed(read_only=True)),
    Option("rw", "", "mount for reading and writing (default)", _fixed(read_only=False)),
    Option("port", "N", "the server's NFS port (default: ask its portmapper, else 2049)",
           _setting("port", "port", 1, 65535)),
    Option("mountport", "N", "the port of its mountd (default: ask its portmapper)",
           _setting("mountport", "mountport", 1, 65535)),
    Option("addr", "A[:B…]", "addresses to connect to, IPv6 in brackets (default: all that the name has)", _addresses),
    Option("nconnect", "N", "data links, 1 to 64 (default 4); metadata has links of its own",
           _setting("nconnect", "nconnect", 1, 64)),
    Option("rsize", "BYTES", "largest READ, 4096 to 1048576 (default: what the server takes)",
           _setting("rsize", "rsize", 4096, 1048576)),
    Option("wsize", "BYTES", "largest WRITE, 4096 to 1048576 (default: what the server takes)",
           _setting("wsize", "wsize", 4096, 1048576)),
    Option("timeo", "DECISECONDS", "how long the server may be silent at mount, and one try of a soft mount (600)",
           _setting("timeo_s", "timeo", 1, 36000, 0.1)),
    Option("retrans", "N", "a soft mount fails a call after timeo x retrans (default 2)",
           _setting("retrans", "retrans", 1, 100)),
    Option("hard", "", "wait for a server that is away, for ever (default)", _fixed(soft=False)),
    Option("soft", "", "fail calls with ETIMEDOUT after timeo x retrans", _fixed(soft=True)),
    Option("acregmin", "SECONDS", "attributes of files are fresh at least so long (3)",
           _seconds("acregmin", "acregmin_s")),
    Option("acregmax", "SECONDS", "and at most so long, when they do not change (60)",
           _seconds("acregmax", "acregmax_s")),
    Option("acdirmin", "SECONDS", "the same for directories (30)", _seconds("acdirmin", "acdirmin_s")),
    Option("acdirmax", "SECONDS", "the same for directories (60)", _seconds("acdirmax", "acdirmax_s")),
    Option("actimeo", "SECONDS", "sets all four", _seconds("actimeo", *_AC_FIELDS)),
    Option("noac", "", "the same as actimeo=0", _fixed(**dict.fromkeys(_AC_FIELDS, 0.0))),
    Option("ac", "", "cache attributes (default)", _fixed()),
    Option("cto", "", "close-to-open: every open asks the server (default)", _fixed(cto=True)),
    Option("nocto", "", "open asks only when the attributes are no longer fresh", _fixed(cto=False)),
    Option("lookupcache", "all|positive|none", "which names the kernel may keep (all)",
           _choice("lookupcache", {"all": {"lookupcache": "all"}, "none": {"lookupcache": "none"},
                                   "pos": {"lookupcache": "positive"}, "positive": {"lookupcache": "positive"}},
                   "expected all, positive or none")),
    Option("consistency", "close-to-open|strict|immutable", "what readers may believe (close-to-open)",
           _choice("consistency", {"close-to-open": {"consistency": "close-to-open"},
                                   "strict": {"consistency": "strict"},
                                   "immutable": {"consistency": "immutable", "read_only": True}},
                   "expected close-to-open, strict or immutable")),
    Option("rules", "FILE", "the same by path: lines of a pattern and one of these words", _rules),
    Option("mem", "SIZE|N%", "the cache in memory, of all the user's mounts together (5 % of memory, at most 1g)",
           _mem),
    Option("ssd", "DIR:SIZE", "a cache on a local disk; may be given several times", _ssd),
    Option("identity", "NAME", "what the cache knows the server by; mounts that say the same share what they cache"
           " (default: host and port)", _identity),
    Option("dirty", "SIZE", "how much may be written and not yet safe on the server, at least 16m (128m)", _dirty),
    Option("verify", "ssd|all", "which cached blocks are checked against their sums at each read (ssd)",
           _choice("verify", {"ssd": {"verify_memory": False}, "all": {"verify_memory": True}},
                   "expected ssd or all")),
    Option("allow_other", "", "other users may use the mount (default for root)", _fixed(allow_other=True)),
    Option("noallow_other", "", "only the user who mounts may use it (default for others)", _fixed(allow_other=False)),
    Option("resvport", "", "connect from ports below 1024 (default for root)", _fixed(resvport=True)),
    Option("noresvport", "", "connect from any port", _fixed(resvport=False)),
    Option("vers", "3", "NFS version; there is only this one", _V3),
    Option("nfsvers", "3", "the same", _V3),
    Option("proto", "tcp", "transport; there is only this one",
           _choice("proto", {"tcp": {}, "tcp6": {}}, "efcfs speaks TCP only: use proto=tcp or leave it out")),
    Option("sec", "sys", "security flavor; there is only this one",
           _choice("sec", {"sys": {}}, "efcfs speaks sec=sys only: use sec=sys or leave it out")),
)  # fmt: skip
_BY_NAME = {option.name: option for option in OPTIONS}

# Words that mount(8) acts on, or that mean something to the kernel's NFS client only.
ACCEPTED = frozenset([
    "_netdev", "nofail", "auto", "noauto", "user", "users", "nouser", "owner", "group", "defaults",
    "bg", "fg", "intr", "nointr", "lock", "nolock", "acl", "noacl", "mand", "nomand", "async", "tcp",
    "sharecache", "nosharecache", "rdirplus", "nordirplus", "fsc", "nofsc", "iversion", "noiversion",
    "silent", "loud", "lazytime", "nolazytime", "diratime", "atime", "remount",
])  # fmt: skip
_ACCEPTED_PREFIXES = ("x-", "X-", "comment=", "local_lock=", "context=", "retry=", "mountvers=", "mountproto=",
                      "mounthost=", "mountaddr=", "clientaddr=", "helper=")  # fmt: skip
_FLAGS = {
    "nosuid": MS_NOSUID, "nodev": MS_NODEV, "noexec": MS_NOEXEC, "sync": MS_SYNCHRONOUS, "dirsync": MS_DIRSYNC,
    "noatime": MS_NOATIME, "nodiratime": MS_NODIRATIME, "relatime": MS_RELATIME, "strictatime": MS_STRICTATIME,
}  # fmt: skip
_UNSET = {"suid": MS_NOSUID, "dev": MS_NODEV, "exec": MS_NOEXEC, "norelatime": MS_RELATIME}

_SOURCE = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%\w]+)\]|(?P<host>[^:/\[\]\s]+)):(?P<export>/.*)")


def parse(source: str, mountpoint: str, words: Sequence[str], *, sloppy: bool = False) -> MountConfig:
    """The mount that was asked for; `words` are -o arguments. Raises UsageError.

    sloppy: unknown options are left out, as `mount -s` wants.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise UsageError(f"'{source}' is not SERVER:/EXPORT: write it as in nas.example.com:/data or [fd00::1]:/data")
    root = os.geteuid() == 0
    values: dict[str, object] = {"allow_other": root, "resvport": root}
    flags = _set(values, 0 if root else MS_NOSUID | MS_NODEV, words, sloppy=sloppy)
    if values.get("read_only"):
        flags |= MS_RDONLY
    values["mount_flags"] = flags
    config = MountConfig(
        match["v6"] or match["host"], match["export"], mountpoint, **values  # type: ignore[arg-type]
    )
    return _checked(config)


def changed(config: MountConfig, words: Sequence[str]) -> MountConfig:
    """The mount with other options, as an upgrade may set them while it is used. Raises UsageError."""
    values: dict[str, object] = {}
    values["mount_flags"] = _set(values, config.mount_flags, words)
    other = replace(config, **values)  # type: ignore[arg-type]  # what options set
    kept = {"ro or rw": "read_only", "allow_other": "allow_other", "a flag of mount(8)": "mount_flags"}
    for what, field in kept.items():
        if getattr(other, field) != getattr(config, field):
            raise UsageError(f"{what} cannot change while it is mounted: unmount, and mount again")
    if (other.consistency == "immutable") != (config.consistency == "immutable"):
        raise UsageError("consistency=immutable cannot change while it is mounted: unmount, and mount again")
    return _checked(other)


def _set(values: dict[str, object], flags: int, words: Sequence[str], *, sloppy: bool = False) -> int:
    """Put what the options say into `values`; returns the flags for mount(2) with theirs. Raises UsageError."""
    for word in (w for words_ in words for w in words_.split(",") if w):
        name, equals, value = word.partition("=")
        option = _BY_NAME.get(name)
        if option is not None:
            if bool(equals) != bool(option.value):
                expected = f"{name}={option.value}" if option.value else f"{name} without a value"
                raise UsageError(f"option {word}: expected {expected}")
            sets = option.sets(value)
            if name == "ssd":
                sets = {"ssd": (*values.get("ssd", ()), *sets["ssd"])}  # type: ignore[misc]  # tuples both
            values.update(sets)
        elif word in _FLAGS:
            flags |= _FLAGS[word]
        elif word in _UNSET:
            flags &= ~_UNSET[word]
        elif word == "udp":
            raise UsageError("option udp: efcfs speaks TCP only")
        elif not sloppy and word not in ACCEPTED and not word.startswith(_ACCEPTED_PREFIXES):
            import difflib  # noqa: PLC0415  # a daemon that takes over starts 5 ms sooner without

            near = difflib.get_close_matches(name, [*_BY_NAME, *ACCEPTED, *_FLAGS, *_UNSET], 1)
            hint = f"did you mean {near[0]}?" if near else "`efcfs mount --help` lists them"
            raise UsageError(f"unknown option '{name}': {hint}")
    return flags


def _checked(config: MountConfig) -> MountConfig:
    for low, high, what in (
        (config.acregmin_s, config.acregmax_s, "acreg"), (config.acdirmin_s, config.acdirmax_s, "acdir"),
    ):  # fmt: skip
        if low > high:
            raise UsageError(f"option {what}min={low:g}: more than {what}max={high:g}")
    return config


def options_help() -> str:
    """The table of options for `efcfs mount --help`."""
    rows = [(f"{o.name}={o.value}" if o.value else o.name, o.help) for o in OPTIONS]
    width = max(len(left) for left, _ in rows) + 2
    return "\n".join(f"  {left:<{width}}{right}" for left, right in rows)
