"""Class columns by position and by category id."""

import json

import pytest
import torch
from weights_builders import detector, small_canonical, write_mmdet

from ddetr_mm.errors import WeightsError
from ddetr_mm.weights import (
    convert_checkpoint,
    full_class_names,
    inspect_checkpoint,
    load_for_model,
    names_by_category_id,
    numbered_by_position,
    read_checkpoint,
    to_category_ids,
)
from ddetr_mm.weights.class_columns import NEVER_LOGIT, coco_column_names, head_columns
from ddetr_mm.weights.formats import TAO, from_canonical

WEIGHT, BIAS = "bbox_head.cls_branches.1.weight", "bbox_head.cls_branches.1.bias"


@pytest.fixture
def zoo(tmp_path):
    """Four classes by position, named as in mmdet's model zoo."""
    names = ("cat", "dog", "traffic light", "cow")
    return write_mmdet(tmp_path / "zoo.pth", small_canonical(), dataset_meta={"classes": names})


def test_columns_go_to_the_ids_of_their_names(zoo):
    before = read_checkpoint(zoo)
    names = ("background", "dog", "unknown", "Traffic_Light", "horse", "cat")
    moved = to_category_ids(before, 6, names)
    for key in (WEIGHT, BIAS):
        assert torch.equal(moved.state_dict[key][[1, 3, 5]], before.state_dict[key][[1, 2, 0]])
    # Background, gap and the class that the file does not know can never win.
    assert not moved.state_dict[WEIGHT][[0, 2, 4]].any()
    assert (moved.state_dict[BIAS][[0, 2, 4]] == NEVER_LOGIT).all()
    assert moved.state_dict["level_embed"] is before.state_dict["level_embed"]
    assert before.state_dict[WEIGHT].shape[0] == 4 and before.meta.label_mode == "contiguous"
    assert (moved.meta.label_mode, moved.meta.class_names) == ("category_id", names)
    assert moved.meta.category_ids == (None, 1, None, 3, 4, 5)
    assert "3 are moved" in moved.notes[-1]
    assert "1 unknown to the file and never predicted (horse)" in moved.notes[-1]
    assert "1 not needed (cow)" in moved.notes[-1]


def test_without_the_data_s_names_positions_are_counted_from_one(zoo):
    before = read_checkpoint(zoo)
    moved = to_category_ids(before, 7)
    assert moved.meta.class_names == (
        *("background", "cat", "dog", "traffic light", "cow"),
        *("unknown", "unknown"),
    )
    assert torch.equal(moved.state_dict[WEIGHT][1:5], before.state_dict[WEIGHT])
    assert (moved.state_dict[BIAS][[0, 5, 6]] == NEVER_LOGIT).all()


def test_too_few_columns_say_how_many_it_takes(zoo):
    with pytest.raises(WeightsError, match=r"zoo\.pth: dataset\.num_classes.*got 4.*allowed: 5 or more"):
        to_category_ids(read_checkpoint(zoo), 4)


def test_classes_of_other_data_are_refused(zoo):
    with pytest.raises(WeightsError, match=r"none of the data's classes.*cat, dog"):
        to_category_ids(read_checkpoint(zoo), 3, ("background", "ship", "plane"))


def test_the_file_s_own_category_ids_are_used(tmp_path):
    dataset = {"classes": ("a", "b", "c", "d"), "category_ids": [7, 2, 3, 9]}
    path = write_mmdet(tmp_path / "x.pth", small_canonical(), dataset_meta=dataset)
    names = names_by_category_id(inspect_checkpoint(path).meta, 10)
    assert [names[column] for column in (0, 7, 2, 3, 9)] == ["background", "a", "b", "c", "d"]
    assert set(names) == {"background", "unknown", "a", "b", "c", "d"}


def test_coco_s_eighty_classes_get_coco_s_ids(tmp_path):
    by_id = coco_column_names()
    names = tuple(name for name in by_id if name not in ("background", "unknown"))
    canonical = small_canonical(num_classes=80)
    path = write_mmdet(tmp_path / "zoo.pth", canonical, dataset_meta={"classes": names})
    assert names_by_category_id(inspect_checkpoint(path).meta, 91) == by_id
    moved = to_category_ids(read_checkpoint(path), 91)
    assert torch.equal(moved.state_dict[WEIGHT][90], canonical[WEIGHT][79])  # toothbrush
    assert torch.equal(moved.state_dict[WEIGHT][13], canonical[WEIGHT][11])  # stop sign, after a gap
    # In a smaller head the ids are counted from 1.
    assert names_by_category_id(inspect_checkpoint(path).meta, 81)[12] == "stop sign"


def test_category_ids_and_unknown_conventions_stay_as_they_are(tmp_path):
    tensors, _ = from_canonical(small_canonical(), TAO, with_box_refine=True, two_stage=False)
    torch.save({"state_dict": tensors}, tmp_path / "tao.pth")
    bare = write_mmdet(tmp_path / "bare.pth", small_canonical())
    for path in (tmp_path / "tao.pth", bare):
        checkpoint = read_checkpoint(path)
        assert not numbered_by_position(checkpoint.meta)
        assert to_category_ids(checkpoint, 4, ("background", "a", "b", "c")) is checkpoint
        assert names_by_category_id(checkpoint.meta, 4) is None


