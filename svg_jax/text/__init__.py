"""Prompts to tokens: what each family does to a prompt, and tokenizer files of every form."""
