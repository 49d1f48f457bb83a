"""Kernels behind one dispatch each; a plain reference is the specification of every one."""
