"""The language model behind a gateway: a server by its URL, or a model in this process."""
