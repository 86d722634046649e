"""Injecting faults into real runs: kills, failing calls, power failures."""
