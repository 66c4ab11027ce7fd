"""Packaged workloads: the convolutions of real networks and of classic image filtering, as YAML."""
