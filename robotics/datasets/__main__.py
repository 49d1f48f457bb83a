"""`python -m gencontrol.robotics.datasets SRC DST --format F` converts a data set."""

import sys

from gencontrol.robotics.datasets.convert import main

sys.exit(main())
