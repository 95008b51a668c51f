"""Hugging Face directories: config.json and safetensors in, the same out. Nothing of them is ever run."""
