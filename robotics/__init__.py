"""Robot environments, data sets, policies and their evaluation; version 0.1 holds none of them yet."""
