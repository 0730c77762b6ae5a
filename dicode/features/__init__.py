"""Networks that measure frames, and distances between their features."""
