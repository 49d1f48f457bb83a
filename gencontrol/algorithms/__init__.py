"""Methods: a data rule and a loss each (`base.Algorithm`); look them up with `gencontrol.registry.ALGORITHMS`."""
