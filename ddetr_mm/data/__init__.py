"""Images and annotations: reading COCO JSON, datasets, transforms and conversion."""
