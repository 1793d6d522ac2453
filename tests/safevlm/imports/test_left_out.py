"""What nobody uses is not loaded, and stays importable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from safevlm.imports.left_out import left_out

ROOT = Path(__file__).parents[3]


def test_packages_seem_absent_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with left_out("colorsys", "json"):
        with pytest.raises(ModuleNotFoundError):
            import colorsys
        import json
    import colorsys

    assert json.dumps(1) == "1", "what is loaded stays"
    assert colorsys.rgb_to_hsv(0, 0, 0) == (0, 0, 0)


@pytest.mark.parametrize("before", ["", "import transformers; "])
def test_quantizing_loads_neither_sklearn_nor_pandas_and_they_can_be_loaded_afterwards(before: str) -> None:
    code = before + (
        "import quantize.gptq, sys; print({'sklearn', 'pandas', 'pyarrow'} & {*sys.modules}); "
        "from sklearn.metrics import roc_curve; from scipy.optimize import linear_sum_assignment"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600)
    assert done.stdout == "set()\n"
