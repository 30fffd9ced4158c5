"""The bundled model: a small causal language model that stores real-world facts, and the programs that made it."""
