"""``python -m trainfix`` is the command ``trainfix``."""

import sys

from trainfix.cli import main

sys.exit(main())
