# Twin of configs/specs/deformable-detr-refine_r50_8xb4-50e_coco.yaml: every decoder layer refines the boxes
# of the layer before it.
_base_ = "./deformable-detr_r50_8xb4-50e_coco.py"

model = dict(with_box_refine=True)
