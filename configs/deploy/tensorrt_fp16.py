"""TensorRT, half precision."""

_base_ = "tensorrt_fp32.py"

backend_config = dict(common_config=dict(fp16_mode=True))
