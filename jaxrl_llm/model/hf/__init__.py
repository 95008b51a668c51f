"""Hugging Face model directories: config.json and safetensors are read and written. No code in them is ever run."""
