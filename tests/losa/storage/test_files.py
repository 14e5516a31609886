"""Files are whole or absent."""

from __future__ import annotations

import errno
import json
import os

import pytest

from losa.errors import OutputError
from losa.storage.files import write_json


def test_write_json_is_whole_or_absent(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": [1, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}

    def fails(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OutputError, match=r"a\.json: No space left"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
    assert os.listdir(tmp_path) == ["a.json"]
