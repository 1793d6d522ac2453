"""Reading what others measured as run records: HoliSafe's prediction files, logs of evaluation libraries, tables."""
