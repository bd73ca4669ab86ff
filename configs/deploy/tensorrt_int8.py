"""TensorRT, 8-bit integers, calibrated by mmdeploy; what has no 8-bit form runs in half precision."""

_base_ = "tensorrt_fp16.py"

backend_config = dict(common_config=dict(int8_mode=True))
calib_config = dict(create_calib=True, calib_file="calib_data.h5")
