"""Amounts as people write them: 8.03B parameters, 15T tokens, 24 GB, 21,504 device-hours."""

from puna.model.sizes import LlamaConfig


def count(value: float) -> str:
    """1.3T, 330B, 8.2M, 512."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}" if value < 999.5 * limit else f"{value / limit:,.0f}{unit}"
    return f"{value:,.0f}"


def parameters(config: LlamaConfig) -> str:
    return count(config.parameters)


def bytes_(value: float) -> str:
    """24 GB, 815 MB; decimal."""
    for limit, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= 0.9995 * limit:
            return f"{value / limit:,.3g} {unit}"
    return f"{value / 1e3:.3g} KB"


def hours(value: float) -> str:
    """Device-hours."""
    return f"{value:,.0f} device-hours" if value >= 10 else f"{value:.2g} device-hours"


def seconds(value: float) -> str:
    """A span: 3.2 years, 14 days, 2.5 hours, 41 s, 12 ms."""
    for limit, unit in ((365 * 86_400, "years"), (86_400, "days"), (3600, "hours"), (60, "minutes")):
        if value >= 1.5 * limit:
            return f"{value / limit:,.3g} {unit}" if value < 1000 * limit else f"{value / limit:,.0f} {unit}"
    return f"{value:.3g} s" if value >= 0.1 else f"{value * 1e3:.3g} ms"


def flops(value: float) -> str:
    return f"{value:.2e} FLOPs"


def money(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"
