"""What is printed of runs that train as processes."""

from rich.console import Console


def print_plain(console: Console, text: str) -> None:
    """Print text as it is: names may hold what rich takes for markup, logs are wider than lines.

    Args:
        console: Where to.
        text: Of one line or several.
    """
    console.print(text, markup=False, soft_wrap=True)
