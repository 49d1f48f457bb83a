"""Rewards on another machine: server, client and the wire between them."""
