"""The command `manta`."""


def main() -> None:
    """Entry point."""
