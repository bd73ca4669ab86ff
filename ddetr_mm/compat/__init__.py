"""Living with several versions of torch, mmengine, mmcv and mmdet."""
