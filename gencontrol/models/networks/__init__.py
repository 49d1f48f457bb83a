"""Backbones: transformers, U-Nets, small convolutional networks, the codec."""
