"""Starting, watching and ending processes: the fork server, its supervisor, kernels made ready."""
