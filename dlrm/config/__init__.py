"""Options as frozen dataclasses: from a command line to checked values, and from them to RUN/config.json.

In: argv and presets. Out: an instance of a model's options. Which options a model has is the model's own.
"""
