"""The steps of preprocessing, one file each: unpack, parse, permute, assign ids, place rows.

In: a plan and the files of the step before. Out: files of this step, each named once it is whole.
"""
