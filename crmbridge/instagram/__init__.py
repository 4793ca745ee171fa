"""Meta's shapes, signatures, calls and errors. Meta's words are spoken in this room alone."""
