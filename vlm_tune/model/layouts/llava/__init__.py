"""The layouts of LLaVA: llava-hf and haotian-liu's own."""
