"""ONNX Runtime, any batch."""

_base_ = "_base_/any_batch.py"

backend_config = dict(type="onnxruntime")
