"""One runner a runtime, reading a bundle, and judging images with it."""

from safevlm.imports.siblings import join

join(__name__)
