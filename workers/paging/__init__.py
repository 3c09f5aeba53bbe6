"""Reading experts into slots: pager, loader, threads, checksums."""
