"""Files are whole or not there: values, permissions, links, failures and kills."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

from attnctrl import files


def test_bytes_and_text_arrive_unchanged(tmp_path):
    assert files.write_bytes(tmp_path / "deep" / "er" / "a.bin", b"\0\r\n\xff").read_bytes() == b"\0\r\n\xff"
    assert files.write_text(tmp_path / "a.txt", "línea\r\nzwei\n").read_bytes() == "línea\r\nzwei\n".encode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "deep"]


def test_png_keeps_pixels_and_text_and_is_reproducible(tmp_path):
    image = Image.new("RGB", (3, 2), (10, 20, 30))
    image.putpixel((2, 1), (200, 100, 0))
    path = files.write_png(tmp_path / "a.png", image, {"key": "värde ✓", "long": "x" * 100_000})
    with Image.open(path) as again:
        assert again.size == (3, 2)
        assert again.convert("RGB").getpixel((2, 1)) == (200, 100, 0)
        assert again.info["key"] == "värde ✓"
        assert again.info["long"] == "x" * 100_000
    assert path.stat().st_size < 10_000  # text is compressed
    assert files.png_bytes(image, {"key": "v"}) == files.png_bytes(image.copy(), {"key": "v"})


def test_an_existing_file_keeps_its_permissions_and_a_new_one_follows_the_umask(tmp_path):
    old = tmp_path / "old"
    old.write_text("x")
    old.chmod(0o640)
    files.write_text(old, "y")
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        new = files.write_text(tmp_path / "new", "z")
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    target = tmp_path / "real" / "a.txt"
    target.parent.mkdir()
    target.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    files.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a signal that cannot be caught")
@pytest.mark.parametrize("existed", [True, False])
def test_a_kill_in_the_middle_of_writing_leaves_the_target_alone(tmp_path, existed):
    path = tmp_path / "a.txt"
    if existed:
        path.write_text("old")
    # The process dies when half of the bytes are on disk.
    script = f"""
        import os, signal
        from attnctrl import files
        def half(path, data):
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        files.Path.write_bytes = half
        files.write_bytes({str(path)!r}, b"n" * 100_000)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.exists() == existed
    assert not existed or path.read_text() == "old"
    left = [entry for entry in tmp_path.iterdir() if entry.name != "a.txt"]
    assert [entry.stat().st_size for entry in left] == [50_000]  # it was killed while writing, under another name
    assert all(entry.suffix == ".part" for entry in left)


def test_two_writers_do_not_share_a_temporary_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(files.os, "replace", lambda source, _: seen.append(source.name) or source.unlink())
    files.write_text(tmp_path / "a", "1")
    files.write_text(tmp_path / "a", "2")
    assert len(set(seen)) == 2
