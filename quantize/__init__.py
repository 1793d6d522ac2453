"""GPTQ and INT8: number grids, packing and on-disk formats."""

from safevlm.imports.siblings import join

join(__name__)
