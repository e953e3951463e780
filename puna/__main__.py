"""`python -m puna`: the command where its script is not on the path."""

import sys

from puna.cli import main

sys.exit(main())
