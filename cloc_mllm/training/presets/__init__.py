"""What a preset may say, what it resolves to, and which parts of a model it trains."""
