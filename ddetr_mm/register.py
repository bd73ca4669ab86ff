"""The only import for its side effect: registers every class of this package with mmdet.

In an mmengine config: ``custom_imports = dict(imports=['ddetr_mm.register'])``.
"""

import ddetr_mm.models  # noqa: F401
