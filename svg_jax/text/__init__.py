"""From prompts to tokens: the preparation of prompts by each family, and tokenizer files."""
