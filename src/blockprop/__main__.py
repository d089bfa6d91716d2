"""`python -m blockprop`."""

import sys

from blockprop.cli import main

sys.exit(main())
