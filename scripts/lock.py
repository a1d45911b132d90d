"""Writes constraints.txt: the exact versions of everything installed, but for torch, which `make setup` pins.

Run it with `make lock` after changing a dependency in pyproject.toml.
"""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

LEFT_OUT = {"torch", "musterllm", "pip", "setuptools", "wheel"}


def main() -> None:
    pins = {
        distribution.metadata["Name"].lower().replace("_", "-"): distribution.version
        for distribution in distributions()
    }
    lines = [f"{name}=={version}" for name, version in sorted(pins.items()) if name not in LEFT_OUT]
    target = Path(__file__).parent.parent / "constraints.txt"
    target.write_text("# Written by `make lock`; the versions that CI installs.\n" + "\n".join(lines) + "\n")
    print(f"{target.name}: {len(lines)} packages")


if __name__ == "__main__":
    main()
