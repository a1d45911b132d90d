"""From files to training samples: sources, tokenizer, token store, sampler. Never imports torch."""
