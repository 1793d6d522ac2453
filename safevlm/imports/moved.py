"""Import paths of version 0.1, which work until 0.3 with a DeprecationWarning that names the new one.

``from runtimes.judge import Guard`` gives the very class of ``runtimes.guard.judge``. There is none for ``models``: it
is now ``safevlm``, and a package of that name is likely to be somebody else's.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

__all__ = ["MOVED", "accept_old_paths", "old_names"]

_FOLDERS = (
    ("runtimes", "runtimes.gate", "gate lane gate_command>open gate_request>request gate_result>result"),
    ("runtimes", "runtimes.guard", "activation bundle cuda fake_runner judge llamacpp_guard onnx_file"),
    ("runtimes", "runtimes.guard", "onnxruntime_runner openvino_runner policy random_weights runner select"),
    ("runtimes", "runtimes.guard", "tensorrt_runner torch_runner verdict"),
    ("runtimes", "runtimes.images", "tiling view_option views"),
    ("runtimes", "runtimes.language", "gguf_artifact head language llamacpp llamacpp_first_patch llamacpp_language"),
    ("runtimes", "runtimes.language", "llamacpp_session question torch_language writing"),
    ("runtimes", "benchmarks.judges", "chat_endpoint"),
    ("runtimes.gateway", "runtimes.gateway.chat", "asked chat_messages>messages chat_types>types misfits pass_keys"),
    ("runtimes.gateway", "runtimes.gateway.chat", "requests typed"),
    ("runtimes.gateway", "runtimes.gateway.images", "batching decoder decoding encoding image_urls judge judging"),
    ("runtimes.gateway", "runtimes.gateway.images", "remote"),
    ("runtimes.gateway", "runtimes.gateway.responses", "responses_answer>answer responses_api>api"),
    ("runtimes.gateway", "runtimes.gateway.responses", "responses_events>events responses_model>model"),
    ("runtimes.gateway", "runtimes.gateway.responses", "responses_request>request"),
    ("runtimes.gateway", "runtimes.gateway.serving", "clients config cors json_bounds logs metrics openapi server"),
    ("runtimes.gateway", "runtimes.gateway.serving", "serving streams threads"),
    ("runtimes.gateway", "runtimes.gateway.texts", "linked_images packed_images plain_text text_images"),
    ("runtimes.gateway", "runtimes.gateway.upstream", "embedded upstream upstream_errors>errors"),
    ("calibration", "calibration.distilling", "fidelity student teacher"),
    ("calibration", "calibration.labelled", "judged_images labels risk_control rows tables"),
    ("calibration", "calibration.sets", "conversations leakage mix pictures refusals same_picture samples"),
    ("calibration", "calibration.streaming", "batches sequential"),
    ("quantize", "quantize.bits", "auto_bits sensitivity"),
    ("quantize", "quantize.methods", "gptq_method grid hessian int8_method packing settings solver"),
    ("quantize", "quantize.streamed", "artifact compress drift estimate layers options record unfinished"),
    ("export", "export.guard", "batches bundle graph half_precision heads images int8 int8_file left_out options"),
    ("export", "export.guard", "parts"),
    ("export", "safevlm.contract", "parity"),
    ("export", "export.tensorrt", "engine tensorrt_builder>builder"),
    ("benchmarks", "benchmarks.comparison", "comparison>comparing findings guard_lines judge_lines lines margins"),
    ("benchmarks", "benchmarks.comparison", "measures pairing steps"),
    ("benchmarks", "benchmarks.runs", "answering importing journal record"),
    ("benchmarks.answering", "benchmarks.runs.answering", "answerer bundle gguf select server torch_model"),
    ("benchmarks.importing", "benchmarks.runs.importing", "command imported lines lmms_eval predictions"),
    ("benchmarks", "benchmarks.shapes", "random_guard random_vlm shapes"),
    ("benchmarks", "benchmarks.speed", "gate_speed>gate gate_ways gateway_servers gateway_soak"),
    ("benchmarks", "benchmarks.speed", "gateway_speed>gateway guard_engine guard_lineup guard_peers guard_source"),
    ("benchmarks", "benchmarks.speed", "guard_speed>guard isolation openvino_peer quantize_cases quantize_peers"),
    ("benchmarks", "benchmarks.speed", "quantize_speed>quantize speed>__main__ speed_report>report"),
    ("benchmarks", "benchmarks.speed", "speed_gate_sections>page speed_guard_section>page speed_page>page"),
    ("benchmarks", "benchmarks.speed", "speed_parts>page speed_plots>page speed_records>page speed_sections>page"),
    ("benchmarks", "benchmarks.tiny", "tiny>__main__"),
)
"""From which package to which, and the modules; ``old>new`` where a name changed, too."""
_SPLIT = {
    "benchmarks.comparison": ("benchmarks.comparison.measured",),
    "benchmarks.guard_peers": ("benchmarks.speed.peer",),
    "benchmarks.guard_source": ("benchmarks.speed.reference_runner",),
    "runtimes.chat_endpoint": ("safevlm.terminal.api_key",),
    "runtimes.gate_command": ("runtimes.gate.__main__",),
    "runtimes.views": ("runtimes.gate.judged_views",),
}
"""Where the rest of a module went that became several."""


def _moved() -> Iterator[tuple[str, tuple[str, ...]]]:
    for before, after, modules in _FOLDERS:
        for module in modules.split():
            old, _, new = module.partition(">")
            path = f"{before}.{old}"
            yield path, (f"{after}.{new or old}", *_SPLIT.get(path, ()))


MOVED: Mapping[str, tuple[str, ...]] = MappingProxyType(dict(_moved()))
"""Each module of 0.1 that stands elsewhere: where what it held is now, most of it in the first."""


def accept_old_paths(root: Path) -> None:
    """Let this process import our modules by their paths of 0.1; ``root`` is the folder of our packages."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, _OldPaths(root))


def old_names(package: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package that was a module in 0.1: what it held, with a warning."""

    def find(name: str) -> Any:
        is_module = find_spec(f"{package}.{name}") is not None
        if is_module or name.startswith("__"):
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        home, found = _find(package, name)
        _warn(f"{package}.{name}", f"{home}.{name}", level=3)
        return found

    return find


class _OldPaths(Loader):
    """The finder, and the loader of what it finds: modules that hand on what the new ones hold."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def find_spec(
        self, name: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in MOVED or _is_package_now(name) or not self._is_ours(name.partition(".")[0]):
            return None
        _warn(name, " and ".join(MOVED[name]), level=3)
        return ModuleSpec(name, self, is_package=any(old.startswith(f"{name}.") for old in MOVED))

    def create_module(self, spec: ModuleSpec) -> None:
        """Take an ordinary empty module."""

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = lambda name: _find(module.__name__, name)[1]

    def _is_ours(self, package: str) -> bool:
        file = getattr(sys.modules.get(package), "__file__", None)
        return file is not None and Path(file).resolve().parents[1] == self.root


def _is_package_now(old: str) -> bool:
    return MOVED[old][0].startswith(f"{old}.")


def _find(old: str, name: str) -> tuple[str, Any]:
    """Return where a name of an old module is now, and what it is."""
    for home in MOVED[old]:
        module = import_module(home)
        if hasattr(module, name):
            return home, getattr(module, name)
    raise AttributeError(f"module '{old}' has no attribute '{name}', and neither has {' or '.join(MOVED[old])}")


def _warn(old: str, new: str, *, level: int) -> None:
    message = f"{old} is now {new}; the old path goes with version 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=level)
