"""Python programs in a process of their own."""

from __future__ import annotations

import os
import sys


def elsewhere() -> dict[str, str]:
    """The environment of a program that starts in another folder and imports what this process would.

    In the checkout itself the folder semipd/, which has no compiled module, would go before the installed package.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
