"""Everything that imports vLLM: the plugin (from register.py on), and what drives vLLM (generate.py, serve.py)."""
