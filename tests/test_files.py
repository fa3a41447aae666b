"""Files are written whole or not at all, and a disk that refuses is one clear error."""

import shutil

import pytest
from safetensors import SafetensorError

from ijepa_hf.files import SaveError, free_bytes, read_json, saving, write_atomically, write_json_atomically


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(partial):
        partial.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    write_atomically(path, lambda partial: partial.write_text("new"))
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_error_that_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(SafetensorError, match="no tensor of mine"), saving(tmp_path, 1):
        raise SafetensorError("no tensor of mine")
    with pytest.raises(SaveError, match="could not be written: something else"), saving(tmp_path, 1):
        raise OSError("something else")  # an OSError without a number
    with pytest.raises(SaveError, match="^once$"), saving(tmp_path, 1):
        raise SaveError("once")


def test_free_space_is_that_of_the_nearest_folder_that_exists_or_unknown(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or shutil._ntuple_diskusage(9, 4, 5))
    assert free_bytes(tmp_path / "a" / "b") == 5
    assert asked == [tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 0))
    assert free_bytes(tmp_path) is None
    with saving(tmp_path, 10**15):  # a file system that does not say is not refused
        pass


def test_json_comes_back_as_it_was_and_what_is_no_object_is_named(tmp_path):
    path = tmp_path / "record.json"
    assert read_json(path) is None
    write_json_atomically(path, {"name": "é", "values": [1, 2.5, None]})
    assert path.read_bytes().endswith(b"}\n")
    assert read_json(path) == {"name": "é", "values": [1, 2.5, None]}
    for content, message in ((b'{"half', "is damaged"), (b"\xff", "is damaged"), (b"[]", "holds no JSON object")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_json(path)
