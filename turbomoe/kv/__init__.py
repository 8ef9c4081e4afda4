"""The memory of sequences: codecs, exact windows, pages of codes, and attention over them."""
