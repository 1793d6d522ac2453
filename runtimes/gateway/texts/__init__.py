"""Images that hide in text."""
