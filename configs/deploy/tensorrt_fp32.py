"""TensorRT, single precision."""

onnx_config = dict(
    type="onnx",
    export_params=True,
    keep_initializers_as_inputs=False,
    opset_version=17,
    save_file="end2end.onnx",
    input_names=["input"],
    output_names=["dets", "labels"],
    # (width, height); None: the size in the model config's Resize.
    input_shape=None,
    # The batch only: height and width are fixed in the graph.
    dynamic_axes={"input": {0: "batch"}, "dets": {0: "batch"}, "labels": {0: "batch"}},
)
codebase_config = dict(
    type="mmdet",
    task="ObjectDetection",
    model_type="end2end",
    module=["ddetr_mm.deploy.mmdeploy_rewriters"],
    # nvidia: TensorRT's own plugin; mmdeploy: mmdeploy's library; standard: GridSample (TensorRT >= 8.5).
    attention="nvidia",
)
# The largest batch and the memory (bytes) of a tactic; the sizes are put in by tools/deploy.py.
backend_config = dict(
    type="tensorrt",
    common_config=dict(max_workspace_size=1 << 30),
    model_inputs=[
        dict(input_shapes=dict(input=dict(min_shape=None, opt_shape=None, max_shape=None, max_batch=4)))
    ],
)
