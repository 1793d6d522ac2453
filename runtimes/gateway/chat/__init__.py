"""Chat requests, typed: what they hold, and what is written upstream from them."""
