"""Jobs: one file per thing that a user asks for; a typed configuration in, a result out.

The command line calls these and does nothing else.
"""
