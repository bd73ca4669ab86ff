"""Scores of detections by COCO's rules: pure functions, and the metric that mmdet runs them by."""
