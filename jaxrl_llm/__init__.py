"""jaxrl_llm: reinforcement learning of language models, native to JAX and TPUs. Begin reading at `train.py`."""
