"""Tables of what a trace says: one `Part` per rank (read.py, calls.py, times.py), joined in gather.py,
finished in answers.py. A part is small and needs no other rank, so ranks may be read anywhere."""
