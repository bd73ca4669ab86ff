"""Data sets in COCO format: reading, checking, sampling, transforming."""
