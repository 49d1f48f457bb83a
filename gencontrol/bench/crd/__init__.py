"""`gencontrol bench crd`: claims, worlds, peers and tables of centred reward distillation."""
