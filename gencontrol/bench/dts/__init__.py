"""`gencontrol bench dts`: claims of Diffusion Tree Sampling and Search against peers at equal model calls."""
