"""The engine for NPUs: MindSpeed-LLM, launched and watched."""
