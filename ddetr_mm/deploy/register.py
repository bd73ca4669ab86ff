"""Import for its side effect: registers the detectors that run exported graphs with mmdet."""

import ddetr_mm.deploy.exported_detector
import ddetr_mm.deploy.tensorrt_detector  # noqa: F401 - imported for registration
