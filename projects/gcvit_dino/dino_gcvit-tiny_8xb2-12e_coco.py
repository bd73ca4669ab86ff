# DINO, four scales, on GCViT-tiny: the xxtiny config with more blocks; the channels are the same.
_base_ = "../../configs/gcvit/dino_gcvit-xxtiny_8xb2-12e_coco.py"

model = dict(backbone=dict(variant="tiny"))
