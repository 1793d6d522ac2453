"""Check, in vLLM's environment, what a server with the guard would stand on: ``python -m runtimes.vllm_guard MODEL``.

One line of JSON on standard output: vLLM's version, whose verdicts they would be, the number of layers; or an error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.vllm_guard.versions import installed_version, require_tested
from safevlm.errors import InputError, SafeVLMError

__all__ = ["found"]


def found(model: str, *, allow_untested: bool) -> dict[str, Any]:
    """Return what a server of a model would say of itself. Raises SafeVLMError for one that cannot start."""
    version = installed_version()
    if version is None:
        raise InputError(
            f"vLLM is not installed for {sys.executable}. Install it there (pip install 'safevlm-edge[vllm]'), or name "
            "its interpreter with --python."
        )
    require_tested(version, allow_untested=allow_untested)
    from runtimes.vllm_guard.head import ExactHead, read_config

    folder = Path(model)
    head = ExactHead.read(folder)
    text = read_config(folder).get("text_config")
    layers = text.get("num_hidden_layers") if isinstance(text, dict) else None
    if type(layers) is not int or layers < 1:
        raise InputError(f"{folder}/config.json states no text_config.num_hidden_layers. Write it with export.hf.")
    return {"vllm": version, "head": head.sha256, "classes": list(head.classes), "layers": layers}


if __name__ == "__main__":
    try:
        stated = found(sys.argv[1], allow_untested="--allow-untested-vllm" in sys.argv[2:])
    except SafeVLMError as error:
        stated = {"error": str(error)}
    sys.stdout.write(json.dumps(stated) + "\n")
