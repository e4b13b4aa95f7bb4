"""``python -m wholegrad``, for where the script is not on the path."""

import sys

from wholegrad.cli import main

sys.exit(main())
