"""What runs within vLLM, in its own environment: its folder alone is put on vLLM's path, so its files import nothing of ours."""
