"""Trained detectors leaving PyTorch: ONNX graphs and the proof that they compute the same."""
