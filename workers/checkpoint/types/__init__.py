"""The tensor types of files, and how each is decoded."""
