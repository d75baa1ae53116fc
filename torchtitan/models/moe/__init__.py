"""Mixture of experts: router, experts, and the block that joins them."""
