"""Numbers with units, for people."""


def seconds(value_s: float) -> str:
    """Seconds with three digits, or milliseconds below one second."""
    if 0 < value_s < 1:
        return f"{value_s * 1000:.3g} ms" if value_s < 0.1 else f"{value_s * 1000:.0f} ms"
    return f"{value_s:.2f} s" if value_s < 10 else f"{value_s:.1f} s"


def gib(value_bytes: float) -> str:
    """Gibibytes with one digit behind the point."""
    return f"{value_bytes / 2**30:.1f} GiB"


def ranks_text(written: str) -> str:
    """Ranks as the plan writes them, with the word before them."""
    return f"rank{'' if written.isdigit() else 's'} {written}"