SHAPES = {"classes": ("background", "triangle", "star", "circle"), "category_ids": [None, 1, 2, 3]}


@pytest.fixture
def shapes(tmp_path):
    """Three classes by category id."""
    return read_checkpoint(write_mmdet(tmp_path / "shapes.pth", small_canonical(), dataset_meta=SHAPES))


def test_columns_follow_data_that_number_the_same_names_differently(shapes):
    names = ("background", "circle", "unknown", "triangle", "star")
    moved = to_category_ids(shapes, 5, names)
    for key in (WEIGHT, BIAS):
        assert torch.equal(moved.state_dict[key][[0, 1, 3, 4]], shapes.state_dict[key][[0, 3, 1, 2]])
    assert moved.state_dict[BIAS][2] == NEVER_LOGIT
    assert moved.meta.class_names == names and moved.meta.category_ids == (None, 1, None, 3, 4)
    assert "number the same classes differently: 3 are moved by name" in moved.notes[-1]
    assert "circle 3->1" in moved.notes[-1]


def test_columns_stay_where_data_and_file_agree(shapes):
    assert to_category_ids(shapes, 4, SHAPES["classes"]).state_dict is shapes.state_dict
    found = to_category_ids(shapes, 4, ("background", "triangle", "unknown", "unknown"))
    assert found.state_dict is shapes.state_dict
    assert "2 classes of the file are not in the data (star, circle)" in found.notes[-1]


def test_a_class_that_the_file_lacks_is_noted_and_never_predicted(shapes):
    found = to_category_ids(shapes, 5, ("background", "triangle", "star", "circle", "square"))
    assert torch.equal(found.state_dict[WEIGHT][:4], shapes.state_dict[WEIGHT])
    assert found.state_dict[BIAS][4] == NEVER_LOGIT
    assert "1 unknown to the file and never predicted (square)" in found.notes[-1]
    # Another class in the column of one of the file's.
    found = to_category_ids(shapes, 4, ("background", "triangle", "square", "circle"))
    assert found.state_dict[BIAS][2] == NEVER_LOGIT
    assert torch.equal(found.state_dict[BIAS][[1, 3]], shapes.state_dict[BIAS][[1, 3]])


def test_data_without_any_class_of_the_file_are_refused(shapes):
    with pytest.raises(WeightsError, match="none of the data's classes.*triangle, star.*allowed: ship"):
        to_category_ids(shapes, 4, ("background", "ship", "plane", "car"))


def test_a_class_may_be_called_unknown(tmp_path):
    dataset = {"classes": ("background", "unknown", "a", "b"), "category_ids": [None, 1, 2, 3]}
    file = read_checkpoint(write_mmdet(tmp_path / "x.pth", small_canonical(), dataset_meta=dataset))
    moved = to_category_ids(file, 4, (None, "a", "b", "unknown"))
    assert torch.equal(moved.state_dict[WEIGHT][1:], file.state_dict[WEIGHT][[2, 3, 1]])


def test_head_columns_of_an_exported_graph():
    theirs = (None, "a", "b", "c")
    assert head_columns(theirs, (None, "a", "b", None), path="x.onnx")[0] is None
    columns, note = head_columns(theirs, (None, "c", "d", "a"), path="x.onnx")
    assert columns == [0, 3, None, 1]
    assert "2 are moved by name" in note and "(d)" in note
    with pytest.raises(WeightsError, match="none of the data's classes"):
        head_columns(theirs, (None, "x"), path="x.onnx")


def test_positions_without_names_are_not_taken_for_category_ids(tmp_path):
    """A file of as many columns as the model, whose first is a class where the model has the background."""
    head = dict(type="TAODeformableDETRHead", background_column=True)
    source = detector(backbone="resnet_18", seed=1).state_dict()
    path = write_mmdet(tmp_path / "x.pth", source)
    convert_checkpoint(path, tmp_path / "hf", "hf")
    config = tmp_path / "hf" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "ddetr_mm": None}))
    model = detector(kind="TAODeformableDETR", backbone="resnet_18", bbox_head_options=head, seed=2)
    before = model.state_dict()["bbox_head.cls_branches.0.weight"].clone()
    report = load_for_model(model, tmp_path / "hf")
    assert torch.equal(model.state_dict()["bbox_head.cls_branches.0.weight"], before)
    assert torch.equal(model.state_dict()["level_embed"], source["level_embed"])
    assert any("numbers its classes by position" in note for note in report.notes)


def test_class_names_are_filled_up_and_never_too_many():
    assert full_class_names(None, 3) == ["background", "unknown", "unknown"]
    assert full_class_names(("background", "cat"), 3) == ["background", "cat", "unknown"]
    with pytest.raises(WeightsError, match="class list and the checkpoint disagree"):
        full_class_names(("a", "b", "c"), 2)
