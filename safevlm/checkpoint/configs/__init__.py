"""A checkpoint's settings, in the meaning of the release that wrote them."""
