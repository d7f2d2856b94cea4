"""Utilities shared by all packages: errors, files, caches, processes, devices, the console."""
