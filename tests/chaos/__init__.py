"""Runs in which the bridge is killed at random moments under load, and proofs over what both far sides then saw."""
