"""The report of a comparison: one HTML page, with JSON, Markdown and JUnit XML beside it."""
