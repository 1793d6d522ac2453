"""A language model run decoder layer by decoder layer."""
