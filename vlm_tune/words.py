"""How messages write what they count."""


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
