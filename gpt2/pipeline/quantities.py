"""Quantities in words, with as many digits as an estimate deserves."""


def show_time(seconds: float | None) -> str:
    """A duration in words, two digits or more: 46 h."""
    if seconds is None:
        return "unknown"
    if seconds < 0.1:
        return "< 0.1 s"
    units = ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((pair for pair in units if seconds >= 2 * pair[0]), units[-1])
    return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"


def show_size(n_bytes: float) -> str:
    """Bytes of a disk in decimal units: 1.5 GB."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size, unit = next((pair for pair in units if n_bytes >= pair[0]), units[-1])
    return f"{n_bytes / size:,.{1 if n_bytes < 100 * size else 0}f} {unit}"


def show_count(number: float) -> str:
    """A number in words: 4.0 million."""
    units = ((1e9, " billion"), (1e6, " million"), (1, ""))
    size, unit = next((pair for pair in units if number >= pair[0]), units[-1])
    return f"{number / size:,.{1 if unit else 0}f}{unit}"


def show_rate(flops: float) -> str:
    """Operations per second in words: 396 TFLOP/s."""
    return f"{flops / 1e12:.0f} TFLOP/s" if flops >= 1e13 else f"{flops / 1e9:,.0f} GFLOP/s"
