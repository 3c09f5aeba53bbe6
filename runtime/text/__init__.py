"""Text to tokens and back: vocabularies, pre-tokenizers, tokenizer, detokenizer."""
