"""How a config says that a value is not allowed."""


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError naming the field, its value and what is allowed, unless `condition` holds."""
    if not condition:
        raise ValueError(f"{name} = {value!r}, allowed: {allowed}")
