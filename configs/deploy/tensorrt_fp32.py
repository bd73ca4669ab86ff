"""TensorRT, single precision."""

_base_ = "_base_/any_batch.py"

# nvidia: TensorRT's own plugin; mmdeploy: mmdeploy's library; standard: GridSample (TensorRT >= 8.5).
codebase_config = dict(attention="nvidia")
# The largest batch and the memory (bytes) of a tactic; the sizes are put in by tools/deploy.py.
backend_config = dict(
    type="tensorrt",
    common_config=dict(max_workspace_size=1 << 30),
    model_inputs=[
        dict(input_shapes=dict(input=dict(min_shape=None, opt_shape=None, max_shape=None, max_batch=4)))
    ],
)
