"""Bad input: one line that names the folder or file and what to do about it."""

USAGE = 2


class AnalysisError(Exception):
    """Ends the command with exit code 2 and its text as one line on stderr."""
