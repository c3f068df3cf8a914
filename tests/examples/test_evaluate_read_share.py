# SPDX-License-Identifier: Apache-2.0
import json

import evaluate_read_share
import pytest
from evaluate_read_share import COLUMNS, ORDER
from test_evaluate_pruning import Here


def test_the_tiny_model_with_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_read_share, "ProcessPoolExecutor", Here)
    evaluate_read_share.main(["--frames", "160", "--samples", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "read_share.json").read_text())["rows"]
    assert {(row["kind"], row["read"]) for row in rows} == {(kind, name) for kind in ORDER for name in COLUMNS}
    assert all(row["right"] == row["questions"] for row in rows if row["read"].endswith("%"))
    assert any(row["right"] < row["questions"] for row in rows if row["read"] == "2 steps")
    table = (tmp_path / "read_share.md").read_text()
    assert "| needle | 160 | 100 | 100 | 100 | 100 | 100 |" in table and table in capsys.readouterr().out
    assert (tmp_path / "read_share.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_kinds_are_refused():
    with pytest.raises(SystemExit, match="There are no colours among needle, order, exact"):
        evaluate_read_share.main(["--kinds", "needle,colours"])
