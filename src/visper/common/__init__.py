"""What every package may use: errors, files, caches, processes, devices, the console."""
