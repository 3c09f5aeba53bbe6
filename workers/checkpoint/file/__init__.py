"""The structure of a GGUF file: header, metadata, names, parts of a split file."""
