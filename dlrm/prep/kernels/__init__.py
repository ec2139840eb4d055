"""The compiled inner loops: fields, counts, hexadecimal ids, vocabularies.

In: bytes of text or arrays. Out: arrays; nothing else is written.
"""
