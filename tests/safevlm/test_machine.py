from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safevlm.errors import BusyError, InputError, SafeVLMError
from safevlm.machine import memory_advice, memory_problem

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


FULL_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free.")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL_GPU, "The GPU's memory is full: 2.00 GiB more were needed."),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "The GPU's memory is full."),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "The GPU's memory is full.",
        ),
        (MemoryError(), "There is not enough memory for this."),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (ValueError("memory"), None),
    ],
)
def test_memory_that_ran_out_is_told_from_a_bug(error: Exception, said: str | None) -> None:
    assert memory_problem(error) == said
    with pytest.raises(BusyError if said else type(error)) as caught, memory_advice("Wait.", BusyError):
        raise error
    assert str(caught.value) == (f"{said} Wait." if said else str(error))


def test_the_cpu_s_own_allocator_is_understood() -> None:
    with (
        pytest.raises(InputError, match=r"There is not enough memory for this\. Take less\."),
        memory_advice("Take less."),
    ):
        torch.empty(2**52)


def test_an_error_of_ours_passes_as_it_is() -> None:
    with pytest.raises(SafeVLMError, match=r"^out of memory$"), memory_advice("Take less."):
        raise SafeVLMError("out of memory")
