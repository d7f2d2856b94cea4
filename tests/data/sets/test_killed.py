"""A preparation that is killed with SIGKILL at any moment and repeated gives the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.data.sets import server
from tests.data.sets.published import image, rows, tarred, zipped

POINTS = int(os.environ.get("VISPER_KILL_POINTS", "16"))
"""How many of the several hundred points are tried; docs/data.md reports a run of them all."""


@pytest.mark.slow
def test_killed_anywhere_and_repeated_the_bytes_are_the_same(tmp_path):
    with server.serving() as shelf:
        first = {"a/1.jpg": image(1), "a/2.jpg": image(2, "GIF", "P"), "a/3.jpg": image(3)}
        inner = zipped({"m/1.png": image(5, "PNG"), "m/2.png": image(6, "PNG")})
        named = rows("one/1.jpg", "one/2.jpg", None, "two/t.jpg", "two/none.jpg", "three/1.png")
        downloads = [
            {"file": "rows.json", "sources": [{"url": shelf.put("/rows.json", named)}]},
            {"file": "one.zip",
             "sources": [{"url": shelf.address + "/gone"}, {"url": shelf.put("/one.zip", zipped(first))}],
             "unpack": [{"inside": "a", "to": "one"}]},
            {"file": "two.tar", "sources": [{"url": shelf.put("/two.tar", tarred({"t.jpg": image(4)}))}],
             "unpack": [{"to": "two"}]},
            {"file": "three.zip", "sources": [{"url": shelf.put("/3.zip", zipped({"n.json": b"{}", "m.zip": inner}))}],
             "unpack": [{"to": "notes", "only": ["n.json"]}, {"inner": "m.zip", "inside": "m", "to": "three"}]},
        ]  # fmt: skip
        described = {"name": "k", "title": "t", "use": "u", "license": "l", "rows": [{"json": "rows.json"}]}
        (tmp_path / "k.yaml").write_text(yaml.safe_dump({**described, "downloads": downloads}))
        command = [
            sys.executable,
            "-m",
            "tests.data.sets.killed",
            str(tmp_path / "k.yaml"),
            str(tmp_path / "roots"),
            str(POINTS),
        ]
        (tmp_path / "roots").mkdir()
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["differing"] == [] and result["killed"] > 0.8 * result["points"] and result["files"] > 10, result
    print(result)
