"""Run in vLLM's environment once its packages are there: let torchvision be imported beside a torch for CPUs.

PyPI's torchvision is compiled against a torch for CUDA, so its operators do not load here; it gets
along without them, but for two whose shapes it registers whether they are there or not. They are declared here, and
never run: vLLM needs the transforms, which are torch alone.
"""

from importlib.util import find_spec
from pathlib import Path

DECLARED = """

if not _has_ops():
    _DECLARED = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _DECLARED.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

found = find_spec("torchvision")
assert found is not None and found.origin is not None, "torchvision is not installed"
extension = Path(found.origin).with_name("extension.py")
text = extension.read_text(encoding="utf-8")
if DECLARED not in text:
    extension.write_text(text + DECLARED, encoding="utf-8")
