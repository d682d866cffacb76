"""Whether a field of a JSON file switches something off."""


def is_off(value: object) -> bool:
    """Whether `value` is null, false or empty. 0 is a number, not a switch."""
    return value is None or value is False or value in ("", [], {})
