"""Mount options: what each means, and what the user is told about those that cannot be."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from efcfs import config
from efcfs.config import MountConfig, UsageError, parse


def parsed(options: str, source: str = "nas:/data") -> MountConfig:
    return parse(source, "/mnt", [options])


@pytest.mark.parametrize(
    ("source", "host", "export"),
    [
        ("nas.example.com:/data/set", "nas.example.com", "/data/set"),
        ("10.0.0.1:/", "10.0.0.1", "/"),
        ("[fd00::1]:/data", "fd00::1", "/data"),
        ("[fe80::1%eth0]:/data", "fe80::1%eth0", "/data"),
        ("nas:/with space:and colon", "nas", "/with space:and colon"),
    ],
)
def test_a_source_names_a_server_and_an_export(source: str, host: str, export: str) -> None:
    mount = parsed("", source)
    assert (mount.host, mount.export, mount.source) == (host, export, source)


@pytest.mark.parametrize("source", ["", "nas", "nas:", "nas:data", "/data", ":/data", "fd00::1:/data", "[nas:/data"])
def test_a_bad_source_is_named_with_the_form_expected(source: str) -> None:
    with pytest.raises(UsageError, match=r"SERVER:/EXPORT") as refused:
        parsed("", source)
    assert f"'{source}'" in str(refused.value)


@pytest.mark.parametrize(
    ("options", "field", "value"),
    [
        ("port=20049", "port", 20049),
        ("nconnect=64", "nconnect", 64),
        ("timeo=15", "timeo_s", 1.5),
        ("soft", "soft", True),
        ("soft,hard", "soft", False),
        ("rsize=65536", "rsize", 65536),
        ("nocto", "cto", False),
        ("lookupcache=pos", "lookupcache", "positive"),
        ("addr=10.0.0.1:10.0.0.2", "addresses", ("10.0.0.1", "10.0.0.2")),
        ("addr=[fd00::1]:10.0.0.2", "addresses", ("fd00::1", "10.0.0.2")),
        ("ro", "mount_flags", config.MS_RDONLY),
        ("noexec,nosuid,nodev,exec", "mount_flags", config.MS_NOSUID | config.MS_NODEV),
    ],
)
def test_an_option_sets_its_field_and_the_last_one_wins(options: str, field: str, value: object) -> None:
    assert os.geteuid() == 0
    assert getattr(parsed(options), field) == value


@pytest.mark.parametrize("options", ["noac", "actimeo=0"])
def test_noac_is_actimeo_0(options: str) -> None:
    mount = parsed(options)
    assert (mount.acregmin_s, mount.acregmax_s, mount.acdirmin_s, mount.acdirmax_s) == (0, 0, 0, 0)


def test_what_other_programs_understand_is_accepted() -> None:
    words = (
        "rw,defaults,_netdev,nofail,auto,noauto,user,users,nouser,owner,group,x-systemd.automount,X-mount.mkdir,"
        "comment=mine,bg,fg,intr,nointr,nolock,lock,local_lock=none,acl,noacl,mand,nomand,async,vers=3,nfsvers=3,"
        "proto=tcp,sec=sys,suid,dev,exec,relatime"
    )
    assert parsed(words).mount_flags == config.MS_RELATIME


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("nconect=8", ["nconect", "nconnect"]),
        ("lookupcash=all", ["lookupcash", "lookupcache"]),
        ("qqqqq", ["qqqqq", "--help"]),
        ("nconnect=65", ["nconnect", "65", "from 1 to 64"]),
        ("nconnect=many", ["nconnect", "many", "from 1 to 64"]),
        ("nconnect", ["nconnect", "nconnect=N"]),
        ("rsize=1", ["rsize", "1", "4096"]),
        ("soft=yes", ["soft", "yes", "without a value"]),
        ("addr=[fd00::1", ["addr", "[fd00::1"]),
        ("vers=4.2", ["vers", "4.2", "NFSv3"]),
        ("proto=udp", ["proto", "udp", "TCP"]),
        ("udp", ["udp", "TCP"]),
        ("sec=krb5", ["sec", "krb5", "sys"]),
        ("lookupcache=some", ["lookupcache", "some", "positive"]),
        ("acregmin=9,acregmax=5", ["acregmin", "9", "acregmax", "5"]),
    ],
)
def test_a_refusal_names_the_option_the_value_and_what_is_expected(options: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(options)
    line = str(refused.value)
    assert "\n" not in line
    for word in words:
        assert word in line


def test_sloppy_leaves_out_what_is_unknown_and_nothing_else() -> None:
    assert parse("nas:/data", "/mnt", ["nconect=8,nconnect=8"], sloppy=True).nconnect == 8
    with pytest.raises(UsageError):
        parse("nas:/data", "/mnt", ["nconnect=0"], sloppy=True)


def test_a_configuration_survives_the_way_to_the_daemon() -> None:
    mount = parsed("soft,timeo=15,addr=10.0.0.1:[fd00::2],nconnect=9,noac,ro,rsize=8192")
    assert MountConfig.from_json(json.loads(json.dumps(mount.to_json()))) == mount


def test_help_has_a_line_for_every_option() -> None:
    lines = config.options_help().splitlines()
    assert len(lines) == len(config.OPTIONS)
    for option, line in zip(config.OPTIONS, lines, strict=True):
        assert line.split()[0].split("=")[0] == option.name


@given(st.text(), st.text())
def test_any_text_is_parsed_or_refused_with_a_usage_error(source: str, options: str) -> None:
    for text in (source, "nas:/data"):
        try:
            parse(text, "/mnt", [options])
        except UsageError as refused:
            assert str(refused)


@pytest.mark.parametrize("line", ["ü" * 100 + " strict", "a strict", "x" * 200 + " immutable", '"\\' * 50 + " strict"])
def test_rules_that_are_accepted_fit_their_message(tmp_path: Path, line: str) -> None:
    rules = tmp_path / "rules"
    fits, refused = 0, 1 << 13
    while refused - fits > 1:
        middle = (fits + refused) // 2
        rules.write_text(f"{line}\n" * middle)
        try:
            assert len(json.dumps(parsed(f"rules={rules}").to_json())) < 60_000
        except UsageError as error:
            assert "48 KiB as JSON" in str(error)
            refused = middle
        else:
            fits = middle
    assert fits
