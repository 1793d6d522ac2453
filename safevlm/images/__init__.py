"""From an image file to the images that its readers show. Light enough for a device."""
