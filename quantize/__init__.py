"""GPTQ and INT8: number grids, packing and on-disk formats."""
