"""One short file per sampling task."""
