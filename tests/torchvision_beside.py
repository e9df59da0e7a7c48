"""A plugin of pytest: lets PyPI's torchvision, which is made for CUDA, be imported beside a torch for CPUs.

It lacks its own operators then, which neither image processors nor models of timm and open_clip call.
"""

import torch


try:
    import torchvision  # noqa: F401
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
