from __future__ import annotations

import pytest

from ddetr_mm.runtime.curve_record import CurveRecord, read_points


def test_points_read_back(tmp_path):
    record = CurveRecord(tmp_path / "deep" / "curves.jsonl")
    record.add_train(10, 0.5, {"loss": 2.0, "loss_cls": float("nan")}, {"0.1": 0.1})
    record.add_val(20, 1, {"coco/bbox_mAP": 0.25})
    assert (
        read_points(record.path)
        == record.points
        == [
            {
                "kind": "train",
                "step": 10,
                "epoch": 0.5,
                "losses": {"loss": 2.0, "loss_cls": None},
                "learning_rates": {"0.1": 0.1},
            },
            {"kind": "val", "step": 20, "epoch": 1, "metrics": {"coco/bbox_mAP": 0.25}},
        ]
    )


def test_resuming_keeps_what_was_not_lost(tmp_path):
    path = tmp_path / "curves.jsonl"
    first = CurveRecord(path)
    for step in (10, 20, 30):
        first.add_train(step, 0, {"loss": step}, {})
    second = CurveRecord(path, resumed_step=20)
    second.add_train(30, 0, {"loss": 99}, {})
    assert [(point["step"], point["losses"]["loss"]) for point in read_points(path)] == [
        (10, 10),
        (20, 20),
        (30, 99),
    ]


def test_a_new_run_starts_anew(tmp_path):
    path = tmp_path / "curves.jsonl"
    CurveRecord(path).add_val(10, 1, {})
    CurveRecord(path)
    assert read_points(path) == []
    assert read_points(tmp_path / "missing.jsonl") == []


def test_a_cut_off_line_is_left_out_and_a_broken_one_told(tmp_path):
    path = tmp_path / "curves.jsonl"
    CurveRecord(path).add_val(10, 1, {})
    with path.open("a") as file:
        file.write('{"kind": "val", "st')
    assert len(CurveRecord(path, resumed_step=10).points) == 1
    assert path.read_text().endswith("}\n")
    path.write_text('{"kind\n{}\n')
    with pytest.raises(ValueError, match="Unterminated"):
        read_points(path)
