"""COCO evaluation: the twelve metrics, the mmdet metric that computes them, and the report."""
