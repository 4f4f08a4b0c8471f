"""The layouts of InternVL: transformers' own and the original, with the parts that the original includes."""
