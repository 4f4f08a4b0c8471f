"""Format numbers, times and dates for messages and pages."""

from datetime import datetime


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def percent(share: float | None, digits: int = 1) -> str:
    """Write a fraction as a percentage; a dash where there is none."""
    return "–" if share is None else f"{share:.{digits}%}"


def number(value: float, digits: str = "") -> str:
    """Write a number with thousands separators; `digits` is a format such as ".1f"."""
    return f"{value:,{digits}}"


def loss(value: float) -> str:
    """Write a loss with three significant digits: 0.164, 2.00, 12,345."""
    return f"{value:#.3g}".rstrip(".") if abs(value) < 999.5 else f"{value:,.0f}"


def rate(value: float) -> str:
    """Write a learning rate, or another small or large number, as people do: 2e-4, 1.5e-5, 0."""
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def duration(seconds: float) -> str:
    """Write a time: 42 s, 5.2 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes // 60:,.0f} h {minutes % 60:.0f} min"


def date(moment: str) -> str:
    """Write an ISO time as people do: 21 November 2026, 23:19."""
    try:
        read = datetime.fromisoformat(moment)
    except ValueError:
        return moment
    return f"{read.day} {read:%B %Y, %H:%M}"
