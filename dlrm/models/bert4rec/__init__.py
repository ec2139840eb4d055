"""BERT4Rec: its options, ratings and sequences, architecture, ranking metrics. Ends in spec.py.

In: options and a file of ratings. Out: what the trainer calls.
"""
