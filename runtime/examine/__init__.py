"""What a file's header tells: description, check, groups of tensors, forecast."""
