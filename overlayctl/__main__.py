"""``python -m overlayctl``."""

import sys

from overlayctl.cli import main

sys.exit(main())
