"""The stages of a run: tokenizer, encoding, prior, bundle. Each resumes from what is in its
folder."""
