"""KITTI folders to sharded COCO JSON."""
