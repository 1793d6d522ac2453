"""Records of speed as one page."""
