"""Demonstrations: scripted experts and their recording."""
