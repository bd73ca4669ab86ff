"""ONNX Runtime, one image at a time."""

_base_ = "_base_/one_image.py"

backend_config = dict(type="onnxruntime")
