"""What a GPU machine can prove of this project within minutes, step by step."""
