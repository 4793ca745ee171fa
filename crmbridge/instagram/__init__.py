"""Every fact about Meta: shapes, signatures, calls, errors. Meta's words are spoken in this room alone."""
