"""What models cost: parameters, memory and speed, here and served by vLLM."""
