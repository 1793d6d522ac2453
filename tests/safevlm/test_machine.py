from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Freed blocks of growing size between small ones that stay: what tensors of many sizes do to a heap.
HOLES = """
import sys
import numpy as np
from safevlm.machine import return_freed_memory

def held():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS:"))
    return int(line.split()[1]) // 1024

if sys.argv[1] == "returned":
    assert return_freed_memory()
before, pins = held(), []
np.ones(30 * 2**20, np.uint8)  # from here on glibc keeps what is smaller
for mib in (5, 9, 13, 17, 21, 25):
    blocks = [np.ones(mib * 2**20, np.uint8) for _ in range(4)]
    pins += [np.ones(100_000, np.uint8)]
    blocks.clear()
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_goes_back_to_the_system() -> None:
    def left(how: str) -> int:
        command = [sys.executable, "-c", HOLES, how]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=600).stdout)

    assert left("returned") < 5 < 20 < left("kept")
