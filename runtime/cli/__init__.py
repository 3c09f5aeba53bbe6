"""The command line: options, progress, rendering, signals; the commands are in `commands/`."""
