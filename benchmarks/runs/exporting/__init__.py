"""Run records in the forms that other tools read: inspect_ai's logs, Parquet tables."""
