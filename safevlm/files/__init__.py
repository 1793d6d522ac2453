"""Files that are read and written so that no crash, link or odd content does harm."""
