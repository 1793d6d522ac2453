"""Two runs compared, paired by sample."""
