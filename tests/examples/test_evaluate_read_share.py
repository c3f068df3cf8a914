# SPDX-License-Identifier: Apache-2.0
import json

import evaluate_read_share
import pytest
from evaluate_read_share import ORDER, SHARES
from test_evaluate_pruning import Here


def test_the_tiny_model_with_shares(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_read_share, "ProcessPoolExecutor", Here)
    evaluate_read_share.main(["--frames", "160", "--samples", "1", "--output", str(tmp_path)])
    rows = json.loads((tmp_path / "read_share.json").read_text())["rows"]
    assert {(row["kind"], row["share"]) for row in rows} == {(kind, share) for kind in ORDER for share in SHARES}
    assert all(row["right"] == row["questions"] == 1 for row in rows if row["kind"] in ("needle", "order"))
    exact = [row for row in rows if row["kind"] in ("exact", "at once") and row["share"] == 1]
    assert len(exact) == 2 and all(row["right"] == row["questions"] > 2 for row in exact)
    table = (tmp_path / "read_share.md").read_text()
    assert "| needle | 160 | 100 | 100 | 100 | 100 | 100 |" in table and table in capsys.readouterr().out
    assert (tmp_path / "read_share.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_kinds_are_refused():
    with pytest.raises(SystemExit, match="There are no colours among needle, order, exact"):
        evaluate_read_share.main(["--kinds", "needle,colours"])
