"""Agents: policies trained from recorded episodes (behaviour cloning of diffusion and flow policies)."""
