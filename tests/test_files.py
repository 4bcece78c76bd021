"""A file that is written is whole or as it was, and nothing lies beside it; what the disk refuses is one line."""

import errno
import os
import resource
from pathlib import Path

import pytest
from safetensors import SafetensorError

from lnfree_interp import files
from lnfree_interp.files import as_value_error, replace_file
from lnfree_interp.finetune.saving import write_json
from lnfree_interp.schedule import RemovalSchedule

LONG = "x" * 50_000


@pytest.fixture
def file(tmp_path):
    """One that is there, alone in its directory."""
    (tmp_path / "there").mkdir()
    path = tmp_path / "there" / "file.txt"
    path.write_text("before")
    return path


def long_text(path):
    path.write_text(LONG)


def test_a_file_is_replaced_and_nothing_lies_beside_it(file):
    seen = []

    def write(beside):
        beside.write_text("after")
        seen.append((beside.parent == file.parent, file.read_text()))

    replace_file(str(file), write)
    assert seen == [(True, "before")], "written beside, while what was there stays"
    assert file.read_text() == "after" and list(file.parent.iterdir()) == [file]


def check_kept(file, message, write=long_text):
    with pytest.raises(ValueError) as error:
        replace_file(file, write)
    assert str(error.value) == f"cannot write {file}: {message}"
    assert file.read_text() == "before" and list(file.parent.iterdir()) == [file]


def test_on_a_full_disk_what_was_there_stays(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        check_kept(file, "File too large")
        schedule = file.with_name("schedule.json")
        for write in (RemovalSchedule.preset("small").to_json, lambda path: write_json(path, LONG)):
            replace_file(schedule, lambda beside: beside.write_text("{}"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
            with pytest.raises(ValueError, match=r"^cannot write .*schedule\.json: File too large$"):
                write(schedule)
            assert schedule.read_text() == "{}" and len(list(file.parent.iterdir())) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("when", ["open", "replace"])
def test_on_a_read_only_disk_what_was_there_stays(file, monkeypatch, when):
    """Which root cannot have without a mount of its own."""

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(*((Path, "write_text") if when == "open" else (files.os, "replace")), refuse)
    check_kept(file, "Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_in_a_directory_of_others_what_was_there_stays(file):
    file.parent.chmod(0o500)
    try:
        check_kept(file, "Permission denied")
    finally:
        file.parent.chmod(0o700)


def test_whatever_ends_the_writing_leaves_nothing_beside(file):
    def half(error):
        def write(beside):
            beside.write_text("half")
            raise error

        return write

    check_kept(file, "I/O error: no room", half(SafetensorError("I/O error: no room\nand more")))
    for error in (KeyboardInterrupt(), TypeError("no text")):
        with pytest.raises(type(error)):
            replace_file(file, half(error))
        assert file.read_text() == "before" and list(file.parent.iterdir()) == [file]


def test_places_that_are_none(file, tmp_path):
    (tmp_path / "directory").mkdir()
    for path, message in (
        (tmp_path / "absent" / "file", "No such file or directory"),
        (file / "file", "Not a directory"),
        (tmp_path / "directory", "Is a directory"),
        (tmp_path / ("long" * 100), "File name too long"),
    ):
        with pytest.raises(ValueError) as error:
            replace_file(path, long_text)
        assert str(error.value) == f"cannot write {path}: {message}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["directory", "there"]
    with pytest.raises(ValueError, match=r"^cannot read it: no reason of two lines$"), as_value_error("read it"):
        raise OSError("no reason of two lines\nbut the first")
