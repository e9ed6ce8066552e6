"""Text in, blocks of tokens out: where a domain comes from, how it is split, and how it is packed."""
