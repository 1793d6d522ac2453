"""What ``benchmarks.real_checkpoint`` calls its files; no torch is loaded here."""

__all__ = ["ABOUT", "CALIBRATION", "CHECKPOINT", "HELD_OUT", "LANGUAGE_MODEL"]

CHECKPOINT, LANGUAGE_MODEL = "checkpoint", "language_model"
CALIBRATION, HELD_OUT, ABOUT = "calibration.jsonl", "held_out.txt", "about.json"
