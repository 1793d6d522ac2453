"""What is agreed between parts: manifests, preprocessing, class names. Light enough for a device."""
