"""Words of messages and reports."""


def format_number(n: int, of: str) -> str:
    """1 row, 2,000 rows."""
    return f"{n:,} {of}{'' if n == 1 else 's'}"
