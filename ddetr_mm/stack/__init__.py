"""What we need of torch and OpenMMLab's packages, and what we mend in them at run time.

- :mod:`~ddetr_mm.stack.versions`: do the installed versions fit?
- :mod:`~ddetr_mm.stack.mmcv_ops`: the import hook that answers for ``mmcv._ext`` where it is missing;
  :mod:`~ddetr_mm.stack.stand_in` holds the ops it answers with.
- :mod:`~ddetr_mm.stack.build_ops`: full mmcv with its compiled ops into an environment.
- :mod:`~ddetr_mm.stack.safe_globals`: classes that checkpoints may hold and still load safely.
- :mod:`~ddetr_mm.stack.mends`: small mends of mmengine at run time.
"""
