"""What every command shares: how it reads, prints and ends."""
