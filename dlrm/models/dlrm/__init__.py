"""DLRM: its options, presets, architecture, interactions, data loaders, sharding. Ends in spec.py.

In: options and a Criteo-like dataset. Out: what the trainer calls.
"""
