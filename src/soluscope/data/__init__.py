"""From text to tokens: sources of documents, the tokenizer, and the cache that training reads."""
