"""What a machine has that Safe-VLM Edge needs: libraries, GPUs, room. Nothing heavy is imported to find out."""
