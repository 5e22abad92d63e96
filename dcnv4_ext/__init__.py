"""DCNv4, the deformable convolution without softmax, compiled for CPU and CUDA.

`dcnv4` is the operator, `DCNv4` the module with the official parameter names, `DCNv4Conv` a drop-in for `torch.nn.Conv2d`,
`dcnv4_reference` the plain-torch twin that tests hold them to. `python -m dcnv4_ext` tells what is built.
"""

from importlib import import_module

from .functional import dcnv4
from .module import DCNv4, DCNv4Conv
from .reference import dcnv4_reference

__version__ = "0.1.0"
__all__ = ["DCNv4", "DCNv4Conv", "dcnv4", "dcnv4_reference"]


def __getattr__(name: str):
    if name == "onnx":  # loaded when it is asked for
        return import_module(".onnx", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
