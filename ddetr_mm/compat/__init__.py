"""Compatibility with the installed torch, mmengine, mmcv and mmdet.

- :mod:`~ddetr_mm.compat.versions`: checks on import that their versions fit.
- :mod:`~ddetr_mm.compat.mmcv_ops`: an import hook that provides ``mmcv._ext`` where mmcv has no compiled ops.
- :mod:`~ddetr_mm.compat.torch_ops`: the ops of that module, in PyTorch and torchvision.
- :mod:`~ddetr_mm.compat.patches`: changes to mmengine and torch at run time, each applied by name.
- :mod:`~ddetr_mm.compat.install_ops`: ``ddetr-mm install-ops``, which installs mmcv with its compiled ops.
"""
