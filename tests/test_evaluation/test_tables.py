from __future__ import annotations

from ddetr_mm.evaluation.coco_eval import METRIC_NAMES, evaluate_boxes
from ddetr_mm.evaluation.columns import DetectionColumns, GroundTruthColumns
from ddetr_mm.evaluation.tables import class_table, source_table


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_class_table_shows_every_class_and_the_total():
    names = {1: "car", 2: "a very long name of a class that no terminal would hold " * 2, 7: "[bold]person"}
    truth = GroundTruthColumns(
        [1], [1, 1], [[0, 0, 50, 50], [60, 60, 9, 9]], [1, 7], [0, 0], [2500, 81], names
    )
    found = DetectionColumns([1, 1], [[0, 0, 50, 50], [200, 200, 5, 5]], [0.9, 0.8], [1, 7])
    lines = class_table(evaluate_boxes(truth, found)).splitlines()
    body = [cells(line) for line in lines if line.startswith("| ")]
    assert body[0] == ["id", "class", "boxes", "found", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR"]
    assert body[1] == ["1", "car", "1", "1", "1.000", "1.000", "1.000", "-", "1.000", "-", "1.000"]
    assert body[2][1:4] == [names[2].strip(), "0", "0"]
    assert body[3][1:6] == ["[bold]person", "1", "1", "0.000", "0.000"]
    assert body[4][1:5] == ["all", "2", "2", "0.500"]
    assert len({len(line) for line in lines}) == 1


def test_source_table_has_the_twelve_figures(make_scene):
    text = source_table({"0: val/*.json": evaluate_boxes(*make_scene(0))})
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["source", "images", *METRIC_NAMES]
    assert rows[1][:2] == ["0: val/*.json", "12"]
