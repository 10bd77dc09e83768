"""Machines: meshes and how arrays lie on them, processes, topologies, kernels."""
