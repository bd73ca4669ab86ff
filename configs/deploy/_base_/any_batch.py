"""The same with a dynamic batch; height and width stay fixed in the graph."""

_base_ = "one_image.py"

onnx_config = dict(dynamic_axes={"input": {0: "batch"}, "dets": {0: "batch"}, "labels": {0: "batch"}})
