"""Reading what others measured as run records: HoliSafe's prediction files, lmms-eval's per-sample logs."""
