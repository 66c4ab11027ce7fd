"""Measuring plans: clock, workloads, accuracy gate, race, tuner."""
