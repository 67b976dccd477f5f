"""Durations and sizes as text, with as many digits as an estimate deserves."""


def show_time(seconds: float) -> str:
    """A duration with two digits or more: 46 h."""
    if seconds < 0.1:
        return "< 0.1 s"
    units = ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min"), (1, "s"))
    size, unit = next((pair for pair in units if seconds >= 2 * pair[0]), units[-1])
    return f"{seconds / size:,.{1 if seconds < 10 * size else 0}f} {unit}"


def show_size(n_bytes: float) -> str:
    """Bytes in decimal units: 1.5 GB."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    size, unit = next((pair for pair in units if n_bytes >= pair[0]), units[-1])
    return f"{n_bytes / size:,.{1 if n_bytes < 100 * size else 0}f} {unit}"
