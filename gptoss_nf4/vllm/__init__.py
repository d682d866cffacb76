"""Everything that imports vLLM: the plugin (register, config, linear, moe, loading) and what drives vLLM (generate, serve)."""
