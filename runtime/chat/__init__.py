"""Chat templates: parsed and rendered in a process of their own, under limits."""
