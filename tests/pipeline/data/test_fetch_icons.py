"""Fetching sets of icons: hashes, and what to do without npm. A stand-in takes npm's place."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import tarfile

import pytest

from pipeline.data.builtin import fetch_icons
from pipeline.data.builtin.fetch_icons import FILES, PACKAGES, fetch


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """A program `npm` that leaves a tarball, with whose hash `noto` is known."""
    tarball = tmp_path / "set.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for name in (*FILES, "../outside.json", "more.js"):
            text = json.dumps({"name": name}).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nset -e\necho "$@" > {tmp_path}/asked\ncp {tarball} .\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    monkeypatch.setitem(PACKAGES, "noto", ("1.2.9", digest))
    return tmp_path


def test_the_three_files_of_a_set_are_unpacked_and_no_others(npm):
    fetch("noto", npm / "icons")
    there = {path.name for path in (npm / "icons").rglob("*")}
    assert there == {"noto", *FILES, "fetched.json"}
    assert json.loads((npm / "icons/noto/chars.json").read_text()) == {"name": "chars.json"}
    assert (npm / "asked").read_text().split()[-1] == "@iconify-json/noto@1.2.9"


def test_another_tarball_is_refused_and_nothing_is_left(npm, monkeypatch):
    monkeypatch.setitem(PACKAGES, "noto", ("1.2.9", "0" * 64))
    with pytest.raises(ValueError, match=r"has SHA-256 .*; run this again, or unpack icons.json"):
        fetch("noto", npm / "icons")
    assert not (npm / "icons").exists()


def test_a_failed_download_shows_what_npm_said(npm):
    (npm / "bin" / "npm").write_text("#!/bin/sh\necho no such package >&2\nexit 1\n")
    with pytest.raises(OSError, match=r"@iconify-json/noto@1\.2\.9 \(no such package\)") as caught:
        fetch("noto", npm / "icons")
    assert "run this again, or unpack icons.json" in str(caught.value)
    (npm / "bin" / "npm").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(OSError, match="npm says no more"):
        fetch("noto", npm / "icons")


def test_a_damaged_set_is_fetched_again(npm, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fetch_icons", "noto", "--folder", str(npm / "icons")])
    assert fetch_icons.main() == 0
    whole = (npm / "icons/noto/icons.json").read_text()
    for damage in (whole[:-3], "[]", ""):
        (npm / "icons/noto/icons.json").write_text(damage)
        assert fetch_icons.main() == 0
        assert (npm / "icons/noto/icons.json").read_text() == whole


def test_a_set_of_another_version_is_fetched_again_unless_it_was_put_there_by_hand(
    npm, monkeypatch, caplog
):
    monkeypatch.setattr("sys.argv", ["fetch_icons", "noto", "--folder", str(npm / "icons")])
    caplog.set_level("INFO")
    assert fetch_icons.main() == 0
    version, digest = PACKAGES["noto"]
    monkeypatch.setitem(PACKAGES, "noto", ("1.3.0", "0" * 64))
    assert fetch_icons.main() == 1 and "has SHA-256" in caplog.text  # it was fetched, and refused
    monkeypatch.setitem(PACKAGES, "noto", (version, digest))
    caplog.clear()
    (npm / "icons/noto/fetched.json").unlink()
    monkeypatch.setitem(PACKAGES, "noto", ("1.3.0", "0" * 64))
    assert fetch_icons.main() == 0 and "is there" in caplog.text


def test_without_npm_the_error_says_what_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="npm is not installed") as caught:
        fetch("twemoji", tmp_path)
    assert "@iconify-json/twemoji@1.2.5" in str(caught.value)
    assert str(tmp_path / "twemoji") in str(caught.value)


def test_an_unknown_set_is_refused_with_those_known(tmp_path):
    with pytest.raises(ValueError, match="known set; give some of noto, twemoji"):
        fetch("tuxmoji", tmp_path)


def test_sets_that_are_there_are_not_fetched_again(npm, monkeypatch, caplog):
    argv = ["fetch_icons", "noto", "--folder", str(npm / "icons")]
    monkeypatch.setattr("sys.argv", argv)
    caplog.set_level("INFO")
    assert fetch_icons.main() == 0
    (npm / "bin" / "npm").unlink()
    assert fetch_icons.main() == 0
    assert "noto is there" in caplog.text
    monkeypatch.setattr("sys.argv", ["fetch_icons", "twemoji", *argv[2:]])
    monkeypatch.setenv("PATH", "")
    assert fetch_icons.main() == 1
