"""``python -m semipd``."""

import sys

from semipd.cli import main

sys.exit(main())
