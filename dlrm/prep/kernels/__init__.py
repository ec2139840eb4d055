"""The compiled inner loops: fields, counts, hexadecimal ids, vocabularies. They write nothing but their arrays.

In: bytes of text or arrays. Out: arrays.
"""
