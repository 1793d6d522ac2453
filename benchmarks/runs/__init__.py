"""Run records: written, resumed, imported."""
