"""Reading model files: GGUF structure, tensor types, tensor names."""
