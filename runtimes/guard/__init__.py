"""Guard bundles and the runners that judge images with them."""
